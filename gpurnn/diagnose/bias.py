"""What truncation and clipping do to a gradient: its angle to the full one, and how much of its length is left."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import positive, whole
from gpurnn.bptt import TruncatedBPTT
from gpurnn.diagnose.subject import Loss, at_every_step, checked_input, output_gradient, recurrent_part, undisturbed
from gpurnn.optim.clipping import clip_grad_norm, clip_grad_value

Gradients = dict[str, np.ndarray]


@dataclass(frozen=True)
class Bias:
    """A biased gradient against the full one, over all parameters together.

    cosine, degrees: the angle between them; ratio: norm of the biased over norm of the full gradient.
    by_name: (cosine, ratio) of each parameter.  Where the biased gradient is 0, the angle counts as 90 degrees; where the full one
    of a parameter is, both are NaN.
    """

    cosine: float
    degrees: float
    ratio: float
    by_name: Mapping[str, tuple[float, float]]

    def __str__(self) -> str:
        return f"{self.degrees:.3g} degrees (cosine {self.cosine:.4f}), norm x {self.ratio:.3g}"


def truncation_bias(
    model: Any, x: Any, targets: Any, loss: Loss | None, k1: int, k2: int | None = None, *, state: Any = None
) -> Bias:
    """Truncated BPTT (windows of k1 steps, k2 >= k1 steps back; see `TruncatedBPTT`) against full BPTT, parameters held still.

    model, x, targets, loss, state: as for `gradient_flow`.  Costs a full forward and backward pass, and the truncated
    one.  Raises ValueError where the full gradient is 0 or the model bidirectional, FloatingPointError where a gradient is not finite.
    """
    x = checked_input(model, x)
    if recurrent_part(model).directions != 1:
        raise ValueError("model: expected one direction, a stream of windows has no other; got a bidirectional one")
    with undisturbed(model):
        out, _, backward = model(x, state)
        dout = output_gradient(out, targets, loss)
        backward(dout)
        full = _gradients(model)
        model.zero_grad()
        window = [0, 0]
        k1 = whole("k1", k1)
        bptt = TruncatedBPTT(model, lambda out, _: (0.0, dout[window[0] : window[1]]), k1, k2)
        bptt.reset(state)
        for start in range(0, len(x), k1):
            window[:] = start, min(start + k1, len(x))
            part = x[start : window[1]]
            bptt.step(part, part)
        return compare(_gradients(model), full)


def clipping_bias(
    model: Any,
    x: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    norm: float | None = None,
    value: float | None = None,
    in_time: float | None = None,
    parts: int = 1,
    state: Any = None,
) -> Bias:
    """Clipping (in time, then by value, then by norm, whichever are given) against the gradient as it is.

    parts: the batch is cut into so many batches, each clipped by itself, and the sums are compared.  Clipping by norm
    keeps a gradient's direction, but the mean of clipped gradients is another one than the mean.
    model, x, targets (their second axis is the batch), loss, state: as for `gradient_flow`.  Costs two forward and
    backward passes.  Raises ValueError where the full gradient is 0, FloatingPointError where one is not finite.
    """
    layer, x = recurrent_part(at_every_step(model)), checked_input(model, x)
    if norm is None and value is None and in_time is None:
        raise ValueError("expected at least one of norm, value and in_time, got none")
    in_time = None if in_time is None else positive("in_time", in_time)
    N = x.shape[1]
    if targets is not None:
        targets = backend.asarray(targets, None, "targets")
        if targets.ndim < 2:
            raise ValueError(f"targets: expected (T, N, ...), got {targets.shape}")
    if whole("parts", parts) > N:
        raise ValueError(f"parts: expected at most one for each of {N} rows, got {parts}")
    states = layer.unpacked(state, N, "state", layer.trainable_h0) if state is not None else None
    full: Gradients = {}
    clipped: Gradients = {}
    before = layer.clip_in_time
    for rows in np.array_split(np.arange(N), parts):
        cut = slice(int(rows[0]), int(rows[-1]) + 1)
        begin = None if states is None else tuple(part[:, cut] for part in states)
        begin = begin[0] if begin is not None and len(begin) == 1 else begin
        wanted = None if targets is None else targets[:, cut]
        for total, limited in ((full, False), (clipped, True)):
            try:
                layer.clip_in_time = in_time if limited else None
                _add(total, _clipped(model, x[:, cut], wanted, loss, begin, value, norm, limited))
            finally:
                layer.clip_in_time = before
    return compare(clipped, full)


def compare(biased: Gradients, full: Gradients) -> Bias:
    """Two gradients, {name: array} with the same names."""
    if not any(value.any() for value in full.values()):
        raise ValueError("the full gradient is 0: there is nothing to compare with")
    whole_biased, whole_full = (np.concatenate([value.ravel() for value in g.values()]) for g in (biased, full))
    cosine, degrees, ratio = _angle(whole_biased, whole_full)
    by_name = {name: _angle(biased[name].ravel(), full[name].ravel())[::2] for name in full}
    return Bias(cosine, degrees, ratio, by_name)


def _angle(a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """Cosine, degrees, and norm of a over norm of b."""
    lengths = float(np.linalg.norm(a)), float(np.linalg.norm(b))
    if not lengths[1]:
        return math.nan, math.nan, math.nan
    if not lengths[0]:
        return 0.0, 90.0, 0.0
    a, b = a / lengths[0], b / lengths[1]
    # Small angles drown in the rounding of an arc cosine; this form is good for all (Kahan 2006).
    angle = 2 * math.atan2(float(np.linalg.norm(a - b)), float(np.linalg.norm(a + b)))
    return math.cos(angle), math.degrees(angle), lengths[0] / lengths[1]


def _clipped(
    model: Any,
    x: Any,
    targets: Any,
    loss: Loss | None,
    state: Any,
    value: float | None,
    norm: float | None,
    limited: bool,
) -> Gradients:
    with undisturbed(model):
        out, _, backward = model(x, state)
        backward(output_gradient(out, targets, loss))
        gradients = _gradients(model)
        if not limited:
            return gradients
        if value is not None:
            clip_grad_value(model, value)
        if norm is not None:
            clip_grad_norm(model, norm)
        return _gradients(model)


def _gradients(model: Any) -> Gradients:
    """The model's gradients in float64 on the host; FloatingPointError where one is not finite."""
    found = {name: backend.to_numpy(grad).astype(np.float64) for name, grad in model.grads.items()}
    for name, grad in found.items():
        if not np.isfinite(grad).all():
            bad = grad[~np.isfinite(grad)]
            raise FloatingPointError(
                f"gradient of {name}: expected finite values, got {bad[0]} ({bad.size} of {grad.size})"
            )
    return found


def _add(total: Gradients, part: Gradients) -> None:
    for name, value in part.items():
        total[name] = total.get(name, 0) + value
