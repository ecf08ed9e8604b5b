"""C (+)= A B for the few rows of one time step, with B packed once per pass, or read where it lies.

BLAS packs B anew at every call, which at batch 16 costs as much as the product.  Here B is laid out once in panels of
`panel` vectors of columns, then of one vector, each panel row-major in k: the micro-kernel streams it while a tile of C
stays in registers.  The micro-kernels are LLVM IR that Numba compiles; the loops around them are Numba's own.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir

from gpurnn.executors import cache
from gpurnn.executors.cache import Compiled
from gpurnn.executors.packing import make_pack_rows, make_transpose, packed_size, panel_columns, panel_vectors
from gpurnn.executors.simd import I64, Emitter, host, instruction, least, vector_loop, word, words

TILE_ROWS = (6, 4, 3, 2, 1)
REDUCED_ROWS, REDUCED_COLUMNS = 512, 192  # of a block of gradients: transposed, it stays in the second-level cache
FEW_SUMMED = 8  # rows: of so few a sum takes as long as its gradients' memory, and is walked through along that
PARALLEL_CHAINS = 8  # a fused multiply-add takes 4 cycles and two start in each: fewer chains leave the unit idle


def _emit_tile(b: ir.IRBuilder, emit: Emitter, rows: int, vectors: int, masked: bool, numbers) -> None:
    """C[rows, vectors*width] = A[rows, k] B + (C if accumulate else 0); masked: columns from `count` on are left alone."""
    a, lda, w, ldw, k, c, ldc, count, accumulate = numbers
    chains = 1
    while rows * vectors * chains < PARALLEL_CHAINS:
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
        emit.prefetch_to_write(place)
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
    wide panel or over `count` columns of a narrow one.
    """

    @instruction
    def tile(b, wide, rows, *numbers):
        emit = Emitter(b, dtype, host().width(dtype))
        which = b.add(b.mul(rows, I64(2)), b.select(b.icmp_signed("!=", wide, I64(0)), I64(1), I64(0)))
        after = b.append_basic_block("after")
        switch = b.switch(which, after)
        for count, is_wide in itertools.product(TILE_ROWS, (False, True)):
            block = b.append_basic_block(f"tile{count}{'wide' if is_wide else 'narrow'}")
            switch.add_case(I64(2 * count + is_wide), block)
            b.position_at_end(block)
            _emit_tile(b, emit, count, panel_vectors() if is_wide else 1, not is_wide, numbers)
            b.branch(after)
        b.position_at_end(after)

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

    return cache.external(gemm, dtype.str, host())


def may_lie(n: int, dtype: np.dtype) -> bool:
    """Whether B of n columns can be read where it lies: not if a vector at its end would be read beyond it."""
    return host().masks or n % host().width(dtype) == 0


def _add_row(dtype: np.dtype):
    """target += source, n elements."""

    @instruction
    def add_row(builder, n, source, target):
        def body(emit, offset, mask):
            at = builder.add(target, offset)
            emit.store(emit.add(emit.load(at, mask), emit.load(builder.add(source, offset), mask)), at, mask)

        vector_loop(builder, dtype, n, body)

    return add_row


def reduction_size(K: int, H: int, I: int, dtype: np.dtype) -> int:
    """Elements of a reduction's workspace: for a block of d transposed, of h and of x packed."""
    rows = min(K, REDUCED_ROWS)
    return REDUCED_COLUMNS * REDUCED_ROWS + packed_size(rows, H, dtype) + packed_size(rows, I, dtype)


@functools.cache
def reduction(dtype: np.dtype) -> Compiled:
    """reduce(values, part): what columns [first, last) of the slots give the weights and biases, the sums over time and batch.

    See `crew.run`.  The numbers: K, time and batch; H, I; S, how many slots; G, the gates, and how many are split; addresses:

    slots   (K, S*H)       gradients: of r in the first G slots, of x in G slots from `split` on
    orders  (2, G)         whose gate they are, those of r and those of x
    h (K, H), x (K, I)     what the weights were multiplied by
    sums    ((split+G)*H,) the column sums, gradients of the biases, are added to it
    weight_hh, weight_ih   (G*H, H), (G*H, I): their gradients are added to

    A part's share: first, last, and the address of `work`, room of `reduction_size`.
    """
    gemm, transpose, pack, add_row = make_gemm(dtype), make_transpose(dtype), make_pack_rows(dtype), _add_row(dtype)
    size, width, read, read_share = dtype.itemsize, host().width(dtype), words(17), words(3)

    def reduce(values, part):
        _, _, _, shares, K, H, I, S, gates, split, slots, orders, h, x, sums, weight_hh, weight_ih = read(values)
        first, last, work = read_share(values + shares + part * 24)
        stride, x_orders = S * H * size, orders + (gates - split) * 8
        blocks = (K + REDUCED_ROWS - 1) // REDUCED_ROWS
        packed_h = work + REDUCED_COLUMNS * REDUCED_ROWS * size
        packed_x = packed_h + least(K, REDUCED_ROWS) * ((H + width - 1) // width) * width * size
        for block in range(blocks):
            begin, end = K * block // blocks, K * (block + 1) // blocks
            k = end - begin
            d_stride = (k + width - 1) // width * width * size
            pack(h + begin * H * size, H * size, 0, 1, k, H, 0, 1, packed_h)
            pack(x + begin * I * size, I * size, 0, 1, k, I, 0, 1, packed_x)
            most = REDUCED_COLUMNS if k > FEW_SUMMED else TILE_ROWS[0]
            column = first
            while column < last:
                slot = column // H
                unit = column - slot * H
                count = least(most, least(last - column, H - unit))
                d = slots + begin * stride + column * size
                for row in range(k):
                    add_row(count, d + row * stride, sums + column * size)
                transpose(d, stride, k, count, work, d_stride)
                if slot < gates:
                    to = weight_hh + (word(orders + slot * 8) * H + unit) * H * size
                    gemm(1, work, 0, d_stride, count, packed_h, 0, k, 1, H, to, 0, 0, H * size, 1)
                if slot >= split:
                    to = weight_ih + (word(x_orders + slot * 8) * H + unit) * I * size
                    gemm(1, work, 0, d_stride, count, packed_x, 0, k, 1, I, to, 0, 0, I * size, 1)
                column += count

    return cache.external(reduce, dtype.str, host())
