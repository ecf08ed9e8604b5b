"""Words in memory that threads wait at, in compiled code.

A wait is far shorter than a thread's sleep and waking: it spins.  Where it lasts, because another process has the other
CPU, it offers its own CPU to whoever can run, again and again.
"""

import functools
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurnn.executors import cache
from gpurnn.executors.simd import I64, host

CACHE_LINE = 128  # bytes: two of them, where processors fetch lines in pairs
SPINS = 1000  # before the CPU is offered: some ten microseconds

yield_cpu = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _arrive(typing, address):
    """One more has arrived; how many have."""

    def codegen(context, builder, signature, args):
        before = builder.atomic_rmw("add", _pointer(builder, args[0]), I64(1), "acq_rel")
        return builder.add(before, I64(1))

    return types.intp(types.intp), codegen


@intrinsic
def seen(typing, address):
    """The word as it is now, and with it all that was written before it was."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def show(typing, address, value):
    """Writes the word, for others to see what was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


@intrinsic
def swapped(typing, address, old, new):
    """1, and the word is now `new`, if it was `old`; else 0."""

    def codegen(context, builder, signature, args):
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "acq_rel", "acquire")
        return builder.zext(builder.extract_value(pair, 1), I64)

    return types.intp(types.intp, types.intp, types.intp), codegen


@intrinsic
def _relax(typing):
    """What a processor wants to be told in a loop that waits."""

    def codegen(context, builder, signature, args):
        if host().x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@functools.cache
def make_pause():
    """pause(turn): what stands in a loop that waits, `turn` its number."""

    def pause(turn):
        if turn % SPINS == 0:
            yield_cpu()
        else:
            _relax()

    return cache.external(pause, host())


@functools.cache
def make_meet():
    """meet(barrier, arrivals): waits until `arrivals` threads in all have come, its own coming being one; for 1, nothing."""
    pause = make_pause()

    def meet(barrier, arrivals):
        if arrivals == 1 or _arrive(barrier) >= arrivals:
            return
        turn = 1
        while seen(barrier) < arrivals:
            pause(turn)
            turn += 1

    return cache.external(meet, host())
