"""Small copies and fills on a device, gathered and done by one launch."""

from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.executors.device import grid, kernel
from gpurnn.kernels import moves

Array = Any


class Moves:
    """`copy` and `fill` note what is to be done, `run` does it in that order.

    A copy's source may be the target of a later one, whole; targets are contiguous.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[int, int, int, int]] = []  # addresses, bytes, pattern
        self._kept: list[Array] = []

    def copy(self, target: Array, source: Array) -> None:
        """target[...] = source, of the same shape and dtype."""
        source = backend.xp.ascontiguousarray(source)
        if target.size:
            self._jobs.append((source.data.ptr, target.data.ptr, target.nbytes, 0))
            self._kept.append(source)

    def fill(self, target: Array, value: int) -> None:
        """target[...] = value, for int64."""
        if target.size:
            self._jobs.append((0, target.data.ptr, target.nbytes, int(np.int64(value))))

    def run(self) -> None:
        for start in range(0, len(self._jobs), moves.JOBS):
            jobs = self._jobs[start : start + moves.JOBS]
            size = 1 if any(number % 4 for job in jobs for number in job[:3]) else 4
            longest = max(count for _, _, count, _ in jobs) // size
            given = [(source, target, count // size, pattern) for source, target, count, pattern in jobs]
            given += [(0, 0, 0, 0)] * (moves.JOBS - len(jobs))
            blocks = min(moves.MOST_BLOCKS, grid(longest, moves.THREADS))
            kernel(moves.move, size=size)(blocks, *(number for job in given for number in job), longest)
        self._jobs, self._kept = [], []
