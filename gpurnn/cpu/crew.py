"""Threads that do one call's work together, in compiled code from its beginning to its end.

Waking a thread takes as long as tens of millions of floating-point operations.  So a worker waits for its next job in
compiled code, without Python and its lock, for `costs.LINGER_TURNS`; only then it goes to sleep.  A call hires its workers,
has them for itself until all have done their parts, and frees them: all that is one step for Python, which no interrupt
from the keyboard can end halfway.  Workers live as long as the process; a forked child has none and starts its own.
"""

import ctypes
import functools
import itertools
import os
import struct
from collections.abc import Callable, Sequence

import numpy as np

from gpurnn import locks
from gpurnn.cpu import cache, costs, threads
from gpurnn.cpu.barrier import CACHE_LINE, make_pause, seen, show, swapped
from gpurnn.cpu.cache import Compiled, call
from gpurnn.cpu.instructions import put, word
from gpurnn.cpu.records import HEAD, WORD
from gpurnn.cpu.simd import address, host
from gpurnn.cpu.subnormals import flush, restore
from gpurnn.environment import MAX_THREADS, cpu_threads

ASLEEP, IDLE, HIRED, CALLED, JOB, DONE = range(6)  # CALLED: hired in its sleep, and to be woken
FOR_EVER, REST = -1, 100  # us: how long a lock is waited for
LOCK, ACQUIRE, RELEASE = 32, 40, 48  # where these words of a worker stand

_python = ctypes.pythonapi  # its locks can be had without the interpreter's own
_python.PyThread_allocate_lock.restype = ctypes.c_void_p


def _taken_lock() -> int:
    """A lock that is held: who wants it sleeps until it is released.  Never freed, as its waiter is never gone."""
    lock = _python.PyThread_allocate_lock()
    if not lock:
        raise MemoryError("there is no lock for another thread")
    _python.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock


def _address_of(name: str) -> int:
    return ctypes.cast(getattr(_python, name), ctypes.c_void_p).value or 0


