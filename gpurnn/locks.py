"""Locks of the system's own, and those that a fork waits for.

A forked child has one thread, and all the locks as they were: one that another thread held is never released there.
Python's own import locks are among them, those of Numba's compiler and of LLVM too.  So who imports something in the midst
of a call, or compiles, holds `building`, and a fork waits until it can hold all of these itself.  One from the thread that
holds them goes on at once.
"""

import _thread
import itertools
import logging  # noqa: F401 (a fork takes its lock too: after ours, which compilers that log hold, if it is imported first)
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from operator import methodcaller
from typing import Any


def system(name: str) -> Callable[..., Any]:
    """Of `_thread`, and of the system: gevent and eventlet put green threads there, one of which runs at a time."""
    gevent, eventlet = sys.modules.get("gevent.monkey"), sys.modules.get("eventlet.patcher")
    if gevent is not None:
        return gevent.get_original("_thread", name)
    return getattr(eventlet.original("_thread") if eventlet is not None else _thread, name)


def new_lock() -> Any:
    return system("allocate_lock")()


def new_rlock() -> Any:
    return system("RLock")()


blas = new_rlock()  # held by who sets BLAS's threads
building = new_rlock()  # held by who imports an executor or compiles


class _Held(threading.local):
    """By this thread's fork."""

    def __init__(self) -> None:
        self.locks: list[Any] = []


_held = _Held()


def _waited_for() -> Iterator[Any]:
    """In the order in which they are taken: LLVM's is held for each call of it, within Numba's or alone, to free memory."""
    yield blas
    yield building
    numba, llvm = sys.modules.get("numba.core.compiler_lock"), sys.modules.get("llvmlite.binding.ffi")
    for holder in getattr(numba, "global_compiler_lock", None), getattr(getattr(llvm, "lib", None), "_lock", None):
        lock = getattr(holder, "_lock", None)
        if lock is not None:
            yield lock


def _before_fork() -> None:
    held = _held.locks
    held.extend(filter(_ACQUIRE, itertools.islice(_waited_for(), len(held), None)))


def _after_fork() -> None:
    held = _held.locks
    deque(map(_RELEASE, map(held.pop, itertools.repeat(-1, len(held)))), maxlen=0)


# Of C, as the loops over them are: no interrupt comes between a lock and its place in the list.
_ACQUIRE, _RELEASE = methodcaller("acquire"), methodcaller("release")

if hasattr(os, "register_at_fork"):
    for _ in range(2):  # what an interrupt keeps the first from, the second does
        os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork)
