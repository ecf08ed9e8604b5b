"""Threads of our own, large products on them, and BLAS held to one thread while we work.

After a two-thread product OpenBLAS's workers spin for about 100 ms and take the core that our next loop wants.  So BLAS
runs on one thread inside our operations, large products are split over threads (NumPy releases the interpreter lock
in them), and the caller's setting comes back when the last of our operations ends.  Without threadpoolctl BLAS keeps its
threads: slower, and right all the same.
"""

import functools
import itertools
import os
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np

from gpurnn import locks
from gpurnn.cpu import costs
from gpurnn.environment import cpu_threads


def start(work: Callable[[], None]) -> None:
    """`work()` in a new thread that the process does not wait for.  RuntimeError where there is none to be had."""
    locks.system("start_new_thread")(work, ())


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
            done = locks.new_lock()
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


class _Leave(functools.partial):
    """What a `with` calls as it ends."""

    held: Iterator[object]  # ends with this


class _OneBlasThread:
    """A context manager that many threads may hold at once: the first in saves BLAS's threads, the last out restores.

    An interrupt at any moment leaves BLAS as it was: a step that it cuts short is begun anew.  It may even come before a
    word of how to leave has been run.  Then what was to be called goes, and with it a generator, which leaves as it ends.
    """

    def __init__(self) -> None:
        self._holders: dict[object, int] = {}  # the thread of each `with`
        self._before: list[tuple[Any, int]] | None = None  # libraries, and the threads that each had

    def __enter__(self) -> None:
        """All is done when `with` asks what to call at its end, which it does first."""

    @property
    def __exit__(self) -> Callable[..., None]:
        held = self._held()
        try:
            leave = _Leave(self._leave, next(held))
            leave.held = held
        except BaseException:
            held.close()
            raise
        return leave

    def _held(self) -> Generator[object, None, None]:
        hold = object()
        try:
            self._join(hold)
            yield hold
        finally:
            if hold in self._holders:
                self._leave(hold)

    def _join(self, hold: object) -> None:
        controller = _controller()
        with locks.blas:
            self._holders[hold] = threading.get_ident()
            if self._before is None:
                blas = controller.select(user_api="blas").lib_controllers if controller is not None else []
                counts = [(library, library.num_threads) for library in blas]
                self._before = [(library, count) for library, count in counts if count is not None]  # that can be set
                _set_threads([(library, 1) for library, _ in self._before])

    def _leave(self, hold: object, *_: object) -> None:
        with locks.blas:
            if self._before is not None and self._holders.keys() <= {hold}:
                _set_threads(self._before)
                self._before = None
            self._holders.pop(hold, None)

    def forked(self) -> None:
        """A child has none of its parent's threads but one."""
        gone = [hold for hold, thread in self._holders.items() if thread != threading.get_ident()]
        for hold in gone:
            self._leave(hold)


one_blas_thread = _OneBlasThread()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=one_blas_thread.forked)


@functools.cache
def _controller() -> Any:
    """What sets BLAS's threads; None where threadpoolctl is not installed."""
    with locks.building:
        try:
            from threadpoolctl import ThreadpoolController
        except ModuleNotFoundError:
            return None
        return ThreadpoolController()


def _set_threads(counts: list[tuple[Any, int]]) -> None:
    """threadpoolctl 3.8 heeds only the first Python thread that sets OpenBLAS's threads, for as long as that one lives.

    Our last thread out is often not our first one in, and must restore what that one has changed.
    """
    for library, count in counts:
        _let_any_thread_control(library)
        library.set_num_threads(count)
        _let_any_thread_control(library)


def _let_any_thread_control(library: Any) -> None:
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
    if 2 * a.shape[0] * a.shape[1] * b.shape[1] < costs.PRODUCT_FLOPS:
        np.matmul(a, b, out=out)
        return out

    def multiply(rows: slice) -> None:
        np.matmul(a[rows], b, out=out[rows])

    run(multiply, shares(a.shape[0], cpu_threads()))
    return out
