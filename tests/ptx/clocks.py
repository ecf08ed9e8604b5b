"""Happens-before by vector clocks: what each thread knows of what the others did.

A warp's clock ticks at every barrier, release and fence.  An access is stamped with who made it and when; it is known
to those whose row of the clock matrix is beyond that stamp in the column of who made it.  Barriers join rows; a release
stores a row at an address, and an acquire of that address joins it.  Where one thread alone, not its warp, releases or
acquires, it gets a column or a row of its own.  A partial `bar.warp.sync` is taken for one of the whole warp.

Agents have columns too: what is done in nobody's program order is stamped by one (see mbarriers.py).

A row has one line for each of `memories`: what holds for accesses to any memory, and, where a kernel has fences that
are restricted to shared memory, what holds for accesses to that alone.  The second knows all that the first knows.
"""

import numpy as np

BLOCK, CLUSTER, DEVICE = 1, 2, 3  # scopes, each within the next
WHO = (1 << 28) - 1  # of a stamp's lower half: a thread or an agent, then a flag of races.py, then the strength
STRENGTH = 30
EVERY, SHARED = 0, -1  # lines of a row: the same one where there is but one
LAST = (1 << 31) - 1  # the tick of what has not happened yet: nobody can know of it

Board = dict[tuple[int, int], np.ndarray]  # what was released at one place: (scope, its group of threads) -> row


