"""Gradient flow: how large dL/dstate_t is at every step, layer, direction and state."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.diagnose.subject import (
    Loss,
    at_every_step,
    checked_input,
    layer_names,
    output_gradient,
    recurrent_part,
    step_number,
    undisturbed,
)

LARGEST_LOG = 700.0  # e^710 overflows


@dataclass(frozen=True, eq=False)
class Flow:
    """L2 norms of dL/dstate_t.

    norms   (L*D, S, T) over batch and units, or (L*D, S, T, N) by batch row; float64.  States are taken as they are
            carried: for an LSTM dL/dc_t is without its way through h_t.
    layers  names of the first axis: l0, l0_reverse, l1, ...
    states  names of the second: h, c.
    step    the step whose loss this is the gradient of; None: of all steps' losses.
    """

    norms: np.ndarray
    layers: tuple[str, ...]
    states: tuple[str, ...]
    step: int | None = None

    @property
    def total(self) -> np.ndarray:
        """(L*D, T) or (L*D, T, N): the norm over all states together."""
        return np.hypot.reduce(self.norms, axis=1)

    def by_lag(self, layer: str) -> np.ndarray:
        """(S, lags) or (S, lags, N): from the loss's own step (lag 0) back to where this direction began.

        Raises ValueError where the loss is that of all steps: it has no lag.
        """
        if self.step is None:
            raise ValueError("step: expected the flow of one step's loss, got that of all steps")
        return _backwards(self.norms[self._at(layer)], layer, self.step)

    def rate(self, layer: str) -> float:
        """The factor by which the norm changes with every step back, from a line through its logarithms (least squares).

        NaN where fewer than three norms are positive.
        """
        norms = self.norms[self._at(layer)]
        norms = np.hypot.reduce(norms if norms.ndim == 2 else np.hypot.reduce(norms, axis=2), axis=0)
        last = norms.shape[0] - 1 if self.step is None else self.step
        return factor_per_step(
            norms if self.step is None and layer.endswith("_reverse") else _backwards(norms, layer, last)
        )

    def _at(self, layer: str) -> int:
        if layer not in self.layers:
            raise ValueError(f"layer: expected one of {', '.join(self.layers)}, got {layer!r}")
        return self.layers.index(layer)


def gradient_flow(
    model: Any,
    x: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    state: Any = None,
    lengths: Any = None,
    step: int | None = None,
    rows: bool = False,
) -> Flow:
    """How gradients flow back through `model` for one batch: one forward and one backward pass of its own executor.

    model    a SequenceModel or a recurrent layer.  x, state, lengths: as it takes them.
    targets, loss  as in `gpurnn.full_bptt`; without them the loss is the sum of all outputs.
    step     only what the loss has of this step (negative: from the end); None: of all steps.
    rows     by batch row; costs a backward pass for each.
    `clip_in_time` acts as in training; dropout does not, and random numbers are their means.  Parameters, gradients and random state stay as they were.
    Raises ValueError where shapes do not fit or x is not finite, FloatingPointError where dL/dstate_t is not, naming
    layer, state and step.
    """
    flow = measured_flow(model, x, targets, loss, state, lengths, step, rows)
    raise_where_flow_is_not_finite(flow)
    return flow


def measured_flow(
    model: Any, x: Any, targets: Any, loss: Loss | None, state: Any, lengths: Any, step: int | None, rows: bool = False
) -> Flow:
    """`gradient_flow`, whether finite or not."""
    layer, xp = recurrent_part(model), backend.xp
    x = checked_input(model, x, lengths)
    T, N = x.shape[:2]
    at = None if step is None else step_number(step, T)
    if at is not None or rows:
        at_every_step(model)
    with undisturbed(model):
        out, _, backward = model(x, state, lengths=lengths)
        dout = output_gradient(out, targets, loss, lengths)
        if at is not None:
            dout = _only(dout, at)
        shape = (layer.num_layers * layer.directions, layer.cell.states, T)
        parts = [dout] if not rows else [_only(dout, (slice(None), n)) for n in range(N)]
        norms = []
        for part in parts:
            filled = xp.zeros(shape)
            backward(part, keep=True, flow=filled)
            norms.append(backend.to_numpy(filled))
    return Flow(np.stack(norms, axis=-1) if rows else norms[0], layer_names(layer), layer.cell.state_names, at)


def _only(dout: Any, index: Any) -> Any:
    """dout with 0 everywhere else."""
    kept = backend.xp.zeros_like(dout)
    kept[index] = dout[index]
    return kept


def _backwards(norms: np.ndarray, layer: str, step: int) -> np.ndarray:
    """norms, with time as its last axis or the one before the rows', from `step` on against the direction of `layer`."""
    axis = 0 if norms.ndim == 1 else 1
    index = np.arange(step, norms.shape[axis]) if layer.endswith("_reverse") else np.arange(step, -1, -1)
    return norms.take(index, axis=axis)


def raise_where_flow_is_not_finite(flow: Flow) -> None:
    """Names the state where it happened first, on the way back from the top layer's end."""
    for at in reversed(range(len(flow.layers))):
        name = flow.layers[at]
        bad = ~np.isfinite(flow.norms[at].reshape(*flow.norms.shape[1:3], -1)).all(axis=-1)  # (S, T)
        steps = np.flatnonzero(bad.any(axis=0))
        if len(steps):
            t = int(steps[0] if name.endswith("_reverse") else steps[-1])
            s = int(np.argmax(bad[:, t]))
            came = flow.norms[at, s, t].max()
            raise FloatingPointError(
                f"dL/d{flow.states[s]} of {name}: expected finite norms, got {came} at step {t}, "
                f"and at {len(steps) - 1} of the {bad.shape[1] - 1} others"
            )


def factor_per_step(norms: np.ndarray) -> float:
    """norms (lags,), lag 0 first -> the factor from one to the next; NaN for fewer than three positive, finite ones."""
    lags = np.flatnonzero((norms > 0) & np.isfinite(norms))
    if len(lags) < 3:
        return math.nan
    slope = np.polyfit(lags, np.log(norms[lags]), 1)[0]
    return math.exp(min(slope, LARGEST_LOG))
