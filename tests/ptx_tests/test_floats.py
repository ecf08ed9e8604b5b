"""Floating-point arithmetic and comparisons, against exact fractions."""

import math
import operator
from fractions import Fraction

import numpy as np
import pytest

from tests.ptx_tests.snippets import compute, edges, pairs, rounded, same

FLOATS = [0.0, -0.0, 1.0, -1.5, 3.1415927, 1e-40, -1e-40, 2.0**-149, 2.0**-126, 1e38, -3e38, 65504.0, 1e-7]
ODD = [*FLOATS, math.inf, -math.inf, math.nan]


def near_ties(count: int, dtype) -> tuple[np.ndarray, ...]:
    """Products half way between two numbers, and addends that decide, or are far too small for a wider format to see."""
    rng = np.random.default_rng(0)
    digits = 24 if dtype == np.float32 else 53
    a = (1 + 2.0 ** -(digits // 2)) * np.ones(count)
    b = 1 + rng.integers(0, 1 << digits // 2, count) * 2.0 ** (1 - digits)
    b[: count // 2] = 1 + 2.0 ** -(digits - digits // 2)
    c = rng.choice([1, -1], count) * 2.0 ** -rng.choice([digits, digits + 5, 70, 100, 140], count)
    return a.astype(dtype), b.astype(dtype), c.astype(dtype)


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
@pytest.mark.parametrize("dtype, kind, digits, least", [(np.float32, "f32", 24, -149), (np.float64, "f64", 53, -1074)])
def test_one_rounding(dtype, kind, digits, least, mode):
    rng = np.random.default_rng(1)
    a, b, c = (
        np.concatenate(x).astype(dtype) for x in zip(near_ties(60, dtype), rng.standard_normal((3, 100)), strict=True)
    )
    a[-20:] *= dtype(2.0 ** (least // 2))  # products among the denormals
    b[-20:] *= dtype(2.0 ** (least // 2 + 20))
    c[-20:] *= dtype(2.0 ** (least + 20))
    exact = [[Fraction(float(v)) for v in x] for x in (a, b, c)]
    cases = {
        f"fma.{mode}.{kind} %o, %a, %b, %c;": [x * y + z for x, y, z in zip(*exact, strict=True)],
        f"add.{mode}.{kind} %o, %a, %c;": [x + z for x, _, z in zip(*exact, strict=True)],
        f"sub.{mode}.{kind} %o, %a, %c;": [x - z for x, _, z in zip(*exact, strict=True)],
        f"mul.{mode}.{kind} %o, %a, %b;": [x * y for x, y, _ in zip(*exact, strict=True)],
    }
    for body, values in cases.items():
        got = compute(body, a, b, c, out=dtype)
        same(np.where(got == 0, 0, got).astype(dtype), [float(rounded(v, digits, least, mode)) for v in values])


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_float32_arithmetic_at_the_edges(ftz):
    a, b = pairs(ODD, "f4")
    flush = (lambda x: np.where(np.abs(x) < 2.0**-126, np.copysign(0, x), x).astype("f4")) if ftz else (lambda x: x)
    with np.errstate(all="ignore"):
        x, y = flush(a), flush(b)
        for name, result in {"add": x + y, "sub": x - y, "mul": x * y, "div.rn": x / y}.items():
            same(compute(f"{name}{ftz}.f32 %o, %a, %b;", a, b, out="f4"), flush(result))
        same(compute(f"sqrt.rn{ftz}.f32 %o, %a;", a, out="f4"), flush(np.sqrt(x)))
        same(compute(f"rcp.rn{ftz}.f32 %o, %a;", a, out="f4"), flush(1 / x))
        same(compute(f"neg{ftz}.f32 %o, %a;", a, out="f4"), -x)
        same(compute(f"abs{ftz}.f32 %o, %a;", a, out="f4"), np.abs(x))
        same(
            compute(f"add{ftz}.sat.f32 %o, %a, %b;", a, b, out="f4"),
            np.where(x + y > 0, np.minimum(flush(x + y), 1), 0),
        )


def test_arithmetic_writes_one_nan():
    a, b = np.array([np.nan, np.inf], "f4"), np.array([1, -np.inf], "f4")
    a.view("u4")[0] = 0xFFC12345
    for body in ("add.f32 %o, %a, %b;", "fma.rn.f32 %o, %a, %a, %b;"):
        got = compute(body, a, b, out="u4")
        assert got[0] == 0x7FFFFFFF and got[1] == 0x7FFFFFFF
    assert compute("mov.b32 %o, %a;", a, out="u4")[0] == 0xFFC12345


def test_max_and_min_at_zero_and_nan():
    a = np.array([np.nan, 1, np.nan, 0.0, -0.0, -np.inf], "f4")
    b = np.array([1, np.nan, np.nan, -0.0, 0.0, 3], "f4")
    same(compute("max.f32 %o, %a, %b;", a, b, out="f4"), [1, 1, np.nan, 0.0, 0.0, 3])
    same(compute("min.f32 %o, %a, %b;", a, b, out="f4"), [1, 1, np.nan, -0.0, -0.0, -np.inf])
    same(compute("max.NaN.f32 %o, %a, %b;", a, b, out="f4"), [np.nan, np.nan, np.nan, 0.0, 0.0, 3])
    same(compute("min.NaN.f32 %o, %a, %b;", a, b, out="f4"), [np.nan, np.nan, np.nan, -0.0, -0.0, -np.inf])


@pytest.mark.parametrize(
    "body, reference",
    {
        "ex2.approx.f32 %o, %a;": lambda x: 2.0**x if x < 128 else math.inf,
        "lg2.approx.f32 %o, %a;": lambda x: math.log2(x) if x > 0 else -math.inf if x == 0 else math.nan,
        "sin.approx.f32 %o, %a;": math.sin,
        "cos.approx.f32 %o, %a;": math.cos,
        "tanh.approx.f32 %o, %a;": math.tanh,
        "rsqrt.approx.f32 %o, %a;": lambda x: 1 / math.sqrt(x) if x > 0 else math.nan,
        "rcp.approx.f32 %o, %a;": lambda x: 1 / x,
        "sqrt.approx.f32 %o, %a;": lambda x: math.sqrt(x) if x >= 0 else math.nan,
    }.items(),
)
def test_transcendentals(body, reference):
    x = np.array([0.5, -0.5, 1.0, 2.0, 10.0, -20.0, 1e-3, 100.5, 3.0], "f4")
    np.testing.assert_allclose(compute(body, x, out="f4"), [reference(float(v)) for v in x], rtol=1e-7)


def test_transcendentals_flush():
    tiny = np.array([1e-40, -1e-40], "f4")
    assert (compute("lg2.approx.ftz.f32 %o, %a;", tiny[:1], out="f4") == -np.inf).all()
    same(compute("rcp.approx.ftz.f32 %o, %a;", tiny, out="f4"), [np.inf, -np.inf])
    same(compute("ex2.approx.ftz.f32 %o, %a;", np.array([-130.0], "f4"), out="f4"), [0.0])
    assert compute("ex2.approx.f32 %o, %a;", np.array([-130.0], "f4"), out="f4")[0] == 2.0**-130


def test_coarse_reciprocal_has_no_lower_word():
    x = np.array([3.0, -7.25, 1e300], "f8")
    got = compute("rcp.approx.ftz.f64 %o, %a;", x, out="f8")
    assert not (got.view("u8") & 0xFFFFFFFF).any()
    np.testing.assert_allclose(got, 1 / x, rtol=2e-6)


def test_copysign_takes_the_sign_of_its_first_source():
    same(
        compute("copysign.f32 %o, %a, %b;", np.array([-0.0, 2], "f4"), np.array([3, -np.inf], "f4"), out="f4"),
        [-3, np.inf],
    )


@pytest.mark.parametrize(
    "name, expected", {"finite": 0b00111, "infinite": 0b01000, "notanumber": 0b10000, "subnormal": 0b00010}.items()
)
def test_testp(name, expected):
    x = np.array([0.0, 1e-40, 1.0, -np.inf, np.nan], "f4")
    got = compute(f"testp.{name}.f32 %p1, %a; selp.u32 %o, 1, 0, %p1;", x, out="u4")
    assert sum(int(bit) << k for k, bit in enumerate(got)) == expected


ORDERED = {name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}


@pytest.mark.parametrize("name", ORDERED)
def test_float_comparisons_with_nan(name):
    a, b = pairs([0.0, -0.0, 1.0, -1.0, math.inf, math.nan], "f4")
    ordered = compute(f"setp.{name}.f32 %p1, %a, %b; selp.u32 %o, 1, 0, %p1;", a, b, out="u4")
    either = compute(f"setp.{name}u.f32 %p1, %a, %b; selp.u32 %o, 1, 0, %p1;", a, b, out="u4")
    for x, y, o, e in zip(a.tolist(), b.tolist(), ordered, either, strict=True):
        unordered = math.isnan(x) or math.isnan(y)
        plain = ORDERED[name](x, y)
        assert (bool(o), bool(e)) == (plain and not unordered, plain or unordered), (name, x, y)


@pytest.mark.parametrize(
    "name, kind", [("lo", "u32"), ("hs", "u32"), ("hi", "u64"), ("ls", "u64"), ("lt", "s32"), ("ge", "s64")]
)
def test_integer_comparisons(name, kind):
    a, b = pairs(edges(kind), edges(kind).dtype)
    got = compute(f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %o, 1, 0, %p1;", a, b, out="u4").astype(bool)
    sign = {"lo": a < b, "hs": a >= b, "hi": a > b, "ls": a <= b, "lt": a < b, "ge": a >= b}[name]
    assert (got == sign).all()


def test_joined_and_double_comparisons():
    a, b = pairs([0, 1, 2], "i4")
    c = (np.arange(9, dtype="i4") % 2).astype("i4")
    setup = "setp.ne.s32 %p3, %c, 0;"
    both = f"{setup} setp.lt.and.s32 %p1|%p2, %a, %b, !%p3; selp.u32 %r1, 1, 0, %p1; selp.u32 %r2, 2, 0, %p2; or.b32 %o, %r1, %r2;"
    got = compute(both, a, b, c, out="u4")
    free = c == 0
    assert (got == ((a < b) & free) + 2 * (~(a < b) & free)).all()
    plain = compute("setp.lt.s32 %p1|%p2, %a, %b; selp.u32 %o, 1, 0, %p2;", a, b, out="u4")
    assert (plain == ~(a < b)).all()
    overlap = compute(
        "setp.eq.s32 %p1, %a, %a; setp.lt.xor.s32 %p1, %a, %b, %p1; selp.u32 %o, 1, 0, %p1;", a, b, out="u4"
    )
    assert (overlap == ~(a < b)).all()


def test_set_and_slct():
    a, b = np.array([1, 5, -1], "i4"), np.array([2, 2, 2], "i4")
    assert compute("set.lt.u32.s32 %o, %a, %b;", a, b, out="u4").tolist() == [0xFFFFFFFF, 0, 0xFFFFFFFF]
    same(compute("set.lt.f32.s32 %o, %a, %b;", a, b, out="f4"), [1, 0, 1])
    x = np.array([np.nan, -0.0, -1e-40], "f4")
    assert compute("slct.s32.f32 %o, %a, %b, %c;", a, b, x, out="i4").tolist() == [2, 5, 2]
    assert compute("slct.ftz.s32.f32 %o, %a, %b, %c;", a, b, x, out="i4").tolist() == [2, 5, -1]


def test_predicate_logic():
    a, b = pairs([0, 1], "u4")
    setup = "setp.ne.u32 %p1, %a, 0; setp.ne.u32 %p2, %b, 0;"
    for name, expected in {"and": a & b, "or": a | b, "xor": a ^ b}.items():
        assert (
            compute(f"{setup} {name}.pred %p3, %p1, %p2; selp.u32 %o, 1, 0, %p3;", a, b, out="u4") == expected
        ).all()
    assert (compute(f"{setup} not.pred %p3, %p1; selp.u32 %o, 1, 0, %p3;", a, b, out="u4") == 1 - a).all()
