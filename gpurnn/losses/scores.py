"""What people report beside a loss: accuracy and perplexity.  Scalars of the backend; nothing here waits for a device."""

from typing import Any

from gpurnn import backend
from gpurnn.losses.basic import floats, softmax_cross_entropy
from gpurnn.sequence import prepare_lengths
from gpurnn.types import Array


def accuracy(logits: Array, targets: Array, *, ignore_index: int | None = None, lengths: Any = None) -> Array:
    """The part of the positions whose largest logit is the target's, a float64 scalar; 0 where none counts.

    logits (..., C), targets (...), ignore_index and lengths as `softmax_cross_entropy` takes them.
    """
    xp, logits, targets = backend.xp, floats(logits, "logits"), backend.asarray(targets, None, "targets")
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        expected = "logits (..., C) and targets (...), such as (T, N, C) and (T, N)"
        raise ValueError(f"expected {expected}; got {logits.shape} and {targets.shape}")
    counts = xp.ones(targets.shape, bool) if ignore_index is None else targets != ignore_index
    if lengths is not None:
        if targets.ndim < 2:
            raise ValueError(f"targets: expected (T, N, ...) beside lengths, got {targets.shape}")
        prepared = prepare_lengths(lengths, *targets.shape[:2])
        if prepared is not None:
            counts = counts & ~prepared.padding.reshape(*targets.shape[:2], *[1] * (targets.ndim - 2))
    right = (logits.argmax(axis=-1) == targets) & counts
    return right.sum(dtype=xp.float64) / xp.maximum(counts.sum(dtype=xp.float64), 1.0)


def perplexity(logits: Array, targets: Array, *, ignore_index: int | None = None, lengths: Any = None) -> Array:
    """exp of the mean cross-entropy: among how many classes the model is undecided; of a uniform one, all C of them.

    Arguments and errors are those of `softmax_cross_entropy`.
    """
    loss, _ = softmax_cross_entropy(logits, targets, ignore_index=ignore_index, lengths=lengths)
    return backend.xp.exp(loss)
