"""Medians, percentiles, and what may be said about a ratio of two noisy times.

Times on a shared machine have a long tail to the right, so everything here rests on medians and on resampling
(Efron 1979, percentile bootstrap), never on means and standard deviations.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
FEWEST_SAMPLES = 3  # with fewer on either side `changed` gives no verdict


class Change(NamedTuple):
    """What became of a time: after / before with its interval, and the verdict."""

    ratio: float
    low: float
    high: float
    verdict: str  # "slower", "faster", "same" or, with too few samples, "unknown"


def summary(samples: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile).  Raises ValueError where there is no sample, or one is not a time."""
    low, median, high = np.percentile(_times("samples", samples), (20, 50, 80))
    return float(median), float(low), float(high)


def ratio(ours: Sequence[float], theirs: Sequence[float], rng: Any = 0) -> tuple[float, float, float]:
    """theirs / ours, above 1 where we are faster: (median, low, high) with a 95% bootstrap interval.

    The samples are pairs, the k-th of both taken in the same round: what slows a whole round down cancels.
    rng: a NumPy generator or a seed.  Raises ValueError where the lengths differ.
    """
    a, b = _times("ours", ours), _times("theirs", theirs)
    if a.size != b.size:
        raise ValueError(f"expected pairs, got {a.size} of ours and {b.size} of theirs")
    quotients = b / a
    low, high = _interval(_resampled_medians(quotients, np.random.default_rng(rng)))
    return float(np.median(quotients)), low, high


def changed(before: Sequence[float], after: Sequence[float], *, least: float = 0.05, rng: Any = 0) -> Change:
    """Whether a time has changed between two runs, whose samples are not pairs.

    least: the smallest relative change that counts; runs on one machine differ by a few percent for no reason that a
        bootstrap within a run could see (memory layout, clocks), so 0.05.
    "slower" (or "faster") asks for two things: the ratio of the medians is beyond `least`, and its whole 95% interval
    is on that side of 1.  Samples that scatter widely make the interval wide, and the verdict "same".
    """
    if not 0 <= least < 1:
        raise ValueError(f"least: expected a number from 0 to 1, got {least!r}")
    a, b = _times("before", before), _times("after", after)
    rng = np.random.default_rng(rng)
    middle = float(np.median(b) / np.median(a))
    low, high = _interval(_resampled_medians(b, rng) / _resampled_medians(a, rng))
    if min(a.size, b.size) < FEWEST_SAMPLES:
        return Change(middle, low, high, "unknown")
    if low > 1 and middle >= 1 + least:
        return Change(middle, low, high, "slower")
    if high < 1 and middle <= 1 / (1 + least):
        return Change(middle, low, high, "faster")
    return Change(middle, low, high, "same")


def _resampled_medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Medians of RESAMPLES samples with replacement, each of the size of `values`."""
    return np.median(values[rng.integers(0, values.size, (RESAMPLES, values.size))], axis=1)


def _interval(values: np.ndarray) -> tuple[float, float]:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(values, (tail, 100 - tail))
    return float(low), float(high)


def _times(name: str, samples: Sequence[float]) -> np.ndarray:
    array = np.asarray(samples, dtype=np.float64)
    if array.ndim != 1 or not array.size:
        raise ValueError(f"{name}: expected one or more times, got shape {array.shape}")
    if not (np.isfinite(array) & (array > 0)).all():
        raise ValueError(f"{name}: expected finite times above 0, got {array[~(np.isfinite(array) & (array > 0))][0]}")
    return array
