"""The gradients of a direction's weights and biases, summed over time and batch in blocks of rows.

A block's gates' gradients are transposed, what they were multiplied by is packed, and both meet while they are in cache.
"""

import functools

import numpy as np

from gpurnn.cpu import cache, costs
from gpurnn.cpu.cache import Compiled, call
from gpurnn.cpu.gemm import make_gemm
from gpurnn.cpu.instructions import instruction, least, word
from gpurnn.cpu.packing import make_pack_rows, make_transpose, packed_size
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import add_wide, host, vector_loop

REDUCTION = Record("K H head I S gates split combine slots orders h x sums weight_ih weight_hh", "first last work")
SIDE_BY_SIDE = 4  # rows that are added up in their own type; their sums are, in float64


def few_are_summed(K: int) -> bool:
    """Whether K rows are summed by `combine.combine`, from where they lie."""
    return K <= costs.FEW_SUM_ROWS


def reduction_size(K: int, H: int, head: int, I: int, dtype: np.dtype) -> int:
    """Elements of a reduction's workspace: for a block of d transposed, of h packed, head by head, and of x."""
    rows = min(K, costs.SUM_ROWS)
    packed_h = H // head * packed_size(rows, head, dtype)
    return costs.SUM_COLUMNS * costs.SUM_ROWS + packed_h + packed_size(rows, I, dtype)


def _make_add_rows(dtype: np.dtype, count: int):
    """target += the sum of `count` rows, `stride` bytes apart from source on: n elements, in float64 at the target."""

    @instruction
    def add_rows(builder, n, source, stride, target):
        def body(emit, offset, mask):
            total, place = None, builder.add(source, offset)
            for _ in range(count):
                row = emit.load(place, mask)
                total, place = row if total is None else emit.add(total, row), builder.add(place, stride)
            add_wide(emit, total, target, offset, mask)

        vector_loop(builder, dtype, n, body)

    return add_rows


@functools.cache
def _make_add(dtype: np.dtype):
    """add(combine, d, d_stride, m, k, rows, row, packed, n, c): C (m, n) += D (m, k) times k rows, packed or, where `combine` is
    the address of `combine.combine`, as they lie, `row` bytes apart.
    """
    gemm, size = make_gemm(dtype), dtype.itemsize

    def add(combine, d, d_stride, m, k, rows, row, packed, n, c):
        if combine:
            call(combine, d, d_stride, m, rows, row, k, n, c, n * size, 1)
        else:
            gemm(1, d, 0, d_stride, m, packed, 0, k, 1, n, c, 0, 0, n * size, 1)

    return cache.external(add, dtype.str, host())


@functools.cache
def reduction(dtype: np.dtype) -> Compiled:
    """reduce(values, part): what columns [first, last) of the slots give the weights and biases, the sums over time and batch.

    See `crew.run`.  The numbers of REDUCTION: K, time and batch; H; head, units that meet; I; S, how many slots; G, the gates, and how many are split;
    `combine`, the address of `combine.combine` if `few_are_summed`, else 0; addresses:

    slots   (K, S*H)       gradients: of r in the first G slots, of x in G slots from `split` on
    orders  (2, G)         whose gate they are, those of r and those of x
    h (K, H), x (K, I)     what the weights were multiplied by
    sums    ((split+G)*H,) float64: the column sums, gradients of the biases, are added to it
    weight_ih, weight_hh   (G*H, I), (G*H, head): their gradients are added to; weight_hh 0 where the cell has none

    A part's share: first, last, and the address of `work`, room of `reduction_size`.
    """
    add, transpose, pack, add_row = (
        _make_add(dtype),
        make_transpose(dtype),
        make_pack_rows(dtype),
        _make_add_rows(dtype, 1),
    )
    add_rows = _make_add_rows(dtype, SIDE_BY_SIDE)
    size, width, apart = dtype.itemsize, host().width(dtype), REDUCTION.stride
    read, read_share = REDUCTION.read, REDUCTION.read_share
    sizes = most_rows, most_columns, few_columns = costs.SUM_ROWS, costs.SUM_COLUMNS, costs.FEW_SUM_COLUMNS

    def reduce(values, part):
        (
            _parties, _ready, _barrier, shares, K, H, head, I, S, gates, split, combine, slots, orders, h, x, sums, weight_ih,
            weight_hh,
        ) = read(values)  # fmt: skip
        first, last, work = read_share(values + shares + part * apart)
        stride, x_orders = S * H * size, orders + (gates - split) * 8
        blocks = (K + most_rows - 1) // most_rows
        packed_h = work + most_columns * most_rows * size
        of_row = (head + width - 1) // width * width * size  # of one head's packed units
        packed_x = packed_h + least(K, most_rows) * (H // head) * of_row
        for block in range(blocks):
            begin, end = K * block // blocks, K * (block + 1) // blocks
            k, h_rows, x_rows = end - begin, h + begin * H * size, x + begin * I * size
            d_stride = (k + width - 1) // width * width * size
            if not combine:
                for one in range(H // head if weight_hh else 0):
                    pack(h_rows + one * head * size, H * size, 0, 1, k, head, 0, 1, packed_h + one * k * of_row)
                pack(x_rows, I * size, 0, 1, k, I, 0, 1, packed_x)
            column, most = first, few_columns if combine else most_columns
            while column < last:
                slot = column // H
                unit = column - slot * H
                count = least(most, least(last - column, H - unit))
                d = slots + begin * stride + column * size
                grouped = k // SIDE_BY_SIDE * SIDE_BY_SIDE
                for row in range(0, grouped, SIDE_BY_SIDE):
                    add_rows(count, d + row * stride, stride, sums + column * 8)
                for row in range(grouped, k):
                    add_row(count, d + row * stride, stride, sums + column * 8)
                transpose(d, stride, k, count, work, d_stride)
                done = 0 if weight_hh and slot < gates else count
                while done < count:
                    one, to = (
                        (unit + done) // head,
                        weight_hh + (word(orders + slot * 8) * H + unit + done) * head * size,
                    )
                    some = least(count - done, (one + 1) * head - unit - done)
                    add(
                        combine, work + done * d_stride, d_stride, some, k, h_rows + one * head * size, H * size,
                        packed_h + one * k * of_row, head, to,
                    )  # fmt: skip
                    done += some
                if slot >= split:
                    to = weight_ih + (word(x_orders + slot * 8) * H + unit) * I * size
                    add(combine, work, d_stride, count, k, x_rows, I * size, packed_x, I, to)
                column += count

    return cache.external(reduce, dtype.str, host(), *sizes, record=REDUCTION)
