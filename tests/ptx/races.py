"""Which accesses to memory are ordered; the clocks that know it are in clocks.py.

An access has a strength: 0 weak, otherwise the scope in which it is strong.  Two accesses that are strong in a scope
that both threads belong to never race.  Of the readers of a word, global memory keeps the last; shared memory keeps the
last of each warp of the cluster, and whether several of its lanes read the word with no order between them.
"""

import numpy as np

from tests.ptx.clocks import BLOCK, CLUSTER, DEVICE, EVERY, LAST, SHARED, STRENGTH, WHO, Clocks
from tests.ptx.errors import Race

MANY_LANES = 1 << 28  # of a reader's stamp: more than one of its warp
PAGE = 10  # log2 of grains: where nothing of a page was written, reads need no look at each word


class Tracker:
    """The last write and the last reads of every grain, `grain` bytes, of one memory.

    window: bytes that a block has, in shared memory.  place: an index into the memory, in words.
    """

    def __init__(self, clocks: Clocks, size: int, grain: int, window: int | None, place):
        self.clocks, self.grain, self.window, self.place = clocks, grain, window, place
        self.memory = SHARED if window else EVERY
        grains, self.warps = size // grain, clocks.warps_per_block
        self.writer = np.zeros(grains, np.int64)  # stamps; 0: nobody
        self.reader = np.zeros((grains, self.warps if window else 1), np.int64)
        self.foreign = None  # like `reader`, for all warps of the cluster, as soon as one reads what is not its block's
        self.touched = np.zeros((grains >> PAGE) + 1, bool)  # pages with a write

    def read(self, index, size: int, threads, strength: int, constant: bool = False, fleeting: bool = False) -> None:
        """constant: a load that promises that nobody writes there during the launch (.nc).

        fleeting: who writes there later need not know of this read.
        """
        grains, threads = self._grains(index, size, threads)
        first, last = grains.min(), grains.max()
        if self.touched[first >> PAGE : (last >> PAGE) + 1].any():
            self._unordered(grains, threads, strength, self.writer[grains], "reads", "wrote")
            if constant and (self.writer[grains] > 0).any():
                k = int((self.writer[grains] > 0).argmax())
                self._report(grains[k], threads[k], self.writer[grains[k]], "reads as constant", "wrote")
        if not fleeting:
            self._add_reader(grains, threads, self.clocks.stamp(threads, strength))

    def _add_reader(self, grains, threads, stamps) -> None:
        if not self.window:
            self.reader[grains, 0] = stamps
            return
        away = self.clocks.group(threads, BLOCK) != grains * self.grain // self.window
        if not away.any():
            self._remember(self.reader, grains, threads, (threads >> 5) % self.warps, stamps)
            return
        if self.foreign is None:
            slots = self.clocks.sizes[CLUSTER] // 32
            self.foreign = np.zeros((len(self.reader), slots), np.int64)
        slots = (threads >> 5) % self.foreign.shape[1]
        self._remember(self.foreign, grains, threads, slots, stamps)

    def write(self, index: np.ndarray, size: int, threads: np.ndarray, strength: int, agents=None) -> None:
        """agents: for each thread, the stamp under which the write goes down instead of the thread's own."""
        count = size // self.grain
        grains, threads = self._grains(index, size, threads)
        self._unordered(grains, threads, strength, self.writer[grains], "writes", "wrote")
        for readers in (self.reader, self.foreign):
            if readers is not None:
                held = readers[grains]
                at, slots = held.nonzero()
                if len(at):
                    self._unordered(grains[at], threads[at], strength, held[at, slots], "writes", "read")
                    if strength == 0:  # ordered, or there would have been an error: what knows the write knows them
                        readers[grains] = 0
        stamps = self.clocks.stamp(threads, strength)
        self.writer[grains] = stamps
        self.touched[grains >> PAGE] = True
        if strength == 0:
            twice = self.writer[grains] != stamps
            if twice.any():
                k = int(twice.argmax())
                self._report(grains[k], threads[k], self.writer[grains[k]], "writes", "writes too")
        if agents is not None:
            self.writer[grains] = np.repeat(agents, count)

    def settle(self, index: np.ndarray, size: int, stamps: np.ndarray) -> None:
        """Writes of agents get their final stamps."""
        grains, stamps = self._grains(index, size, stamps)
        self.writer[grains] = stamps

    def _grains(self, index: np.ndarray, size: int, threads: np.ndarray):
        grains = index // self.grain
        count = size // self.grain
        if count == 1:
            return grains, threads
        return (grains[:, None] + np.arange(count)).reshape(-1), np.repeat(threads, count)

    def _unordered(self, grains, threads, strength: int, stamps, does: str, did: str) -> None:
        """Raises Race where an access stamped before is not ordered before this one."""
        others = (stamps > 0) & ((stamps & WHO != threads) | (stamps & MANY_LANES != 0))
        if not others.any():
            return
        at = np.flatnonzero(others)
        grains, threads, stamps = grains[at], threads[at], stamps[at]
        ordered = self._known(threads, stamps)
        least = np.minimum(strength, stamps >> STRENGTH & 3)
        for scope in (DEVICE, CLUSTER, BLOCK) if strength else ():
            if not ordered.all():
                together = self.clocks.group(threads, scope) == self.clocks.group(stamps & WHO, scope)
                ordered |= (least == scope) & together
        if not ordered.all():
            k = int(np.flatnonzero(~ordered)[0])
            self._report(grains[k], threads[k], stamps[k], does, did)

    def _known(self, threads, stamps) -> np.ndarray:
        """Whether each thread knows of the access, or of all the lanes' accesses, that a stamp stands for."""
        ordered, known = self.clocks.knows(threads, stamps, self.memory), self.clocks.known[self.memory]
        many = stamps & MANY_LANES != 0
        if many.any():
            warps = (stamps & WHO) >> 5
            rows = known[threads >> 5, warps]
            own = self.clocks.row[threads]
            rows = np.where(own >= 0, np.maximum(rows, known[own, warps]), rows)
            ordered = np.where(many, rows > stamps >> 32, ordered)
        return ordered

    def _remember(self, readers: np.ndarray, grains, threads, slots, stamps) -> None:
        """In the slots of the threads' warps; lanes that nothing orders are kept together."""
        before = readers[grains, slots]
        apart = (before > 0) & ((before & WHO != threads) | (before & MANY_LANES != 0))
        if apart.any():
            apart[apart] = ~self._known(threads[apart], before[apart])
            weaker = np.minimum(stamps >> STRENGTH & 3, before >> STRENGTH & 3) << STRENGTH
            merged = stamps & ~(3 << STRENGTH) | weaker | MANY_LANES
            stamps = np.where(apart, merged, stamps)
        readers[grains, slots] = stamps
        kept = readers[grains, slots]  # several lanes read it at once: one of them is there
        other = kept & WHO != threads
        if other.any():
            readers[grains[other], slots[other]] = kept[other] | MANY_LANES

    def _report(self, grain: int, thread: int, stamp: int, does: str, did: str) -> None:
        clocks, who, when = self.clocks, int(stamp & WHO), int(stamp >> 32)
        if who < clocks.threads:
            whom = "block {}, thread {}".format(*divmod(who, clocks.sizes[BLOCK]))
        elif when == 0:
            whom, did = "an mbarrier.init", "made an mbarrier"
        else:
            whom = f"an asynchronous store{' still on its way' if when == LAST else ''}"
        place = self.place(int(grain) * self.grain)
        raise Race(f"{does} {place}, which {whom} {did}; nothing orders the two", int(thread))
