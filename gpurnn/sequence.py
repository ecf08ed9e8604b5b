"""One layer in one direction over a sequence: picks the executor, sorts out lengths, and owns the tape.

Lengths are handled here, once for every cell and executor.  The batch is sorted by length, longest first, so that the
rows that live at a step are the first ones; inputs behind a row's end are replaced by zeros in that copy, which is why
nothing there, NaN included, can reach a result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.executors import choose
from gpurnn.executors.contract import Backward, Weights
from gpurnn.types import Array

State = tuple[Array, ...]


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


def run(
    cell: Cell,
    x: Array,
    weights: Weights,
    state: State,
    *,
    lengths: Lengths | None = None,
    reverse: bool = False,
    executor: str | None = None,
    training: bool = True,
    precision: str = "float32",
    clip: bool = False,
) -> tuple[Array, State, Callable | None]:
    """x (T, N, I) and S initial states (N, H) -> y (T, N, H), final states, backward.

    `backward(dy, dstate, grads, options)` adds to `grads` and returns dx and the gradients of the initial states; None
    without training.  dstate may be None, for zeros.  clip: whether backward will clip in time.  At padding y and dx are 0
    and dy is not read.
    """
    xp = backend.xp
    T, N, _ = x.shape
    H = state[0].shape[1]
    engine = choose(executor, cell, H, N, x.dtype, precision, training=training, clip=clip)
    rows = np.full(T, N) if lengths is None else lengths.rows
    if lengths is not None:
        zero = xp.zeros((), x.dtype)
        x = xp.where(lengths.padding, zero, x)[:, lengths.order]
        # The states of empty rows go round the engine, whose products run over all rows and know no NaN in an unused one.
        given, state = state, tuple(xp.where(lengths.empty, zero, part)[lengths.order] for part in state)
    states, tape = engine.forward(cell, xp.ascontiguousarray(x), weights, state, rows, reverse, training, precision)
    y = states.h[:T] if reverse else states.h[1:]
    final = states.final
    if lengths is not None:
        y = y[:, lengths.inverse]
        final = tuple(
            xp.where(lengths.empty, part, end[lengths.inverse]) for part, end in zip(given, final, strict=True)
        )
    if not training:
        return y, final, None

    def backward(dy: Array, dstate: State | None, grads: Weights, options: Backward) -> tuple[Array, State]:
        if lengths is None:
            return engine.backward(tape, dy, dstate, grads, options)
        dstate = None if dstate is None else tuple(part[lengths.order] for part in dstate)
        dx, dinitial = engine.backward(tape, dy[:, lengths.order], dstate, grads, options)
        return dx[:, lengths.inverse], tuple(part[lengths.inverse] for part in dinitial)

    return y, final, backward
