"""Products of the rows of a few time steps with a layer's weights, whose gates are rows (G*H, K) in any order.

The weights are packed, gates in the order asked for; or they lie as they are, where so few rows meet them that packing
would take longer than it saves (`costs`: of whole passes, RNN and LSTM of 64 to 1400 units, batches of 1 to 64, 1 to 64
steps).
"""

import functools

import numpy as np

from gpurnn.cells import Cell
from gpurnn.cpu import cache, costs
from gpurnn.cpu.cache import call
from gpurnn.cpu.gemm import make_gemm, may_lie
from gpurnn.cpu.instructions import word
from gpurnn.cpu.packing import packed_size
from gpurnn.cpu.simd import host


def packing_pays(steps: int, rows: int, k: int) -> bool:
    """Whether weights (n, k) should be packed that `rows` rows meet in each of `steps` steps; `dot` reads them else."""
    return steps * (costs.LYING_ROWS + rows) * (k + costs.DOT_TERMS) >= costs.PACKING_ROWS * k


def packing_pays_backwards(steps: int, rows: int, n: int, dtype: np.dtype) -> bool:
    """The same for weights (k, n), which `gemm` reads else, or `combine` for one row."""
    return steps * (costs.LYING_ROWS + rows) >= costs.COPYING_ROWS or not may_lie(n, dtype)


@functools.cache
def make_project(dtype: np.dtype):
    """project(dot, steps, a, a_step, lda, m, weights, k, H, unit, end_unit, order, gates, c, c_step, ldc, accumulate): gates
    from a state, or from x.

    At each of `steps`, m rows of C (+)= A W^T for the units [unit, end_unit) of the gates in `order`, the address of their
    numbers, which stand in C H columns apart.  weights: W as `pack_gates` leaves it; or as it lies, where `dot` is not 0 but
    the address of `dot.dot`.  Distances are in bytes, as in `gemm`.
    """
    gemm, size = make_gemm(dtype), dtype.itemsize

    def project(dot, steps, a, a_step, lda, m, weights, k, H, unit, end_unit, order, gates, c, c_step, ldc, accumulate):
        units, stride, row = end_unit - unit, H * size, k * size
        if dot:
            for place in range(gates):
                w, to = weights + (word(order + place * 8) * H + unit) * row, c + place * stride
                call(dot, steps, a, a_step, lda, m, w, row, k, units, to, c_step, ldc, accumulate)
        else:
            blocks, n = (1, gates * H) if units == H else (gates, units)
            gemm(steps, a, a_step, lda, m, weights, 0, k, blocks, n, c, c_step, stride, ldc, accumulate)

    return cache.external(project, dtype.str, host())


@functools.cache
def make_give_back(dtype: np.dtype):
    """give_back(ldw, combine, steps, d, d_step, ldd, m, weights, H, n, order, gates, c, c_step, ldc, accumulate): what gates'
    gradients D mean for a state, or for x.

    At each of `steps`, m rows of C (+)= D W, n columns of W with the gates of its rows in `order`.  weights: those columns
    as `pack_rows` leaves them, and ldw 0; or where they begin in W as it lies, its rows ldw bytes apart, and `combine`
    0 or, for one row in all, the address of `combine.combine`.
    """
    gemm, size = make_gemm(dtype), dtype.itemsize

    def give_back(ldw, combine, steps, d, d_step, ldd, m, weights, H, n, order, gates, c, c_step, ldc, accumulate):
        if ldw:
            for place in range(gates):
                at, w = d + place * H * size, weights + word(order + place * 8) * H * ldw
                if combine:
                    call(combine, at, ldd, m, w, ldw, H, n, c, ldc, accumulate + place)
                else:
                    gemm(steps, at, d_step, ldd, m, w, ldw, H, 1, n, c, c_step, 0, ldc, accumulate + place)
        else:
            gemm(steps, d, d_step, ldd, m, weights, 0, gates * H, 1, n, c, c_step, 0, ldc, accumulate)

    return cache.external(give_back, dtype.str, host())


def packed_forward(
    cell: Cell, lies: tuple[bool, bool], units: slice, I: int, H: int, head: int, dtype: np.dtype
) -> tuple[int, int, int]:
    """Bytes for W_ih, for W_hh's split gates and for its joint gates as `project` and `recur` want them for `units`.

    lies: whether W_ih is read where it lies, and W_hh.
    """
    count, split = units.stop - units.start, len(cell.trace.split)

    def size(gates: int, k: int, together: list[int]) -> int:
        sizes = (packed_size(k, gates * H, dtype) if n == H else gates * packed_size(k, n, dtype) for n in together)
        return sum(sizes) * dtype.itemsize

    of_ih = 0 if lies[0] else size(cell.gates, I, [count])
    if lies[1]:
        return of_ih, 0, 0
    own = _of_each_head(units, head)
    return of_ih, size(split, head, own), size(cell.gates - split, head, own)


def packed_backward(
    cell: Cell, lies: tuple[bool, bool], inputs: slice, units: slice, H: int, head: int, dtype: np.dtype
) -> tuple[int, int]:
    """Bytes for those columns of W_ih, and for those of W_hh, as `give_back` and `recur_back` want them."""
    of_ih = of_hh = 0
    if not lies[0]:
        of_ih = packed_size(cell.gates * H, inputs.stop - inputs.start, dtype)
    if not lies[1]:
        of_hh = sum(packed_size(cell.gates * head, n, dtype) for n in _of_each_head(units, head))
    return of_ih * dtype.itemsize, of_hh * dtype.itemsize


def _of_each_head(units: slice, head: int) -> list[int]:
    """How many of `units` each of their heads has, `head` units each."""
    if units.start % head + units.stop - units.start <= head:
        return [units.stop - units.start]
    starts = range(units.start // head * head, units.stop, head)
    return [min(units.stop, start + head) - max(units.start, start) for start in starts]
