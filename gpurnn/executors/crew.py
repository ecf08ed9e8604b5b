"""Threads that do one call's work together, in compiled code from its beginning to its end.

Waking a thread takes as long as tens of millions of floating-point operations.  So a worker waits for its next job in
compiled code, without Python and its lock, for LINGER turns; only then it goes to sleep, in the pool of `threads`.  A call
hires its workers, and has them for itself until all have done their parts.
"""

import functools
import itertools
import os
import struct
import threading
from collections.abc import Sequence

import numpy as np

from gpurnn.environment import cpu_threads
from gpurnn.executors import cache, threads
from gpurnn.executors.barrier import CACHE_LINE, make_pause, seen, show, swapped
from gpurnn.executors.cache import Compiled, call
from gpurnn.executors.instructions import put, word
from gpurnn.executors.simd import address, host
from gpurnn.executors.subnormals import flush, restore

ASLEEP, IDLE, HIRED, CALLED, JOB = range(5)  # CALLED: hired in its sleep, and to be woken
LINGER = 20_000  # turns: half a millisecond


class _Worker:
    """Its words: STATE | function, values, part of its job; and, each alone in its cache lines, the two places where those
    meet who do a job that this worker is the first to be hired for.
    """

    def __init__(self) -> None:
        words = np.zeros(4 * CACHE_LINE // 8, np.int64)
        first = -address(words) % CACHE_LINE // 8
        self.words = words[first:]
        self.address = address(self.words)
        self.places = self.address + CACHE_LINE, self.address + 2 * CACHE_LINE

    @property
    def state(self) -> int:
        return int(self.words[0])

    @state.setter
    def state(self, state: int) -> None:
        self.words[0] = state

    def work(self) -> None:
        """In a thread of the pool, which so keeps the words in memory for as long as it looks at them."""
        _serve()(self.address)


class _Office:
    """Who is free.  Calls of several Python threads wait until they can have all the workers that they need at once."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._free: list[_Worker] = []
        self._count = 0
        self._changed = threading.Condition()

    def take(self, count: int) -> list[_Worker]:
        with self._changed:
            most = max(cpu_threads() - 1, count)
            while len(self._free) < count and self._count - len(self._free) + count > most:
                self._changed.wait()
            missing = count - len(self._free)
            if missing > 0:
                self._free += [_Worker() for _ in range(missing)]
                self._count += missing
            return [self._free.pop() for _ in range(count)]  # the last to have worked is the last to fall asleep

    def give_back(self, workers: list[_Worker]) -> None:
        with self._changed:
            self._free += reversed(workers)
            self._changed.notify_all()

    def dismiss(self, workers: list[_Worker]) -> None:
        """Of a call that has failed: some may be about to wake up, and are not used again."""
        for worker in workers:
            worker.state = ASLEEP
        with self._changed:
            self._count -= len(workers)
            self._changed.notify_all()


_office = _Office()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_office.reset)  # it has none of its parent's threads


@functools.cache
def _serve():
    """serve(worker): its jobs one after the other, until none has come for LINGER turns."""
    pause = make_pause()

    def serve(worker):
        before, turn = flush(), 1
        while True:
            state = seen(worker)
            if state == JOB:
                call(word(worker + 8), word(worker + 16), word(worker + 24))
                show(worker, IDLE)
                turn = 1
            elif state == ASLEEP or (turn > LINGER and state == IDLE and swapped(worker, IDLE, ASLEEP)):
                break
            else:
                pause(turn)
                turn += 1
        restore(before)

    return cache.external(serve, host()).python


@functools.cache
def _hire():
    """hire(workers, count): nobody else's from now on; those asleep are CALLED."""

    def hire(workers, count):
        for number in range(count):
            worker = word(workers + number * 8)
            if not swapped(worker, IDLE, HIRED):
                show(worker, CALLED)

    return cache.external(hire, host()).python


@functools.cache
def _share():
    """share(function, values, workers, count): function(values, part) on as many workers, and here as part 0; returns when
    all have done.
    """
    pause = make_pause()

    def share(function, values, workers, count):
        for number in range(count):
            worker = word(workers + number * 8)
            put(worker + 8, function)
            put(worker + 16, values)
            put(worker + 24, number + 1)
            show(worker, JOB)
        before = flush()
        call(function, values, 0)
        restore(before)
        for number in range(count):
            worker, turn = word(workers + number * 8), 1
            while seen(worker) == JOB:
                pause(turn)
                turn += 1

    return cache.external(share, host()).python


def run(function: Compiled, numbers: Sequence[int], shares: Sequence[Sequence[int]]) -> None:
    """function(values, part) for every part at once.

    At the address `values` stand: how many threads meet, where when they are ready, where after each step; how many bytes
    on the first part's share stands; `numbers`; the shares.
    """
    own = len(numbers) * 8 + 32, *numbers, *itertools.chain(*shares)
    form = f"{3 + len(own)}q"
    if len(shares) == 1:
        _share()(function.address, struct.pack(form, 1, 0, 0, *own), 0, 0)
        return
    workers = _office.take(len(shares) - 1)
    try:
        first = workers[0]
        first.words[CACHE_LINE // 8 :] = 0
        values = struct.pack(form, len(shares), *first.places, *own)
        addresses = struct.pack(f"{len(workers)}q", *(worker.address for worker in workers))
        _serve()  # is compiled here, where an error is raised
        _hire()(addresses, len(workers))
        for worker in workers:
            if worker.state == CALLED:
                threads.pool().submit(worker.work)
        _share()(function.address, values, addresses, len(workers))
    except BaseException:  # no memory, no thread, or an interrupt from the keyboard
        _office.dismiss(workers)
        raise
    _office.give_back(workers)
