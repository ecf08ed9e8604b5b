"""One owned pool of threads, and BLAS held to one thread while we work.

After a two-thread product OpenBLAS's workers spin for about 100 ms and take the core that our next loop wants.  So BLAS
runs on one thread inside our operations, large products are split over this pool (NumPy releases the interpreter lock
in them), and the caller's setting comes back when the last of our operations ends.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from threadpoolctl import ThreadpoolController

from gpurnn.environment import cpu_threads

PARALLEL_FLOPS = 2_000_000  # a product below this is not worth waking another thread for


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=max(1, cpu_threads() - 1), thread_name_prefix="gpurnn")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=lambda: (_pool.cache_clear(), one_blas_thread.reset()))


def run(work: Callable[[Any], None], parts: Sequence[Any]) -> None:
    """`work(part)` for every part at once, the first on the calling thread; an exception in any of them is raised."""
    others: list[Future] = [_pool().submit(work, part) for part in parts[1:]]
    try:
        work(parts[0])
    finally:
        for other in others:
            other.result()


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
                self._limit = _controller().limit(limits=1, user_api="blas")
            self._holders += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limit.restore_original_limits()


one_blas_thread = _OneBlasThread()


@functools.cache
def _controller() -> ThreadpoolController:
    return ThreadpoolController()


def shares(count: int, parts: int) -> list[slice]:
    """0..count cut into at most `parts` nearly equal slices, none of them empty."""
    parts = max(1, min(parts, count))
    edges = [count * p // parts for p in range(parts + 1)]
    return [slice(a, b) for a, b in zip(edges, edges[1:], strict=False)]


def matmul(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """a @ b for matrices, the rows of the result split over the pool where that pays.  Call inside `one_blas_thread`."""
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
    if 2 * a.shape[0] * a.shape[1] * b.shape[1] < PARALLEL_FLOPS:
        np.matmul(a, b, out=out)
        return out

    def multiply(rows: slice) -> None:
        np.matmul(a[rows], b, out=out[rows])

    run(multiply, shares(a.shape[0], cpu_threads()))
    return out
