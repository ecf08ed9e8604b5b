"""Matrices laid out anew for the micro-kernels: in panels, or transposed.

Both go block by block, a vector of rows at a time, and a block is transposed in registers: an element at a time costs
five times as much, which for one pass over a large weight matrix is a tenth of the whole.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpurnn.executors import cache
from gpurnn.executors.simd import I64, Emitter, host, word

JOB = 6  # whole numbers that say what to pack


def panel_vectors() -> int:
    """Vectors in a wide panel: with 6 rows, 24 accumulators fit 32 registers and 12 fit 16."""
    return 4 if host().registers >= 32 else 2


def panel_columns(dtype: np.dtype) -> int:
    return panel_vectors() * host().width(dtype)


def packed_size(k: int, n: int, dtype: np.dtype) -> int:
    """Elements of the packed form of a (k, n) matrix: columns padded to a whole vector."""
    width = host().width(dtype)
    return k * -(-n // width) * width


def _move_block(dtype: np.dtype, transposed: bool):
    """A block of at most width x width elements to `out`, as it is or transposed; strides are in bytes.

    What the block lacks in length is written as zeros; rows that the result lacks are not written.
    """
    width = host().width(dtype)

    def emit_move(b: ir.IRBuilder, source, stride, rows, columns, out, out_stride):
        emit = Emitter(b, dtype, width)

        def lanes(count, index, limit):
            return emit.first_lanes(b.select(b.icmp_signed("<", I64(index), limit), count, I64(0)))

        block = [emit.load(b.add(source, b.mul(stride, I64(r))), lanes(columns, r, rows)) for r in range(width)]
        if transposed:
            block, rows = emit.transposed(block), columns
        for r, value in enumerate(block):
            emit.store(value, b.add(out, b.mul(out_stride, I64(r))), lanes(I64(width), r, rows))

    @intrinsic
    def move(typing, source, stride, rows, columns, out, out_stride):
        def codegen(context, builder, signature, args):
            emit_move(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 6), codegen

    return move


@functools.cache
def make_pack(dtype: np.dtype):
    """pack(source, stride, k, n, transposed, out): the (k, n) matrix at `source` in panels, or the (n, k) one's transpose.

    Panels of `panel_columns` columns, then of one vector, each row-major in k.
    """
    width, size = host().width(dtype), dtype.itemsize
    wide = panel_columns(dtype)
    as_it_is, turned = _move_block(dtype, transposed=False), _move_block(dtype, transposed=True)

    def pack(source, stride, k, n, transposed, out):
        lines, length = (n, k) if transposed else (k, n)  # of the source: its rows, whichever way they go
        for line in range(0, lines, width):
            for place in range(0, length, width):
                row, column = (place, line) if transposed else (line, place)
                start = column - column % wide
                panel = wide
                if n - start < wide:
                    start, panel = column, width
                rows, columns = min(width, k - row), min(width, n - column)
                at, to = source + line * stride + place * size, out + (start * k + row * panel + column - start) * size
                if transposed:
                    turned(at, stride, columns, rows, to, panel * size)
                else:
                    as_it_is(at, stride, rows, columns, to, panel * size)

    return cache.external(pack, dtype.str, host())


@functools.cache
def make_pack_share(dtype: np.dtype):
    """pack_share(jobs, count, part, parts): one thread's panels of `count` matrices, each dealt out to `parts` threads.

    jobs: the address of JOB int64 for each, `source, stride, k, n, transposed, out` of `pack`.
    """
    pack, wide, size = make_pack(dtype), panel_columns(dtype), dtype.itemsize

    def pack_share(jobs, count, part, parts):
        for job in range(count):
            at = jobs + job * JOB * 8
            source, stride, k, n, transposed, out = (
                word(at), word(at + 8), word(at + 16), word(at + 24), word(at + 32), word(at + 40),
            )  # fmt: skip
            panels = -(-n // wide)
            first, end = panels * part // parts * wide, min(n, panels * (part + 1) // parts * wide)
            if end > first:
                begin = source + first * (stride if transposed else size)
                pack(begin, stride, k, end - first, transposed, out + k * first * size)

    return cache.external(pack_share, dtype.str, host())


@functools.cache
def make_transpose(dtype: np.dtype):
    """transpose(source, stride, rows, columns, out, out_stride): a (rows, columns) matrix to a (columns, rows) one.

    Writes whole vectors: out_stride has room for them.
    """
    width, size = host().width(dtype), dtype.itemsize
    move = _move_block(dtype, transposed=True)

    def transpose(source, stride, rows, columns, out, out_stride):
        for column in range(0, columns, width):
            for row in range(0, rows, width):
                at = out + column * out_stride + row * size
                count = min(width, rows - row), min(width, columns - column)
                move(source + row * stride + column * size, stride, count[0], count[1], at, out_stride)

    return cache.external(transpose, dtype.str, host())
