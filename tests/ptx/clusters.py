"""What a cluster of blocks adds: each other's shared memory, and a barrier for all."""

import numpy as np

from tests.ptx.clocks import BLOCK, CLUSTER, SHARED, Clocks, joined
from tests.ptx.errors import BarrierMisuse, OutOfBounds, PeerExited
from tests.ptx.mbarriers import Mbarriers
from tests.ptx.memory import Space
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.warp import ALL

RANK = 24  # the bit of an address from which on it has the block's rank in the cluster + 1; 0: the own block
u32, u64 = np.uint32, np.uint64


class Distributed(Space):
    """The shared memory of all blocks of the cluster.

    exited: by block.  visits: [rank of the block, thread], the stamp of its last access to another block's memory.
    """

    def __init__(self, shared: Space, clocks: Clocks):
        data, state = shared.words.views[1], shared.state.views[1]
        super().__init__("shared", data, state, shared.first, shared.limit, shared.spans, shared.base)
        self.tracker = shared.tracker
        self.clocks, self.exited = clocks, np.zeros(clocks.threads // clocks.sizes[BLOCK], bool)
        self.ranks = clocks.sizes[CLUSTER] // clocks.sizes[BLOCK]
        self.visits = np.zeros((self.ranks, clocks.threads), np.int64)

    def resolve(self, addresses: np.ndarray, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        rank = (addresses >> u64(RANK)).astype(np.int64) - 1
        own = self.clocks.group(threads, BLOCK)
        if (rank < 0).all():
            return addresses, self.base[threads]
        if rank.max() >= self.ranks:
            k = int(rank.argmax())
            raise OutOfBounds(f"an address in block {rank[k]} of a cluster of {self.ranks}", int(threads[k]))
        block = np.where(rank < 0, own, own - own % self.ranks + rank)
        gone = self.exited[block]
        if gone.any():
            raise PeerExited(f"block {block[gone][0]} has exited", int(threads[gone][0]))
        return addresses & u64((1 << RANK) - 1), block * self.limit

    def locate(self, addresses: np.ndarray, size: int, threads: np.ndarray, visits: bool = True) -> np.ndarray:
        """visits: the threads themselves will be there, not asynchronous stores of theirs."""
        index = super().locate(addresses, size, threads)
        block = index // self.limit
        away = block != self.clocks.group(threads, BLOCK)
        if visits and away.any():
            self.visits[block[away] % self.ranks, threads[away]] = self.clocks.stamp(threads[away], 0)
        return index

    def leave(self, block: int, row: np.ndarray, thread: int) -> None:
        """The block exits, knowing what `row` says: every access from outside must come before."""
        visits = self.visits[block % self.ranks]
        lanes = self.clocks.sizes[CLUSTER]
        first = block * self.clocks.sizes[BLOCK] // lanes * lanes
        visitors = first + np.flatnonzero(visits[first : first + lanes])
        columns, alone = self.clocks.home[visitors], self.clocks.column[visitors]
        known = np.maximum(row[columns], np.where(alone >= 0, row[alone], 0))
        late = known <= visits[visitors] >> 32
        if late.any():
            other = "block {}, thread {}".format(*divmod(int(visitors[late][0]), self.clocks.sizes[BLOCK]))
            raise PeerExited(f"its block exits, and nothing orders an access of {other} to its memory before", thread)


class Clusters:
    """The barrier of each cluster, and who has exited.

    A thread arrives, goes on, and waits later; it has come as often as it has gone, or once more.
    """

    def __init__(self, clocks: Clocks, mbarriers: Mbarriers, memory: Distributed, absent: np.ndarray):
        """absent: the threads that do not exist."""
        self.clocks, self.mbarriers, self.memory, self.gone = clocks, mbarriers, memory, absent.copy()
        self.came, self.went = np.zeros((2, len(absent)), np.int64)
        count = len(absent) // clocks.sizes[CLUSTER]
        self.opened = np.zeros(count, np.int64)  # how often each cluster's barrier has let everybody go
        self.gathered: list[np.ndarray | None] = [None] * count  # what arrivals have released
        self.done: list[np.ndarray | None] = [None] * count  # what of it was there when the barrier opened
        self.passed = 0  # barriers of clusters

    def arrive(self, threads: np.ndarray, releases: bool) -> None:
        self._expect(threads, self.came == self.went, "arrives again without having waited")
        clusters = self.clocks.group(threads, CLUSTER)
        for cluster in np.unique(clusters).tolist():
            some = threads[clusters == cluster]
            rows = [self.clocks.depart(some)] if releases else [self.clocks.departed(some, CLUSTER)]
            rows += [self.mbarriers.fenced.get(thread) for thread in some.tolist() if not releases]
            for row in rows:
                if row is not None:
                    self.gathered[cluster] = joined(row, self.gathered[cluster])
        self.came[threads] += 1
        self._open(clusters)

    def wait(self, threads: np.ndarray) -> np.ndarray:
        """Which of them may go on."""
        self._expect(threads, self.came == self.went + 1, "waits without having arrived")
        clusters = self.clocks.group(threads, CLUSTER)
        free = self.opened[clusters] >= self.came[threads]
        for cluster in np.unique(clusters[free]).tolist():
            row = self.done[cluster]
            if row is not None:
                self.clocks.learn(threads[free & (clusters == cluster)], row)
        self.went[threads[free]] += 1
        return free

    def leave(self, threads: np.ndarray) -> None:
        """The threads exit: nobody waits for them any more."""
        self.gone[threads] = True
        blocks = np.unique(self.clocks.group(threads, BLOCK))
        lanes = self.clocks.sizes[BLOCK]
        for block in blocks[self.gone.reshape(-1, lanes)[blocks].all(1)].tolist():
            row = self.clocks.view(np.arange(block * lanes, (block + 1) * lanes))[SHARED]
            thread = int(threads[self.clocks.group(threads, BLOCK) == block][0])
            self.memory.leave(block, row, thread)
            self.mbarriers.leave(block, row, thread)
            self.memory.exited[block] = True
        self._open(self.clocks.group(threads, CLUSTER))

    def _open(self, clusters: np.ndarray) -> None:
        """Where all who have not exited have come once more."""
        never = np.iinfo(np.int64).max
        came = np.where(self.gone, never, self.came).reshape(len(self.opened), -1).min(1)
        for cluster in np.unique(clusters).tolist():
            if self.opened[cluster] < came[cluster] < never:
                self.opened[cluster] += 1
                self.done[cluster] = self.gathered[cluster]
                self.passed += 1

    def _expect(self, threads: np.ndarray, right: np.ndarray, why: str) -> None:
        if not right[threads].all():
            raise BarrierMisuse(why, int(threads[(~right[threads]).argmax()]))


def barrier(m: Modifiers, x: Operands):
    """barrier.cluster: (what a thread does there, whether it may have to wait)."""
    waits = m.one("arrive", "wait") == "wait"
    if m.flag("aligned") and not waits:
        x.members = lambda active: np.full(len(active), ALL)
    order = m.one("acquire", "release", "relaxed", default="acquire" if waits else "release")
    if order not in (("acquire",) if waits else ("release", "relaxed")):
        raise m.unknown(f".{order} is not for this half of the barrier")
    m.operands(0)
    if waits:
        return lambda active: x.clusters.wait(active.threads), True
    return lambda active: x.clusters.arrive(active.threads, order == "release"), False


def mapa(m: Modifiers, x: Operands):
    """The address, in the cluster's shared memory, of what another block has at an address of this one's."""
    m.type("u32")
    m.one("shared::cluster")
    destination, address, rank = m.operands(3)
    reads, write = (x.read(address, "u32"), x.read(rank, "u32")), x.write(destination, "u32")
    ranks = x.spaces["shared::cluster"].ranks

    def execute(active):
        at, to = (active.full(read(active)) for read in reads)
        wrong = (to >= ranks) | (at >> u32(RANK) != 0)
        if wrong.any():
            k = int(wrong.argmax())
            raise OutOfBounds(f"address {at[k]:#x} for block {to[k]} of a cluster of {ranks}", int(active.threads[k]))
        write(active, at | (to + u32(1)) << u32(RANK))

    return execute


TABLE = {
    "mapa": mapa,
}
