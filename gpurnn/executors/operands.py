"""A layer's weights as the loops read them: packed by the threads that are about to read them, or as they lie."""

from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.executors import packing
from gpurnn.executors.layout import ordered
from gpurnn.executors.numpy_loop import Weights
from gpurnn.executors.packing import packed_size
from gpurnn.executors.simd import begin


class Operands(NamedTuple):
    """arrays: what a loop is given.  jobs: for `packing.make_pack_share`, what has to be put there from `sources` first."""

    arrays: list[np.ndarray]
    jobs: np.ndarray
    sources: list[np.ndarray]


def for_forward(cell: Cell, weights: Weights, lies: tuple[bool, bool], units: slice) -> Operands:
    """For `products.make_projection`: W_ih, W_hh's split and its joint gates.  lies: whether W_ih does, and W_hh."""
    trace, split, H = cell.trace, len(cell.trace.split), weights.weight_hh.shape[1]
    whole = units == slice(0, H)

    def blocks(weight: np.ndarray, order: tuple[int, ...]) -> list[np.ndarray]:
        """All units' rows in one; of some units, those of each gate in one of their own."""
        if whole:
            return [ordered(weight, order, H)]
        return [weight[gate * H + units.start : gate * H + units.stop] for gate in order]

    (weight_ih, weight_hh), (r_order, x_order) = weights[:2], (trace.r_order, trace.x_order)
    return _operands(
        [
            weight_ih if lies[0] else blocks(weight_ih, x_order),
            weight_hh if lies[1] else blocks(weight_hh, r_order[:split]),
            weight_hh if lies[1] else blocks(weight_hh, r_order[split:]),
        ],
        weight_hh.dtype,
        transposed=True,
    )


def for_backward(cell: Cell, weights: Weights, lies: tuple[bool, bool], inputs: slice, units: slice) -> Operands:
    """For `products.make_return`: those columns of W_ih, and those of W_hh."""
    trace, H = cell.trace, weights.weight_hh.shape[1]
    (weight_ih, weight_hh), (r_order, x_order) = weights[:2], (trace.r_order, trace.x_order)
    return _operands(
        [
            weight_ih if lies[0] else [ordered(weight_ih, x_order, H)[:, inputs]],
            weight_hh if lies[1] else [ordered(weight_hh, r_order, H)[:, units]],
        ],
        weight_hh.dtype,
        transposed=False,
    )


def _operands(given: list[np.ndarray | list[np.ndarray]], dtype: np.dtype, transposed: bool) -> Operands:
    """Of matrices that stay as they are, and of lists of them that are packed one behind the other."""
    arrays, jobs, sources = [], [], []
    for matrices in given:
        if isinstance(matrices, np.ndarray):
            arrays.append(matrices.reshape(-1))
            continue
        shapes = [matrix.shape[::-1] if transposed else matrix.shape for matrix in matrices]
        sizes = [packed_size(k, n, dtype) for k, n in shapes]
        arrays.append(np.empty(sum(sizes), dtype))
        at = begin(arrays[-1])
        for matrix, (k, n), size in zip(matrices, shapes, sizes, strict=True):
            jobs.append((begin(matrix), matrix.strides[0], k, n, transposed, at))
            at += size * dtype.itemsize
        sources += matrices
    return Operands(arrays, np.array(jobs, np.int64).reshape(-1, packing.JOB), sources)
