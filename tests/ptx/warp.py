"""What the threads of a warp do together: shuffles, votes, matrix products.

The machine calls these when all members of each warp have arrived.  x.members: Active -> the lanes that must, as masks.
"""

import numpy as np

from tests.ptx import numbers
from tests.ptx.errors import Divergence
from tests.ptx.parse import Pair
from tests.ptx.registers import Active, Modifiers, Operands
from tests.ptx.types import DTYPE

ALL = np.uint32(0xFFFFFFFF)
LANES = np.arange(32)
u16, u32, f32, f64 = np.uint16, np.uint32, np.float32, np.float64


class Warps:
    """The active threads as (warps, 32), some lanes of which may be absent."""

    def __init__(self, active: Active):
        self.lanes = active.threads & 31
        numbers_ = active.threads >> 5
        first = np.flatnonzero(np.diff(numbers_, prepend=-1))
        self.count = len(first)
        self.rows = np.repeat(np.arange(self.count), np.diff(first, append=len(numbers_)))
        self.whole = len(active) == 32 * self.count

    def spread(self, values, fill=0) -> np.ndarray:
        values = np.asarray(values)
        if self.whole and values.ndim:
            return values.reshape(self.count, 32)
        result = np.full((self.count, 32), fill, values.dtype)
        result[self.rows, self.lanes] = values
        return result

    def collect(self, values) -> np.ndarray:
        return values.reshape(-1) if self.whole else values[self.rows, self.lanes]

    def present(self) -> np.ndarray:
        return self.spread(np.ones(len(self.lanes), bool), False)


def _membership(x: Operands, operand):
    """The mask operand of a .sync instruction; a thread outside of its own mask is an error."""
    read = x.read(operand, "b32")

    def members(active):
        mask = active.full(read(active))
        outside = (mask >> (active.threads & 31).astype(u32) & u32(1)) == 0
        if outside.any():
            k = int(outside.argmax())
            raise Divergence(f"the mask {mask[k]:#010x} leaves out the thread itself", int(active.threads[k]))
        return mask

    x.members = members
    return members


def _aligned(x: Operands, m: Modifiers):
    """mma and ldmatrix take the whole warp."""
    m.one("sync")
    m.one("aligned")
    x.members = lambda active: np.full(len(active), ALL)

    def warps(active) -> Warps:
        found = Warps(active)
        if not found.whole:
            raise Divergence("executed by a warp that has lost threads", int(active.threads[0]))
        return found

    return warps


def shfl(m: Modifiers, x: Operands):
    m.type("b32")
    m.one("sync")
    mode = m.one("bfly", "idx", "up", "down")
    destination, a, b, c, mask = m.operands(5)
    both = (destination.first, destination.second) if isinstance(destination, Pair) else (destination,)
    value, by, clamp = x.read(a, "b32"), x.read(b, "u32"), x.read(c, "u32")
    _membership(x, mask)
    writes = [x.write(d, kind) for d, kind in zip(both, ("b32", "pred"), strict=False)]

    def execute(active):
        warps = Warps(active)
        amount = warps.spread(active.full(by(active))).astype(np.int64) & 31
        limits = warps.spread(active.full(clamp(active))).astype(np.int64)
        segment, last = limits >> 8 & 31, limits & 31
        highest, lowest = (LANES & segment) | (last & ~segment & 31), LANES & segment
        source = {"up": LANES - amount, "down": LANES + amount, "bfly": LANES ^ amount}.get(mode)
        source = lowest | (amount & ~segment) if source is None else source
        valid = source >= highest if mode == "up" else source <= highest
        source = np.where(valid, source, LANES)
        present = warps.present()
        absent = present & ~np.take_along_axis(present, source, 1)
        if absent.any():
            k = int(np.flatnonzero(warps.collect(absent))[0])
            lane = int(warps.collect(source)[k])
            raise Divergence(f"reads from lane {lane}, which takes no part", int(active.threads[k]))
        result = np.take_along_axis(warps.spread(active.full(value(active))), source, 1)
        for write, values in zip(writes, (result, valid), strict=False):
            write(active, warps.collect(values))

    return execute


