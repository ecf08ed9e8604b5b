"""Training windows on the device, each copied while the step before it runs."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from gpurnn import backend
from gpurnn.types import Array


class Windows(Protocol):
    """Tokens (steps, batch) and their targets, by number; and whether the stream begins anew with them: `app.data.Windows`."""

    steps: int
    batch: int

    def at(self, index: int) -> tuple[np.ndarray, np.ndarray, bool]: ...


class _Slot(NamedTuple):
    """Memory on the device for one window, inputs and targets: copied when it is there, used when it is free again."""

    window: Array
    copied: Any
    used: Any


class Prefetch:
    """`Windows` on CUDA: `at` gives arrays of the device, and has the next window copied meanwhile, on a stream of its own.

    Two slots take turns.  The host never waits: a window goes through pinned memory, which is used again once its copy is
    done, and as long as none is there is more.
    """

    def __init__(self, windows: Windows):
        cuda, self._windows = backend.xp.cuda, windows
        shape = (2, windows.steps, windows.batch)
        self._stream = cuda.Stream(non_blocking=True)
        events = [cuda.Event(disable_timing=True) for _ in range(4)]
        self._slots = [_Slot(backend.xp.empty(shape, np.int32), *events[2 * s : 2 * s + 2]) for s in range(2)]
        for slot in self._slots:
            slot.used.record()  # behind whatever this memory was used for before
        self._staged: list[int | None] = [None, None]  # which window each slot holds
        self._first: dict[int, bool] = {}
        self._in_use: _Slot | None = None
        self._pinned: list[tuple[Any, np.ndarray]] = []  # an event behind each buffer's last copy

    def at(self, index: int) -> tuple[Array, Array, bool]:
        """Window `index`, as `Windows.at`; its arrays hold until the next call."""
        if self._in_use is not None:
            self._in_use.used.record()  # the work given so far is what reads the last window
        self._stage(index)
        self._stage(index + 1)
        slot = self._in_use = self._slots[index % 2]
        backend.xp.cuda.get_current_stream().wait_event(slot.copied)
        self._first = {index: self._first[index], index + 1: self._first[index + 1]}
        return slot.window[0], slot.window[1], self._first[index]

    def _stage(self, index: int) -> None:
        if self._staged[index % 2] == index:
            return
        slot = self._slots[index % 2]
        buffer = self._buffer(slot.window.shape)
        buffer[0], buffer[1], self._first[index] = self._windows.at(index)
        self._stream.wait_event(slot.used)
        slot.window.set(buffer, stream=self._stream)
        slot.copied.record(self._stream)
        done = backend.xp.cuda.Event(disable_timing=True)
        done.record(self._stream)
        self._pinned.append((done, buffer))
        self._staged[index % 2] = index

    def _buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        if self._pinned and self._pinned[0][0].done:
            return self._pinned.pop(0)[1]
        size = int(np.prod(shape))
        memory = backend.xp.cuda.alloc_pinned_memory(4 * size)
        return np.frombuffer(memory, np.int32, size).reshape(shape)
