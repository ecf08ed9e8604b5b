"""The mbarriers of a launch: their counts and phases, and what the end of a phase publishes.

A phase ends when no arrival is pending and as many bytes have come as were expected.  A wait that sees it acquires what
the arrivals released, up to then, and the asynchronous stores that were counted.  These belong to no thread's program
order; an agent for each mbarrier stamps them: its tick 0 is the initialisation, and tick p + 1 is phase p.
"""

from dataclasses import dataclass, field

import numpy as np

from tests.ptx.clocks import BLOCK, CLUSTER, DEVICE, LAST, Board, Clocks, joined
from tests.ptx.errors import BarrierMisuse, PeerExited, Uninitialised
from tests.ptx.memory import ALL_ALLOCATED, ALL_MBARRIER, MBARRIER, Space

MOST = (1 << 20) - 1  # of arrivals, and of bytes either way


@dataclass
class Mbarrier:
    number: int
    block: int
    agent: int
    expected: int  # arrivals in each phase
    pending: int
    transactions: int = 0  # bytes expected, less the bytes that came; below 0 where these came first
    phase: int = 0
    flying: int = 0  # elements of asynchronous stores still on their way
    last: int = 0  # the agent's tick at the last one that came
    foreign: bool = False  # some came from other blocks
    gathered: Board = field(default_factory=dict)  # what arrivals have released
    done: Board = field(default_factory=dict)  # what of it the last phase had that has ended