def vote(m: Modifiers, x: Operands):
    kind = m.type("pred", "b32")
    m.one("sync")
    mode = m.one(*(("ballot",) if kind == "b32" else ("all", "any", "uni")))
    destination, predicate, mask = m.operands(3)
    read = x.read(predicate, "pred")
    _membership(x, mask)
    write = x.write(destination, kind)

    def execute(active):
        warps = Warps(active)
        holds, present = warps.spread(active.full(read(active)), False), warps.present()
        every, some = (holds | ~present).all(1), (holds & present).any(1)
        if mode == "ballot":
            result = ((holds & present).astype(u32) << LANES.astype(u32)).sum(1, dtype=u32)
        else:
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(active, result[warps.rows])

    return execute


REDUCTIONS = {"add": np.add, "min": np.minimum, "max": np.maximum}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}


def redux(m: Modifiers, x: Operands):
    kind = m.type("u32", "s32", "b32")
    m.one("sync")
    table = BITWISE if kind == "b32" else REDUCTIONS
    function = table[m.one(*table)]
    destination, a, mask = m.operands(3)
    read = x.read(a, kind)
    _membership(x, mask)
    write = x.write(destination, kind)

    def execute(active):
        warps = Warps(active)
        starts = np.flatnonzero(np.diff(warps.rows, prepend=-1))
        write(active, function.reduceat(active.full(read(active)), starts, dtype=DTYPE[kind])[warps.rows])

    return execute


def activemask(m: Modifiers, x: Operands):
    """The lanes that stand here together; hardware promises no more."""
    write = x.write(m.operands(1)[0], m.type("b32"))

    def execute(active):
        warps = Warps(active)
        write(active, (warps.present().astype(u32) << LANES.astype(u32)).sum(1, dtype=u32)[warps.rows])

    return execute


# The types and depths of A and B -> registers of A and of B
SHAPES = {
    **{(kind, "m16n8k16"): (4, 2) for kind in ("bf16", "f16")},
    **{(kind, "m16n8k8"): (2, 1) for kind in ("bf16", "f16")},
    **{("tf32", "m16n8k8"): (4, 2), ("tf32", "m16n8k4"): (2, 1)},
}
GROUP, QUAD = LANES >> 2, LANES & 3


def mma(m: Modifiers, x: Operands):
    """D = A B + C: exact products, summed in float64 and rounded once; hardware keeps fewer bits of the sum."""
    warps_of = _aligned(x, m)
    kind = m.left[-2] if len(m.left) > 2 else ""
    shape = m.one("m16n8k16", "m16n8k8", "m16n8k4")
    if m.left != ["row", "col", "f32", kind, kind, "f32"] or (kind, shape) not in SHAPES:
        raise m.unknown("expected .row.col.f32, twice the type of A and B, .f32")
    m.left.clear()
    d, a, b, c = m.operands(4)
    if (len(d), len(a), len(b), len(c)) != (4, *SHAPES[kind, shape], 4):
        raise m.unknown("expected as many registers as the shape has")
    reads = [[x.read(part, "b32") for part in matrix] for matrix in (a, b)]
    reads_c, writes = [x.read(part, "f32") for part in c], [x.write(part, "f32") for part in d]
    depth = int(shape.partition("k")[2])

    def execute(active):
        warps = warps_of(active)
        words_a, words_b = ([warps.spread(active.full(read(active))) for read in matrix] for matrix in reads)
        product = fragment_a(words_a, kind, depth) @ fragment_b(words_b, kind, depth)
        for k, (read, write) in enumerate(zip(reads_c, writes, strict=True)):
            added = product[:, GROUP + 8 * (k >> 1), 2 * QUAD + (k & 1)] + warps.spread(active.full(read(active)))
            write(active, numbers.canonical(added.astype(f32).reshape(-1)))

    return execute


