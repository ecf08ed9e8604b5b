"""A layer's weights as the loops read them: packed by the threads that are about to read them, or as they lie."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.executors import packing
from gpurnn.executors.layout import ordered
from gpurnn.executors.numpy_loop import Weights
from gpurnn.executors.packing import packed_size, panel_columns


class Operand(NamedTuple):
    """array: what a loop is given.  blocks: matrices, or their transposes, and where in `array` each has to be packed."""

    array: np.ndarray
    blocks: tuple[tuple[np.ndarray, np.ndarray], ...] = ()
    transposed: bool = False


def for_forward(cell: Cell, weights: Weights, lies: tuple[bool, bool], units: slice) -> list[Operand]:
    """For `products.make_projection`: W_ih, W_hh's split and its joint gates.  lies: whether W_ih does, and W_hh."""
    trace, split, H = cell.trace, len(cell.trace.split), weights.weight_hh.shape[1]
    parts = (
        (weights.weight_ih, trace.x_order, lies[0]),
        (weights.weight_hh, trace.r_order[:split], lies[1]),
        (weights.weight_hh, trace.r_order[split:], lies[1]),
    )
    return [
        Operand(weight.reshape(-1)) if as_it_lies else _gates(weight, order, H, units)
        for weight, order, as_it_lies in parts
    ]


def for_backward(cell: Cell, weights: Weights, lies: tuple[bool, bool], inputs: slice, units: slice) -> list[Operand]:
    """For `products.make_return`: those columns of W_ih, and those of W_hh."""
    trace, H = cell.trace, weights.weight_hh.shape[1]
    parts = (weights.weight_ih, trace.x_order, lies[0], inputs), (weights.weight_hh, trace.r_order, lies[1], units)
    return [
        Operand(weight.reshape(-1))
        if as_it_lies
        else _packed([ordered(weight, order, H)[:, columns]], weight.dtype, transposed=False)
        for weight, order, as_it_lies, columns in parts
    ]


def _gates(weight: np.ndarray, order: tuple[int, ...], H: int, units: slice) -> Operand:
    """All units' rows in one block; of some units, those of each gate in one of their own."""
    if units == slice(0, H):
        return _packed([ordered(weight, order, H)], weight.dtype, transposed=True)
    return _packed(
        [weight[gate * H + units.start : gate * H + units.stop] for gate in order], weight.dtype, transposed=True
    )


def _packed(matrices: list[np.ndarray], dtype: np.dtype, transposed: bool) -> Operand:
    """For any number of matrices of one shape."""
    if not matrices:
        return Operand(np.empty(0, dtype))
    k, n = _extents(matrices[0], transposed)
    array = np.empty((len(matrices), packed_size(k, n, dtype)), dtype)
    return Operand(array.reshape(-1), tuple(zip(matrices, array, strict=True)), transposed)


def _extents(matrix: np.ndarray, transposed: bool) -> tuple[int, int]:
    k, n = matrix.shape[::-1] if transposed else matrix.shape
    return k, n


def pack(operands: Iterable[Operand], part: int, parts: int) -> None:
    """Does a share of the packing: the panels of each block are dealt out."""
    for operand in operands:
        for matrix, out in operand.blocks:
            (k, n), wide = _extents(matrix, operand.transposed), panel_columns(matrix.dtype)
            first, end = (-(-n // wide) * share // parts * wide for share in (part, part + 1))
            if end > first:
                columns = matrix[first:end] if operand.transposed else matrix[:, first:end]
                packing.pack(columns, operand.transposed, out[k * first :])
