"""PTX's arithmetic where it is not NumPy's: NaN, flushed denormals, rounding, fused multiply-add, bfloat16.

Every function takes arrays or scalars of the type it computes in.  Warnings about overflow and NaN are the caller's.
"""

from fractions import Fraction

import numpy as np

f16, f32, f64, u16, u32, u64 = np.float16, np.float32, np.float64, np.uint16, np.uint32, np.uint64
NAN = {f16: u16(0x7FFF).view(f16), f32: u32(0x7FFFFFFF).view(f32), f64: u64(0x7FFFFFFFFFFFFFFF).view(f64)}
BF16_NAN = u16(0x7FFF)
SMALLEST = {f32: f32(2.0**-126), f64: f64(2.0**-1022)}  # normal numbers


def canonical(x):
    """A NaN that float32 arithmetic produced has one pattern, and not x86's; float64's payloads are open."""
    if x.dtype != f32:
        return x
    odd = x != x
    return np.where(odd, NAN[f32], x) if np.any(odd) else x


def flush(x):
    """Denormals become zeros of their sign (.ftz)."""
    small = np.abs(x) < SMALLEST[x.dtype.type]
    return np.where(small, np.copysign(x.dtype.type(0), x), x) if np.any(small) else x


def saturate(x):
    """To [0, 1]; NaN becomes 0 (.sat)."""
    kind = x.dtype.type
    return np.where(x > 0, np.minimum(x, kind(1)), kind(0))


def two_sum(a, b):
    """a + b as a float64 and what its rounding lost, exactly (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def to_odd(s, error):
    """s + error rounded to odd: a later rounding to fewer digits is then right (Boldo and Melquiond)."""
    s = np.asarray(s, f64)
    even = (s.view(u64) & u64(1)) == 0
    move = even & (error != 0) & np.isfinite(s)
    return np.where(move, np.nextafter(s, np.where(error > 0, np.inf, -np.inf)), s)


def narrow(x, rounding: str):
    """float64 -> float32, in one of PTX's four rounding modes."""
    near = np.asarray(x, f64).astype(f32)
    if rounding == "rn":
        return near
    if rounding == "rz":
        over = np.abs(near) > np.abs(x)
        return np.where(over, np.nextafter(near, f32(0)), near)
    wrong, limit = (near > x, f32(-np.inf)) if rounding == "rm" else (near < x, f32(np.inf))
    return np.where(wrong, np.nextafter(near, limit), near)


def fma32(a, b, c, rounding: str = "rn"):
    """One rounding.  The product is exact in float64; only sums near a tie, or denormal, need their lost part."""
    product = a.astype(f64) * b
    s = product + c
    if rounding == "rn":
        tie = (s.view(u64) & u64(0x1FFFFFFF)) == u64(0x10000000)
        tie |= (np.abs(s) < SMALLEST[f32]) & (s != 0)
        if not np.any(tie):
            return s.astype(f32)
    s, error = two_sum(product, np.asarray(c, f64))
    return narrow(to_odd(s, np.where(np.isfinite(s), error, 0)), rounding)


def add32(a, b, rounding: str):
    if rounding == "rn":
        return a + b
    s, error = two_sum(a.astype(f64), b.astype(f64))
    return narrow(to_odd(s, np.where(np.isfinite(s), error, 0)), rounding)


def mul32(a, b, rounding: str):
    return a * b if rounding == "rn" else narrow(a.astype(f64) * b, rounding)


def split(a):
    """a = high + low, 26 bits each (Veltkamp)."""
    t = a * f64(134217729.0)
    high = t - (t - a)
    return high, a - high


def fma64(a, b, c, rounding: str = "rn"):
    """One rounding, by error-free transformations (Boldo and Melquiond 2008); extreme exponents by exact fractions."""
    a, b, c = np.broadcast_arrays(*(np.atleast_1d(np.asarray(x, f64)) for x in (a, b, c)))
    product = a * b
    (ah, al), (bh, bl) = split(a), split(b)
    low = al * bl - (((product - ah * bh) - al * bh) - ah * bl)
    th, tl = two_sum(c, low)
    vh, vl = two_sum(product, th)
    result = vh + to_odd(tl + vl, two_sum(tl, vl)[1])
    plain = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    sizes = [np.abs(x) for x in (a, b, c, product)]
    within = np.all([((x == 0) | (x > 1e-200)) & (x < 1e200) for x in sizes[:3]], axis=0)
    within &= ((product == 0) & ((a == 0) | (b == 0))) | ((sizes[3] > 1e-200) & (sizes[3] < 1e200))
    result = np.where(plain, result, product + c)
    for k in np.flatnonzero(plain if rounding != "rn" else plain & ~within):
        result[k] = exact64(
            Fraction(float(a[k])) * Fraction(float(b[k])), Fraction(float(c[k])), rounding, (product + c)[k]
        )
    return result