def _elements(words: np.ndarray, kind: str) -> list[np.ndarray]:
    """The numbers in a register, lowest first; tf32 ignores the 13 bits that it has not."""
    if kind == "tf32":
        return [(words & u32(0xFFFFE000)).view(f32)]
    widen = numbers.from_bf16 if kind == "bf16" else numbers.from_f16
    return [widen(words.astype(u16)), widen((words >> u32(16)).astype(u16))]


def fragment_a(words: list[np.ndarray], kind: str, depth: int) -> np.ndarray:
    """(warps, 16, depth): register r has row g, or g + 8 where r is odd; the columns of r >= 2 are the second half."""
    matrix = np.zeros((len(words[0]), 16, depth), f64)
    for r, word in enumerate(words):
        elements = _elements(word, kind)
        for k, values in enumerate(elements):
            matrix[:, GROUP + 8 * (r & 1), QUAD * len(elements) + k + 4 * len(elements) * (r >> 1)] = values
    return matrix


def fragment_b(words: list[np.ndarray], kind: str, depth: int) -> np.ndarray:
    """(warps, depth, 8): column g; the rows of register 1 are the second half."""
    matrix = np.zeros((len(words[0]), depth, 8), f64)
    for r, word in enumerate(words):
        elements = _elements(word, kind)
        for k, values in enumerate(elements):
            matrix[:, QUAD * len(elements) + k + 4 * len(elements) * r, GROUP] = values
    return matrix


def ldmatrix(m: Modifiers, x: Operands):
    """Lanes 8 k to 8 k + 7 hold the addresses of matrix k's rows; lane 4 g + q receives row g, columns 2 q and 2 q +
    1.
    """
    warps_of = _aligned(x, m)
    m.type("b16")
    m.one("m8n8")
    count = {"x1": 1, "x2": 2, "x4": 4}[m.one("x1", "x2", "x4")]
    transposed = m.flag("trans")
    m.one("shared", "shared::cta")
    destination, source = m.operands(2)
    parts = destination if isinstance(destination, tuple) else (destination,)
    if len(parts) != count:
        raise m.unknown(f"expected {count} registers")
    writes, address, space = [x.write(part, "b32") for part in parts], x.address(source), x.spaces["shared"]

    def execute(active):
        warps = warps_of(active)
        rows = np.tile(8 * count > LANES, warps.count)
        found = space.load(address(active)[rows], np.dtype(u32), 4, active.threads[rows])
        matrices = found.view(u16).reshape(warps.count, count, 8, 8)
        matrices = matrices.swapaxes(2, 3) if transposed else matrices
        for k, write in enumerate(writes):
            write(active, np.ascontiguousarray(matrices[:, k]).view(u32).reshape(-1))

    return execute


def stmatrix(m: Modifiers, x: Operands):
    """ldmatrix, the other way."""
    warps_of = _aligned(x, m)
    m.type("b16")
    m.one("m8n8")
    count = {"x1": 1, "x2": 2, "x4": 4}[m.one("x1", "x2", "x4")]
    transposed = m.flag("trans")
    m.one("shared", "shared::cta")
    target, source = m.operands(2)
    parts = source if isinstance(source, tuple) else (source,)
    if len(parts) != count:
        raise m.unknown(f"expected {count} registers")
    reads, address, space = [x.read(part, "b32") for part in parts], x.address(target), x.spaces["shared"]

    def execute(active):
        warps = warps_of(active)
        rows = np.tile(8 * count > LANES, warps.count)
        words = np.stack([active.full(read(active)).reshape(-1, 32) for read in reads], axis=1)
        matrices = words.view(u16).reshape(-1, count, 8, 8)
        matrices = matrices.swapaxes(2, 3) if transposed else matrices
        values = np.ascontiguousarray(matrices).view(u32).reshape(-1, 4)
        x.changes += space.store(address(active)[rows], values, active.threads[rows])

    return execute


TABLE = {
    **{"shfl": shfl, "vote": vote, "redux": redux, "activemask": activemask},
    **{"mma": mma, "ldmatrix": ldmatrix, "stmatrix": stmatrix},
}
