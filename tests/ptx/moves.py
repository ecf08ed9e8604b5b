"""Moves, and addresses from one state space to another."""

import numpy as np

from tests.ptx.elementwise import BITS, INTEGERS, elementwise
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.parse import WIDTH
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE

u64 = np.uint64

SPACES = {"global": 0, "const": 0, "param": 0, "shared": SHARED_WINDOW, "local": LOCAL_WINDOW}


def mov(m: Modifiers, x: Operands):
    kind = m.type(*INTEGERS, *BITS, "f32", "f64", "pred")
    destination, source = m.operands(2)
    if isinstance(source, tuple):
        return _pack(x, kind, destination, source)
    if isinstance(destination, tuple):
        return _unpack(x, kind, destination, source)
    return elementwise(x, kind, lambda a: a, (destination, source))


def _pack(x: Operands, kind: str, destination, parts: tuple):
    """The first part goes to the lowest bits."""
    part = f"b{WIDTH[kind] // len(parts)}"
    reads = [x.read(source, part) for source in parts]
    write = x.write(destination, kind)
    dtype = DTYPE[part]

    def execute(active):
        both = np.empty((len(active), len(reads)), dtype)
        for k, read in enumerate(reads):
            both[:, k] = read(active)
        write(active, both.view(DTYPE[kind])[:, 0])

    return execute


def _unpack(x: Operands, kind: str, parts: tuple, source):
    part = f"b{WIDTH[kind] // len(parts)}"
    read = x.read(source, kind)
    writes = [x.write(register, part) for register in parts]

    def execute(active):
        values = np.array(active.full(read(active))).view(DTYPE[part]).reshape(-1, len(parts))
        for k, write in enumerate(writes):
            write(active, values[:, k])

    return execute


def cvta(m: Modifiers, x: Operands):
    """Between an address in one state space and the generic address of the same byte."""
    kind = m.type("u32", "u64")
    back = m.flag("to")
    window = DTYPE[kind].type(SPACES[m.one(*SPACES)])
    return elementwise(x, kind, (lambda a: a - window) if back else (lambda a: a + window), m.operands(2))


def isspacep(m: Modifiers, x: Operands):
    space = m.one("global", "shared", "local")
    low, high = {
        "global": (0, SHARED_WINDOW),
        "shared": (SHARED_WINDOW, LOCAL_WINDOW),
        "local": (LOCAL_WINDOW, 1 << 63),
    }[space]
    return elementwise(x, "u64", lambda a: (a >= u64(low)) & (a < u64(high)), m.operands(2), "pred")


TABLE = {
    **{"mov": mov, "cvta": cvta, "isspacep": isspacep},
}
