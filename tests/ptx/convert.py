"""Conversions between types."""

import numpy as np

from tests.ptx import numbers
from tests.ptx.elementwise import INTEGERS, PACKED, ROUNDINGS
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE, SIGNED

f64, u64 = np.float64, np.uint64

EIGHTS = ("u8", "s8")
INTEGRAL = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}


def cvt(m: Modifiers, x: Operands):
    sources = (*INTEGERS, *EIGHTS, "f16", "bf16", "f32", "f64")
    source = m.type(*sources)
    result = m.type(*sources, *PACKED, "tf32")
    if result in PACKED:
        return _cvt_packed(m, x, result, source)
    rounding = m.one(*INTEGRAL, *ROUNDINGS, "rna", default="none")
    convert = _conversion(result, source, rounding, m)
    ftz, sat = m.flag("ftz"), m.flag("sat")
    destination, operand = m.operands(2)
    read = x.read(operand, "b16" if source == "bf16" else source, wider=True)
    write = x.write(destination, {"bf16": "b16", "tf32": "b32"}.get(result, result), wider=True)
    limits = np.iinfo(DTYPE[result]) if result[0] in "us" and source[0] in "us" else None

    def execute(active):
        value = read(active)
        value = numbers.flush(value) if ftz and source in ("f32", "f64") else value
        if limits and sat:
            value = _clip(value, limits)
        value = convert(value)
        value = numbers.saturate(value) if sat and result in ("f32", "f64") else value
        write(active, numbers.flush(value) if ftz and result == "f32" else value)

    return execute


def _clip(value, limits):
    """To the limits of a type, whatever the value's own type is."""
    own = np.iinfo(value.dtype)
    return np.clip(value, max(limits.min, own.min), min(limits.max, own.max))


def _conversion(result: str, source: str, rounding: str, m: Modifiers):
    """values of the source's type -> values of the result's (bits for bf16 and tf32)."""
    if result == "tf32":
        if (source, rounding) != ("f32", "rna"):
            raise m.unknown("expected cvt.rna.tf32.f32")
        return numbers.to_tf32
    widen = {"f16": lambda a: a.astype(f64), "bf16": lambda a: numbers.from_bf16(a).astype(f64)}
    widen = widen.get(source, lambda a: a.astype(f64))
    if result[0] in "us":
        if source[0] in "us":
            return lambda a: a.astype(DTYPE[result])
        if rounding not in INTEGRAL:
            raise m.unknown("a conversion from a float to an integer needs .rni, .rzi, .rmi or .rpi")
        special = result[1:] == "64" or source == "f64"
        return lambda a: to_integer(INTEGRAL[rounding](widen(a)), DTYPE[result], special)
    if source[0] in "us":
        return lambda a: from_integer(a, result, rounding)
    if rounding in INTEGRAL:
        return lambda a: _to_float(INTEGRAL[rounding](widen(a)), result, "rn")
    return lambda a: _to_float(widen(a), result, rounding)


def to_integer(value, dtype: np.dtype, nan_is_extreme: bool):
    """Integral float64 -> integer, clamped.  NaN is 0, or the type's 1000...0 where either side has 64 bits."""
    value = np.atleast_1d(value)
    limits = np.iinfo(dtype)
    result = np.where(value > 0, dtype.type(limits.max), dtype.type(limits.min))
    inside = (value >= float(limits.min)) & (value < float(limits.max + 1))
    result[inside] = value[inside].astype(dtype)
    nan = (
        SIGNED[dtype.itemsize].type(np.iinfo(SIGNED[dtype.itemsize]).min).view(dtype)
        if nan_is_extreme
        else dtype.type(0)
    )
    result[np.isnan(value)] = nan
    return result


def from_integer(value, result: str, rounding: str):
    """Through two exact halves, so that 64 bits are rounded once."""
    wide = np.asarray(value).astype(np.int64 if value.dtype.kind == "i" else u64)
    low = (wide & wide.dtype.type(0xFFFFFFFF)).astype(f64)
    s, error = numbers.two_sum((wide >> wide.dtype.type(32)).astype(f64) * f64(2.0**32), low)
    if result != "f64":
        return _to_float(numbers.to_odd(s, error), result, rounding)
    wrong = {"rz": (error != 0) & ((error > 0) != (s > 0)), "rm": error < 0, "rp": error > 0}.get(rounding)
    if wrong is None:
        return s
    return np.where(wrong, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)


def _to_float(value, result: str, rounding: str):
    """float64, exact or rounded to odd -> the result's type."""
    if result == "f64":
        return value
    if result == "f32":
        return numbers.canonical(numbers.narrow(value, "rn" if rounding in ("none", *INTEGRAL) else rounding))
    bits = numbers.half_bits(value, result)
    return bits.view(np.float16) if result == "f16" else bits


def _cvt_packed(m: Modifiers, x: Operands, result: str, source: str):
    """The first source goes to the upper half."""
    if source != "f32":
        raise m.unknown("expected .f32")
    m.one("rn")
    relu = m.flag("relu")
    destination, upper, lower = m.operands(3)
    reads = x.read(lower, "f32"), x.read(upper, "f32")
    write = x.write(destination, "b32")

    def execute(active):
        values = np.stack([active.full(read(active)).astype(f64) for read in reads], axis=1)
        values = np.where(values < 0, 0.0, values) if relu else values
        write(active, numbers.pack(values, result))

    return execute


TABLE = {
    "cvt": cvt,
}
