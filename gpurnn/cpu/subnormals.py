"""Subnormal numbers count as zero in compiled loops, and nowhere else.

A gradient that fades over many steps ends among numbers below 1.2e-38 (float32), with which most processors calculate up
to a hundred times as slowly.  A control register of each thread says whether they count as zero.  It is set before a
thread's part of a call, and put back behind it: code that is not ours never runs with it.
"""

from llvmlite import binding, ir
from numba.core import cgutils

from gpurnn.cpu.instructions import instruction, whole
from gpurnn.cpu.simd import I32, I64, host

X86 = 1 << 15 | 1 << 6  # of MXCSR: results that are subnormal are 0, operands too
ARM = 1 << 24  # of FPCR: both


def _is_arm() -> bool:
    return binding.get_process_triple().startswith(("aarch64", "arm64"))


def _call(builder: ir.IRBuilder, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
    kind = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


def emit_flush(builder: ir.IRBuilder) -> ir.Value:
    """From now on they count as zero in this thread.  Returns the register as it was, for `emit_restore`."""
    if host().x86:
        place = cgutils.alloca_once(builder, I32)
        _call(builder, "llvm.x86.sse.stmxcsr", ir.VoidType(), place)
        before = builder.load(place)
        _set_mxcsr(builder, builder.or_(before, I32(X86)))
        return builder.zext(before, I64)
    if _is_arm():
        before = _call(builder, "llvm.aarch64.get.fpcr", I64)
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), builder.or_(before, I64(ARM)))
        return before
    return I64(0)


def emit_restore(builder: ir.IRBuilder, before: ir.Value) -> None:
    """The register is again what `emit_flush` returned, its marks of past exceptions with it."""
    if host().x86:
        _set_mxcsr(builder, builder.trunc(before, I32))
    elif _is_arm():
        _call(builder, "llvm.aarch64.set.fpcr", ir.VoidType(), before)


def _set_mxcsr(builder: ir.IRBuilder, value: ir.Value) -> None:
    place = cgutils.alloca_once(builder, I32)
    builder.store(value, place)
    _call(builder, "llvm.x86.sse.ldmxcsr", ir.VoidType(), place)


flush = whole(emit_flush)
restore = instruction(emit_restore)