def exact64(left: Fraction, right: Fraction, rounding: str, zero: float) -> float:
    """left + right rounded once; `zero` has the sign of an exact zero."""
    exact = left + right
    if exact == 0:
        return -0.0 if rounding == "rm" and left != 0 else float(zero)
    try:
        near = exact.numerator / exact.denominator  # Python rounds this division correctly
    except OverflowError:
        near = np.copysign(np.inf, float(exact > 0) - 0.5)
    towards = {"rn": None, "rz": 0.0, "rm": -np.inf, "rp": np.inf}[rounding]
    if towards is None:
        return near
    big = near if np.isinf(near) else Fraction(near)
    wrong = {"rz": abs(big) > abs(exact), "rm": big > exact, "rp": big < exact}[rounding]
    return float(np.nextafter(near, towards)) if wrong else near


def add64(a, b, rounding: str):
    return a + b if rounding == "rn" else fma64(a, f64(1), b, rounding)


def mul64(a, b, rounding: str):
    if rounding == "rn":
        return a * b
    return fma64(a, b, np.copysign(f64(0), np.asarray(a * b)), rounding)


def extreme(a, b, largest: bool, nan: bool):
    """max or min: -0 is below +0; NaN loses against a number unless `nan`."""
    either = np.isnan(a) | np.isnan(b)
    kind = a.dtype.type
    bits = {f16: u16, f32: u32, f64: u64}[kind]
    result = (np.fmax if largest else np.fmin)(a, b)
    x, y = np.asarray(a).view(bits), np.asarray(b).view(bits)
    zeros = (x & y if largest else x | y).view(kind)
    result = np.where(np.asarray(a == b), zeros, result)
    both = either if nan else np.isnan(a) & np.isnan(b)
    return np.where(both, NAN[kind], result)


def to_bf16(x):
    """float32 -> bits of the nearest bfloat16, ties to even."""
    bits = np.asarray(x, f32).view(u32)
    near = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(u16)
    return np.where(np.isnan(x), BF16_NAN, near)


def from_bf16(bits):
    return (np.asarray(bits, u16).astype(u32) << u32(16)).view(f32)


def to_f16(x):
    """float32 -> bits of the nearest half, ties to even."""
    return np.where(np.isnan(x), u16(0x7FFF), np.asarray(x).astype(f16).view(u16))


def from_f16(bits):
    return np.asarray(bits, u16).view(f16).astype(f32)


def to_tf32(x):
    """float32 -> nearest number of 10 mantissa bits, ties away from zero (cvt.rna)."""
    bits = np.asarray(x, f32).view(u32)
    near = (bits + u32(0x1000)) & u32(0xFFFFE000)
    return np.where(np.isnan(x), u32(0x7FFFFFFF), np.where(np.isinf(x), bits, near))


def halves(packed, kind: str):
    """The two 16-bit parts of each 32-bit word as float64: (threads, 2), the lower part first."""
    bits = np.atleast_1d(packed).astype(u32, copy=False).view(u16).reshape(-1, 2)
    return (from_f16(bits) if kind.startswith("f16") else from_bf16(bits)).astype(f64)


def pack(values, kind: str):
    """float64, rounded to odd where that lost anything, (threads, 2) -> 32-bit words of two 16-bit parts."""
    bits = half_bits(values, kind)
    return np.ascontiguousarray(bits).view(u32).reshape(-1)


def half_bits(values, kind: str):
    """float64, rounded to odd where that lost anything -> bits of f16 or bf16."""
    if kind.startswith("f16"):
        return to_f16(values)
    down = narrow(values, "rz")
    odd = down.view(u32) | (down.astype(f64) != values).astype(u32)
    return to_bf16(np.where(np.isfinite(values), odd, down.view(u32)).view(f32))


def fma_half(a, b, c):
    """Of 16-bit numbers in float64: their product is exact there, and the sum is rounded to odd."""
    s, error = two_sum(a * b, c)
    return to_odd(s, np.where(np.isfinite(s), error, 0))
