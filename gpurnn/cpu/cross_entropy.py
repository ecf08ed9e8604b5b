"""Softmax cross-entropy and its gradient on NumPy: one array of the size of logits, and no one-hot array."""

import numpy as np

from gpurnn.arguments import wrong_target

# exp of anything within +-SAFE, and the sum of a whole vocabulary of it, is far from float32's limits.
SAFE = 30.0


def cross_entropy(
    logits: np.ndarray, targets: np.ndarray, ignore: int | None, reduction: str
) -> tuple[np.ndarray, np.ndarray]:
    """See `losses.softmax_cross_entropy`.  ValueError for the first target outside [0, C) that is not ignored."""
    kept = targets != ignore if ignore is not None else None
    _check_range(targets, kept, logits.shape[-1])
    mean = reduction == "mean"
    count = 1 if not mean else max(targets.size, 1) if kept is None else np.maximum(kept.sum(), 1)
    losses, dlogits = _each(logits, targets, kept, count)
    if reduction == "none":
        return losses, dlogits
    total = losses.sum()
    return (total / count if mean else total), dlogits


def exponentials(logits: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray | float]:
    """exp(logits - shift) in a new array, and shift in float64: a number, or one for each row along `axis`.

    Usually shift is the row's maximum.  Rows of one vocabulary are so short that finding and subtracting it costs more
    than the exponentials; logits that all lie within +-SAFE, as they nearly always do, need no shift (and are more
    accurate without).  float16 is computed in float32.
    """
    dtype = np.promote_types(logits.dtype, np.float32)
    if logits.size and logits.max() <= SAFE and logits.min() >= -SAFE:
        return np.exp(logits, dtype=dtype), 0.0
    shift = logits.max(axis=axis, keepdims=True)
    with np.errstate(invalid="ignore"):  # inf - inf
        work = np.subtract(logits, shift, dtype=dtype)
    return np.exp(work, out=work), shift.astype(np.float64)


def _each(
    logits: np.ndarray, targets: np.ndarray, kept: np.ndarray | None, count: int | np.integer
) -> tuple[np.ndarray, np.ndarray]:
    """E_t in float64, and dlogits = softmax(logits) - onehot(target), divided by `count`.

    The one array holds exp(logits) first, then the gradient.
    """
    classes = logits.shape[-1]
    rows = logits.reshape(-1, classes)
    target = targets.reshape(-1).astype(np.int64, copy=False)
    if kept is not None:
        kept = kept.reshape(-1)
        target = np.where(kept, target, 0)
    position = np.arange(len(rows))

    work, shift = exponentials(rows, -1)
    sums = work.sum(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):  # rows without a softmax become NaN, quietly
        # In float64, and this side of the logarithm first: shift and logit may be large and close to one another.
        losses = (shift - rows[position, target].astype(np.float64)[:, None] + np.log(sums.astype(np.float64)))[:, 0]
        scale = 1.0 / count
        work *= (scale / sums).astype(work.dtype)
    work[position, target] -= scale
    if kept is not None:
        losses[~kept] = 0.0
        work[~kept] = 0.0
    return losses.reshape(targets.shape), work.reshape(logits.shape).astype(logits.dtype, copy=False)


def _check_range(targets: np.ndarray, kept: np.ndarray | None, classes: int) -> None:
    """Raises ValueError for a target outside [0, C) that is not ignored."""
    wrong = (targets < 0) | (targets >= classes)
    if kept is not None:
        wrong &= kept
    if not bool(wrong.any()):
        return
    first = int(wrong.reshape(-1).argmax())
    raise wrong_target(targets.shape, classes, first, int(targets.reshape(-1)[first]))
