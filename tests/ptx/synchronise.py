"""The instructions of mbarriers; what they do is in mbarriers.py."""

import numpy as np

from tests.ptx.access import SCOPES
from tests.ptx.parse import Immediate
from tests.ptx.registers import Modifiers, Operands

OWN, ANYWHERE = ("shared", "shared::cta"), ("shared", "shared::cta", "shared::cluster")


class Place:
    """Where an mbarrier is.  find: Active -> the byte indices, and there the numbers of mbarriers that live."""

    def __init__(self, m: Modifiers, x: Operands, operand, *names: str):
        name = m.one(*names)
        self.x, self.remote = x, name == "shared::cluster"
        self.space, self.address = x.spaces[name.removesuffix("::cta")], x.address(operand)

    def index(self, active) -> np.ndarray:
        return self.space.locate(self.address(active), 8, active.threads)

    def find(self, active) -> np.ndarray:
        return self.x.mbarriers.find(self.index(active), active.threads)


def mbarrier(m: Modifiers, x: Operands):
    m.type("b64")
    for name, build in BUILDERS.items():
        if m.flag(name):
            return build(m, x)
    raise m.unknown(f"expected one of {', '.join(BUILDERS)}")


def _init(m: Modifiers, x: Operands):
    at, count = m.operands(2)
    place, read = Place(m, x, at, *OWN), x.read(count, "u32")

    def execute(active):
        x.mbarriers.init(place.index(active), active.full(read(active)), active.threads)

    return execute


def _inval(m: Modifiers, x: Operands):
    place = Place(m, x, m.operands(1)[0], *OWN)
    return lambda active: x.mbarriers.invalidate(place.index(active), active.threads)


def _arrive(m: Modifiers, x: Operands):
    """A wait needs the state that this returns, or the parity; from another block's mbarrier no state comes back."""
    expects = m.flag("expect_tx")
    state, at, *given = m.operands(3 if expects else 2, 3)
    place, scope = Place(m, x, at, *ANYWHERE), SCOPES[m.one("cta", "cluster", default="cta")]
    releases = m.one("release", "relaxed", default="release") == "release"
    write = x.write(state, "b64")
    if place.remote and x.writes:
        raise m.unknown("expected the sink _: another block's mbarrier returns no state")
    read = x.read(given[0] if given else Immediate("1"), "u32")

    def execute(active):
        numbers, amount = place.find(active), active.full(read(active)).astype(np.int64)
        counts, bytes_ = (np.ones_like(amount), amount) if expects else (amount, np.zeros_like(amount))
        write(active, x.mbarriers.arrive(active.threads, numbers, counts, bytes_, scope, releases))
        x.changes += 1

    return execute


def _transactions(sign: int):
    def build(m: Modifiers, x: Operands):
        at, count = m.operands(2)
        m.flag("relaxed", "cta", "cluster")
        place, read = Place(m, x, at, *ANYWHERE), x.read(count, "u32")

        def execute(active):
            numbers, amount = place.find(active), active.full(read(active)).astype(np.int64)
            x.mbarriers.expect(active.threads, numbers, sign * amount)
            x.changes += 1

        return execute

    return build


def _wait(m: Modifiers, x: Operands):
    """test_wait and try_wait, which may also come back with nothing: a loop around either is the kernel's."""
    parity = m.flag("parity")
    acquires = m.one("acquire", "relaxed", default="acquire") == "acquire"
    scope = SCOPES[m.one("cta", "cluster", default="cta")]
    done, at, which, *limit = m.operands(3, 4)
    place, read = Place(m, x, at, *OWN), x.read(which, "u32" if parity else "b64")
    for hint in limit:
        x.read(hint, "u32")
    write = x.write(done, "pred")
    x.yields = True

    def execute(active):
        threads = active.threads
        x.poll(active, place.address(active))
        numbers, phase = place.find(active), active.full(read(active))
        ended = x.mbarriers.ended(numbers, phase, parity, threads)
        if ended.any():
            x.mbarriers.acquire(numbers[ended], threads[ended], scope, acquires)
        write(active, ended)

    return execute


BUILDERS = {
    **{"init": _init, "inval": _inval, "arrive": _arrive, "test_wait": _wait, "try_wait": _wait},
    **{"expect_tx": _transactions(1), "complete_tx": _transactions(-1)},
}
TABLE = {
    "mbarrier": mbarrier,
}
