"""C (+)= A W with W read where it lies, each row of C a combination of W's rows.

Everything is read and written along its rows, and what grows stays in the cache: for a single row of A, which meets all
of W once, and for few rows of W, whose products with many rows of A are mostly memory.  A tile of C that stays in
registers would walk down columns, of large matrices at half the speed.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir

from gpurnn.cpu import cache, costs
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.instructions import branch, instruction, least
from gpurnn.cpu.simd import I64, Emitter, host, vector_loop

SIDE_BY_SIDE = 4  # rows of W


def _emit_rows(b: ir.IRBuilder, dtype: np.dtype, rows: int, terms: int, numbers) -> None:
    """C[rows, n] = A[rows, terms] W[terms, n] + (C if accumulate else 0)."""
    a, lda, w, ldw, n, c, ldc, accumulate = numbers
    emit, size = Emitter(b, dtype, host().width(dtype)), dtype.itemsize
    w_rows = [b.add(w, b.mul(ldw, I64(term))) for term in range(terms)]
    c_rows = [b.add(c, b.mul(ldc, I64(row))) for row in range(rows)]
    given, ahead = b.icmp_signed("!=", accumulate, I64(0)), b.mul(ldw, I64(terms))

    def factor(row, term):
        address = b.add(b.add(a, b.mul(lda, I64(row))), I64(term * size))
        return emit.splat(b.load(b.inttoptr(address, emit.scalar.as_pointer()), align=size))

    factors = [[factor(row, term) for term in range(terms)] for row in range(rows)]

    def body(emit, offset, mask):
        places = [b.add(row, offset) for row in w_rows]
        right = [emit.load(place, mask) for place in places]
        for place in places:  # the rows behind these: each is too short for the processor to see where it leads
            emit.prefetch(b.add(place, ahead))
        for row, own in zip(c_rows, factors, strict=True):
            place = b.add(row, offset)
            value = emit.where(given, emit.load(place, mask), emit.constant(0))
            for left, column in zip(own, right, strict=True):
                value = emit.fma(left, column, value)
            emit.store(value, place, mask)

    vector_loop(b, dtype, n, body)


@functools.cache
def combine(dtype: np.dtype) -> Compiled:
    """combine(a, lda, m, w, ldw, k, n, c, ldc, accumulate): m rows of C (+)= A W, W (k, n) with its rows ldw apart; distances
    in bytes.  Loops are given its address: only a short pass has it compiled.
    """
    most, size = 4 if host().registers >= 32 else 2, dtype.itemsize  # rows of C whose factors stay in registers
    columns = costs.COMBINE_COLUMNS

    @instruction
    def add(b, rows, terms, *numbers):
        sizes = itertools.product((most, 1), (SIDE_BY_SIDE, 1))
        cases = {8 * count + of: functools.partial(_emit_rows, b, dtype, count, of, numbers) for count, of in sizes}
        branch(b, b.add(b.mul(rows, I64(8)), terms), cases)

    def combine(a, lda, m, w, ldw, k, n, c, ldc, accumulate):
        for column in range(0, n, columns):
            count, term = least(columns, n - column), 0
            while term < k:
                terms, row, from_w = SIDE_BY_SIDE if k - term >= SIDE_BY_SIDE else 1, 0, w + term * ldw + column * size
                while row < m:
                    rows = most if m - row >= most else 1
                    from_a, to_c = a + row * lda + term * size, c + row * ldc + column * size
                    add(rows, terms, from_a, lda, from_w, ldw, count, to_c, ldc, accumulate + term)
                    row += rows
                term += terms

    return cache.external(combine, dtype.str, host(), columns)
