"""Comparisons, selections, logic."""

import numpy as np

from tests.ptx import numbers
from tests.ptx.elementwise import BITS, INTEGERS, elementwise
from tests.ptx.parse import Pair
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE

f32 = np.float32

COMPARISONS = {
    **{"eq": np.equal, "ne": lambda a, b: (a < b) | (a > b) if a.dtype.kind == "f" else a != b},
    **{"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal},
    **{"lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal},
    **{"equ": lambda a, b: ~((a < b) | (a > b)), "neu": np.not_equal},
    **{"ltu": lambda a, b: ~(a >= b), "leu": lambda a, b: ~(a > b), "gtu": lambda a, b: ~(a <= b)},
    **{"geu": lambda a, b: ~(a < b), "num": lambda a, b: ~(np.isnan(a) | np.isnan(b))},
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
ORDERED = {"eq", "ne", "lt", "le", "gt", "ge"}
UNORDERED = {"equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}
JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def comparison(m: Modifiers, x: Operands, kind: str, sources):
    """Active -> (the comparison, its opposite), each joined with a third predicate where the instruction has one."""
    name, ftz = m.one(*COMPARISONS), m.flag("ftz")
    allowed = {"f": ORDERED | UNORDERED, "u": ORDERED | {"lo", "ls", "hi", "hs"}, "s": ORDERED, "b": {"eq", "ne"}}
    if name not in allowed[kind[0]]:
        raise m.unknown(f".{name} is not for {kind}")
    join = m.one(*JOINS, default="none")
    a, b = x.read(sources[0], kind), x.read(sources[1], kind)
    third = None if join == "none" else x.read(sources[2], "pred")
    compare = COMPARISONS[name]

    def evaluate(active):
        left, right = (numbers.flush(a(active)), numbers.flush(b(active))) if ftz else (a(active), b(active))
        result = np.asarray(compare(left, right))
        if third is None:
            return result, ~result
        return JOINS[join](result, third(active)), JOINS[join](~result, third(active))

    return evaluate


def setp(m: Modifiers, x: Operands):
    kind = m.type(*INTEGERS, *BITS, "f32", "f64", "f16")
    destination, *sources = m.operands(3, 4)
    evaluate = comparison(m, x, kind, sources)
    both = (destination.first, destination.second) if isinstance(destination, Pair) else (destination,)
    writes = [x.write(register, "pred") for register in both]

    def execute(active):
        for write, value in zip(writes, evaluate(active), strict=False):
            write(active, value)

    return execute


def set_(m: Modifiers, x: Operands):
    """All ones or zero as an integer, 1 or 0 as a float."""
    kind = m.type(*INTEGERS, *BITS, "f32", "f64", "f16")
    result = m.type("u32", "s32", "f32")
    destination, *sources = m.operands(3, 4)
    evaluate = comparison(m, x, kind, sources)
    write = x.write(destination, result)
    one = f32(1) if result == "f32" else DTYPE[result].type(0) - DTYPE[result].type(1)
    return lambda active: write(active, np.where(evaluate(active)[0], one, one.dtype.type(0)))


def selp(m: Modifiers, x: Operands):
    kind = m.type(*INTEGERS, *BITS, "f32", "f64")
    destination, a, b, predicate = m.operands(4)
    reads = x.read(a, kind), x.read(b, kind), x.read(predicate, "pred")
    write = x.write(destination, kind)
    return lambda active: write(active, np.where(reads[2](active), reads[0](active), reads[1](active)))


def slct(m: Modifiers, x: Operands):
    """a where c is not negative; NaN is negative here."""
    chooser = m.type("s32", "f32")
    ftz = m.flag("ftz")
    kind = m.type(*INTEGERS, *BITS, "f32", "f64")
    destination, a, b, c = m.operands(4)
    reads = x.read(a, kind), x.read(b, kind), x.read(c, chooser)
    write = x.write(destination, kind)

    def execute(active):
        value = reads[2](active)
        write(active, np.where((numbers.flush(value) if ftz else value) >= 0, reads[0](active), reads[1](active)))

    return execute


def logic(function):
    def build(m: Modifiers, x: Operands):
        kind = m.type(*BITS, "pred")
        return elementwise(x, kind, function, m.operands(2 if function is np.invert else 3))

    return build


TABLE = {
    **{"setp": setp, "set": set_, "selp": selp, "slct": slct, "not": logic(np.invert)},
    **{"and": logic(np.bitwise_and), "or": logic(np.bitwise_or), "xor": logic(np.bitwise_xor)},
}
