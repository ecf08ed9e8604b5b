"""Inline PTX for Numba kernels: a table, one row per instruction; and code that is written out, not unrolled.

Global addresses are uint64 (`global_address`), shared ones uint32 (`shared_address`); a `b16` pair travels in a uint32.
Semantics: NVIDIA's PTX ISA.  What Numba expresses itself (scalar loads and stores, barriers, shuffles) stays Numba's.
"""

import inspect
from typing import Any

from llvmlite import ir

from .numba_cuda import cgutils, intrinsic, signature, types

f32, f64, u32, u64 = types.float32, types.float64, types.uint32, types.uint64
GLOBAL, SHARED = 1, 3
CONSTRAINT = {f32: "f", f64: "d", u32: "r", u64: "l"}
LLVM = {f32: ir.FloatType(), f64: ir.DoubleType(), u32: ir.IntType(32), u64: ir.IntType(64)}


class Instruction:
    """One PTX instruction: `$0, $1, ...` stand for the results, then for the operands.

    results   a tuple of types.
    pure      it neither reads nor writes memory, so equal calls may become one.
    tied      the first `tied` operands live in the registers of the first results.
    A warp-wide instruction (`.sync`, `.aligned`) is convergent: LLVM may not put it under another condition.
    """

    def __init__(self, text, results, operands, pure, tied):
        self.text, self.results, self.operands, self.pure = text, results, operands, pure
        constraints = ["=" + CONSTRAINT[t] for t in results] + [str(k) for k in range(tied)]
        self.constraints = ",".join(
            constraints + [CONSTRAINT[t] for t in operands[tied:]] + ([] if pure else ["~{memory}"])
        )
        kinds = [LLVM[t] for t in results]
        answer = ir.VoidType() if not kinds else kinds[0] if len(kinds) == 1 else ir.LiteralStructType(kinds)
        self.kind = ir.FunctionType(answer, [LLVM[t] for t in operands])
        self.attributes = ("convergent",) if ".sync" in text or ".aligned" in text else ()

    def emit(self, builder, *operands):
        """Writes it; a list of LLVM values, one a result."""
        body = ir.InlineAsm(self.kind, self.text, self.constraints, side_effect=not self.pure)
        value = builder.call(body, operands, attrs=self.attributes)
        if len(self.results) < 2:
            return [value] * len(self.results)
        return [builder.extract_value(value, k) for k in range(len(self.results))]


def instruction(name, text, results, operands, *, pure=False, tied=0):
    """An intrinsic for kernels: one result is returned as itself, several as a tuple.  `.emit`: see Instruction."""
    written = Instruction(text, results, operands, pure, tied)
    answer = (
        types.none if not results else results[0] if len(results) == 1 else types.UniTuple(results[0], len(results))
    )

    def codegen(context, builder, sig, args):
        values = written.emit(builder, *args)
        if len(values) > 1:
            return context.make_tuple(builder, sig.return_type, values)
        return values[0] if values else context.get_dummy_value()

    made = intrinsic(_of_arity(lambda context, *given: (signature(answer, *operands), codegen), name, len(operands)))
    made.emit = written.emit
    return made


class Local:
    """A local array in code that is written out: elements by constant index, so that they become registers."""

    def __init__(self, builder, data):
        self.builder, self.data = builder, data

    def __getitem__(self, k: int) -> Any:
        return self.builder.load(self.builder.gep(self.data, [ir.IntType(64)(k)]))

    def __setitem__(self, k: int, value: Any) -> None:
        self.builder.store(value, self.builder.gep(self.data, [ir.IntType(64)(k)]))


def written_out(write):
    """An intrinsic whose code `write(builder, ...)` lays down line by line, with Python's loops.

    Arrays arrive as `Local`, numbers as LLVM values; nothing is returned.  LLVM unrolls loops only up to a size, and an
    array whose index is not a constant in the end is memory, not registers: what must be registers is written out.
    """

    def typer(context, *given):
        def codegen(context, builder, sig, args):
            values = [
                Local(builder, context.make_array(kind)(context, builder, value=value).data)
                if isinstance(kind, types.Array)
                else value
                for kind, value in zip(sig.args, args, strict=True)
            ]
            write(builder, *values)
            return context.get_dummy_value()

        return signature(types.none, *given), codegen

    return intrinsic(_of_arity(typer, write.__name__, write.__code__.co_argcount - 1))


def multiply_add(builder, a, b, c):
    """a*b + c in float32, rounded once."""
    kind = ir.FunctionType(LLVM[f32], [LLVM[f32]] * 3)
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), [a, b, c])


