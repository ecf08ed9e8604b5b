"""Losses with their gradients: softmax cross-entropy and the mean squared error.

Each returns `loss, dinput` from one call.  Reductions, with E_t the loss of one position:
  "mean"   the mean over positions (cross-entropy) or over elements (squared error), as in PyTorch
  "sum"    the sum over all of them: the literature's E = sum of E_t
  "none"   each by itself; the gradient is then that of their SUM
The loss is computed in float64 whatever the input, and is a scalar of the backend, numpy.float64 or a CuPy array of
shape (), so that adding losses up never makes the host wait for the device.  The gradient has the input's dtype.
With `lengths`, N whole numbers, the first two axes are (T, N) and positions behind a row's length do not exist: a mean is
over valid steps only, and there loss and gradient are 0 whatever stands there.
A target out of range is raised at once on NumPy; on CUDA its loss and gradient are NaN, and `gpurnn.synchronize` raises it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import checked, one_of, probability, returned
from gpurnn.sequence import checked_lengths
from gpurnn.types import Array

Loss = Callable[..., tuple[Any, Array]]

REDUCTIONS = ("mean", "sum", "none")
OUTPUTS = ("linear", "softmax")


def softmax(logits: Array, axis: int = -1) -> Array:
    """exp(logits) / sum of exp(logits) along `axis`, without overflow.

    logits: float, any shape.  Returns the same shape and dtype.  A row whose largest logit is inf, -inf or NaN has no
    softmax and comes out as NaN.  Raises TypeError for integers, ValueError where `axis` is missing or empty.
    """
    logits = floats(logits, "logits")
    if not isinstance(axis, int | np.integer) or isinstance(axis, bool | np.timedelta64):
        raise ValueError(f"axis: expected a whole number, got {axis!r:.80}")
    if not -logits.ndim <= axis < logits.ndim or logits.shape[axis] < 1:
        raise ValueError(f"logits: expected at least 1 class along axis {axis}, got the shape {logits.shape}")
    exps, _ = backend.ops.exponentials(logits, axis)
    exps /= exps.sum(axis=axis, keepdims=True)
    return exps.astype(logits.dtype, copy=False)


def softmax_cross_entropy(
    logits: Array,
    targets: Array,
    *,
    reduction: str = "mean",
    ignore_index: int | None = None,
    weight: Any = None,
    label_smoothing: float = 0.0,
    lengths: Any = None,
) -> tuple[Array, Array]:
    """Cross-entropy of softmax(logits) against class numbers, E_t = -log softmax(logits)[target], in nats.

    logits: (..., C) float, usually (T, N, C).  targets: (...) integers in [0, C), or `ignore_index`.
    Positions whose target is `ignore_index` have loss 0 and gradient exactly 0 even where their logits are NaN, and
    "mean" does not count them; where nothing is left to count, loss and gradient are 0.
    weight: (C,) numbers from 0, what a position of each class counts; "mean" divides by the sum of what they count.  In a
    captured step it has to lie on the device.
    label_smoothing: the part of each target, in [0, 1), that is spread over all C classes (Szegedy et al. 2016), as PyTorch
    does it, weights included.
    lengths: None, or of each row of (T, N, C) and (T, N) how many steps are valid; see above.
    Returns loss, a float64 scalar, for "none" (...) float64; and dlogits, of the shape and dtype of logits.
    A target of logit -inf has loss inf.  A row whose largest logit is inf, -inf or NaN has loss and gradient NaN.
    Raises TypeError for integer logits or non-integer targets; ValueError where shapes do not fit, C is 0, ignore_index
    is no whole number, or a target is out of range, naming the first such target (on CUDA by `gpurnn.synchronize`).
    """
    one_of("reduction", reduction, REDUCTIONS)
    if lengths is not None:
        options = {"ignore_index": ignore_index, "weight": weight, "label_smoothing": label_smoothing}
        own = functools.partial(softmax_cross_entropy, reduction=reduction, **options)
        return over_valid_steps(own, logits, targets, lengths)
    logits, targets = floats(logits, "logits"), backend.asarray(targets, None, "targets")
    if targets.dtype.kind not in "iu":
        raise TypeError(f"targets: expected integers, got {targets.dtype}")
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        expected = "logits (..., C) and targets (...), such as (T, N, C) and (T, N)"
        raise ValueError(f"expected {expected}; got {logits.shape} and {targets.shape}")
    if logits.shape[-1] < 1:
        raise ValueError(f"logits: expected at least 1 class along the last axis, got the shape {logits.shape}")
    ignore = None if ignore_index is None else _whole(ignore_index)
    smoothing = probability("label_smoothing", label_smoothing)
    if weight is None and smoothing == 0:
        return backend.ops.cross_entropy(logits, targets, ignore, reduction)
    return _weighted(logits, targets, ignore, reduction, weight, smoothing)


def _weighted(
    logits: Array, targets: Array, ignore: int | None, reduction: str, weight: Any, smoothing: float
) -> tuple[Array, Array]:
    """With E = -log p[y] and d = p - onehot(y), as they are without, and W the sum of the weights w, the loss is

    (1 - s) w[y] E + s/C (W (E + z[y]) - w.z), for -log p[c] = E + z[y] - z[c], and its gradient
    (1 - s) w[y] d + s/C (W d + W onehot(y) - w).
    """
    xp, C = backend.xp, logits.shape[-1]
    E, d = backend.ops.cross_entropy(logits, targets, ignore, "none")
    w = xp.ones(C) if weight is None else checked(weight, np.dtype("float64"), "weight", (C,), "(C,)")
    if not backend.ops.LOOKING_WAITS and not (w.min() >= 0 and xp.isfinite(w).all()):
        raise ValueError(f"weight: expected finite numbers from 0, got {w.min()} to {w.max()}")
    hot = xp.arange(C) == targets[..., None]
    counts = xp.where(hot, w, 0.0).sum(axis=-1)  # of an ignored target, which may be any number, see below
    if ignore is not None:
        counts = xp.where(targets == ignore, 0.0, counts)
    each = (1 - smoothing) * xp.where(counts == 0, 0.0, counts * E)  # a loss may be inf
    gradient = (1 - smoothing) * counts[..., None] * d
    if smoothing:
        z, total, part = logits.astype("float64"), w.sum(), smoothing / C
        if ignore is not None:
            z = xp.where((targets == ignore)[..., None], 0.0, z)
        spread = total * (E + xp.where(hot, z, 0.0).sum(axis=-1)) - xp.where(w == 0, 0.0, w * z).sum(axis=-1)
        slope = total * (d + hot) - w
        if ignore is not None:
            spread = xp.where(targets == ignore, 0.0, spread)
            slope = xp.where((targets == ignore)[..., None], 0.0, slope)
        each, gradient = each + part * spread, gradient + part * slope
    if reduction == "none":
        return each, gradient.astype(logits.dtype)
    if reduction == "sum":
        return each.sum(), gradient.astype(logits.dtype)
    count = counts.sum()
    share = xp.where(count > 0, 1 / xp.where(count > 0, count, 1.0), 0.0)
    return each.sum() * share, (gradient * share).astype(logits.dtype)


def mean_squared_error(
    pred: Array, target: Array, *, output: str = "linear", reduction: str = "mean", lengths: Any = None
) -> tuple[Array, Array]:
    """Squared error (f(pred) - target)^2, without a factor 1/2, as PyTorch's `mse_loss`.

    pred: float, any shape, (..., C) for output="softmax".  target: real numbers of the same shape.
    output: "linear", f(pred) = pred, or "softmax", f = softmax over the last axis: the squared error of a classifier's
        probabilities, its gradient taken back through the softmax.  Both are reduced alike: "mean" divides by the
        number of ELEMENTS (T N C), "sum" adds the squares up, "none" returns them.  The literature's
        E = sum of 1/2 |y_t - target_t|^2 is half of "sum", its gradient half of the gradient here.
    lengths: None, or of each row of (T, N, ...) how many steps are valid; see above.
    Returns loss, a float64 scalar, for "none" float64 of the shape of pred; and dpred, of the shape and dtype of pred.
    Of no elements the mean is 0.  Raises TypeError for integer `pred`, ValueError where the shapes differ.
    """
    one_of("output", output, OUTPUTS)
    one_of("reduction", reduction, REDUCTIONS)
    if lengths is not None:
        own = functools.partial(mean_squared_error, output=output, reduction=reduction)
        return over_valid_steps(own, pred, target, lengths)
    xp = backend.xp
    pred = floats(pred, "pred")
    target = backend.asarray(target, xp.promote_types(pred.dtype, xp.float32), "target")
    if pred.shape != target.shape:
        raise ValueError(f"expected pred and target of one shape, got {pred.shape} and {target.shape}")

    y = softmax(pred.astype(target.dtype, copy=False)) if output == "softmax" else pred
    dpred = y - target
    squares = xp.square(dpred, dtype=xp.float64)
    dpred *= 2.0 / max(pred.size, 1) if reduction == "mean" else 2.0
    if output == "softmax":  # dy/dlogits = diag(y) - y y^T
        dpred -= (dpred * y).sum(axis=-1, keepdims=True)
        dpred *= y
    dpred = dpred.astype(pred.dtype, copy=False)
    if reduction == "none":
        return squares, dpred
    total = squares.sum()
    return (total / max(pred.size, 1) if reduction == "mean" else total), dpred


def evaluate(loss: Loss, out: Array, targets: Any, lengths: Any = None) -> tuple[Any, Array]:
    """`loss(out, targets)` -> value, dout; with lengths, of the valid steps alone.

    A loss with a parameter `lengths` is told them.  Any other is given the valid positions, as `over_valid_steps` does.
    """
    if lengths is None:
        return _answer(loss(out, targets), out)
    if _takes_lengths(loss):
        return _answer(loss(out, targets, lengths=lengths), out)
    return over_valid_steps(loss, out, targets, lengths)


def _answer(given: Any, out: Array) -> tuple[Any, Array]:
    """What a loss returned, if it is a value and a gradient of the shape of `out`; TypeError or ValueError otherwise."""
    value, dout = returned("loss", given, "its value, dout")
    if isinstance(out, backend.xp.ndarray):
        dout = backend.asarray(dout, None, "dout")
        if dout.shape != out.shape:
            raise ValueError(f"loss: expected a gradient of the shape of out, {out.shape}, got {dout.shape}")
    return value, dout


def over_valid_steps(loss: Loss, out: Array, targets: Any, lengths: Any) -> tuple[Any, Array]:
    """`loss` of the M valid positions of out (T, N, ...) and targets (T, N, ...), one behind another: (M, ...) each.

    targets may be None.  Returns the loss's value, and dout with 0 behind each row's end; so has a value for each position.
    Raises ValueError where targets do not stand at every step (such a loss needs a parameter `lengths`), or where the
    loss's gradient is not of the shape that it was given.
    """
    xp, out = backend.xp, backend.asarray(out, None, "out")
    if out.ndim < 2:
        raise ValueError(f"out: expected (T, N, ...) beside lengths, got {out.shape}")
    T, N = out.shape[:2]
    valid = xp.asarray(np.flatnonzero(np.arange(T)[:, None] < checked_lengths(lengths, T, N)))
    if targets is not None:
        targets = backend.asarray(targets, None, "targets")
        if targets.shape[:2] != (T, N):
            raise ValueError(
                f"targets: expected (T, N, ...) = ({T}, {N}, ...) beside lengths, got {targets.shape}; "
                "a loss of other targets needs a parameter `lengths`"
            )
        targets = targets.reshape(T * N, *targets.shape[2:])[valid]
    chosen = out.reshape(T * N, *out.shape[2:])[valid]
    try:
        value, dchosen = _answer(loss(chosen, targets), chosen)
    except Exception as error:
        error.add_note("positions are those within `lengths`, one behind another, time first")
        raise

    def placed(values: Array) -> Array:
        whole = xp.zeros((T * N, *values.shape[1:]), values.dtype)
        whole[valid] = values
        return whole.reshape(T, N, *values.shape[1:])

    each = getattr(value, "ndim", 0) and value.shape[0] == len(chosen)
    return placed(value) if each else value, placed(dchosen)


def _takes_lengths(loss: Loss) -> bool:
    try:
        return "lengths" in inspect.signature(loss).parameters
    except (TypeError, ValueError):  # some callables of other languages have none to show
        return False


def floats(array: Any, name: str) -> Array:
    array = backend.asarray(array, None, name)
    if array.dtype.kind != "f":
        raise TypeError(f"{name}: expected floating point, got {array.dtype}")
    return array


def _whole(ignore_index: Any) -> int:
    """As Python's own, of which kernels take the 64 bits that they read."""
    proper = isinstance(ignore_index, int | np.integer) and not isinstance(ignore_index, bool | np.timedelta64)
    if not proper or not -(1 << 63) <= ignore_index < 1 << 63:
        raise ValueError(f"ignore_index: expected a whole number of 64 bits, got {ignore_index!r}")
    return int(ignore_index)
