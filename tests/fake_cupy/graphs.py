"""Stream capture: what is asked of the device is written down instead of done, and a graph does it, any number of times.

To write it down the stand-in does it once, and at the end puts all memory back as it was; memory allocated meanwhile is
poisoned.  A graph repeats every call on the same operands and copies what comes into what came when it was recorded.
What CUDA, CuPy or a lasting graph cannot bear raises: a wait, a copy from the host, work on another stream, memory from the
common pool, and a launch after the pool of its own has gone.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from .memory import allocations, counters


class CaptureError(RuntimeError):
    """As cudaErrorStreamCaptureUnsupported, or CuPy's own refusal."""


class Capture:
    """A capture under way, in one thread.  What other threads ask for waits meanwhile, as it may on a device: `exclusive`."""

    exclusive = threading.RLock()
    under_way: "Capture | None" = None

    def __init__(self, stream: Any, current_stream: Callable[[], Any], allocator: Callable[[], Any]):
        self.stream, self.current_stream, self._allocator = stream, current_stream, allocator
        self.calls: list[tuple[Callable, list, dict, Any]] = []
        self.busy = False
        self.pool: Any = None
        self.thread = threading.get_ident()
        self.exclusive.acquire()
        self._before = allocations.snapshot()
        Capture.under_way = self

    def write_down(self, function: Callable, args: tuple, options: dict) -> Any:
        if self.current_stream() is not self.stream:
            raise CaptureError("work on another stream while one is capturing")
        given = [list(value) if isinstance(value, Iterator) else value for value in args]
        self.busy = True
        try:
            result = function(*given, **options)
        finally:
            self.busy = False
        self.calls.append((function, given, options, result))
        return result

    def allocate(self) -> None:
        self.pool = self._allocator()
        if self.pool is None:
            raise CaptureError("an allocation from the common pool: others would get the graph's memory")

    def end(self) -> "Graph":
        Capture.under_way = None
        allocations.restore(self._before)
        self.exclusive.release()
        if self.pool is not None:
            self.pool.taken = True
        return Graph(self.calls, self.pool)


def capturing() -> Capture | None:
    """That of this thread.  Raises where the current stream is another thread's, who records all that it gets."""
    capture = Capture.under_way
    if capture is None or capture.thread == threading.get_ident():
        return capture
    if capture.current_stream() is capture.stream:
        raise CaptureError("work on a stream that another thread is capturing")
    return None


class Graph:
    """`cupy.cuda.Graph`."""

    def __init__(self, calls: list, pool: Any):
        self._calls, self._pool = calls, None if pool is None else weakref.ref(pool)

    @property
    def operations(self) -> list[str]:
        """What the device is given to do, by name: kernels, products, fills and copies.  Views are none."""
        return [name for call in self._calls if (name := _operation(*call)) is not None]

    def launch(self, stream: Any = None) -> None:
        if self._pool is not None and self._pool() is None:
            raise CaptureError("the pool that the graph's memory comes from is gone")
        counters.graphs += 1
        with Capture.exclusive:
            for function, args, options, result in self._calls:
                _copy(function(*args, **options), result)


ALLOCATIONS = ("empty", "empty_like")


def _operation(function: Callable, args: list, options: dict, result: Any) -> str | None:
    """The name of what a call makes the device do; None for a view, an allocation, or what concerns no value at all."""
    name, of = function.__name__, args[0] if args else None
    if name == "__call__":  # of a ufunc, or of a kernel
        name = getattr(of, "__name__", "") or of.kernel.name
    if hasattr(result, "_host"):
        shown = hasattr(of, "_host") and np.may_share_memory(of._host, result._host)
        return None if name in ALLOCATIONS or not result.size or (shown and options.get("out") is None) else name
    if name in ("__setitem__", "fill"):
        target = of._host if name == "fill" else np.asarray(of._host[args[1]])
        given = args[-1]._host if hasattr(args[-1], "_host") else None
        return None if not target.size or (given is not None and _same(target, given)) else name
    return name


def _same(one: np.ndarray, other: np.ndarray) -> bool:
    """CuPy leaves out what would be assigned to itself, as `a[...] += b` ends."""
    ours, theirs = one.__array_interface__, other.__array_interface__
    return all(ours[key] == theirs[key] for key in ("data", "shape", "strides"))


def recorded(function: Callable) -> Callable:
    """Makes a call of `function` one node of the graph while a stream is capturing; what it calls belongs to it."""

    @functools.wraps(function)
    def wrapper(*args: Any, **options: Any) -> Any:
        capture = capturing()
        if capture is None or capture.busy:
            with Capture.exclusive:
                return function(*args, **options)
        return capture.write_down(function, args, options)

    return wrapper


def check_allocation() -> None:
    """Called before memory is allocated: a graph's has to come from a pool of its own, and nobody else's from there."""
    from .cuda import private_pool

    pool = private_pool()
    if pool is not None and pool.taken:
        raise CaptureError("an allocation from a graph's pool: what is free there is where the graph keeps its results")
    capture = capturing()
    if capture is not None:
        capture.allocate()


def refused(what: str) -> None:
    """Raises while a stream of this thread is capturing."""
    if capturing() is not None:
        raise CaptureError(f"the current stream is capturing, so {what}")


def _copy(source: Any, target: Any) -> None:
    if isinstance(target, tuple | list):
        for one, other in zip(source, target, strict=True):
            _copy(one, other)
    elif hasattr(target, "_host") and source is not target:
        ours, theirs = source._host, target._host
        if ours.__array_interface__["data"] != theirs.__array_interface__["data"]:
            writable = np.lib.stride_tricks.as_strided(theirs, writeable=True) if not theirs.flags.writeable else theirs
            writable[...] = ours
