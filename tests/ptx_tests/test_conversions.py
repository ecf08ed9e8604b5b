"""Conversions and the 16-bit formats, against exact fractions and the formats' definitions."""

import math
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx_tests.snippets import SIGNED, UNSIGNED, compute, rounded, same, wrap


@pytest.mark.parametrize("mode, how", {"rni": round, "rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil}.items())
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("source", ["f32", "f64"])
def test_float_to_integer_rounds_and_clamps(source, kind, mode, how):
    x = np.array(
        [0.5, 1.5, -0.5, -1.5, 2.5, 1e9, -1e9, 3e9, 1e20, -1e20, math.inf, -math.inf],
        {"f32": "f4", "f64": "f8"}[source],
    )
    bits = int(kind[1:])
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)
    got = compute(f"cvt.{mode}.{kind}.{source} %o, %a;", x, out={"s": SIGNED, "u": UNSIGNED}[kind[0]][bits])
    expected = [min(max(how(v), low), high) if math.isfinite(v) else (high if v > 0 else low) for v in x.tolist()]
    assert got.tolist() == expected


def test_nan_to_integer():
    single, double = np.array([np.nan], "f4"), np.array([np.nan], "f8")
    assert compute("cvt.rzi.s32.f32 %o, %a;", single, out="i4")[0] == 0
    assert compute("cvt.rzi.s64.f32 %o, %a;", single, out="i8")[0] == -(1 << 63)
    assert compute("cvt.rzi.s32.f64 %o, %a;", double, out="i4")[0] == -(1 << 31)
    assert compute("cvt.rzi.u32.f64 %o, %a;", double, out="u4")[0] == 1 << 31


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_integer_to_float_rounds_once(kind, mode):
    bits = int(kind[1:])
    values = [
        (1 << 24) + 1,
        (1 << 24) + 3,
        (1 << 31) - 1,
        (1 << bits) - 1,
        1 << bits - 1,
        (1 << bits - 2) + (1 << bits - 27) + 1,
        0,
    ]
    a = np.array([wrap(v, kind) for v in values], {"s": SIGNED, "u": UNSIGNED}[kind[0]][bits])
    single = compute(f"cvt.{mode}.f32.{kind} %o, %a;", a, out="f4")
    double = compute(f"cvt.{mode}.f64.{kind} %o, %a;", a, out="f8")
    same(single, [float(rounded(Fraction(v), 24, -149, mode)) for v in a.tolist()])
    same(double, [float(rounded(Fraction(v), 53, -1074, mode)) for v in a.tolist()])


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_double_to_single(mode):
    x = np.array([1 + 2.0**-24, 1 + 2.0**-24 + 2.0**-50, -1 - 2.0**-25, 1e-42, 2.0**-150, 1.0], "f8")
    got = compute(f"cvt.{mode}.f32.f64 %o, %a;", x, out="f4")
    same(got, [float(rounded(Fraction(v), 24, -149, mode)) for v in x.tolist()])


def test_integral_and_saturating_floats():
    x = np.array([0.5, 1.5, -0.5, -2.5, 1e30, np.nan], "f4")
    same(compute("cvt.rni.f32.f32 %o, %a;", x, out="f4"), [0.0, 2.0, -0.0, -2.0, np.float32(1e30), np.nan])
    same(compute("cvt.sat.f32.f32 %o, %a;", x, out="f4"), [0.5, 1, 0, 0, 1, 0])
    same(compute("cvt.ftz.f64.f32 %o, %a;", np.array([1e-40], "f4"), out="f8"), [0.0])
    same(compute("cvt.rn.ftz.f32.f64 %o, %a;", np.array([-1e-40], "f8"), out="f4"), [-0.0])


def test_integer_widths():
    a = np.array([-1, 200, 70000, -(1 << 31)], "i4")
    assert compute("cvt.s64.s32 %o, %a;", a, out="i8").tolist() == a.tolist()
    assert compute("cvt.u64.u32 %o, %a;", a, out="i8").tolist() == a.view("u4").tolist()
    assert compute("cvt.s32.s8 %o, %a;", a, out="i4").tolist() == a.astype("i1").tolist()
    assert compute("cvt.u16.u32 %o, %a;", a, out="u2").tolist() == a.astype("u2").tolist()
    assert compute("cvt.sat.s8.s32 %o, %a;", a, out="i4").tolist() == [-1, 127, 127, -128]
    assert compute("cvt.sat.u8.s32 %o, %a;", a, out="u4").tolist() == [0, 200, 255, 0]


def bits16(value: float, digits: int, least: int, bias: int, mantissa: int) -> int:
    """The pattern of a 16-bit float, nearest, from its definition."""
    near = rounded(Fraction(value), digits, least)
    size = abs(near)
    exponent = 0 if size == 0 else math.floor(math.log2(size))
    sign = 0x8000 if math.copysign(1, value) < 0 else 0
    if size < Fraction(2) ** (1 - bias):
        return sign | int(size / Fraction(2) ** least)
    return sign | exponent + bias << mantissa | int((size / Fraction(2) ** exponent - 1) * 2**mantissa)


FORMATS = {"bf16": (8, -133, 127, 7), "f16": (11, -24, 15, 10)}


@pytest.mark.parametrize("kind", FORMATS)
def test_narrow_floats(kind):
    ulp = 2.0 ** (1 - FORMATS[kind][0])
    x = np.array([1, 1 + ulp / 2, 1 + 1.5 * ulp, -1 - ulp / 2 - 1e-6, 3e-5, -6e-8, 0.0, -0.0, 1000.5], "f4")
    bits = [bits16(float(v), *FORMATS[kind]) for v in x]
    assert compute(f"cvt.rn.{kind}.f32 %o, %a;", x, out="u2").tolist() == bits
    packed = compute(f"cvt.rn.{kind}x2.f32 %o, %a, %b;", x, x[::-1], out="u4")
    assert packed.tolist() == [high << 16 | low for high, low in zip(bits, bits[::-1], strict=True)]
    back = compute(f"cvt.f32.{kind} %o, %a;", np.array(bits, "u2"), out="f4")
    digits, least, *_ = FORMATS[kind]
    same(np.where(back == 0, 0, back).astype("f4"), [float(rounded(Fraction(float(v)), digits, least)) for v in x])
    extreme = compute(
        f"cvt.rn.{kind}.f32 %o, %a;", np.array([np.inf, np.nan, 3e38 if kind == "bf16" else 65520], "f4"), out="u2"
    )
    infinity = 0x7F80 if kind == "bf16" else 0x7C00
    assert extreme.tolist() == [infinity, 0x7FFF, 0x7F62 if kind == "bf16" else infinity]


def test_tf32_rounds_ties_away():
    x = np.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 1 + 3 * 2.0**-11], "f4")
    got = compute("cvt.rna.tf32.f32 %o, %a;", x, out="u4").view("f4")
    same(got, [1 + 2.0**-10, -1 - 2.0**-10, 1, 1 + 2.0**-9])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "name, exact",
    {"fma.rn": lambda a, b, c: a * b + c, "add": lambda a, b, c: a + b, "mul": lambda a, b, c: a * b}.items(),
)
def test_packed_arithmetic_rounds_once(kind, name, exact):
    rng = np.random.default_rng(3)
    digits, least, *_ = FORMATS[kind]
    operands = [[rounded(Fraction(float(v)), digits, least) for v in rng.standard_normal(64)] for _ in range(3)]
    operands[2][:8] = [Fraction(2) ** -20] * 8  # far below the product's last digit
    words = [np.array([bits16(float(v), *FORMATS[kind]) for v in x], "u2").view("u4") for x in operands]
    body = f"{name}.{kind}x2 %o, %a, %b{', %c' if 'fma' in name else ''};"
    got = compute(body, *words, out="u4").view("u2")
    expected = [bits16(float(rounded(exact(*v), digits, least)), *FORMATS[kind]) for v in zip(*operands, strict=True)]
    assert got.tolist() == expected


def test_packed_tanh():
    words = np.array([0x3F80BF80], "u4")  # 1 and -1 in bf16
    got = compute("tanh.approx.bf16x2 %o, %a;", words, out="u4").view("u2")
    assert got.tolist() == [bits16(-math.tanh(1), *FORMATS["bf16"]), bits16(math.tanh(1), *FORMATS["bf16"])]