def joined(a: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    """All that either row knows; rows made earlier are shorter."""
    if b is None:
        return a
    a, b = (a, b) if a.shape[-1] >= b.shape[-1] else (b, a)
    result = a.copy()
    known = result[:, : b.shape[-1]]
    np.maximum(known, b, out=known)
    return result


class Clocks:
    """per_block: threads; those that fill up a block's last warp do not exist.  cluster: blocks.  memories: 1 or 2."""

    def __init__(self, blocks: int, warps_per_block: int, per_block: int, cluster: int, memories: int = 1):
        warps, lanes = blocks * warps_per_block, 32 * warps_per_block
        self.threads, self.warps_per_block = 32 * warps, warps_per_block
        self.sizes = {BLOCK: lanes, CLUSTER: lanes * cluster, DEVICE: blocks * lanes}
        self.population = np.tile(np.minimum(32, per_block - 32 * np.arange(warps_per_block)), blocks)
        self.clock = np.ones(warps, np.int64)  # from 1 on: a stamp of 0 is nobody's
        self.known = np.zeros((memories, warps, warps), np.int32)  # [.., u, v]: v's first tick of which u knows nothing
        self.home = np.arange(self.threads, dtype=np.int32) >> 5  # the column of a thread's warp, or of an agent
        self.column = np.full(self.threads, -1, np.int32)  # a thread's own, and its own row; -1: none
        self.row = np.full(self.threads, -1, np.int32)
        self.rows = self.columns = warps
        # [scope]: the tick of a thread's last fence of at least that scope, what its warp knew then, and both as a row
        self.fenced = {scope: np.zeros((memories, self.threads), np.int64) for scope in self.sizes}
        self.at_fence = {scope: np.zeros((memories, warps, 0), np.int32) for scope in self.sizes}
        self.told: dict[int, dict[int, np.ndarray]] = {scope: {} for scope in self.sizes}
        self.published: dict[int, Board] = {}  # by address
        # [scope]: thread -> row, which a relaxed load has read and a fence of that scope acquires
        self.pending: dict[int, dict[int, np.ndarray]] = {scope: {} for scope in self.sizes}

    def group(self, threads, scope: int):
        """The number of the block, the cluster or the device that the threads are in."""
        return threads // self.sizes[scope]

    def stamp(self, threads: np.ndarray, strength: int) -> np.ndarray:
        return self.clock[threads >> 5] << 32 | threads | strength << STRENGTH

    def agent(self) -> int:
        """A new one, by the number that its stamps bear."""
        self.home = np.append(self.home, self._new_column())
        self.column = np.append(self.column, np.int32(-1))
        return len(self.home) - 1

    def knows(self, threads: np.ndarray, stamps: np.ndarray, memory: int) -> np.ndarray:
        """Whether each thread's present comes after the access to a memory with that stamp."""
        who, when, known = stamps & WHO, stamps >> 32, self.known[memory]
        rows, columns, alone = threads >> 5, self.home[who], self.column[who]
        result = (known[rows, columns] > when) | (who == threads)
        if (alone >= 0).any():
            result |= (alone >= 0) & (known[rows, alone] > when)
        own = self.row[threads]
        if (own >= 0).any():
            result |= (own >= 0) & (known[own, columns] > when)
            result |= (own >= 0) & (alone >= 0) & (known[own, alone] > when)
        return result

    def join(self, groups: np.ndarray) -> None:
        """(groups, warps): the warps of a group have met at a barrier."""
        flat = groups.reshape(-1)
        self.clock[flat] += 1
        own = np.flatnonzero(self.row >= 0)
        for thread in own[np.isin(own >> 5, flat)].tolist():
            row = self.known[:, thread >> 5]
            np.maximum(row, self.known[:, self.row[thread]], out=row)
        self.known[:, flat, flat] = self.clock[flat]
        if groups.shape[1] > 1:
            self.known[:, groups] = self.known[:, groups].max(axis=2, keepdims=True)

    def passed(self, groups: list[np.ndarray]) -> None:
        """The warps of each group have met at a barrier of their block."""
        for count in {len(group) for group in groups}:
            self.join(np.array([group for group in groups if len(group) == count]))

    def depart(self, threads: np.ndarray) -> np.ndarray:
        """All that the threads did and know, as a row; what they do from now on is not in it."""
        warps, alone = self._whole(threads)
        columns = [self._column(thread) for thread in alone.tolist()]
        row = self.view(threads)
        row[:, warps] = self.clock[warps] + 1
        row[:, columns] = self.clock[alone >> 5] + 1
        self.clock[np.unique(threads >> 5)] += 1
        return row

    def departed(self, threads: np.ndarray, scope: int) -> np.ndarray | None:
        """What the threads did and knew at their last fences of a scope: all that a relaxed arrival publishes."""
        row = None
        for thread in threads[self.fenced[scope][SHARED, threads] > 0].tolist():
            row = joined(self._told(thread, scope), row)
        return row

    def view(self, threads: np.ndarray) -> np.ndarray:
        """All that any of the threads knows, as a new row."""
        row = self.known[:, np.unique(threads >> 5)].max(axis=1)
        own = self.row[threads]
        return np.maximum(row, self.known[:, own[own >= 0]].max(axis=1)) if (own >= 0).any() else row

    def learn(self, threads: np.ndarray, row: np.ndarray) -> None:
        """The threads join a row: whole warps in the warp's row, others in their own."""
        warps, alone = self._whole(threads)
        rows = np.append(warps, np.array([self._row(thread) for thread in alone.tolist()], warps.dtype))
        width = row.shape[-1]
        self.known[:, rows, :width] = np.maximum(self.known[:, rows, :width], row[:, None])

    def release(self, thread: int, address: int, scope: int, replace: bool) -> None:
        """All that the thread did and knows is published at the address; a store replaces what was there."""
        board = {} if replace else self.published.get(address, {})
        self.post(board, thread, scope, self.depart(np.array([thread])))
        self.published[address] = board

    def relaxed_write(self, threads: np.ndarray, addresses: np.ndarray, scope: int, replace: bool) -> None:
        """A strong write publishes what its thread knew at its last fence."""
        if replace and self.published:
            for address in addresses.tolist():
                self.published.pop(address, None)
        for k in np.flatnonzero(self.fenced[BLOCK][SHARED, threads]).tolist():
            thread = int(threads[k])
            board = self.published.setdefault(int(addresses[k]), {})
            for reach in range(BLOCK, scope + 1):
                if self.fenced[reach][SHARED, thread]:
                    key = (reach, self.group(thread, reach))
                    board[key] = joined(self._told(thread, reach), board.get(key))

    def acquire(self, threads: np.ndarray, addresses: np.ndarray, scope: int) -> None:
        for board, readers in self._boards(threads, addresses):
            self.take(board, readers, scope)

    def relaxed_read(self, threads: np.ndarray, addresses: np.ndarray, scope: int) -> None:
        for board, readers in self._boards(threads, addresses):
            self.remember(board, readers, scope)

    def post(self, board: Board, thread: int, scope: int, row: np.ndarray) -> None:
        """Published by the thread to all that its scope reaches."""
        for reach in range(BLOCK, scope + 1):
            key = (reach, self.group(thread, reach))
            board[key] = joined(row, board.get(key))

    def take(self, board: Board, threads: np.ndarray, scope: int) -> None:
        """The threads acquire what the board has for them."""
        blocks = self.group(threads, BLOCK)
        for block in np.unique(blocks).tolist():
            row = self._posted(board, block * self.sizes[BLOCK], scope)
            if row is not None:
                self.learn(threads[blocks == block], row)

    def remember(self, board: Board, threads: np.ndarray, scope: int) -> None:
        """What they would acquire is kept until their next fence, which makes an acquire of it."""
        for thread in threads.tolist():
            for reach in range(BLOCK, scope + 1):
                row = self._posted(board, thread, reach)
                if row is not None:
                    self.pending[reach][thread] = joined(row, self.pending[reach].get(thread))

    def acquire_fence(self, threads: np.ndarray, scope: int, memory: int) -> None:
        """Makes acquires of the relaxed loads before; of memory SHARED, for accesses to shared memory."""
        for thread in threads.tolist() if self.pending[scope] else ():
            row = self.pending[scope].get(thread)
            if row is not None:
                if memory == SHARED:  # a later fence may acquire the rest
                    row = row.copy()
                    row[EVERY] = 0
                else:
                    del self.pending[scope][thread]
                self.learn(np.array([thread]), row)

    def release_fence(self, threads: np.ndarray, scope: int, memory: int) -> None:
        """Makes releases of the relaxed stores behind; of memory SHARED, of accesses to shared memory."""
        warps, lines = np.unique(threads >> 5), slice(None) if memory == EVERY else slice(1, None)
        for reach in range(BLOCK, scope + 1):
            missing = self.columns - self.at_fence[reach].shape[2]
            if missing > 0:
                self.at_fence[reach] = np.pad(self.at_fence[reach], ((0, 0), (0, 0), (0, missing)))
            width = self.at_fence[reach].shape[2]
            self.at_fence[reach][lines, warps] = self.known[lines, warps, :width]
            for thread in threads[self.row[threads] >= 0].tolist():
                self.at_fence[reach][lines, thread >> 5] = self.view(np.array([thread]))[lines, :width]
            self.fenced[reach][lines, threads] = self.clock[threads >> 5]
            for thread in threads.tolist() if self.told[reach] else ():
                self.told[reach].pop(thread, None)
        self.clock[warps] += 1

    def _told(self, thread: int, scope: int) -> np.ndarray:
        """What the thread did and knew at its last fence of the scope, as a row."""
        if thread not in self.told[scope]:
            column, row = self._column(thread), self.at_fence[scope][:, thread >> 5]
            row = np.pad(row, ((0, 0), (0, max(column + 1 - row.shape[1], 0))))
            row[:, column] = self.fenced[scope][:, thread] + 1
            self.told[scope][thread] = row
        return self.told[scope][thread]

    def _boards(self, threads: np.ndarray, addresses: np.ndarray):
        """What was published at those of the addresses where anything was, each with the threads that read it."""
        if self.published:
            for address in np.unique(addresses).tolist():
                if address in self.published:
                    yield self.published[address], threads[addresses == np.uint64(address)]

    def _posted(self, board: Board, thread: int, scope: int) -> np.ndarray | None:
        """What both the writers' scopes and the reader's own allow a thread to acquire."""
        found = None
        for reach in range(BLOCK, scope + 1):
            row = board.get((reach, self.group(thread, reach)))
            found = found if row is None else joined(row, found)
        return found

    def _whole(self, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The warps of which all threads are there, and the threads of the others."""
        warps, counts = np.unique(threads >> 5, return_counts=True)
        whole = counts == self.population[warps]
        if whole.all():
            return warps, threads[:0]
        return warps[whole], threads[np.isin(threads >> 5, warps[~whole])]

    def _row(self, thread: int) -> int:
        if self.row[thread] < 0:
            if self.rows == self.known.shape[1]:
                self.known = np.pad(self.known, ((0, 0), (0, 64 + self.rows // 4), (0, 0)))
            self.row[thread] = self.rows
            self.rows += 1
        return self.row[thread]

    def _column(self, thread: int) -> int:
        if self.column[thread] < 0:
            self.column[thread] = self._new_column()
        return self.column[thread]

    def _new_column(self) -> int:
        if self.columns == self.known.shape[2]:
            self.known = np.pad(self.known, ((0, 0), (0, 0), (0, 64 + self.columns // 4)))
        self.columns += 1
        return self.columns - 1
