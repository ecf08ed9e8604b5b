"""Randomness as a function of the place: the same bits on every backend and executor, and in backward; nothing is drawn.

The generator is Philox 4x32-10 (`gpurnn.kernels.philox`).  Its key is a seed, which a layer draws when it is made; its
counter is which call of the layer it is, and where a value stands.  So a mask need not be kept: backward makes it again.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.kernels import philox
from gpurnn.types import Array

_words = philox.generator(np.uint32, np.uint64)


class Masks:
    """The dropout masks of a layer, one for each call.

    seed: from `rng`, by a generator of its own, so that what else is drawn from there stays the same.  On CUDA the number
    of calls lies on the device, where a captured step finds and advances it.
    """

    def __init__(self, rng: np.random.Generator):
        self.seed = int(rng.spawn(1)[0].integers(1 << 63))
        self._calls = backend.xp.zeros(1, np.int64)

    @property
    def calls(self) -> int:
        """How many there were; on CUDA the device has to be asked, which waits."""
        return int(self._calls[0])

    @calls.setter
    def calls(self, value: int) -> None:
        self._calls.fill(value)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Calls inside do not count: the masks that they see come again behind it."""
        before = self._calls.copy()
        try:
            yield
        finally:
            self._calls[...] = before

    def __call__(self, x: Array, p: float) -> tuple[Array, Callable[[Array], Array]]:
        """x of any shape -> x with values set to 0 with probability p and the others divided by 1-p; and the same masking
        for a gradient of that shape."""
        threshold = min(round(p * 2**32), 2**32 - 1)
        scale = x.dtype.type(1) / x.dtype.type(1 - p)
        call = backend.ops.advance(self._calls)
        masked = functools.partial(backend.ops.drop, seed=self.seed, call=call, threshold=threshold, scale=scale)
        return masked(x), masked


def words(seed: int, call: int, count: int) -> np.ndarray:
    """The uint32 words of places 0..count-1 in a call, by NumPy: what says whether the others are right."""
    blocks = np.arange(-(-count // 4), dtype=np.uint64)
    low, high = np.uint64(0xFFFFFFFF), np.uint64(32)

    def halves(call: Any) -> tuple[np.ndarray, np.ndarray]:
        wide = np.atleast_1d(np.asarray(call, np.uint64))
        return (wide & low).astype(np.uint32), (wide >> high).astype(np.uint32)

    return np.stack(np.broadcast_arrays(*_words(*halves(blocks), *halves(call), *halves(seed))), 1).reshape(-1)[:count]
