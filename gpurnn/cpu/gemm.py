"""C (+)= A B for the few rows of one time step, with B packed once per pass, or read where it lies.

BLAS packs B anew at every call, which at batch 16 costs as much as the product.  Here B is laid out once in panels of
`panel` vectors of columns, then of one vector, each panel row-major in k: the micro-kernel streams it while a tile of C
stays in registers.  The micro-kernels are LLVM IR that Numba compiles; the loops around them are Numba's own.
"""

import functools
import itertools
from functools import partial

import numpy as np
from llvmlite import ir

from gpurnn.cpu import cache, costs
from gpurnn.cpu.instructions import branch, instruction, least
from gpurnn.cpu.packing import panel_columns, panel_vectors
from gpurnn.cpu.simd import I64, Emitter, host

TILE_ROWS = (6, 4, 3, 2, 1)


def _emit_tile(b: ir.IRBuilder, emit: Emitter, rows: int, vectors: int, masked: bool, numbers) -> None:
    """C[rows, vectors*width] = A[rows, k] B + (C if accumulate else 0); masked: columns from `count` on are left alone."""
    a, lda, w, ldw, k, c, ldc, count, accumulate = numbers
    chains = 1
    while rows * vectors * chains < costs.CHAINS:
        chains *= 2
    width, size = emit.width, emit.dtype.itemsize
    tile = [(r, v) for r in range(rows) for v in range(vectors)]
    mask = emit.first_lanes(count) if masked else None
    there = mask if host().masks else None  # where not, the rows of B are padded
    c_at = [b.add(c, b.add(b.mul(ldc, I64(r)), I64(v * width * size))) for r, v in tile]
    a_rows = [b.add(a, b.mul(lda, I64(r))) for r in range(rows)]
    w_rows = [b.mul(ldw, I64(chain)) for chain in range(chains + 1)]

    def step(position, row, sums):
        columns = [emit.load(b.add(row, I64(v * width * size)), there) for v in range(vectors)]
        offset = b.mul(position, I64(size))
        scalars = [b.load(b.inttoptr(b.add(a_row, offset), emit.scalar.as_pointer()), align=size) for a_row in a_rows]
        left = [emit.splat(scalar) for scalar in scalars]
        return [emit.fma(left[r], columns[v], sums[i]) for i, (r, v) in enumerate(tile)]

    def loop(name, position, row, sums):
        """From `position` on, as many steps side by side as there are sums; what they have come to when fewer are left."""
        before, count = b.block, len(sums)
        head, body, done = (b.append_basic_block(f"{name}.{part}") for part in ("head", "body", "done"))
        b.branch(head)
        b.position_at_end(head)
        position_here, row_here = b.phi(I64), b.phi(I64)
        sums_here = [[b.phi(emit.type) for _ in chain] for chain in sums]
        b.cbranch(b.icmp_signed("<=", b.add(position_here, I64(count)), k), body, done)
        b.position_at_end(body)
        new = [
            step(b.add(position_here, I64(chain)), b.add(row_here, w_rows[chain]), sums_here[chain])
            for chain in range(count)
        ]
        starts, phis = (position, row, *itertools.chain(*sums)), (position_here, row_here, *itertools.chain(*sums_here))
        ends = b.add(position_here, I64(count)), b.add(row_here, w_rows[count]), *itertools.chain(*new)
        for phi, start, end in zip(phis, starts, ends, strict=True):
            phi.add_incoming(start, before)
            phi.add_incoming(end, body)
        b.branch(head)
        b.position_at_end(done)
        while len(sums_here) > 1:
            pairs = zip(sums_here[::2], sums_here[1::2], strict=True)
            sums_here = [[emit.add(x, y) for x, y in zip(*pair, strict=True)] for pair in pairs]
        return position_here, row_here, sums_here

    for place in c_at:  # C is wanted at the end, and may by then be on its way from memory
        emit.prefetch(place, to_write=True)
    reached = loop("main", I64(0), w, [[emit.constant(0)] * len(tile)] * chains)
    if chains > 1:
        reached = loop("rest", *reached)
    [totals] = reached[-1]
    without = b.block
    fetch, done = b.append_basic_block("fetch"), b.append_basic_block("done")
    b.cbranch(b.icmp_signed("!=", accumulate, I64(0)), fetch, done)
    b.position_at_end(fetch)
    added = [emit.add(value, emit.load(place, mask)) for place, value in zip(c_at, totals, strict=True)]
    b.branch(done)
    b.position_at_end(done)
    results = [b.phi(emit.type) for _ in tile]
    for result, value, with_c in zip(results, totals, added, strict=True):
        result.add_incoming(value, without)
        result.add_incoming(with_c, fetch)
    for place, result in zip(c_at, results, strict=True):
        emit.store(result, place, mask)


def _tile(dtype: np.dtype):
    """tile(wide, rows, a, lda, w, ldw, k, c, ldc, count, accumulate): the micro-kernel of `rows`, one of TILE_ROWS, over a
    panel that is wide, 1, or over `count` columns of one that is not, 0.
    """

    @instruction
    def tile(b, wide, rows, *numbers):
        emit, sizes = Emitter(b, dtype, host().width(dtype)), itertools.product(TILE_ROWS, (0, 1))
        cases = {
            2 * count + is_wide: partial(
                _emit_tile, b, emit, count, panel_vectors() if is_wide else 1, not is_wide, numbers
            )
            for count, is_wide in sizes
        }
        branch(b, b.add(b.mul(rows, I64(2)), wide), cases)

    return tile


@functools.cache
def make_gemm(dtype: np.dtype):
    """gemm(steps, a, a_step, lda, m, w, ldw, k, blocks, n, c, c_step, c_block, ldc, accumulate): at each of `steps`, and for
    each of `blocks` matrices B of n columns, m rows of C (+)= A B.

    Addresses and distances are in bytes: lda from row to row, a_step from one step's rows to the next's, c_block from one
    block's columns to the next's.  `w` is each B as packed, and ldw 0; or one B as it lies, see `may_lie`, its rows ldw
    apart.  A panel serves all steps before the next is read.
    """
    tile, wide, width, size = _tile(dtype), panel_columns(dtype), host().width(dtype), dtype.itemsize

    def gemm(steps, a, a_step, lda, m, w, ldw, k, blocks, n, c, c_step, c_block, ldc, accumulate):
        for block in range(blocks):
            column = 0
            while column < n:
                to, count = c + block * c_block + column * size, n - column
                is_wide = 1 if count >= wide else 0
                panel = wide if is_wide else width
                apart = ldw or panel * size
                for step in range(steps):
                    row, from_a, to_c = 0, a + step * a_step, to + step * c_step
                    while row < m:
                        left = m - row
                        if left >= 6 and left != 7 and left != 8:  # not 6 + 1, nor 6 + 2, but 4 + 3 and 4 + 4
                            rows = 6
                        elif left >= 6 or left == 4:
                            rows = 4
                        else:
                            rows = least(left, 3)
                        tile(is_wide, rows, from_a, lda, w, apart, k, to_c, ldc, count, accumulate)
                        row, from_a, to_c = row + rows, from_a + rows * lda, to_c + rows * ldc
                w += panel * size if ldw else k * panel * size
                column += panel

    return cache.external(gemm, dtype.str, host(), costs.CHAINS)


def may_lie(n: int, dtype: np.dtype) -> bool:
    """Whether B of n columns can be read where it lies: not if a vector at its end would be read beyond it."""
    return host().masks or n % host().width(dtype) == 0
