"""Functions of one number: signs, roots, exponentials."""

import numpy as np

from tests.ptx import numbers
from tests.ptx.elementwise import HALVES, PACKED, elementwise, floating, halfway
from tests.ptx.parse import WIDTH
from tests.ptx.registers import Modifiers, Operands

f32, f64, u32, u64 = np.float32, np.float64, np.uint32, np.uint64


def absolute(m: Modifiers, x: Operands):
    kind = m.type("s16", "s32", "s64", "f32", "f64", *HALVES)
    return _sign_bit(m, x, kind, np.abs, lambda bits, sign: bits & ~sign)


def neg(m: Modifiers, x: Operands):
    kind = m.type("s16", "s32", "s64", "f32", "f64", *HALVES)
    return _sign_bit(m, x, kind, np.negative, lambda bits, sign: bits ^ sign)


def _sign_bit(m: Modifiers, x: Operands, kind: str, function, on_bits):
    if kind in HALVES:
        sign = u32(0x80008000) if kind in PACKED else np.uint16(0x8000)
        return elementwise(x, f"u{WIDTH[kind]}", lambda bits: on_bits(bits, sign), m.operands(2))
    if kind in ("f32", "f64"):
        return floating(m, x, kind, function, m.operands(2))
    return elementwise(x, kind, function, m.operands(2))


def unary(function, *kinds: str, approximate: bool = True):
    """sin, ex2 and their like.  Hardware's .approx is good to some 2^-21; here the float64 result is rounded once."""

    def build(m: Modifiers, x: Operands):
        kind = m.type(*kinds)
        if approximate:
            m.one("approx")
        else:
            m.one("rn", "approx")
        if kind in HALVES:
            m.flag("ftz")
            return halfway(m, x, kind, function, m.operands(2))
        if kind == "f64":
            return floating(m, x, kind, function, m.operands(2))
        return floating(m, x, kind, lambda a: function(a.astype(f64)).astype(f32), m.operands(2))

    return build


def coarse(function):
    """rcp and rsqrt.approx.ftz.f64 read and write only the upper 32 bits of a float64."""
    upper = u64(0xFFFFFFFF00000000)
    cut = lambda a: (np.asarray(a).view(u64) & upper).view(f64)  # noqa: E731
    return lambda a: cut(function(cut(a)))


def reciprocal(function):
    exact = unary(function, "f32", "f64", approximate=False)

    def build(m: Modifiers, x: Operands):
        if m.left == ["approx", "ftz", "f64"]:
            m.left.remove("approx")
            return floating(m, x, m.type("f64"), coarse(function), m.operands(2))
        return exact(m, x)

    return build


def copysign(m: Modifiers, x: Operands):
    """The sign of the first source, all else of the second."""
    return elementwise(x, m.type("f32", "f64"), lambda a, b: np.copysign(b, a), m.operands(3))


TESTS = {
    "finite": np.isfinite,
    "infinite": np.isinf,
    "number": lambda a: ~np.isnan(a),
    "notanumber": np.isnan,
    "normal": lambda a: np.isfinite(a) & (np.abs(a) >= numbers.SMALLEST[a.dtype.type]),
    "subnormal": lambda a: (a != 0) & (np.abs(a) < numbers.SMALLEST[a.dtype.type]),
}


def testp(m: Modifiers, x: Operands):
    return elementwise(x, m.type("f32", "f64"), TESTS[m.one(*TESTS)], m.operands(2), "pred")


TABLE = {
    **{"abs": absolute, "neg": neg, "copysign": copysign, "testp": testp},
    "rcp": reciprocal(lambda a: a.dtype.type(1) / a),
    "rsqrt": reciprocal(lambda a: a.dtype.type(1) / np.sqrt(a)),
    "sqrt": unary(np.sqrt, "f32", "f64", approximate=False),
    "sin": unary(np.sin, "f32"),
    "cos": unary(np.cos, "f32"),
    "lg2": unary(np.log2, "f32"),
    "ex2": unary(np.exp2, "f32", *HALVES),
    "tanh": unary(np.tanh, "f32", *HALVES),
}
