"""Threads of our own, large products on them, and BLAS held to one thread while we work.

After a two-thread product OpenBLAS's workers spin for about 100 ms and take the core that our next loop wants.  So BLAS
runs on one thread inside our operations, large products are split over threads (NumPy releases the interpreter lock
in them), and the caller's setting comes back when the last of our operations ends.  Without threadpoolctl BLAS keeps its
threads: slower, and right all the same.
"""

import _thread
import functools
import importlib
import itertools
import logging  # noqa: F401, before our handlers of a fork: the last to come is asked first, and see _before_fork
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.environment import compiles, cpu_threads

PARALLEL_FLOPS = 40_000_000  # a product below this is not worth waking another thread for
PARALLEL_BYTES = 1 << 22  # nor fewer zeros; the forward pass behind them has use for a thread that is awake


def _system(name: str) -> Callable:
    """Of `_thread`, and of the system: gevent and eventlet put green threads there, one of which runs at a time."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None:
        return gevent.get_original("_thread", name)
    return getattr(eventlet.original("_thread") if eventlet is not None else _thread, name)


def start(work: Callable[[], None]) -> None:
    """`work()` in a new thread that the process does not wait for.  RuntimeError where there is none to be had."""
    _system("start_new_thread")(work, ())


def new_lock() -> Any:
    return _system("allocate_lock")()


def run(work: Callable[[Any], None], parts: Sequence[Any]) -> None:
    """`work(part)` for every part at once, the first on the calling thread; an exception in any of them is raised.

    What no thread can be had for, the calling thread does.
    """
    errors: list[BaseException] = []

    def other(part: Any, done: Any) -> None:
        try:
            work(part)
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    waiting, left = [], [parts[0]]
    try:
        for part in parts[1:]:
            done = new_lock()
            done.acquire()
            try:
                start(functools.partial(other, part, done))
                waiting.append(done)
            except (RuntimeError, MemoryError):
                left.append(part)
        for part in left:
            work(part)
    finally:
        for done in waiting:
            done.acquire()
    if errors:
        raise errors[0]


class _OneBlasThread:
    """A context manager that many threads may hold at once: the first in saves BLAS's threads, the last out restores."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()
        self._holders = 0
        self._limit: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._holders == 0:
                self._limit = _limited()
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0 and self._limit is not None:
                _let_any_thread_control_blas()
                self._limit.restore_original_limits()
                _let_any_thread_control_blas()


one_blas_thread = _OneBlasThread()


building = threading.RLock()  # held by who imports an executor or compiles
_held: list[Any] = []  # by a fork


def _before_fork() -> None:
    """A child that is born while another thread compiles, or imports the compiler, would wait for that thread for ever.

    That thread writes to logs: were their lock taken first, each would wait for the other.  So logging is imported above.
    """
    numba = getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)
    for lock in (building, numba):
        if lock is not None:
            lock.acquire()
            _held.append(lock)


def _after_fork() -> None:
    while _held:
        _held.pop().release()


def _in_child() -> None:
    """It has none of its parent's threads."""
    _after_fork()
    one_blas_thread.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)


@functools.cache
def _controller() -> Any:
    """What sets BLAS's threads; None where threadpoolctl is not installed."""
    with building:
        try:
            from threadpoolctl import ThreadpoolController
        except ModuleNotFoundError:
            return None
        return ThreadpoolController()


def _limited() -> Any:
    """BLAS on one thread from now on: what restores its threads."""
    if _controller() is None:
        return None
    _let_any_thread_control_blas()
    return _controller().limit(limits=1, user_api="blas")


def _let_any_thread_control_blas() -> None:
    """threadpoolctl 3.8 heeds only the first Python thread that sets OpenBLAS's threads, for as long as that one lives.

    Our last thread out is often not our first one in, and must restore what that one has changed.
    """
    for library in _controller().lib_controllers:
        if hasattr(library, "clear_controlling_thread"):
            library.clear_controlling_thread(force=True)


def shares(count: int, parts: int) -> list[slice]:
    """0..count cut into at most `parts` nearly equal slices, none of them empty."""
    parts = max(1, min(parts, count))
    edges = [count * p // parts for p in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b for matrices, the rows of the result split over threads where that pays.  Call inside `one_blas_thread`."""
    out = np.empty((a.shape[0], b.shape[1]), a.dtype)
    if 2 * a.shape[0] * a.shape[1] * b.shape[1] < PARALLEL_FLOPS:
        np.matmul(a, b, out=out)
        return out

    def multiply(rows: slice) -> None:
        np.matmul(a[rows], b, out=out[rows])

    run(multiply, shares(a.shape[0], cpu_threads()))
    return out


def product(a: Any, b: Any) -> Any:
    """a @ b for matrices on either backend, for callers that hold no `one_blas_thread`."""
    if backend.name == "cuda":
        return a @ b
    with one_blas_thread:
        return matmul(a, b)


def clear(buffer: Any) -> None:
    """buffer[...] = 0 on either backend, for a buffer of `Parameters`."""
    if backend.name == "cuda" or buffer.nbytes < PARALLEL_BYTES or not compiles():
        buffer[...] = 0
    else:
        with building:
            clear = importlib.import_module("gpurnn.executors.clear").clear
        clear(buffer)
