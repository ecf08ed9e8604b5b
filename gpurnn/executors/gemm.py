"""C (+)= A B for the few rows of one time step, with B packed once per pass.

BLAS packs B anew at every call, which at batch 16 costs as much as the product.  Here B is laid out once in panels of
`panel` vectors of columns, then of one vector, each panel row-major in k: the micro-kernel streams it while a tile of C
stays in registers.  The micro-kernels are LLVM IR that Numba compiles; the loops around them are Numba's own.
"""

import functools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpurnn.executors import cache
from gpurnn.executors.simd import I64, Emitter, host

TILE_ROWS = (6, 4, 2, 1)
PARALLEL_CHAINS = 8  # a fused multiply-add takes 4 cycles and two start in each: fewer chains leave the unit idle


def panel_vectors() -> int:
    """Vectors in a wide panel: with 6 rows, 24 accumulators fit 32 registers and 12 fit 16."""
    return 4 if host().registers >= 32 else 2


def packed_size(k: int, n: int, dtype: np.dtype) -> int:
    """Elements of the packed form of a (k, n) matrix: columns padded to a whole vector."""
    width = host().width(dtype)
    return k * -(-n // width) * width


def _micro_kernel(dtype: np.dtype, rows: int, vectors: int, masked: bool):
    """C[rows, vectors*width] = A[rows, k] B + (C if accumulate else 0); columns from `count` on are left alone."""
    width = host().width(dtype)
    chains = 1
    while rows * vectors * chains < PARALLEL_CHAINS:
        chains *= 2
    size = dtype.itemsize

    def emit_kernel(b: ir.IRBuilder, a, lda, w, k, c, ldc, count, accumulate):
        emit = Emitter(b, dtype, width)
        tile = [(r, v) for r in range(rows) for v in range(vectors)]
        mask = emit.first_lanes(count) if masked else None
        c_at = [b.add(c, b.add(b.mul(ldc, I64(r)), I64(v * width * size))) for r, v in tile]
        a_rows = [b.add(a, b.mul(lda, I64(r))) for r in range(rows)]
        zero = emit.constant(0)

        def step(position, sums):
            row = b.add(w, b.mul(position, I64(vectors * width * size)))
            columns = [emit.load(b.add(row, I64(v * width * size))) for v in range(vectors)]
            offset = b.mul(position, I64(size))
            scalars = [
                b.load(b.inttoptr(b.add(a_row, offset), emit.scalar.as_pointer()), align=size) for a_row in a_rows
            ]
            left = [emit.splat(scalar) for scalar in scalars]
            return [emit.fma(left[r], columns[v], sums[i]) for i, (r, v) in enumerate(tile)]

        before = b.block
        fetch, head, body = (b.append_basic_block(name) for name in ("fetch", "head", "body"))
        rest_head, rest_body, done = (b.append_basic_block(name) for name in ("rest.head", "rest.body", "done"))
        b.cbranch(b.icmp_signed("!=", accumulate, I64(0)), fetch, head)
        b.position_at_end(fetch)
        fetched = [emit.load(address, mask) for address in c_at]
        b.branch(head)

        b.position_at_end(head)
        position = b.phi(I64)
        sums = [[b.phi(emit.type) for _ in tile] for _ in range(chains)]
        for block, first in ((before, [zero] * len(tile)), (fetch, fetched)):
            position.add_incoming(I64(0), block)
            for chain, chain_sums in enumerate(sums):
                for i, phi in enumerate(chain_sums):
                    phi.add_incoming(zero if chain else first[i], block)
        b.cbranch(b.icmp_signed("<=", b.add(position, I64(chains)), k), body, rest_head)

        b.position_at_end(body)
        for chain, chain_sums in enumerate(sums):
            new = step(b.add(position, I64(chain)), chain_sums)
            for phi, value in zip(chain_sums, new, strict=True):
                phi.add_incoming(value, body)
        position.add_incoming(b.add(position, I64(chains)), body)
        b.branch(head)

        b.position_at_end(rest_head)
        rest_position = b.phi(I64)
        totals = [b.phi(emit.type) for _ in tile]
        b.position_at_end(head)  # the chains are added up once, on the way out of the main loop
        terminator = b.block.terminator
        b.position_before(terminator)
        while len(sums) > 1:
            sums = [
                [emit.add(x, y) for x, y in zip(*pair, strict=True)] for pair in zip(sums[::2], sums[1::2], strict=True)
            ]
        rest_position.add_incoming(position, head)
        for phi, value in zip(totals, sums[0], strict=True):
            phi.add_incoming(value, head)
        b.position_at_end(rest_head)
        b.cbranch(b.icmp_signed("<", rest_position, k), rest_body, done)
        b.position_at_end(rest_body)
        new = step(rest_position, totals)
        rest_position.add_incoming(b.add(rest_position, I64(1)), rest_body)
        for phi, value in zip(totals, new, strict=True):
            phi.add_incoming(value, rest_body)
        b.branch(rest_head)

        b.position_at_end(done)
        for address, value in zip(c_at, totals, strict=True):
            emit.store(value, address, mask)

    @intrinsic
    def kernel(typing, a, lda, w, k, c, ldc, count, accumulate):
        def codegen(context, builder, signature, args):
            emit_kernel(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 8), codegen

    return kernel


def _tile(dtype: np.dtype, vectors: int, masked: bool):
    """Any number of rows as tiles of 6, 4, 2 and 1."""
    six, four, two, one = (_micro_kernel(dtype, rows, vectors, masked) for rows in TILE_ROWS)

    def tile(a, lda, m, w, k, c, ldc, count, accumulate):
        row = 0
        while row < m:
            left = m - row
            if left >= 6:
                six(a + row * lda, lda, w, k, c + row * ldc, ldc, count, accumulate)
                row += 6
            elif left >= 4:
                four(a + row * lda, lda, w, k, c + row * ldc, ldc, count, accumulate)
                row += 4
            elif left >= 2:
                two(a + row * lda, lda, w, k, c + row * ldc, ldc, count, accumulate)
                row += 2
            else:
                one(a + row * lda, lda, w, k, c + row * ldc, ldc, count, accumulate)
                row += 1

    return cache.inner(tile, dtype.str, vectors, masked)


@functools.cache
def make_gemm(dtype: np.dtype):
    """gemm(a, lda, m, w, k, n, c, ldc, accumulate): addresses and strides in bytes, `w` as `pack` leaves it."""
    vectors, width, size = panel_vectors(), host().width(dtype), dtype.itemsize
    wide_tile = _tile(dtype, vectors, masked=False)
    narrow_tile = _tile(dtype, 1, masked=True)
    wide = vectors * width

    def gemm(a, lda, m, w, k, n, c, ldc, accumulate):
        column = 0
        while column < n:
            if n - column >= wide:
                wide_tile(a, lda, m, w, k, c + column * size, ldc, wide, accumulate)
                w += k * wide * size
                column += wide
            else:
                narrow_tile(a, lda, m, w, k, c + column * size, ldc, n - column, accumulate)
                w += k * width * size
                column += width

    return cache.inner(gemm, dtype.str)


def make_pack(dtype: np.dtype):
    """pack(b, out): writes the (k, n) matrix b, of any strides, to `out` in panels."""
    width = host().width(dtype)
    wide = panel_vectors() * width

    def pack(b, out):
        k, n = b.shape
        column, start = 0, 0
        while column < n:
            panel = wide if n - column >= wide else width
            real = min(panel, n - column)
            for k0 in range(0, k, 16):  # blocks of 16 rows: a transposed b is read along its cache lines
                for lane in range(real):
                    for i in range(k0, min(k, k0 + 16)):
                        out[start + i * panel + lane] = b[i, column + lane]
                for lane in range(real, panel):
                    for i in range(k0, min(k, k0 + 16)):
                        out[start + i * panel + lane] = 0
            start += k * panel
            column += panel

    return pack
