"""Happens-before: which accesses to memory are ordered, by vector clocks.

A warp's clock ticks at every barrier, release and fence.  A write is stamped with its thread and its warp's clock; it is
known to a reader whose warp's row of the clock matrix is beyond that stamp in the writer's column.  Barriers join rows;
a release stores the row at an address, and an acquire of that address joins it.  Where one thread alone, not its warp,
releases or acquires, it gets a column or a row of its own.

An access has a strength: 0 weak, 1 strong within its block (`.cta`), 2 strong in the device.  Two strong accesses never
race.  Of the readers of a word, global memory keeps the last; shared memory also knows "several lanes of one warp" and
"several warps of the block", so that it misses none; several warps are no longer told apart in a block in which some warps
have passed a barrier without the others.  A partial `bar.warp.sync` is taken for one of the whole warp.
"""

import numpy as np

from tests.ptx.errors import Race

THREAD = (1 << 28) - 1  # of a stamp's lower half: the thread, then two flags of readers, then the strength
MANY_LANES, MANY_WARPS = 1 << 28, 1 << 29
STRENGTH = 30
PAGE = 10  # log2 of grains: where nothing of a page was written, reads need no look at each word


class Clocks:
    def __init__(self, threads: int, warps_per_block: int):
        warps = threads // 32
        self.warps, self.warps_per_block = warps, warps_per_block
        self.clock = np.zeros(warps, np.int64)
        self.known = np.zeros((warps, warps), np.int32)  # [u, v]: the first tick of v that u does not know of
        self.row = np.full(threads, -1, np.int32)  # a thread's own row and column of `known`, -1: none
        self.column = np.full(threads, -1, np.int32)
        self.rows = self.columns = warps
        self.epoch = np.zeros(warps // warps_per_block, np.int64)  # barriers that a whole block passed
        self.partial = np.zeros(warps // warps_per_block, bool)  # it has passed one without all of its warps
        # [scope]: the tick of a thread's last fence of at least that scope, and what its warp knew then
        self.fenced = {scope: np.full(threads, -1, np.int64) for scope in (1, 2)}
        self.at_fence = {scope: np.zeros((warps, 0), np.int32) for scope in (1, 2)}
        self.published: dict[tuple[int, int], np.ndarray] = {}  # (address, -1 or the block) -> row
        # [scope]: thread -> row, which a relaxed load has read and a fence of that scope acquires
        self.pending: dict[int, dict[int, np.ndarray]] = {1: {}, 2: {}}

    def block(self, threads):
        return threads // (32 * self.warps_per_block)

    def stamp(self, threads: np.ndarray, strength: int) -> np.ndarray:
        return self.clock[threads >> 5] << 32 | threads | strength << STRENGTH

    def knows(self, threads: np.ndarray, stamps: np.ndarray) -> np.ndarray:
        """Whether each thread's present comes after the access with that stamp."""
        who, when = stamps & THREAD, stamps >> 32
        rows, columns = threads >> 5, who >> 5
        result = (self.known[rows, columns] > when) | (who == threads)
        alone = self.column[who]
        if (alone >= 0).any():
            result |= (alone >= 0) & (self.known[rows, alone] > when)
        own = self.row[threads]
        if (own >= 0).any():
            result |= (own >= 0) & (self.known[own, columns] > when)
            result |= (own >= 0) & (alone >= 0) & (self.known[own, alone] > when)
        return result

    def join(self, groups: np.ndarray) -> None:
        """(groups, warps): the warps of a group have met at a barrier."""
        flat = groups.reshape(-1)
        self.clock[flat] += 1
        for thread in np.flatnonzero(self.row >= 0):
            if (flat == thread >> 5).any():
                warp = thread >> 5
                np.maximum(self.known[warp], self.known[self.row[thread]], out=self.known[warp])
        self.known[flat, flat] = self.clock[flat]
        if groups.shape[1] > 1:
            self.known[groups] = self.known[groups].max(axis=1, keepdims=True)

    def passed(self, groups: list[np.ndarray]) -> None:
        """The warps of each group have met at a barrier of their block."""
        for count in {len(group) for group in groups}:
            self.join(np.array([group for group in groups if len(group) == count]))
        for group in groups:
            block = group[0] // self.warps_per_block
            if len(group) == self.warps_per_block:
                self.epoch[block] += 1
            else:
                self.partial[block] = True

    def release(self, thread: int, address: int, scope: int, replace: bool) -> None:
        """All that the thread did and knows is published at the address; a store replaces what was there."""
        warp = thread >> 5
        column, row = self._column(thread), self._view(thread)
        row[column] = self.clock[warp] + 1
        self.clock[warp] += 1
        self._publish(thread, address, scope, replace, row)

    def relaxed_write(self, threads: np.ndarray, addresses: np.ndarray, scope: int, replace: bool) -> None:
        """A strong write publishes what its thread knew at its last fence."""
        fenced = self.fenced[1][threads] >= 0
        for k in np.flatnonzero(fenced).tolist():
            thread = int(threads[k])
            for reach in range(scope, 0, -1):
                if self.fenced[reach][thread] >= 0:
                    column, row = self._column(thread), self._wide(self.at_fence[reach][thread >> 5])
                    row[column] = self.fenced[reach][thread] + 1
                    self._publish(thread, int(addresses[k]), reach, replace, row)
        if replace and self.published:
            for k in np.flatnonzero(~fenced).tolist():
                self.published.pop((int(addresses[k]), -1), None)

    def acquire(self, threads: np.ndarray, addresses: np.ndarray, scope: int) -> None:
        for address in np.unique(addresses).tolist() if self.published else ():
            readers = threads[addresses == np.uint64(address)]
            for block in np.unique(self.block(readers)).tolist():
                row = self._published(address, block, scope)
                if row is not None:
                    self._learn(readers[self.block(readers) == block], row)

    def relaxed_read(self, threads: np.ndarray, addresses: np.ndarray, scope: int) -> None:
        """Remembered until the thread's next fence, which makes an acquire of it."""
        if not self.published:
            return
        for thread, address in zip(threads.tolist(), addresses.tolist(), strict=True):
            for reach in range(1, scope + 1):
                row = self._published(address, self.block(thread), reach)
                if row is not None:
                    old = self.pending[reach].get(thread)
                    self.pending[reach][thread] = row if old is None else np.maximum(self._wide(old), self._wide(row))

    def fence(self, threads: np.ndarray, scope: int) -> None:
        for thread in threads.tolist() if self.pending[scope] else ():
            row = self.pending[scope].pop(thread, None)
            if row is not None:
                self._learn(np.array([thread]), row)
        warps = np.unique(threads >> 5)
        for reach in range(1, scope + 1):
            if self.at_fence[reach].shape[1] < self.columns:
                missing = self.columns - self.at_fence[reach].shape[1]
                self.at_fence[reach] = np.pad(self.at_fence[reach], ((0, 0), (0, missing)))
            width = self.at_fence[reach].shape[1]
            self.at_fence[reach][warps] = self.known[warps, :width]
            for thread in threads[self.row[threads] >= 0].tolist():
                self.at_fence[reach][thread >> 5] = self._view(thread)[:width]
            self.fenced[reach][threads] = self.clock[threads >> 5]
        self.clock[warps] += 1

    def _publish(self, thread: int, address: int, scope: int, replace: bool, row: np.ndarray) -> None:
        for key in ((address, -1), (address, int(self.block(thread))))[0 if scope == 2 else 1 :]:
            old = None if replace else self.published.get(key)
            self.published[key] = row if old is None else np.maximum(self._wide(old), self._wide(row))

    def _published(self, address: int, block: int, scope: int) -> np.ndarray | None:
        device = self.published.get((address, -1)) if scope == 2 else None
        own = self.published.get((address, block))
        if device is None or own is None:
            return own if device is None else device
        return np.maximum(self._wide(device), self._wide(own))

    def _learn(self, threads: np.ndarray, row: np.ndarray) -> None:
        """The threads join a row: whole warps in the warp's row, others in their own."""
        warps, counts = np.unique(threads >> 5, return_counts=True)
        for warp, count in zip(warps.tolist(), counts.tolist(), strict=True):
            lanes = threads[threads >> 5 == warp].tolist() if count < 32 else ()
            for target in [self._row(lane) for lane in lanes] if count < 32 else [warp]:
                known = self.known[target]
                np.maximum(known[: len(row)], row, out=known[: len(row)])

    def _view(self, thread: int) -> np.ndarray:
        """All that a thread knows, as a row of its own."""
        known = self.known[thread >> 5]
        return known.copy() if self.row[thread] < 0 else np.maximum(known, self.known[self.row[thread]])

    def _wide(self, row: np.ndarray) -> np.ndarray:
        """A copy as long as rows are today."""
        return np.pad(row, (0, self.known.shape[1] - len(row)))

    def _row(self, thread: int) -> int:
        if self.row[thread] < 0:
            if self.rows == self.known.shape[0]:
                self.known = np.pad(self.known, ((0, 64 + self.rows // 4), (0, 0)))
            self.row[thread] = self.rows
            self.rows += 1
        return self.row[thread]

    def _column(self, thread: int) -> int:
        if self.column[thread] < 0:
            if self.columns == self.known.shape[1]:
                self.known = np.pad(self.known, ((0, 0), (0, 64 + self.columns // 4)))
            self.column[thread] = self.columns
            self.columns += 1
        return self.column[thread]


class Tracker:
    """The last write and the last read of every grain, `grain` bytes, of one memory."""

    def __init__(self, clocks: Clocks, size: int, grain: int, shared: bool, place):
        self.clocks, self.grain, self.shared, self.place = clocks, grain, shared, place
        self.writer = np.full(size // grain, -1, np.int64)
        self.reader = np.full(size // grain, -1, np.int64)
        self.touched = np.zeros((size // grain >> PAGE) + 1, bool)  # pages with a write

    def read(self, index: np.ndarray, size: int, threads: np.ndarray, strength: int, constant: bool = False) -> None:
        """constant: a load that promises that nobody writes there during the launch (.nc)."""
        grains, threads = self._grains(index, size, threads)
        first, last = grains.min(), grains.max()
        if self.touched[first >> PAGE : (last >> PAGE) + 1].any():
            self._unordered(grains, threads, strength, self.writer[grains], "reads", "wrote")
            if constant and (self.writer[grains] >= 0).any():
                k = int((self.writer[grains] >= 0).argmax())
                self._report(grains[k], threads[k], int(self.writer[grains[k]] & THREAD), "reads as constant", "wrote")
        stamps = self.clocks.stamp(threads, strength)
        if self.shared:
            self._add_readers(grains, threads, stamps)
        else:
            self.reader[grains] = stamps

    def write(self, index: np.ndarray, size: int, threads: np.ndarray, strength: int) -> None:
        grains, threads = self._grains(index, size, threads)
        self._unordered(grains, threads, strength, self.writer[grains], "writes", "wrote")
        self._unordered(grains, threads, strength, self.reader[grains], "writes", "read")
        stamps = self.clocks.stamp(threads, strength)
        self.writer[grains] = stamps
        self.touched[grains >> PAGE] = True
        if strength == 0:
            twice = self.writer[grains] != stamps
            if twice.any():
                k = int(twice.argmax())
                self._report(grains[k], threads[k], int(self.writer[grains[k]] & THREAD), "writes", "writes too")

    def _grains(self, index: np.ndarray, size: int, threads: np.ndarray):
        grains = index // self.grain
        count = size // self.grain
        if count == 1:
            return grains, threads
        return (grains[:, None] + np.arange(count)).reshape(-1), np.repeat(threads, count)

    def _unordered(self, grains, threads, strength: int, stamps, does: str, did: str) -> None:
        """Raises Race where an access stamped before is not ordered before this one."""
        others = (stamps >= 0) & (stamps & THREAD != threads)
        if self.shared:
            others |= (stamps >= 0) & (stamps & (MANY_LANES | MANY_WARPS) != 0)
        if not others.any():
            return
        at = np.flatnonzero(others)
        grains, threads, stamps = grains[at], threads[at], stamps[at]
        ordered = self._known(threads, stamps)
        if strength:
            least = np.minimum(strength, stamps >> STRENGTH & 3)
            blocks = self.clocks.block(threads), self.clocks.block(stamps & THREAD)
            ordered |= (least == 2) | (least == 1) & (blocks[0] == blocks[1])
        if not ordered.all():
            k = int(np.flatnonzero(~ordered)[0])
            self._report(grains[k], threads[k], int(stamps[k] & THREAD), does, did)

    def _known(self, threads, stamps) -> np.ndarray:
        """Whether each thread knows of the access, or of all the accesses, that a stamp stands for."""
        ordered = self.clocks.knows(threads, stamps)
        if self.shared:
            lanes = self.clocks.known[threads >> 5, (stamps & THREAD) >> 5] > stamps >> 32
            ordered = np.where(stamps & MANY_LANES, lanes, ordered)
            blocks = self.clocks.block(threads)
            warps = (self.clocks.epoch[blocks] > stamps >> 32) | self.clocks.partial[blocks]
            ordered = np.where(stamps & MANY_WARPS, warps, ordered)
        return ordered

    def _add_readers(self, grains, threads, stamps) -> None:
        """Readers of one word that nothing orders are kept together, as lanes of one warp or warps of the block."""
        before = self.reader[grains]
        apart = before >= 0
        if apart.any():
            apart &= (before & THREAD != threads) | (before & (MANY_LANES | MANY_WARPS) != 0)
            apart[apart] = ~self._known(threads[apart], before[apart])
        merged = self._together(stamps, before) if apart.any() else stamps
        self.reader[grains] = np.where(apart, merged, stamps)
        lost = self.reader[grains]  # several read it at once: one of them is there
        other = (lost & THREAD != threads) & (lost & MANY_WARPS == 0)
        if other.any():
            merged = self._together(stamps[other], lost[other])
            for flag in (MANY_LANES, MANY_WARPS):  # the wider claim last
                some = merged & flag != 0
                self.reader[grains[other][some]] = merged[some]

    def _together(self, stamps, before) -> np.ndarray:
        same = ((stamps ^ before) & THREAD) >> 5 == 0
        same &= before & MANY_WARPS == 0
        epoch = self.clocks.epoch[self.clocks.block(stamps & THREAD)]
        warps = epoch << 32 | stamps & 0xFFFFFFFF | MANY_WARPS
        return np.where(same, stamps | MANY_LANES, warps)

    def _report(self, grain: int, thread: int, other: int, does: str, did: str) -> None:
        per_block = 32 * self.clocks.warps_per_block
        whom = f"block {other // per_block}, thread {other % per_block}"
        place = self.place(int(grain) * self.grain)
        raise Race(f"{does} {place}, which {whom} {did}; nothing orders the two", int(thread))
