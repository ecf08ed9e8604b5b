"""Influence: how much the output of one step depends on the input of every other."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import listed, whole
from gpurnn.diagnose.subject import (
    at_every_step,
    back_through,
    blocks,
    recurrent_part,
    run_steps,
    step_number,
    undisturbed,
)


def influence(
    model: Any, x: Any, *, step: int = -1, state: Any = None, outputs: Sequence[int] | None = None
) -> np.ndarray:
    """Frobenius norms of dy_step/dx_k for every k, (T, N) float64; through a head too, and to embedded tokens.

    model, x, state: as for `gradient_flow`.  step: that of the output (negative: from the end).  outputs: the outputs y to
    look at, C of them; None: all.  Where dy_step/dx_k is one number, this is its magnitude.
    Costs C backward passes from `step`, taken many at a time.
    """
    layer = recurrent_part(at_every_step(model))
    head = getattr(model, "head", None)
    with undisturbed(model):
        tapes, y = run_steps(model, x, state)
        T, N, width = y.shape
        at = step_number(step, T)
        count = width if head is None else head(y[at], training=False)[0].shape[-1]
        chosen = (
            range(count)
            if outputs is None
            else [_output(number, count) for number in listed("outputs", outputs, "numbers of outputs or None")]
        )
        until = at + 1 if layer.directions == 1 else T
        squares = np.zeros((T, N))
        for part in blocks(chosen, 3 * y.itemsize * until * N * max(width, layer.input_size)):
            unit = backend.xp.zeros((len(part), N, count), layer.dtype)
            for row, number in enumerate(part):
                unit[row, :, number] = 1
            dy = backend.xp.zeros((len(part), until, N, width), layer.dtype)
            dy[:, at] = unit if head is None else _through(head, y[at], unit)
            dx = back_through(layer, tapes, dy)
            squares[:until] += backend.to_numpy((dx.astype("float64") ** 2).sum(axis=(0, 3)))
    return np.sqrt(squares)


def _output(number: int, count: int) -> int:
    if whole("outputs", number, 0) >= count:
        raise ValueError(f"outputs: expected numbers from 0 to {count - 1}, got {number!r}")
    return int(number)


def _through(head: Any, y: Any, unit: Any) -> Any:
    """unit (R, N, C) -> (R, N, D*H): y (N, D*H) is shared by all R."""
    _, backward = head(backend.xp.stack([y] * len(unit)))
    return backward(unit)
