"""Small copies and fills on a device, gathered and done by one launch."""

import numpy as np

from gpurnn import backend
from gpurnn.cuda.device import grid, kernel
from gpurnn.kernels import moves
from gpurnn.types import Array

_NONE = (0, 0, 0, 0)


class Moves:
    """`copy` and `fill` note what is to be done, `run` does it in that order.

    A copy's source may be the target of a later one, whole; targets are contiguous.
    """

    def __init__(self) -> None:
        self._jobs: list[tuple[int, int, int, int]] = []  # addresses, bytes, pattern
        self._kept: list[Array] = []
        self._sum, self._dtype = _NONE, "float32"

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

    def add(self, out: Array, a: Array, b: Array) -> None:
        """out[...] = a + b, of one contiguous shape and dtype; once, before all else."""
        self._sum = out.data.ptr, a.data.ptr, b.data.ptr, out.size
        self._dtype = out.dtype.name
        self._kept += [a, b]

    def run(self) -> None:
        for start in range(0, max(len(self._jobs), int(self._sum[3] > 0)), moves.JOBS):
            jobs = self._jobs[start : start + moves.JOBS]
            size = 1 if any(number % 4 for job in jobs for number in job[:3]) else 4
            longest = max((count for _, _, count, _ in jobs), default=0) // size
            given = [(source, target, count // size, pattern) for source, target, count, pattern in jobs]
            given += [(0, 0, 0, 0)] * (moves.JOBS - len(jobs))
            blocks = min(moves.MOST_BLOCKS, grid(max(longest, self._sum[3]), moves.THREADS))
            move = kernel(moves.move, size=size, dtype=self._dtype)
            move(blocks, *(number for job in given for number in job), longest, *self._sum)
            self._sum = _NONE
        self._jobs, self._kept = [], []