def _of_arity(typer, name, count):
    """`typer` with a name and a signature of `count` arguments behind the context, as Numba reads it."""
    kind = inspect.Parameter.POSITIONAL_ONLY
    names = ["context", *(f"a{k}" for k in range(count))]
    typer.__name__ = typer.__qualname__ = name
    typer.__signature__ = inspect.Signature([inspect.Parameter(each, kind) for each in names])
    return typer


def _pointer(context, builder, kind, array, index):
    data = array if isinstance(kind, types.CPointer) else context.make_array(kind)(context, builder, value=array).data
    return builder.gep(data, [index])


def _in_space(pointer, space):
    """The pointer's type in an address space: global accesses are faster than those that might be of any space."""
    return ir.PointerType(addrspace=space) if pointer.type.is_opaque else pointer.type.pointee.as_pointer(space)


@intrinsic
def global_address(context, array, index):
    """The address of element `index`, counted flat, of a pointer or a contiguous array."""

    def codegen(context, builder, sig, args):
        return builder.ptrtoint(_pointer(context, builder, sig.args[0], *args), LLVM[u64])

    return u64(array, types.int64), codegen


@intrinsic
def advance(context, pointer, count):
    """The pointer `count` elements on: what all threads share is added once, and each thread adds a small offset.

    LLVM would add the two counts first, for every access: it does not see through this.
    """

    def codegen(context, builder, sig, args):
        pointer = builder.gep(args[0], [args[1]])
        kind = ir.FunctionType(LLVM[u64], [LLVM[u64]])
        same = ir.InlineAsm(kind, "mov.u64 $0, $1;", "=l,l", side_effect=False)
        address = builder.call(same, [builder.ptrtoint(pointer, LLVM[u64])])
        return builder.addrspacecast(builder.inttoptr(address, _in_space(pointer, GLOBAL)), pointer.type)

    return pointer(pointer, types.int64), codegen


@intrinsic
def shared_address(context, array, index):
    """The address of element `index` of a shared array, in the window of shared memory."""

    def codegen(context, builder, sig, args):
        pointer = _pointer(context, builder, sig.args[0], *args)
        return builder.ptrtoint(builder.addrspacecast(pointer, _in_space(pointer, SHARED)), LLVM[u32])

    return u32(array, types.int64), codegen


def _mma(name, shape, kind):
    """D = A B + D for one warp; D in the registers of the results, then A (four) and B (two)."""
    d, a, b = "{$0,$1,$2,$3}", "{$8,$9,$10,$11}", "{$12,$13}"
    text = f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {d}, {a}, {b}, {d};"
    return instruction(name, text, (f32,) * 4, (f32,) * 4 + (u32,) * 6, pure=True, tied=4)


mma_bf16 = _mma("mma_bf16", "m16n8k16", "bf16")
mma_f16 = _mma("mma_f16", "m16n8k16", "f16")
mma_tf32 = _mma("mma_tf32", "m16n8k8", "tf32")

load_global_4f = instruction("load_global_4f", "ld.global.v4.f32 {$0,$1,$2,$3}, [$4];", (f32,) * 4, (u64,))
load_global_4u = instruction("load_global_4u", "ld.global.v4.u32 {$0,$1,$2,$3}, [$4];", (u32,) * 4, (u64,))
load_shared_u = instruction("load_shared_u", "ld.shared.u32 $0, [$1];", (u32,), (u32,))
load_shared_2f = instruction("load_shared_2f", "ld.shared.v2.f32 {$0,$1}, [$2];", (f32,) * 2, (u32,))
load_shared_4f = instruction("load_shared_4f", "ld.shared.v4.f32 {$0,$1,$2,$3}, [$4];", (f32,) * 4, (u32,))
load_shared_4u = instruction("load_shared_4u", "ld.shared.v4.u32 {$0,$1,$2,$3}, [$4];", (u32,) * 4, (u32,))

store_global_u = instruction("store_global_u", "st.global.u32 [$0], $1;", (), (u64, u32))
store_shared_u = instruction("store_shared_u", "st.shared.u32 [$0], $1;", (), (u32, u32))
store_shared_2f = instruction("store_shared_2f", "st.shared.v2.f32 [$0], {$1,$2};", (), (u32,) + (f32,) * 2)
store_shared_4f = instruction("store_shared_4f", "st.shared.v4.f32 [$0], {$1,$2,$3,$4};", (), (u32,) + (f32,) * 4)
store_shared_4u = instruction("store_shared_4u", "st.shared.v4.u32 [$0], {$1,$2,$3,$4};", (), (u32,) * 5)
shuffle = instruction("shuffle", "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;", (f32,), (f32, u32))  # with lane ^ mask

