"""One owned pool of threads, and BLAS held to one thread while we work.

After a two-thread product OpenBLAS's workers spin for about 100 ms and take the core that our next loop wants.  So BLAS
runs on one thread inside our operations, large products are split over this pool (NumPy releases the interpreter lock
in them), and the caller's setting comes back when the last of our operations ends.
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from gpurnn import backend
from gpurnn.environment import cpu_threads

LARGE = 1 << 22  # bytes
PARALLEL_FLOPS = 2_000_000  # a product below this is not worth waking another thread for


@functools.cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=size, thread_name_prefix="gpurnn")


class _Queue:
    """Puts the parts of one call into the pool's queue with nobody else's between them.

    The pool serves first who came first, and has as many threads as a call has parts.  So of calls whose parts wait for
    each other, the earliest has all its parts served; in between those of others, two calls could wait for ever.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = threading.Lock()

    def submit(self, work: Callable[[Any], None], parts: Sequence[Any]) -> list[Future]:
        pool = _pool(max(1, cpu_threads() - 1, len(parts)))
        with self._lock:
            return [pool.submit(work, part) for part in parts]


_queue = _Queue()
_leaving = threading.local()


def run(work: Callable[[Any], None], parts: Sequence[Any], barrier: Any = None) -> None:
    """`work(part)` for every part at once, the first on the calling thread; an exception in any of them is raised.

    barrier: where the parts meet, the last time when their work is done: then nobody has to wait until threads have gone
    to sleep and woken up, see `settle`.  What one of them raises opens it, so that the others come to an end.
    """

    def guarded(part: Any) -> None:
        try:
            work(part)
        except BaseException:
            barrier.open()
            raise

    one = work if barrier is None else guarded
    others = _queue.submit(one, parts[1:]) if len(parts) > 1 else []
    try:
        one(parts[0])
    finally:
        if barrier is None or barrier.is_open:
            for other in others:
                other.result()
        else:
            _leaving.futures = [*getattr(_leaving, "futures", ()), *others]


def settle(size: int) -> None:
    """Waits for threads of this one's earlier calls that have met and not yet let go of their arrays.

    To be called before arrays of `size` bytes in all are made: if they are large, there could be one more of them than
    there need be.
    """
    left = [future for future in getattr(_leaving, "futures", ()) if not future.done()]
    if size >= LARGE:
        for future in left:
            future.result()
        left = []
    _leaving.futures = left


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
                _let_any_thread_control_blas()
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                _let_any_thread_control_blas()
                self._limit.restore_original_limits()
                _let_any_thread_control_blas()


one_blas_thread = _OneBlasThread()


def _after_fork() -> None:
    """A forked child has none of its parent's threads."""
    _pool.cache_clear()
    _queue.reset()
    _leaving.futures = []
    one_blas_thread.reset()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


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
    """a @ b for matrices, the rows of the result split over the pool where that pays.  Call inside `one_blas_thread`."""
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
