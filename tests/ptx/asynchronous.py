"""Stores that complete at an mbarrier: st.async.

Such a store is stamped by the mbarrier's agent, from its issue on: what its thread knows then must order it after the
accesses before it, and whoever comes to its bytes later must know that its phase has ended.  So what races does not
depend on when it arrives: at once in lock-step, at any later moment in a random order.
"""

import numpy as np

from tests.ptx import access
from tests.ptx.errors import BarrierMisuse
from tests.ptx.memory import ALL_ALLOCATED, ALL_WRITTEN, Space
from tests.ptx.parse import Address
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE

KINDS = ("b32", "u32", "s32", "f32", "b64", "u64", "s64", "f64")


class Stores:
    def __init__(self, x: Operands, space: Space):
        self.x, self.space, self.mbarriers = x, space, x.mbarriers
        self.flying: list[tuple] = []  # (byte indices, values, numbers of mbarriers, threads), each with one size

    def issue(self, index: np.ndarray, values: np.ndarray, numbers: np.ndarray, threads: np.ndarray) -> None:
        """values: (threads, count)."""
        space, size = self.space, values.dtype.itemsize * values.shape[1]
        state = space.state.gather(size, index // size)
        space.expect(state, ALL_ALLOCATED, index, size, threads)
        space.tracker.write(index, size, threads, 0, self.mbarriers.stamps_in_flight(numbers))
        space.state.scatter(size, index // size, np.full_like(state, ALL_WRITTEN[state.dtype.itemsize]))
        for number, count in zip(*np.unique(numbers, return_counts=True), strict=True):
            self.mbarriers.all[number].flying += int(count)
        flight = (index, values, numbers, threads)
        if self.x.random is None:
            self._land(flight)
        else:
            self.flying.append(flight)

    def arrive(self) -> None:
        """Any half of the elements of one instruction that are on their way."""
        flight = self.flying.pop(self.x.random.integers(len(self.flying)))
        order = self.x.random.permutation(len(flight[0]))
        half = -(-len(order) // 2)
        self._land(tuple(part[order[:half]] for part in flight))
        if half < len(order):
            self.flying.append(tuple(part[order[half:]] for part in flight))

    def _land(self, flight: tuple) -> None:
        index, values, numbers, threads = flight
        size = values.dtype.itemsize * values.shape[1]
        self.space.words.scatter(size, index // size, np.ascontiguousarray(values).reshape(-1))
        stamps = np.empty(len(index), np.int64)
        for number in np.unique(numbers).tolist():
            some = numbers == number
            self.mbarriers.all[number].flying -= int(some.sum())
            stamps[some] = self.mbarriers.complete(number, size, threads[some])
        self.space.tracker.settle(index, size, stamps)


def store(m: Modifiers, x: Operands):
    if not m.flag("async"):
        return access.store(m, x)
    kind = m.type(*KINDS)
    count = access.elements(m, DTYPE[kind])
    m.flag("weak")
    m.one("shared::cluster")
    m.one("mbarrier::complete_tx::bytes")
    target, source, mbarrier = m.operands(3)
    parts = source if isinstance(source, tuple) else (source,)
    if len(parts) != count or not isinstance(target, Address) or not isinstance(mbarrier, Address):
        raise m.unknown(f"expected an address, {count} registers and an mbarrier's address")
    address, gather, at = x.address(target), access.gathered(x, parts, kind), x.address(mbarrier)
    space, size = x.spaces["shared::cluster"], DTYPE[kind].itemsize * count

    def execute(active):
        threads = active.threads
        index = space.locate(address(active), size, threads, visits=False)
        places = space.locate(at(active), 8, threads, visits=False)
        numbers = x.mbarriers.find(places, threads, fleeting=True)
        apart = index // space.limit != places // space.limit
        if apart.any():
            why = "the mbarrier is not in the block that is stored to"
            raise BarrierMisuse(why, int(threads[int(apart.argmax())]))
        x.stores.issue(index, gather(active), numbers, threads)
        x.changes += 1

    return execute


TABLE = {
    "st": store,
}
