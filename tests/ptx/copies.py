"""Asynchronous copies from global to shared memory: cp.async."""

import numpy as np

from tests.ptx.access import CACHE
from tests.ptx.errors import PtxError
from tests.ptx.memory import Space
from tests.ptx.registers import Modifiers, Operands

u32 = np.uint32


class Copies:
    """Asynchronous copies on their way.  Their bytes arrive when the thread that asked for them waits, not before."""

    def __init__(self, threads: int):
        self.groups = np.zeros(threads, np.int64)  # that a thread has committed
        self.flying: list[tuple] = []  # (threads, their group, addresses, values)

    def arrive(self, space: Space, threads: np.ndarray, left: int) -> None:
        """All but the last `left` groups of these threads; left = -1: those not committed either."""
        still = []
        for owners, group, addresses, values in self.flying:
            here = np.isin(owners, threads) & (group < self.groups[owners] - left)
            if here.any():
                space.store(addresses[here], np.ascontiguousarray(values[here]), owners[here])
            if not here.all():
                still.append((owners[~here], group[~here], addresses[~here], values[~here]))
        self.flying = still


def cp(m: Modifiers, x: Operands):
    if not m.flag("async"):
        raise m.unknown("only cp.async is known")
    shared, copies = x.spaces["shared"], x.copies
    if m.flag("commit_group"):
        m.operands(0)

        def commit(active):
            copies.groups[active.at] += 1

        return commit
    if m.flag("wait_all"):
        m.operands(0)
        return lambda active: copies.arrive(shared, active.threads, -1)
    if m.flag("wait_group"):
        left = int(m.operands(1)[0].text)
        return lambda active: copies.arrive(shared, active.threads, left)
    return _copy(m, x)


def _copy(m: Modifiers, x: Operands):
    level = m.one("ca", "cg")
    m.one("shared", "shared::cta")
    m.one("global")
    m.flag(*CACHE)
    target, source, size, *given = m.operands(3, 4)
    bytes_ = int(size.text)
    if bytes_ not in ((16,) if level == "cg" else (4, 8, 16)):
        raise m.unknown(f"expected 4, 8 or 16 bytes, with .cg 16, got {bytes_}")
    to, origin = x.address(target), x.address(source)
    valid = x.read(given[0], "u32") if given else lambda active: u32(bytes_)
    space, memory, copies = x.spaces["shared"], x.spaces["global"], x.copies

    def execute(active):
        there, here, count = to(active), origin(active), active.full(valid(active))
        values = np.zeros((len(active), bytes_ // 4), u32)
        for length in np.unique(count).tolist():
            some = count == length
            if length not in (0, 4, 8, 16) or length > bytes_:
                raise PtxError(f"a source size of {length} bytes is not known", int(active.threads[some][0]))
            if length:
                values[some, : length // 4] = memory.load(here[some], np.dtype(u32), length // 4, active.threads[some])
        space.forget(there, bytes_, active.threads)
        if space.tracker:
            space.tracker.write(space.locate(there, bytes_, active.threads), bytes_, active.threads, 0)
        copies.flying.append((active.threads, copies.groups[active.threads], there, values))

    return execute


TABLE = {
    "cp": cp,
}
