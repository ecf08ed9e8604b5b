"""C (+)= A W^T with W read where it lies, each element of C a dot product along a row of both.

Its sums lie across the lanes of vectors and are added up at the end of each tile: of long passes a fifth slower than
`gemm`, of short ones faster than packing W for that.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir

from gpurnn.cpu import cache
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.instructions import instruction, least
from gpurnn.cpu.simd import I32, I64, Emitter, host

COLUMNS = 8  # rows of W that are read side by side


def _lane_sums(emit: Emitter, parts: list[ir.Value]) -> ir.Value:
    """The sum of each vector's lanes, in one vector.  Halves of two vectors are added in one operation, then quarters."""
    b, width = emit.builder, emit.width

    def shuffle(x: ir.Value, y: ir.Value, lanes: list[int]) -> ir.Value:
        return b.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    vectors = [(value, [k]) for k, value in enumerate(parts)]  # and whose sums stand in it, group by group
    group = width
    while group > 1:
        half, groups = group // 2, width // group
        if len(vectors) > 1:
            pairs = zip(vectors[::2], vectors[1::2], strict=True)
            added = []
            for (x, of_x), (y, of_y) in pairs:
                starts = [start + g * group for g in range(groups) for start in (0, width)]
                low, high = ([s + first + lane for s in starts for lane in range(half)] for first in (0, half))
                both = [owner for pair in zip(of_x, of_y, strict=True) for owner in pair]
                added.append((emit.add(shuffle(x, y, low), shuffle(x, y, high)), both))
            vectors = added
        else:
            (x, of_x), turned = vectors[0], [lane ^ half for lane in range(width)]
            lanes = range(0, width, group)
            vectors = [(emit.add(x, shuffle(x, x, turned)), [of_x[lane // group] for lane in lanes for _ in range(2)])]
        group = half
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [(shuffle(x, y, list(range(len(of_x + of_y)))), of_x + of_y) for (x, of_x), (y, of_y) in pairs]
    [(value, owners)] = vectors
    return shuffle(value, value, [owners.index(k) for k in range(len(parts))])


def _micro_kernel(dtype: np.dtype, rows: int, columns: int):
    """C[rows, columns] = A[rows, k] W[columns, k]^T + (C if accumulate else 0); of columns the first `count` are there."""
    width, size = host().width(dtype), dtype.itemsize

    @instruction
    def kernel(b: ir.IRBuilder, a, lda, w, ldw, k, c, ldc, count, accumulate):
        emit, out = Emitter(b, dtype, width), Emitter(b, dtype, columns)
        last = b.sub(count, I64(1))
        a_rows = [b.add(a, b.mul(lda, I64(r))) for r in range(rows)]
        w_rows = [b.select(b.icmp_signed("<", I64(column), count), I64(column), last) for column in range(columns)]
        w_rows = [b.add(w, b.mul(ldw, row)) for row in w_rows]
        whole = b.and_(k, I64(-width))

        def step(position, mask, sums):
            offset = b.mul(position, I64(size))
            right = [emit.load(b.add(row, offset), mask) for row in w_rows]
            left = [emit.load(b.add(row, offset), mask) for row in a_rows]
            return [emit.fma(x, y, total) for (x, y), total in zip(itertools.product(left, right), sums, strict=True)]

        before = b.block
        head, body, rest, tail, done = (b.append_basic_block(name) for name in ("head", "body", "rest", "tail", "done"))
        b.branch(head)
        b.position_at_end(head)
        position, sums = b.phi(I64), [b.phi(emit.type) for _ in range(rows * columns)]
        b.cbranch(b.icmp_signed("<", position, whole), body, rest)
        b.position_at_end(body)
        new = step(position, None, sums)
        position.add_incoming(I64(0), before)
        position.add_incoming(b.add(position, I64(width)), body)
        for total, value in zip(sums, new, strict=True):
            total.add_incoming(emit.constant(0), before)
            total.add_incoming(value, body)
        b.branch(head)
        b.position_at_end(rest)
        b.cbranch(b.icmp_signed("<", whole, k), tail, done)
        b.position_at_end(tail)
        ends = step(whole, emit.first_lanes(b.sub(k, whole)), sums)
        b.branch(done)
        b.position_at_end(done)
        totals = [b.phi(emit.type) for _ in sums]
        for total, without, value in zip(totals, sums, ends, strict=True):
            total.add_incoming(without, rest)
            total.add_incoming(value, tail)

        there = out.first_lanes(count)
        given = out.first_lanes(b.select(b.icmp_signed("!=", accumulate, I64(0)), count, I64(0)))
        for r in range(rows):
            place = b.add(c, b.mul(ldc, I64(r)))
            value = _lane_sums(emit, totals[r * columns : (r + 1) * columns])
            out.store(out.add(value, out.load(place, given)), place, there)

    return kernel


@functools.cache
def dot(dtype: np.dtype) -> Compiled:
    """dot(steps, a, a_step, lda, m, w, ldw, k, n, c, c_step, ldc, accumulate): at each of `steps`, m rows of
    C (+)= A W^T, W (n, k) with its rows ldw apart; distances in bytes.  Loops are given its address:
    only a short pass has it compiled.
    """
    few, some = (COLUMNS // 2, COLUMNS) if host().registers >= 32 else (COLUMNS // 4, COLUMNS // 2)
    four, two, one = (_micro_kernel(dtype, rows, columns) for rows, columns in ((4, few), (2, some), (1, COLUMNS)))
    size = dtype.itemsize

    def dot(steps, a, a_step, lda, m, w, ldw, k, n, c, c_step, ldc, accumulate):
        for column in range(0, n, COLUMNS):
            count = least(COLUMNS, n - column)
            for step in range(steps):
                row, from_row, to = 0, a + step * a_step, c + step * c_step + column * size
                while row < m:
                    if m - row >= 4:
                        for first in range(0, count, few):
                            at, left = w + (column + first) * ldw, least(few, count - first)
                            four(from_row, lda, at, ldw, k, to + first * size, ldc, left, accumulate)
                        done = 4
                    elif m - row >= 2:
                        for first in range(0, count, some):
                            at, left = w + (column + first) * ldw, least(some, count - first)
                            two(from_row, lda, at, ldw, k, to + first * size, ldc, left, accumulate)
                        done = 2
                    else:
                        one(from_row, lda, w + column * ldw, ldw, k, to, ldc, count, accumulate)
                        done = 1
                    row, from_row, to = row + done, from_row + done * lda, to + done * ldc

    return cache.external(dot, dtype.str, host())
