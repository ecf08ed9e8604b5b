"""`cupy.cuda` of the stand-in: one device, streams, graphs, pools, pinned memory, cuBLAS and the runtime."""

import contextlib
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from . import cublas, runtime
from .graphs import Capture, CaptureError, Graph, capturing
from .memory import counters, poisoned

__all__ = [
    "Device", "Event", "Graph", "MemoryPool", "Stream", "alloc", "alloc_pinned_memory", "cublas", "device",
    "get_current_stream", "get_elapsed_time", "is_available", "runtime", "using_allocator",
]  # fmt: skip

_CUBLAS_HANDLE = 1

_ATTRIBUTES = {
    "CooperativeLaunch": 1,
    "L2CacheSize": 62_914_560,
    "MaxBlocksPerMultiprocessor": 32,
    "MaxGridDimX": 2**31 - 1,
    "MaxRegistersPerBlock": 65_536,
    "MaxRegistersPerMultiprocessor": 65_536,
    "MaxSharedMemoryPerBlock": 49_152,
    "MaxSharedMemoryPerBlockOptin": 232_448,
    "MaxSharedMemoryPerMultiprocessor": 233_472,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MultiProcessorCount": 132,
    "WarpSize": 32,
}


class _Thread(threading.local):
    """Each has its own current streams and allocators."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.allocators: list[Any] = []


_here = _Thread()


class Device:
    """The one device."""

    def __init__(self, device: int | None = None):
        self.id = 0 if device is None else int(device)
        runtime.setDevice(self.id)

    compute_capability = "90"
    cublas_handle = _CUBLAS_HANDLE

    @property
    def attributes(self) -> dict[str, int]:
        return dict(_ATTRIBUTES)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None  # as CuPy's, which defines comparisons only

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> "Device":
        return self

    def synchronize(self) -> None:
        runtime.deviceSynchronize()


class Event:
    """A place in a stream's work."""

    def __init__(self, block: bool = False, disable_timing: bool = False, interprocess: bool = False):
        self._stream: Stream | None = None
        self._mark = 0
        self.when = None if disable_timing else 0.0

    def record(self, stream: "Stream | None" = None) -> None:
        self._stream = get_current_stream() if stream is None else stream
        self._mark = self._stream.given
        if self.when is not None:
            self.when = time.perf_counter()

    @property
    def done(self) -> bool:
        return self._stream is None or self._stream.done_until >= self._mark

    def synchronize(self) -> None:
        counters.wait("an event")
        self.happen()

    def happen(self) -> None:
        if self._stream is not None:
            self._stream.run(self._mark)


def get_elapsed_time(start_event: Event, end_event: Event) -> float:
    """Milliseconds."""
    if not start_event.when or not end_event.when or not end_event.done:
        raise RuntimeError("expected two events that keep their time, recorded and over")
    return 1e3 * (end_event.when - start_event.when)


class Stream:
    """Work on it is done when the call that gives it returns; but copies to the device, when somebody waits for them."""

    null: ClassVar["Stream"]

    def __init__(self, null: bool = False, non_blocking: bool = False):
        self.ptr = 0 if null else id(self)
        self._non_blocking = non_blocking
        self._work: list[Any] = []
        self.done_until = 0

    @property
    def given(self) -> int:
        return self.done_until + len(self._work)

    def later(self, work: Any) -> None:
        """Does `work` at once on the current stream, as everything else; otherwise as late as it may be."""
        self._work.append(work)
        if self is get_current_stream():
            self.run(self.given)

    def run(self, until: int) -> None:
        while self._work and self.done_until < until:
            self._work.pop(0)()
            self.done_until += 1

    def __enter__(self) -> "Stream":
        _here.streams.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _here.streams.pop()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)
        self.run(self.given)

    def record(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        event.happen()

    def begin_capture(self, mode: int | None = None) -> None:
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if capturing() is not None or not self._non_blocking:
            raise CaptureError("expected a non-blocking stream, and no other capture under way")
        Capture(self, get_current_stream, private_pool)

    def end_capture(self) -> Graph:
        capture = capturing()
        if capture is None or capture.stream is not self:
            raise CaptureError("this stream is not capturing")
        return capture.end()

    def is_capturing(self) -> bool:
        capture = capturing()
        return capture is not None and capture.stream is self


Stream.null = Stream(null=True)


def get_current_stream() -> Any:
    return _here.streams[-1] if _here.streams else Stream.null


class MemoryPool:
    """Whose `malloc` is the allocator of a private pool.  taken: a graph's memory comes from it."""

    taken = False

    def malloc(self, size: int) -> Any:
        return alloc(size)


@contextlib.contextmanager
def using_allocator(allocator: Any = None) -> Iterator[None]:
    _here.allocators.append(allocator)
    try:
        yield
    finally:
        _here.allocators.pop()


def private_pool() -> MemoryPool | None:
    """The pool that memory comes from now; None for the common one."""
    return getattr(_here.allocators[-1], "__self__", None) if _here.allocators else None


def alloc(size: int) -> Any:
    """A `MemoryPointer`."""
    memory = poisoned((size,), np.dtype(np.uint8))
    return SimpleNamespace(ptr=memory.ctypes.data, mem=memory)


class PinnedMemoryPointer(np.ndarray):
    """Pinned memory: a buffer, with its address in `ptr`."""

    @property
    def ptr(self) -> int:
        return self.ctypes.data


_pinned: list[np.ndarray] = []


def alloc_pinned_memory(size: int) -> Any:
    _pinned.append(np.full(size, 0xAB, np.uint8))
    return _pinned[-1].view(PinnedMemoryPointer)


def is_pinned(host: np.ndarray) -> bool:
    return host.flags.c_contiguous and any(np.may_share_memory(host, memory) for memory in _pinned)


def is_available() -> bool:
    return True


device = SimpleNamespace(Device=Device, get_cublas_handle=lambda: _CUBLAS_HANDLE, get_device_id=runtime.getDevice)