class Mbarriers:
    def __init__(self, clocks: Clocks, space: Space):
        self.clocks, self.space = clocks, space
        self.number = np.zeros(len(space.words.views[8]), np.int32)  # of the mbarrier in a word of shared memory
        self.phases, self.agents = np.zeros((2, 0), np.int64)  # by number
        self.all: list[Mbarrier] = []
        self.inits: dict[int, np.ndarray] = {}  # thread -> what it initialised, as a row
        self.fenced: dict[int, np.ndarray] = {}  # the same, as of its last fence.mbarrier_init

    def find(self, index: np.ndarray, threads: np.ndarray, fleeting: bool = False) -> np.ndarray:
        """The numbers of the mbarriers at these byte indices, whose initialisation each thread must know of.

        fleeting: not the threads will be there, but asynchronous stores of theirs.
        """
        absent = self.space.state.gather(8, index // 8) != np.uint64(ALL_MBARRIER[8])
        if absent.any():
            k = int(absent.argmax())
            where = self.space.place(int(index[k]) % self.space.limit)
            raise Uninitialised(f"nobody has initialised an mbarrier at {where}", int(threads[k]))
        self.space.tracker.read(index, 8, threads, DEVICE, fleeting=fleeting)
        return self.number[index // 8]

    def init(self, index: np.ndarray, counts: np.ndarray, threads: np.ndarray) -> None:
        space, clocks = self.space, self.clocks
        space.expect(space.state.gather(8, index // 8), ALL_ALLOCATED, index, 8, threads)
        for thread, at, count in zip(threads.tolist(), index.tolist(), counts.tolist(), strict=True):
            if not 1 <= count <= MOST:
                raise BarrierMisuse(f"expected 1 to {MOST} arrivals, got {count}", thread)
            agent, number = clocks.agent(), len(self.all)
            space.tracker.write(np.array([at]), 8, np.array([thread]), 0, np.array([agent]))
            space.state.views[1][at : at + 8] = MBARRIER
            self.all.append(Mbarrier(number, at // space.limit, agent, count, count))
            self.number[at // 8] = number
            self.phases, self.agents = np.append(self.phases, 0), np.append(self.agents, agent)
            clocks.learn(np.array([thread]), self._tick(agent, 1))
            self.inits[thread] = joined(self._tick(agent, 1), self.inits.get(thread))

    def invalidate(self, index: np.ndarray, threads: np.ndarray) -> None:
        for k, number in enumerate(self.find(index, threads).tolist()):
            if self.all[number].flying:
                raise BarrierMisuse("asynchronous stores to this mbarrier are still on their way", int(threads[k]))
        self.space.tracker.write(index, 8, threads, 0)
        self.space.state.scatter(8, index // 8, np.full(len(index), ALL_ALLOCATED[8], np.uint64))

    def fence_inits(self, threads: np.ndarray) -> None:
        """The threads' initialisations so far will be known to those who meet them at the cluster's barrier."""
        for thread in threads.tolist():
            if thread in self.inits:
                self.fenced[thread] = self.inits[thread]

    def arrive(self, threads, numbers, counts, expected, scope: int, releases: bool) -> np.ndarray:
        """expected: bytes to be expected before the arrival.  Returns the phases that the arrivals belong to."""
        phases = self.phases[numbers]
        for number in np.unique(numbers).tolist():
            some = np.flatnonzero(numbers == number)
            if counts[some].sum() <= self.all[number].pending:
                self._arrive(self.all[number], threads[some], counts[some], expected[some], scope, releases)
                continue
            for k in some:  # into the next phase, or one too many
                phases[k] = self.phases[number]
                one = slice(k, k + 1)
                self._arrive(self.all[number], threads[one], counts[one], expected[one], scope, releases)
        return phases

    def _arrive(self, mbarrier: Mbarrier, threads, counts, expected, scope: int, releases: bool) -> None:
        count = int(counts.sum())
        if not 1 <= counts.min() <= count <= mbarrier.pending:
            why = f"{count} arrivals in a phase in which {mbarrier.pending} are pending"
            raise BarrierMisuse(why, int(threads[0]))
        self._count(mbarrier, int(expected.sum()), int(threads[0]))
        blocks = self.clocks.group(threads, BLOCK)
        for block in np.unique(blocks).tolist():
            some = threads[blocks == block]
            row = self.clocks.depart(some) if releases else self.clocks.departed(some, scope)
            if row is not None:
                self.clocks.post(mbarrier.gathered, int(some[0]), scope, row)
        mbarrier.pending -= count
        self._settle(mbarrier)

    def expect(self, threads, numbers, bytes_) -> None:
        """So many more bytes are missing in the present phase; fewer where negative."""
        for thread, number, count in zip(threads.tolist(), numbers.tolist(), bytes_.tolist(), strict=True):
            self._count(self.all[number], count, thread)
            self._settle(self.all[number])

    def complete(self, number: int, size: int, threads: np.ndarray) -> np.ndarray:
        """`size` bytes have come for each of the threads.  Returns the agent's stamps of their phases."""
        mbarrier, stamps = self.all[number], np.empty(len(threads), np.int64)
        mbarrier.foreign |= bool((self.clocks.group(threads, BLOCK) != mbarrier.block).any())
        start = 0
        while start < len(threads):
            stop, missing = len(threads), mbarrier.transactions
            if mbarrier.pending == 0 and missing > 0 and missing % size == 0:
                stop = min(stop, start + missing // size)  # the phase ends there, and the next one has the rest
            mbarrier.last = mbarrier.phase + 1
            stamps[start:stop] = mbarrier.last << 32 | mbarrier.agent
            self._count(mbarrier, (start - stop) * size, int(threads[start]))
            self._settle(mbarrier)
            start = stop
        return stamps

    def _count(self, mbarrier: Mbarrier, bytes_: int, thread: int) -> None:
        mbarrier.transactions += bytes_
        if abs(mbarrier.transactions) > MOST:
            why = f"{mbarrier.transactions} bytes are missing at once, and an mbarrier counts to {MOST}"
            raise BarrierMisuse(why, thread)

    def _settle(self, mbarrier: Mbarrier) -> None:
        """Ends the phase if nothing is missing any more."""
        if mbarrier.pending or mbarrier.transactions:
            return
        if mbarrier.last:
            thread = mbarrier.block * self.clocks.sizes[BLOCK]
            row = self._tick(mbarrier.agent, mbarrier.phase + 2)
            for scope in (CLUSTER, DEVICE) if mbarrier.foreign else (BLOCK, CLUSTER, DEVICE):
                key = (scope, self.clocks.group(thread, scope))
                mbarrier.gathered[key] = joined(row, mbarrier.gathered.get(key))
        mbarrier.done = dict(mbarrier.gathered)
        mbarrier.phase += 1
        mbarrier.pending = mbarrier.expected
        self.phases[mbarrier.number] = mbarrier.phase

    def ended(self, numbers: np.ndarray, which: np.ndarray, parity: bool, threads: np.ndarray) -> np.ndarray:
        """Whether the phase with a parity, or else the phase that an arrival belonged to, has ended."""
        if parity:
            return self.phases[numbers] & 1 != which
        since = self.phases[numbers] - which.astype(np.int64)
        stale = (since != 0) & (since != 1)
        if stale.any():
            k = int(stale.argmax())
            raise BarrierMisuse(f"the state of an arrival {int(since[k])} phases ago", int(threads[k]))
        return since == 1

    def acquire(self, numbers: np.ndarray, threads: np.ndarray, scope: int, acquires: bool) -> None:
        """These threads have seen the last phase's end."""
        for number in np.unique(numbers).tolist():
            board, who = self.all[number].done, threads[numbers == number]
            (self.clocks.take if acquires else self.clocks.remember)(board, who, scope)

    def leave(self, block: int, row: np.ndarray, thread: int) -> None:
        """The block exits, knowing what `row` says: every asynchronous store to it must have ended before."""
        for mbarrier in self.all:
            if mbarrier.block == block and (
                mbarrier.flying or row[self.clocks.home[mbarrier.agent]] <= mbarrier.last > 0
            ):
                raise PeerExited("its block exits, and has not waited for asynchronous stores to it", thread)

    def stamps_in_flight(self, numbers: np.ndarray) -> np.ndarray:
        """For asynchronous stores that are still on their way."""
        return LAST << 32 | self.agents[numbers]

    def lacking(self) -> str:
        """What mbarriers wait for that have got something in their present phase."""
        begun = [m for m in self.all if m.pending < m.expected or m.transactions]
        told = [
            f"block {m.block}'s lacks {m.pending} arrivals, {m.transactions} bytes in phase {m.phase}" for m in begun
        ]
        return "".join(f"; an mbarrier of {what}" for what in told[:3])

    def _tick(self, agent: int, tick: int) -> np.ndarray:
        """A row of one who knows nothing but the agent up to a tick."""
        row = np.zeros((len(self.clocks.known), int(self.clocks.home[agent]) + 1), np.int32)
        row[:, -1] = tick
        return row
