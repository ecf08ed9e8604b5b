"""A cell's random numbers in SIMD: the lines of `kernels.deviates` on vectors of units."""

from collections.abc import Callable

from llvmlite import ir

from gpurnn.cells.trace import Random
from gpurnn.cpu.instructions import pointer
from gpurnn.cpu.simd import I32, I64, Emitter
from gpurnn.executors.random import HEAD
from gpurnn.kernels import deviates, lanes
from gpurnn.kernels.lanes import Lanes


def values(
    b: ir.IRBuilder, numbers: ir.Value, t: ir.Value, row: ir.Value, unit: ir.Value
) -> Callable[[Emitter, ir.Value], Callable[[Random], ir.Value]]:
    """For each vector of units of a batch row at step t, what gives its random numbers.

    numbers: the address of `Draws.numbers`; row, unit: the engine's row, and the unit where a vector's offset is 0.
    """

    def number(place: ir.Value) -> ir.Value:
        return b.load(pointer(b, b.add(numbers, b.mul(place, I64(8)))))

    low, high, call = (number(I64(k)) for k in range(HEAD))
    wide = low, b.add(high, b.lshr(call, I64(32))), call, number(b.add(row, I64(HEAD))), t
    fixed = [b.trunc(value, I32) for value in wide]

    def of_vector(emit: Emitter, offset: ir.Value) -> Callable[[Random], ir.Value]:
        low, high, call, own_row, step = (Lanes(b, emit.splat(value)) for value in fixed)
        counted = ir.Constant(ir.VectorType(I32, emit.width), list(range(emit.width)))
        first = b.trunc(b.add(unit, b.sdiv(offset, I64(emit.dtype.itemsize))), I32)
        units, known = Lanes(b, emit.splat(first)) + Lanes(b, counted), {}

        def value(random: Random) -> ir.Value:
            block, which = divmod(random.number, deviates.EACH)
            if (random.per, block) not in known:
                at = low.like(emit.splat(I32(deviates.SEQUENCE))) if random.per == "sequence" else step
                known[random.per, block] = lanes.words((low, high), call, own_row, at, units, block)
            word = known[random.per, block][which]
            return lanes.deviate(random, word, emit.constant(1), emit.constant(0))

        return value

    return of_vector
