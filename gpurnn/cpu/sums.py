"""Sums over many rows that are as good as sums over few: CHUNK rows in their own type, and of those in float64."""

import numpy as np

CHUNK = 16  # rows whose float32 sum is as good as one of a few


def column_sums(values: np.ndarray) -> np.ndarray:
    """Of (R, C), in float64 (C,)."""
    whole = len(values) // CHUNK * CHUNK
    partial = values[:whole].reshape(-1, CHUNK, values.shape[1]).sum(1)
    return partial.sum(0, dtype=np.float64) + values[whole:].sum(0, dtype=np.float64)


def segment_sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of the rows from each start to the next, in float64 where they are many."""
    lengths = np.diff(starts, append=len(values))
    if lengths.max() <= CHUNK:
        return np.add.reduceat(values, starts, axis=0)
    begins = (np.arange(len(values)) - np.repeat(starts, lengths)) % CHUNK == 0
    partial = np.add.reduceat(values, np.flatnonzero(begins), axis=0)
    return np.add.reduceat(partial, np.cumsum(begins)[starts] - 1, axis=0, dtype=np.float64)
