"""More losses: binary cross-entropy and Huber's; weights of classes and label smoothing of the softmax's.

Reductions, lengths, types and what a call returns are those of `losses.basic`.
"""

import functools
from typing import Any

from gpurnn import backend
from gpurnn.arguments import one_of, positive
from gpurnn.losses.basic import REDUCTIONS, floats, over_valid_steps
from gpurnn.types import Array


def binary_cross_entropy(
    logits: Array, targets: Array, *, reduction: str = "mean", lengths: Any = None
) -> tuple[Array, Array]:
    """-t log s - (1 - t) log(1 - s) with s = sigmoid(logits), in nats: as many yes-or-no questions as there are elements.

    logits: float, any shape.  targets: numbers in [0, 1] of the same shape.  "mean" is over ELEMENTS, as PyTorch's
    `binary_cross_entropy_with_logits`; of polyphonic music, whose literature gives nats a step, it is that by the number of
    notes.  Neither large logits nor such of the wrong sign overflow.
    Raises TypeError for integer logits; ValueError where shapes differ, or on NumPy a target is outside of [0, 1].
    """
    one_of("reduction", reduction, REDUCTIONS)
    if lengths is not None:
        own = functools.partial(binary_cross_entropy, reduction=reduction)
        return over_valid_steps(own, logits, targets, lengths)
    xp, (logits, targets) = backend.xp, _pair("logits", logits, "targets", targets)
    if not backend.ops.LOOKING_WAITS and targets.size and not (targets.min() >= 0 and targets.max() <= 1):
        raise ValueError(f"targets: expected values in [0, 1], got {targets.min()} to {targets.max()}")
    wide = logits.astype(xp.float64)
    small = xp.exp(-abs(wide))  # at most 1
    each = xp.maximum(wide, 0) - wide * targets + xp.log1p(small)
    dlogits = xp.where(wide < 0, small, 1.0) / (1 + small) - targets
    return _reduced(each, dlogits, reduction, logits.dtype)


def huber(
    pred: Array, target: Array, *, delta: float = 1.0, reduction: str = "mean", lengths: Any = None
) -> tuple[Array, Array]:
    """Huber's loss (1964) of e = pred - target: e^2 / 2 where |e| <= delta, else delta (|e| - delta / 2).

    pred: float, any shape.  target: real numbers of the same shape.  "mean" is over ELEMENTS, as PyTorch's `huber_loss`.
    Raises TypeError for integer `pred`, ValueError where the shapes differ or delta is not above 0.
    """
    one_of("reduction", reduction, REDUCTIONS)
    delta = positive("delta", delta)
    if lengths is not None:
        return over_valid_steps(functools.partial(huber, delta=delta, reduction=reduction), pred, target, lengths)
    xp, (pred, target) = backend.xp, _pair("pred", pred, "target", target)
    error = pred - target
    dpred = xp.clip(error, -delta, delta)
    return _reduced(dpred * (error - 0.5 * dpred), dpred, reduction, pred.dtype)


def _pair(one: str, pred: Array, other: str, target: Array) -> tuple[Array, Array]:
    """Both as arrays, the second in float64."""
    pred, target = floats(pred, one), backend.asarray(target, "float64", other)
    if pred.shape != target.shape:
        raise ValueError(f"expected {one} and {other} of one shape, got {pred.shape} and {target.shape}")
    return pred, target


def _reduced(each: Array, gradient: Array, reduction: str, dtype: Any) -> tuple[Array, Array]:
    count = max(each.size, 1) if reduction == "mean" else 1
    value = each if reduction == "none" else each.sum() / count
    return value, (gradient / count).astype(dtype)
