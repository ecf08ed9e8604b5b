"""C (+)= A B for the few rows of one time step, with B packed once per pass, or read where it lies.

BLAS packs B anew at every call, which at batch 16 costs as much as the product.  Here B is laid out once in panels of
`panel` vectors of columns, then of one vector, each panel row-major in k: the micro-kernel streams it while a tile of C
stays in registers.  The micro-kernels are LLVM IR that Numba compiles; the loops around them are Numba's own.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpurnn.executors import cache
from gpurnn.executors.barrier import make_meet
from gpurnn.executors.packing import make_pack, make_transpose, packed_size, panel_vectors
from gpurnn.executors.simd import I64, Emitter, address, host, vector_loop

TILE_ROWS = (6, 4, 3, 2, 1)
REDUCED_ROWS, REDUCED_COLUMNS = 512, 192  # of a block of gradients: transposed, it stays in the second-level cache
FEW_SUMMED = 8  # rows: of so few a sum takes as long as its gradients' memory, and is walked through along that
PARALLEL_CHAINS = 8  # a fused multiply-add takes 4 cycles and two start in each: fewer chains leave the unit idle


def _micro_kernel(dtype: np.dtype, rows: int, vectors: int, masked: bool):
    """C[rows, vectors*width] = A[rows, k] B + (C if accumulate else 0); masked: columns from `count` on are left alone."""
    width = host().width(dtype)
    chains = 1
    while rows * vectors * chains < PARALLEL_CHAINS:
        chains *= 2
    size = dtype.itemsize

    def emit_kernel(b: ir.IRBuilder, a, lda, w, ldw, k, c, ldc, count, accumulate):
        emit = Emitter(b, dtype, width)
        tile = [(r, v) for r in range(rows) for v in range(vectors)]
        mask = emit.first_lanes(count) if masked else None
        there = mask if host().masks else None  # where not, the rows of B are padded
        c_at = [b.add(c, b.add(b.mul(ldc, I64(r)), I64(v * width * size))) for r, v in tile]
        a_rows = [b.add(a, b.mul(lda, I64(r))) for r in range(rows)]
        zero = emit.constant(0)

        def step(position, sums):
            row = b.add(w, b.mul(position, ldw))
            columns = [emit.load(b.add(row, I64(v * width * size)), there) for v in range(vectors)]
            offset = b.mul(position, I64(size))
            scalars = [
                b.load(b.inttoptr(b.add(a_row, offset), emit.scalar.as_pointer()), align=size) for a_row in a_rows
            ]
            left = [emit.splat(scalar) for scalar in scalars]
            return [emit.fma(left[r], columns[v], sums[i]) for i, (r, v) in enumerate(tile)]

        for place in c_at:  # C is wanted at the end, and may by then be on its way from memory
            emit.prefetch_to_write(place)
        before = b.block
        head, body = (b.append_basic_block(name) for name in ("head", "body"))
        rest_head, rest_body = (b.append_basic_block(name) for name in ("rest.head", "rest.body"))
        total, fetch, done = (b.append_basic_block(name) for name in ("total", "fetch", "done"))
        b.branch(head)

        b.position_at_end(head)
        position = b.phi(I64)
        sums = [[b.phi(emit.type) for _ in tile] for _ in range(chains)]
        position.add_incoming(I64(0), before)
        for phi in itertools.chain(*sums):
            phi.add_incoming(zero, before)
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
        b.cbranch(b.icmp_signed("<", rest_position, k), rest_body, total)
        b.position_at_end(rest_body)
        new = step(rest_position, totals)
        rest_position.add_incoming(b.add(rest_position, I64(1)), rest_body)
        for phi, value in zip(totals, new, strict=True):
            phi.add_incoming(value, rest_body)
        b.branch(rest_head)

        b.position_at_end(total)
        b.cbranch(b.icmp_signed("!=", accumulate, I64(0)), fetch, done)
        b.position_at_end(fetch)
        added = [emit.add(value, emit.load(place, mask)) for place, value in zip(c_at, totals, strict=True)]
        b.branch(done)
        b.position_at_end(done)
        results = [b.phi(emit.type) for _ in tile]
        for result, value, with_c in zip(results, totals, added, strict=True):
            result.add_incoming(value, total)
            result.add_incoming(with_c, fetch)
        for place, result in zip(c_at, results, strict=True):
            emit.store(result, place, mask)

    @intrinsic
    def kernel(typing, a, lda, w, ldw, k, c, ldc, count, accumulate):
        def codegen(context, builder, signature, args):
            emit_kernel(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 9), codegen

    return kernel


def _tile(dtype: np.dtype, vectors: int, masked: bool):
    """Any number of rows as tiles of 6, 4 and 3, if there are so many: fewer take as long as their panel takes to read."""
    six, four, three, two, one = (_micro_kernel(dtype, rows, vectors, masked) for rows in TILE_ROWS)

    def tile(a, lda, m, w, ldw, k, c, ldc, count, accumulate):
        row = 0
        while row < m:
            left = m - row
            if left >= 6 and left != 7 and left != 8:
                six(a + row * lda, lda, w, ldw, k, c + row * ldc, ldc, count, accumulate)
                row += 6
            elif left >= 6 or left == 4:
                four(a + row * lda, lda, w, ldw, k, c + row * ldc, ldc, count, accumulate)
                row += 4
            elif left >= 3:
                three(a + row * lda, lda, w, ldw, k, c + row * ldc, ldc, count, accumulate)
                row += 3
            elif left == 2:
                two(a + row * lda, lda, w, ldw, k, c + row * ldc, ldc, count, accumulate)
                row += 2
            else:
                one(a + row * lda, lda, w, ldw, k, c + row * ldc, ldc, count, accumulate)
                row += 1

    return cache.external(tile, dtype.str, vectors, masked, host())


@functools.cache
def make_gemm(dtype: np.dtype):
    """gemm(steps, a, a_step, lda, m, w, ldw, k, blocks, n, c, c_step, c_block, ldc, accumulate): at each of `steps`, and for
    each of `blocks` matrices B of n columns, m rows of C (+)= A B.

    Addresses and distances are in bytes: lda from row to row, a_step from one step's rows to the next's, c_block from one
    block's columns to the next's.  `w` is each B as `pack` leaves it, and ldw 0; or one B as it lies, see `may_lie`, its
    rows ldw apart.  A panel serves all steps before the next is read.
    """
    vectors, width, size = panel_vectors(), host().width(dtype), dtype.itemsize
    wide_tile = _tile(dtype, vectors, masked=False)
    narrow_tile = _tile(dtype, 1, masked=True)
    wide = vectors * width

    def gemm(steps, a, a_step, lda, m, w, ldw, k, blocks, n, c, c_step, c_block, ldc, accumulate):
        for block in range(blocks):
            column = 0
            while column < n:
                at = c + block * c_block + column * size
                is_wide = n - column >= wide
                panel = wide if is_wide else width
                apart = ldw or panel * size
                if is_wide:
                    for step in range(steps):
                        wide_tile(a + step * a_step, lda, m, w, apart, k, at + step * c_step, ldc, wide, accumulate)
                else:
                    left = n - column
                    for step in range(steps):
                        narrow_tile(a + step * a_step, lda, m, w, apart, k, at + step * c_step, ldc, left, accumulate)
                w += panel * size if ldw else k * panel * size
                column += panel

    return cache.external(gemm, dtype.str, host())


def may_lie(n: int, dtype: np.dtype) -> bool:
    """Whether B of n columns can be read where it lies: not if a vector at its end would be read beyond it."""
    return host().masks or n % host().width(dtype) == 0


def _add_row(dtype: np.dtype):
    """target += source, n elements."""

    @intrinsic
    def add_row(typing, n, source, target):
        def codegen(context, builder, signature, args):
            count, given, result = args

            def body(emit, offset, mask):
                at = builder.add(result, offset)
                emit.store(emit.add(emit.load(at, mask), emit.load(builder.add(given, offset), mask)), at, mask)

            vector_loop(builder, dtype, count, body)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), codegen

    return add_row


def reduction_size(K: int, H: int, I: int, dtype: np.dtype) -> int:
    """Elements of a reduction's workspace: for a block of d transposed, of h and of x packed."""
    rows = min(K, REDUCED_ROWS)
    return REDUCED_COLUMNS * REDUCED_ROWS + packed_size(rows, H, dtype) + packed_size(rows, I, dtype)