larger = instruction("larger", "max.u32 $0, $1, $2;", (u32,), (u32, u32), pure=True)
early = instruction("early", "mov.u32 $0, $1;", (u32,), (u32,))  # computed here, not where it is needed
settled = instruction("settled", "add.f32 $0, $1, 0f00000000;", (f32,), (f32,))  # the value, when it has been loaded
# The value, when it has been loaded and the zero is there.
behind_zero = instruction("behind_zero", "{ .reg .f32 z; mov.b32 z, $2; add.f32 $0, $1, z; }", (f32,), (f32, u32))
pack_bf16 = instruction("pack_bf16", "cvt.rn.bf16x2.f32 $0, $1, $2;", (u32,), (f32, f32), pure=True)  # (high, low)
pack_f16 = instruction("pack_f16", "cvt.rn.f16x2.f32 $0, $1, $2;", (u32,), (f32, f32), pure=True)  # (high, low)
round_tf32 = instruction("round_tf32", "cvt.rna.tf32.f32 $0, $1;", (u32,), (f32,), pure=True)

# Between blocks, through the L2 cache; relaxed accesses of the whole device pass by the L1 caches.
load_relaxed_u = instruction("load_relaxed_u", "ld.relaxed.gpu.global.u32 $0, [$1];", (u32,), (u64,))
load_relaxed_4u = instruction(
    "load_relaxed_4u", "ld.relaxed.gpu.global.v4.u32 {$0,$1,$2,$3}, [$4];", (u32,) * 4, (u64,)
)
store_relaxed_u = instruction("store_relaxed_u", "st.relaxed.gpu.global.u32 [$0], $1;", (), (u64, u32))
add_release = instruction("add_release", "red.release.gpu.global.add.u32 [$0], $1;", (), (u64, u32))
fence = instruction("fence", "fence.acq_rel.gpu;", (), ())
acquire = instruction("acquire", "fence.acquire.gpu;", (), ())
global_timer = instruction("global_timer", "mov.u64 $0, %globaltimer;", (u64,), ())  # nanoseconds
sleep = instruction("sleep", "nanosleep.u32 $0;", (), (u32,))
raise_flag = instruction("raise_flag", "st.relaxed.cta.shared::cta.u32 [$0], 1;", (), (u32,))  # several threads may

# Between blocks of a cluster (sm_90), from one shared memory into another.  What an arrival publishes and a wait learns
# is in shared memory only, and the two fences say so: `.release` and `.acquire` on the mbarrier's own instructions
# would wait for every store to global memory, and drop all of L1.
cluster_arrive = instruction("cluster_arrive", "barrier.cluster.arrive.release.aligned;", (), ())
cluster_wait = instruction("cluster_wait", "barrier.cluster.wait.acquire.aligned;", (), ())
of_block = instruction("of_block", "mapa.shared::cluster.u32 $0, $1, $2;", (u32,), (u32, u32), pure=True)
mbarrier_init = instruction("mbarrier_init", "mbarrier.init.shared::cta.b64 [$0], $1;", (), (u32, u32))
release_shared = instruction("release_shared", "fence.release.sync_restrict::shared::cta.cluster;", (), ())
acquire_shared = instruction("acquire_shared", "fence.acquire.sync_restrict::shared::cluster.cluster;", (), ())
mbarrier_arrive = instruction(
    "mbarrier_arrive", "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [$0];", (), (u32,)
)
mbarrier_expect = instruction(
    "mbarrier_expect", "mbarrier.arrive.expect_tx.relaxed.cta.shared::cta.b64 _, [$0], $1;", (), (u32, u32)
)
mbarrier_passed = instruction(
    "mbarrier_passed",
    "{ .reg .pred p; mbarrier.try_wait.parity.relaxed.cluster.shared::cta.b64 p, [$1], $2; selp.u32 $0, 1, 0, p; }",
    (u32,),
    (u32, u32),
)
fence_mbarrier_init = instruction("fence_mbarrier_init", "fence.mbarrier_init.release.cluster;", (), ())
# Address, value, mbarrier of the block that has the address.
store_async = instruction(
    "store_async", "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [$0], $1, [$2];", (), (u32, u32, u32)
)
