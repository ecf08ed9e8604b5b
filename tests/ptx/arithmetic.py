"""Sums, products and quotients."""

import numpy as np

from tests.ptx import numbers
from tests.ptx.elementwise import HALVES, INTEGERS, ROUNDINGS, elementwise, floating, halfway
from tests.ptx.parse import WIDTH
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE, UNSIGNED

f64, u64 = np.float64, np.uint64

WIDE = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}


def _odd_sum(a, b):
    return numbers.fma_half(a, f64(1), b)


def add(m: Modifiers, x: Operands, subtract: bool = False):
    kind = m.type(*INTEGERS, "f32", "f64", *HALVES)
    operands = m.operands(3)
    if kind in HALVES:
        m.flag("rn")
        return halfway(m, x, kind, (lambda a, b: _odd_sum(a, -b)) if subtract else _odd_sum, operands)
    if kind in ("f32", "f64"):
        rounding = m.one(*ROUNDINGS, default="rn")
        plus = numbers.add32 if kind == "f32" else numbers.add64
        return floating(m, x, kind, lambda a, b: plus(a, -b if subtract else b, rounding), operands)
    if m.flag("cc"):
        return _carrying(x, kind, operands, subtract, False, True)
    if kind == "s32" and m.flag("sat"):
        limits = np.iinfo(np.int32)
        wide = np.subtract if subtract else np.add
        return elementwise(x, kind, lambda a, b: np.clip(wide(a, b, dtype=np.int64), limits.min, limits.max), operands)
    return elementwise(x, kind, np.subtract if subtract else np.add, operands)


def sub(m: Modifiers, x: Operands):
    return add(m, x, subtract=True)


def _carrying(x: Operands, kind: str, operands, subtract: bool, carry_in: bool, carry_out: bool, product=None):
    """Extended-precision addition.  product: what replaces the first operand (mad)."""
    unsigned = f"u{WIDTH[kind]}"
    destination, *sources = operands
    reads = [x.read(source, unsigned) for source in sources]
    write = x.write(destination, unsigned)

    def execute(active):
        values = [active.full(read(active)) for read in reads]
        a, b = (product(*values[:2]), values[2]) if product else values
        carry = x.carry[active.at] if carry_in else np.zeros(len(active), bool)
        result = a - b - carry.astype(a.dtype) if subtract else a + b + carry.astype(a.dtype)
        write(active, result)
        if carry_out:
            beyond = (a < b) | carry & (a == b) if subtract else (result < a) | carry & (result == a)
            x.carry[active.at] = beyond

    return execute


def addc(m: Modifiers, x: Operands, subtract: bool = False):
    kind = m.type("u32", "s32", "u64", "s64")
    return _carrying(x, kind, m.operands(3), subtract, True, m.flag("cc"))


def subc(m: Modifiers, x: Operands):
    return addc(m, x, subtract=True)


