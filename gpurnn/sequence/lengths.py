"""Rows of different lengths, once for every cell and executor, and once for all layers.

The batch is sorted by length, longest first, so that the rows that live at a step are the first ones; inputs behind a
row's end are replaced by zeros in that copy, which is why nothing there, NaN included, can reach a result.
"""

from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.types import Array


class Lengths(NamedTuple):
    """The lengths of a batch and what follows from them.

    order     batch rows, longest first; `inverse` undoes it.
    rows      (T,) how many rows live at each step.
    padding   (T, N, 1) True behind each row's end, in the caller's order.
    empty     (N, 1) True for rows of length 0, in the caller's order.
    """

    order: Array
    inverse: Array
    rows: np.ndarray
    padding: Array
    empty: Array

    def sorted(self, array: Array, blank: Array | None = None) -> Array:
        """array (T or L*D, N, ...) with its batch rows in `order`; 0 where `blank` is True, before."""
        if blank is not None:
            array = backend.xp.where(blank, backend.xp.zeros((), array.dtype), array)
        return array.take(self.order, 1)

    def unsorted(self, array: Array) -> Array:
        """What was `sorted`, in the caller's order."""
        return array.take(self.inverse, 1)


def checked_lengths(lengths: Any, T: int, N: int) -> np.ndarray:
    """`lengths` on the host, (N,) int64.  Raises ValueError unless they are N whole numbers in 0..T."""
    given = backend.to_numpy(backend.asarray(lengths, None, "lengths"))
    if given.shape != (N,) or (N and given.dtype.kind not in "iu"):  # an empty list has no whole numbers in it
        raise ValueError(f"lengths: expected {N} whole numbers, got {given.dtype} of shape {given.shape}")
    if N and (given.min() < 0 or given.max() > T):
        raise ValueError(f"lengths: expected values from 0 to T = {T}, got {given.min()} to {given.max()}")
    return given.astype(np.int64)


def prepare_lengths(lengths: Any, T: int, N: int) -> Lengths | None:
    """None where every row is full.  Raises ValueError unless `lengths` is N whole numbers in 0..T."""
    if lengths is None:
        return None
    given = checked_lengths(lengths, T, N)
    if N == 0 or given.min() == T:
        return None
    steps = np.arange(T)
    order = np.argsort(-given, kind="stable")
    rows = (given[None, :] > steps[:, None]).sum(1)
    xp = backend.xp
    padding = xp.asarray(steps[:, None] >= given[None, :])[..., None]
    return Lengths(xp.asarray(order), xp.asarray(np.argsort(order)), rows, padding, xp.asarray(given == 0)[:, None])