class _Worker:
    """Its words: STATE | function, values, part of its job | a lock, and what acquires and releases it; and, each alone in
    its cache lines, the two places where those meet who do a job that this worker is the first to be hired for.
    """

    def __init__(self) -> None:
        words = np.zeros(4 * CACHE_LINE // 8, np.int64)
        first = -address(words) % CACHE_LINE // 8
        self.words = words[first:]
        self.address = address(self.words)
        self.words[LOCK // 8] = _taken_lock()
        self.words[ACQUIRE // 8] = _address_of("PyThread_acquire_lock_timed")
        self.words[RELEASE // 8] = _address_of("PyThread_release_lock")
        self.words[0] = IDLE

    @property
    def state(self) -> int:
        return int(self.words[0])

    def work(self) -> None:
        """In a thread of its own, which so keeps the words in memory for as long as it looks at them."""
        _serve()(self.address)


class _Office:
    """Who works here, and a word that is 1 while somebody hires."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = locks.new_lock()
        self._workers: list[_Worker] = []
        self._table = np.zeros(MAX_THREADS, np.int64)  # their addresses
        self._desk = np.array([0, _taken_lock(), _address_of("PyThread_acquire_lock_timed")], np.int64)

    @property
    def _count(self) -> int:
        return len(self._workers)

    @property
    def _free(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.state in (IDLE, ASLEEP)]

    def hands(self, wanted: int) -> int:
        """How many threads a call can have, itself one of them: `wanted`, or fewer where no more can be started."""
        if len(self._workers) < wanted - 1:
            _serve()  # is compiled here, where an error is raised
            with self._lock:
                while len(self._workers) < wanted - 1:
                    worker = _Worker()
                    try:
                        threads.start(worker.work)
                    except (RuntimeError, MemoryError):  # the system has no more, or Python is about to end
                        break
                    self._table[len(self._workers)] = worker.address
                    self._workers.append(
                        worker
                    )  # one that an interrupt keeps out of the list sleeps, and nobody waits for it
        return 1 + min(len(self._workers), wanted - 1)

    def lists(self) -> tuple[int, int, int]:
        """Where the workers' addresses stand and how many there are; where one hires."""
        return address(self._table), len(self._workers), address(self._desk)


_office = _Office()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_office.reset)  # it has none of its parent's threads


def hands(wanted: int) -> int:
    """See `_Office.hands`."""
    return _office.hands(wanted) if wanted > 1 else 1


def cut(work: Callable[[int], list]) -> list:
    """`work(parts)`, which cuts it into at most so many parts, for as many threads as can be had."""
    cuts = work(cpu_threads())
    had = hands(len(cuts))
    return cuts if had >= len(cuts) else work(had)


@functools.cache
def _serve():
    """serve(worker): its jobs one after the other, for ever; it sleeps when none has come for LINGER_TURNS."""
    pause, linger = make_pause(), costs.LINGER_TURNS

    def serve(worker):
        flush()
        turn = 1
        while True:
            state = seen(worker)
            if state == JOB:
                call(word(worker + 8), word(worker + 16), word(worker + 24))
                show(worker, DONE)
                turn = 1
            elif turn > linger and state == IDLE and swapped(worker, IDLE, ASLEEP):
                call(word(worker + ACQUIRE), word(worker + LOCK), FOR_EVER, 0)
                turn = 1
            else:
                pause(turn)
                turn += 1

    return cache.external(serve, host(), linger).python


@functools.cache
def _make_hire():
    """hire(taken, count, table, present, desk): the addresses of `count` workers, nobody else's from now on; those asleep are
    CALLED.  Calls of several Python threads wait until they can have all the workers that they need at once.
    """
    pause, linger = make_pause(), costs.LINGER_TURNS

    def hire(taken, count, table, present, desk):
        turn = 1
        while True:
            found = 0
            if swapped(desk, 0, 1):
                for k in range(present):
                    state = seen(word(table + k * 8))
                    if found < count and state in (IDLE, ASLEEP):
                        put(taken + found * 8, word(table + k * 8))
                        found += 1
                if found == count:
                    for k in range(count):
                        if not swapped(word(taken + k * 8), IDLE, HIRED):
                            show(word(taken + k * 8), CALLED)
                show(desk, 0)
            if found == count:
                return
            if turn > linger:
                call(word(desk + 16), word(desk + 8), REST, 0)
            else:
                pause(turn)
            turn += 1

    return cache.external(hire, host(), linger)


@functools.cache
def _share():
    """share(function, values, count, taken, table, present, desk): function(values, part) on `count` workers, and here as part
    0; returns when all have done.
    """
    pause, hire = make_pause(), _make_hire()

    def share(function, values, count, taken, table, present, desk):
        if count:
            hire(taken, count, table, present, desk)
            ready = word(taken) + CACHE_LINE
            for line in range(0, 2 * CACHE_LINE, 8):
                put(ready + line, 0)
            put(values + 8, ready)
            put(values + 16, ready + CACHE_LINE)
        for k in range(count):
            worker = word(taken + k * 8)
            put(worker + 8, function)
            put(worker + 16, values)
            put(worker + 24, k + 1)
            asleep = seen(worker) == CALLED
            show(worker, JOB)
            if asleep:
                call(word(worker + RELEASE), word(worker + LOCK))
        before = flush()
        call(function, values, 0)
        restore(before)
        for k in range(count):
            worker, turn = word(taken + k * 8), 1
            while seen(worker) == JOB:
                pause(turn)
                turn += 1
        for k in range(count):
            show(word(taken + k * 8), IDLE)

    return cache.external(share, host()).python


@functools.cache
def _alone():
    """alone(function, values): function(values, 0), here."""

    def alone(function, values):
        before = flush()
        call(function, values, 0)
        restore(before)

    return cache.external(alone, host()).python


def run(function: Compiled, numbers: Sequence[int], shares: Sequence[Sequence[int]]) -> None:
    """function(values, part) for every part at once.  Raises RuntimeError where so many threads cannot be had: see `cut`.

    At the address `values` stands HEAD: how many threads meet, where when they are ready, where after each step; how many bytes
    on the first part's share stands.  Behind it `numbers`, then the shares.  TypeError where these do not fit the record.
    """
    function.record.check(numbers, shares)
    own = len(shares), 0, 0, WORD * (len(HEAD) + len(numbers)), *numbers, *itertools.chain(*shares)
    packed = struct.pack(f"{len(own)}q", *own)
    if len(shares) == 1:
        _alone()(function.address, packed)
        return
    count = len(shares) - 1
    had = hands(count + 1)
    if had <= count:
        raise RuntimeError(f"no more threads can be started: {count + 1} are wanted, {had} can be had")
    values = ctypes.create_string_buffer(packed)
    _share()(function.address, values, count, ctypes.create_string_buffer(8 * count), *_office.lists())