def high(a, b):
    """The upper half of an integer product."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.dtype(f"{a.dtype.kind}{a.dtype.itemsize * 2}").type
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    p, q = a.astype(u64), b.astype(u64)
    low, shift = u64(0xFFFFFFFF), u64(32)
    middle = (p & low) * (q & low) >> shift
    middle += (p >> shift) * (q & low)
    other = (middle & low) + (p & low) * (q >> shift)
    result = (p >> shift) * (q >> shift) + (middle >> shift) + (other >> shift)
    if a.dtype.kind == "i":
        result = result - np.where(a < 0, q, u64(0)) - np.where(b < 0, p, u64(0))
    return result.astype(a.dtype)


def widened(kind: str):
    wide = DTYPE[WIDE[kind]].type
    return lambda a, b: a.astype(wide) * b.astype(wide)


def mul(m: Modifiers, x: Operands):
    kind = m.type(*INTEGERS, "f32", "f64", *HALVES)
    operands = m.operands(3)
    if kind in HALVES:
        m.flag("rn")
        return halfway(m, x, kind, np.multiply, operands)
    if kind in ("f32", "f64"):
        rounding = m.one(*ROUNDINGS, default="rn")
        times = numbers.mul32 if kind == "f32" else numbers.mul64
        return floating(m, x, kind, lambda a, b: times(a, b, rounding), operands)
    part = m.one("lo", "hi", "wide")
    if part == "wide" and kind in WIDE:
        return elementwise(x, kind, widened(kind), operands, WIDE[kind])
    return elementwise(x, kind, high if part == "hi" else np.multiply, operands)


def mad(m: Modifiers, x: Operands, carry_in: bool = False):
    kind = m.type(*INTEGERS, "f32", "f64")
    if kind in ("f32", "f64"):
        m.left.append(kind)
        return fma(m, x)
    part, carry_out = m.one("lo", "hi", "wide"), m.flag("cc")
    operands = m.operands(4)
    product = high if part == "hi" else np.multiply
    if carry_in or carry_out:
        if kind in ("s32", "s64") and part == "hi":
            signed = DTYPE[kind].type
            product = lambda a, b: high(a.view(signed), b.view(signed)).view(a.dtype)  # noqa: E731
        return _carrying(x, kind, operands, False, carry_in, carry_out, product)
    if part == "wide":
        read = x.read(operands[3], WIDE[kind])
        a, b, times = x.read(operands[1], kind), x.read(operands[2], kind), widened(kind)
        write = x.write(operands[0], WIDE[kind])
        return lambda active: write(active, times(a(active), b(active)) + read(active))
    return elementwise(x, kind, lambda a, b, c: product(a, b) + c, operands)


def madc(m: Modifiers, x: Operands):
    return mad(m, x, carry_in=True)


def fma(m: Modifiers, x: Operands):
    kind = m.type("f32", "f64", *HALVES)
    rounding = m.one(*ROUNDINGS, default="rn")
    if kind in HALVES:
        return halfway(m, x, kind, numbers.fma_half, m.operands(4))
    fused = numbers.fma32 if kind == "f32" else numbers.fma64
    return floating(m, x, kind, lambda a, b, c: fused(a, b, c, rounding), m.operands(4))


def magnitude(a):
    unsigned = UNSIGNED[a.dtype.itemsize].type
    return np.where(a < 0, unsigned(0) - a.astype(unsigned), a.astype(unsigned))


def quotient(a, b):
    """Towards zero.  By zero it is all ones; the ISA leaves that open."""
    size = magnitude(a) // np.maximum(magnitude(b), 1)
    negative = (a < 0) != (b < 0)
    return np.where(b == 0, a.dtype.type(0) - a.dtype.type(1), np.where(negative, 0 - size, size).astype(a.dtype))


def remainder(a, b):
    """With the sign of a.  By zero it is a itself; the ISA leaves that open."""
    return np.where(b == 0, a, a - quotient(a, b) * b)


def div(m: Modifiers, x: Operands):
    """div.approx and div.full are within 2 ulp on hardware; here they are rounded correctly."""
    kind = m.type(*INTEGERS, "f32", "f64")
    if kind in INTEGERS:
        return elementwise(x, kind, quotient, m.operands(3))
    m.one("rn", "full", "approx")
    return floating(m, x, kind, np.divide, m.operands(3))


def rem(m: Modifiers, x: Operands):
    return elementwise(x, m.type(*INTEGERS), remainder, m.operands(3))


def maximum(m: Modifiers, x: Operands, largest: bool = True):
    kind = m.type(*INTEGERS, "f32", "f64", *HALVES)
    if kind in INTEGERS:
        return elementwise(x, kind, np.maximum if largest else np.minimum, m.operands(3))
    nan = m.flag("NaN")
    wrapper = halfway if kind in HALVES else floating
    return wrapper(m, x, kind, lambda a, b: numbers.extreme(a, b, largest, nan), m.operands(3))


def minimum(m: Modifiers, x: Operands):
    return maximum(m, x, largest=False)


TABLE = {
    **{"add": add, "sub": sub, "addc": addc, "subc": subc, "mul": mul, "mad": mad, "madc": madc, "fma": fma},
    **{"div": div, "rem": rem, "min": minimum, "max": maximum},
}
