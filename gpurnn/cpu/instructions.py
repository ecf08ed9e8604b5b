"""What compiled code says in LLVM's words and not in Python's: whole numbers, words in memory, cases."""

from collections.abc import Callable, Mapping
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurnn.cpu.simd import I64


def instruction(emit: Callable) -> Any:
    """`emit(builder, *numbers)`, of whole numbers, as a function for compiled code: what it emits stands where it is called."""

    @intrinsic
    def instruction(typing, *numbers):
        def codegen(context, builder, signature, args):
            emit(builder, *cgutils.unpack_tuple(builder, args[0]))
            return context.get_dummy_value()

        return types.void(types.StarArgTuple([types.intp] * len(numbers))), codegen

    return instruction


def whole(emit: Callable) -> Any:
    """An `instruction` that gives a whole number."""

    @intrinsic
    def whole(typing, *numbers):
        def codegen(context, builder, signature, args):
            return emit(builder, *cgutils.unpack_tuple(builder, args[0]))

        return types.intp(types.StarArgTuple([types.intp] * len(numbers))), codegen

    return whole


def pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    """To an int64."""
    return builder.inttoptr(address, I64.as_pointer())


@whole
def least(builder, a, b):
    """The smaller of two whole numbers.  Numba compiles its `min` anew for every function that uses it."""
    return builder.select(builder.icmp_signed("<", a, b), a, b)


@whole
def word(builder, address):
    """The int64 that stands there."""
    return builder.load(pointer(builder, address))


@instruction
def put(builder, address, value):
    """Writes an int64 there."""
    builder.store(value, pointer(builder, address))


def words(count: int):
    """read(address): a tuple of the `count` int64 that stand there."""

    @intrinsic
    def read(typing, address):
        result = types.UniTuple(types.int64, count)

        def codegen(context, builder, signature, args):
            first = builder.inttoptr(args[0], I64.as_pointer())
            values = [builder.load(builder.gep(first, [I64(k)])) for k in range(count)]
            return context.make_tuple(builder, result, values)

        return result(types.intp), codegen

    return read


def branch(builder: ir.IRBuilder, which: ir.Value, cases: Mapping[int, Callable[[], None]]) -> None:
    """Emits every case; the one whose number `which` is runs, or none."""
    after = builder.append_basic_block("after")
    branches = builder.switch(which, after)
    for number, emit in cases.items():
        block = builder.append_basic_block(f"case{number}")
        branches.add_case(I64(number), block)
        builder.position_at_end(block)
        emit()
        builder.branch(after)
    builder.position_at_end(after)
