"""Weights laid out anew for the micro-kernels: in panels of `panel_columns` columns, then of one vector, row-major each.

What has to be transposed for that goes block by block, a vector of rows at a time, and a block is transposed in
registers: an element at a time costs five times as much, which for one pass over a large matrix is a tenth of the whole.
"""

import functools

import numpy as np
from llvmlite import ir

from gpurnn.cpu import cache
from gpurnn.cpu.instructions import instruction, least, word
from gpurnn.cpu.simd import I64, Emitter, host


def panel_vectors() -> int:
    """Vectors in a wide panel: with 6 rows, 24 accumulators fit 32 registers and 12 fit 16."""
    return 4 if host().registers >= 32 else 2


def panel_columns(dtype: np.dtype) -> int:
    return panel_vectors() * host().width(dtype)


def packed_size(k: int, n: int, dtype: np.dtype) -> int:
    """Elements of the packed form of a (k, n) matrix: columns padded to a whole vector."""
    width = host().width(dtype)
    return k * -(-n // width) * width


@functools.cache
def _make_turn(dtype: np.dtype):
    """turn(source, stride, rows, columns, out, out_stride, lanes): the transpose of at most width x width elements.

    Of each of its `columns` rows as many elements are written as `lanes` says, zeros behind the source's rows.
    """
    width = host().width(dtype)

    @instruction
    def move(b: ir.IRBuilder, source, stride, rows, columns, out, out_stride, lanes):
        emit = Emitter(b, dtype, width)

        def first(count, index, limit):
            return emit.first_lanes(b.select(b.icmp_signed("<", I64(index), limit), count, I64(0)))

        block = [emit.load(b.add(source, b.mul(stride, I64(r))), first(columns, r, rows)) for r in range(width)]
        for r, value in enumerate(emit.transposed(block)):
            emit.store(value, b.add(out, b.mul(out_stride, I64(r))), first(lanes, r, columns))

    def turn(source, stride, rows, columns, out, out_stride, lanes):
        move(source, stride, rows, columns, out, out_stride, lanes)

    return cache.external(turn, dtype.str, host())


@functools.cache
def make_transpose(dtype: np.dtype):
    """transpose(source, stride, rows, columns, out, out_stride): a (rows, columns) matrix to a (columns, rows) one.

    Writes whole vectors: out_stride has room for them.
    """
    width, size, turn = host().width(dtype), dtype.itemsize, _make_turn(dtype)

    def transpose(source, stride, rows, columns, out, out_stride):
        for column in range(0, columns, width):
            for row in range(0, rows, width):
                at, to = source + row * stride + column * size, out + column * out_stride + row * size
                turn(at, stride, least(width, rows - row), least(width, columns - column), to, out_stride, width)

    return cache.external(transpose, dtype.str, host())


@functools.cache
def make_pack_gates(dtype: np.dtype):
    """pack_gates(weights, k, order, gates, H, unit, end_unit, part, parts, out): of W (G*H, k) the transpose, (k, n).

    Its columns are the units [unit, end_unit) of the gates in `order`, the address of their numbers: of all units in one
    matrix, of some of them in one of its own for each gate.  The panels of each are dealt out to `parts` threads.
    """
    width, wide, size, turn = host().width(dtype), panel_columns(dtype), dtype.itemsize, _make_turn(dtype)

    def pack_gates(weights, k, order, gates, H, unit, end_unit, part, parts, out):
        units, stride = end_unit - unit, k * size
        blocks, n = (1, gates * H) if units == H else (gates, units)
        panels = (n + wide - 1) // wide
        for block in range(blocks):
            column, end = panels * part // parts * wide, least(n, panels * (part + 1) // parts * wide)
            while column < end:
                panel = wide if n - column // wide * wide >= wide else width
                start = column // panel * panel
                gate, place = block + column // units, column % units
                count = least(width, least(start + panel - column, units - place))  # neither out of panel nor of gate
                at = weights + (word(order + gate * 8) * H + unit + place) * stride
                to, apart = out + (start * k + column - start) * size, panel * size
                lanes = least(width, start + panel - column)
                for row in range(0, k, width):
                    turn(at + row * size, stride, count, least(width, k - row), to + row * apart, apart, lanes)
                column += count
            out += (n + width - 1) // width * width * k * size

    return cache.external(pack_gates, dtype.str, host())


@functools.cache
def make_pack_rows(dtype: np.dtype):
    """pack_rows(matrix, stride, order, gates, H, n, part, parts, out): (gates*H, n), in each of `gates` H rows.

    order: where their numbers in the matrix stand; 0: they come as they lie.  The panels are dealt out to `parts` threads.
    """
    width, wide, size = host().width(dtype), panel_columns(dtype), dtype.itemsize

    @instruction
    def move(builder, source, count, out):
        """`count` elements and zeros for the rest of a vector."""
        emit = Emitter(builder, dtype, width)
        emit.store(emit.load(source, emit.first_lanes(count)), out)

    def pack_rows(matrix, stride, order, gates, H, n, part, parts, out):
        panels, k = (n + wide - 1) // wide, gates * H
        first, end = panels * part // parts * wide, least(n, panels * (part + 1) // parts * wide)
        for gate in range(gates):
            rows = matrix + (word(order + gate * 8) if order else gate) * H * stride
            for begin in range(0, H, width):  # so many rows at once, that each is read on where the last panel ended
                for column in range(first, end, width):
                    panel = wide if n - column // wide * wide >= wide else width
                    start = column // panel * panel
                    at = rows + begin * stride + column * size
                    to = out + (start * k + (gate * H + begin) * panel + column - start) * size
                    for _ in range(least(width, H - begin)):
                        move(at, n - column, to)
                        at, to = at + stride, to + panel * size

    return cache.external(pack_rows, dtype.str, host())
