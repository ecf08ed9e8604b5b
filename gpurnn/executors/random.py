"""Randomness as a function of the place: the same bits on every backend and executor, and in backward; nothing is drawn.

The generator is Philox 4x32-10 (`gpurnn.kernels.philox`).  Its key is a seed, which a layer draws when it is made; its
counter is which call of the layer it is, and where a value stands.  So a mask need not be kept: backward makes it again.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells.trace import Random
from gpurnn.kernels import deviates, philox
from gpurnn.types import Array

HEAD = 3  # numbers of `Draws.numbers` before the rows
KEYS = (1 << 64) - 1  # the call whose words are the keys of cells: dropout never comes so far
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

    def draws(self, rows: Array | None = None) -> "Draws":
        """The random numbers of a call of the layer's cells: one more call."""
        return Draws(self.seed, backend.ops.advance(self._calls), rows)

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


class Draws(NamedTuple):
    """The random numbers that a cell asks for in one call of a layer.

    call  as `ops.advance` gives it: on CUDA it lies on the device.
    rows  (N,): where the engine's batch rows stand in the caller's; None: there as well.
    at    which of the L*D layers in their directions.
    """

    seed: int
    call: Any
    rows: Array | None = None
    at: int = 0

    @property
    def key(self) -> tuple[int, int]:
        """Philox's, low word first."""
        low, high = words(self.seed, KEYS, 4 * self.at + 2)[-2:]
        return int(low), int(high)

    def numbers(self, N: int) -> np.ndarray:
        """What compiled code reads, int64: the key's words, the call, and where each of N batch rows stands."""
        rows = np.arange(N) if self.rows is None else backend.to_numpy(self.rows)
        call = self.call if isinstance(self.call, int) else int(self.call[0])
        return np.array([*self.key, call, *rows], np.int64)


class Step:
    """The arrays (m, H) of one step's random numbers, by their `trace.Random`: what says whether the others are right."""

    def __init__(self, numbers: np.ndarray, t: int, m: int, H: int, dtype: Any):
        """numbers: see `Draws.numbers`."""
        self.numbers, self.t, self.shape, self.dtype = numbers, t, (m, H), dtype

    def __getitem__(self, random: Random) -> Array:
        m, H = self.shape
        low, high, own_call = self.numbers[:HEAD].astype(np.uint32)
        rows, units = self.numbers[HEAD : HEAD + m].astype(np.uint32)[:, None], np.arange(H, dtype=np.uint32)[None]
        own_t = np.uint32(deviates.SEQUENCE if random.per == "sequence" else self.t)
        block, which = divmod(random.number, deviates.EACH)
        with np.errstate(over="ignore"):
            call, rows, t, units = np.broadcast_arrays(*np.atleast_1d(own_call, rows, own_t, units))
            key = low, high + np.uint32(self.numbers[2] >> 32)
            word = deviates.words(_words, key, call, rows, t, units, np.uint32(block))[which]
            if random.kind == "bernoulli":
                value = word < np.uint32(deviates.threshold(random.p))
            else:
                value = deviates.normal(word, ON_ARRAYS)
        return backend.asarray(value.astype(self.dtype), self.dtype, random.kind)


def _f32(value: Any) -> Any:
    return value.astype(np.float32) if isinstance(value, np.ndarray) else np.float32(value)


ON_ARRAYS = SimpleNamespace(
    f32=_f32, bits=lambda value: value.view(np.uint32), real=lambda value: value.view(np.float32), where=np.where
)