def make_reduction(dtype: np.dtype):
    """reduce(...): what columns [first, last) of the slots give the weights and biases, the sums over time and batch.

    parties                threads that meet at `barrier` at the end
    slots   (K, slots*H)   gradients: of r in the first G slots, of x in G slots from x_start on; K is time and batch
    r_order, x_order (G,)  whose gate they are
    h (K, H), x (K, I)     what the weights were multiplied by, C-ordered
    sums    ((x_start+G)*H,)   the column sums, gradients of the biases, are added to it
    weight_hh, weight_ih   (G*H, H), (G*H, I): their gradients are added to
    work                   of `reduction_size`
    """
    gemm, transpose, pack, add_row = make_gemm(dtype), make_transpose(dtype), make_pack(dtype), _add_row(dtype)
    size, width, meet = dtype.itemsize, host().width(dtype), make_meet()

    def reduce(
        first, last, parties, barrier, slots, r_order, x_order, x_start, h, x, sums, weight_hh, weight_ih, work
    ):  # fmt: skip
        K, stride = len(slots), slots.strides[0]
        H, I, gates = h.shape[1], x.shape[1], len(r_order)
        blocks = -(-K // REDUCED_ROWS)
        turned = address(work)
        packed_h = turned + REDUCED_COLUMNS * REDUCED_ROWS * size
        packed_x = packed_h + min(K, REDUCED_ROWS) * -(-H // width) * width * size
        for block in range(blocks):
            begin, end = K * block // blocks, K * (block + 1) // blocks
            k = end - begin
            d_stride = -(-k // width) * width * size
            pack(address(h) + begin * H * size, H * size, k, H, 0, packed_h)
            pack(address(x) + begin * I * size, I * size, k, I, 0, packed_x)
            most = REDUCED_COLUMNS if k > FEW_SUMMED else TILE_ROWS[0]
            column = first
            while column < last:
                slot = column // H
                unit = column - slot * H
                count = min(most, last - column, H - unit)
                d = address(slots) + begin * stride + column * size
                for row in range(k):
                    add_row(count, d + row * stride, address(sums) + column * size)
                transpose(d, stride, k, count, turned, d_stride)
                if slot < gates:
                    to = address(weight_hh) + (r_order[slot] * H + unit) * H * size
                    gemm(1, turned, 0, d_stride, count, packed_h, 0, k, 1, H, to, 0, 0, H * size, 1)
                if slot >= x_start:
                    to = address(weight_ih) + (x_order[slot - x_start] * H + unit) * I * size
                    gemm(1, turned, 0, d_stride, count, packed_x, 0, k, 1, I, to, 0, 0, I * size, 1)
                column += count
        meet(barrier, parties)

    return reduce
