"""Integers, bits, moves, loads and stores, against Python's integers."""

import numpy as np
import pytest

from tests.ptx.errors import UnknownInstruction
from tests.ptx_tests.snippets import SIGNED, UNSIGNED, compute, edges, launch, pairs, wrap


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


INTEGER = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "div": lambda a, b, bits: truncated(a, b) if b else None,
    "rem": lambda a, b, bits: a - truncated(a, b) * b if b else None,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
}


@pytest.mark.parametrize("kind", ["u16", "s16", "u32", "s32", "u64", "s64"])
@pytest.mark.parametrize("name", INTEGER)
def test_integer_arithmetic(name, kind):
    a, b = pairs(edges(kind), edges(kind).dtype)
    got = compute(f"{name}.{kind} %o, %a, %b;", a, b, out=a.dtype.str)
    for x, y, z in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        expected = INTEGER[name](x, y, int(kind[1:]))
        assert expected is None or z == wrap(expected, kind), (name, x, y)


@pytest.mark.parametrize("kind, wide", [("u16", "u32"), ("s16", "s32"), ("u32", "u64"), ("s32", "s64")])
def test_wide_products(kind, wide):
    a, b = pairs(edges(kind), edges(kind).dtype)
    c = np.resize(edges(wide), a.size)
    product = compute(f"mul.wide.{kind} %o, %a, %b;", a, b, out=c.dtype.str)
    total = compute(f"mad.wide.{kind} %o, %a, %b, %c;", a, b, c, out=c.dtype.str)
    exact = [x * y for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert product.tolist() == [wrap(v, wide) for v in exact]
    assert total.tolist() == [wrap(v + w, wide) for v, w in zip(exact, c.tolist(), strict=True)]


def test_mad_keeps_either_half():
    a, b = pairs(edges("s32"), "i4")
    c = np.resize(edges("s32"), a.size)
    low = compute("mad.lo.s32 %o, %a, %b, %c;", a, b, c, out="i4")
    high = compute("mad.hi.s32 %o, %a, %b, %c;", a, b, c, out="i4")
    for x, y, z, lo, hi in zip(a.tolist(), b.tolist(), c.tolist(), low.tolist(), high.tolist(), strict=True):
        assert (lo, hi) == (wrap(x * y + z, "s32"), wrap((x * y >> 32) + z, "s32"))


def test_saturating_addition():
    a, b = pairs(edges("s32"), "i4")
    for name, sign in (("add", 1), ("sub", -1)):
        got = compute(f"{name}.sat.s32 %o, %a, %b;", a, b, out="i4")
        exact = np.clip(a.astype("i8") + sign * b.astype("i8"), -(1 << 31), (1 << 31) - 1)
        assert (got == exact).all()


def test_carries_make_64_bit_arithmetic_of_32_bit_words():
    a, b = pairs([0, 1, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 63, 0x123456789ABCDEF0, 0xFFFFFFFF00000000], "u8")
    split = "mov.b64 {%r1, %r2}, %a; mov.b64 {%r3, %r4}, %b;"
    plus = compute(
        f"{split} add.cc.u32 %r5, %r1, %r3; addc.u32 %r6, %r2, %r4; mov.b64 %o, {{%r5, %r6}};", a, b, out="u8"
    )
    minus = compute(
        f"{split} sub.cc.u32 %r5, %r1, %r3; subc.u32 %r6, %r2, %r4; mov.b64 %o, {{%r5, %r6}};", a, b, out="u8"
    )
    carry = compute(f"{split} add.cc.u32 %r5, %r1, %r3; addc.cc.u32 %r6, %r2, %r4; addc.u32 %o, 0, 0;", a, b, out="u4")
    borrow = compute(f"{split} sub.cc.u32 %r5, %r1, %r3; subc.cc.u32 %r6, %r2, %r4; subc.u32 %o, 0, 0;", a, b, out="i4")
    wide = list(zip(a.tolist(), b.tolist(), strict=True))
    assert carry.tolist() == [x + y >> 64 for x, y in wide] and borrow.tolist() == [x - y >> 64 for x, y in wide]
    times = compute(
        f"""{split} mul.lo.u32 %r5, %r1, %r3; mul.hi.u32 %r6, %r1, %r3;
        mad.lo.cc.u32 %r6, %r1, %r4, %r6; madc.hi.u32 %r7, %r1, %r4, 0;
        mad.lo.cc.u32 %r6, %r2, %r3, %r6; addc.u32 %r7, %r7, 0; mov.b64 %o, {{%r6, %r7}};""",
        a,
        b,
        out="u8",
    )
    for x, y, p, m, t in zip(a.tolist(), b.tolist(), plus.tolist(), minus.tolist(), times.tolist(), strict=True):
        assert (p, m) == ((x + y) % (1 << 64), (x - y) % (1 << 64))
        x0, x1, y0, y1 = x % (1 << 32), x >> 32, y % (1 << 32), y >> 32
        low = (x0 * y0 >> 32) + x0 * y1 % (1 << 32)
        low, carry = low % (1 << 32), low >> 32
        high = (x0 * y1 >> 32) + carry
        low += x1 * y0 % (1 << 32)
        assert t == (low % (1 << 32)) + ((high + (low >> 32)) % (1 << 32) << 32)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_shifts_clamp_their_count(bits):
    values = np.array([1, 3, 1 << bits - 1, (1 << bits) - 1, 0x5A5A], UNSIGNED[bits])
    counts = np.array([0, 1, 5, bits - 1, bits, bits + 1, 255, 1 << 31], "u4")
    a, c = (x.ravel() for x in np.meshgrid(values, counts))
    signed = a.view(SIGNED[bits])
    left = compute(f"shl.b{bits} %o, %a, %b;", a, c, out=UNSIGNED[bits])
    logical = compute(f"shr.u{bits} %o, %a, %b;", a, c, out=UNSIGNED[bits])
    arithmetic = compute(f"shr.s{bits} %o, %a, %b;", a, c, out=SIGNED[bits])
    for k, (x, n) in enumerate(zip(a.tolist(), c.tolist(), strict=True)):
        n = min(n, bits)
        assert left[k] == (x << n) % (1 << bits)
        assert logical[k] == x >> n
        assert arithmetic[k] == int(signed[k]) >> n


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    bits = int(kind[1:])
    a, b, c = (
        x.ravel() for x in np.meshgrid(edges(kind), [0, 1, 5, bits - 1, bits, 200], [0, 1, 8, bits - 1, bits, 255])
    )
    got = compute(f"bfe.{kind} %o, %a, %b, %c;", a, b.astype("u4"), c.astype("u4"), out=a.dtype.str)
    for value, position, length, result in zip(a.tolist(), b.tolist(), c.tolist(), got.tolist(), strict=True):
        digit = lambda k, value=value: value >> min(k, bits - 1) & 1  # noqa: E731
        sign = digit(min(position + length - 1, bits - 1)) if kind[0] == "s" and length else 0
        field = [digit(position + k) if k < length and position + k < bits else sign for k in range(bits)]
        assert result == wrap(sum(d << k for k, d in enumerate(field)), kind), (value, position, length)
    onto = np.resize(edges(f"u{bits}"), a.size)
    inserted = compute(
        f"bfi.b{bits} %o, %a, %b, %c, %d;", a.view(onto.dtype), onto, b.astype("u4"), c.astype("u4"), out=onto.dtype.str
    )
    for k in range(a.size):
        result, value = int(onto[k]), int(a.view(onto.dtype)[k])
        for j in range(min(int(c[k]), bits)):
            if b[k] + j < bits:
                result = result & ~(1 << int(b[k]) + j) | (value >> j & 1) << int(b[k]) + j
        assert int(inserted[k]) == result


def test_counting_and_reversing_bits():
    for bits in (32, 64):
        a = edges(f"u{bits}")
        texts = [f"{x:0{bits}b}" for x in a.tolist()]
        assert compute(f"popc.b{bits} %o, %a;", a, out="u4").tolist() == [t.count("1") for t in texts]
        assert compute(f"clz.b{bits} %o, %a;", a, out="u4").tolist() == [(t + "1").index("1") for t in texts]
        assert compute(f"brev.b{bits} %o, %a;", a, out=a.dtype.str).tolist() == [int(t[::-1], 2) for t in texts]
        found = compute(f"bfind.u{bits} %o, %a;", a, out="u4").tolist()
        assert found == [x.bit_length() - 1 if x else 0xFFFFFFFF for x in a.tolist()]


def test_permuting_bytes():
    a, b = np.full(4, 0x83828180, "u4"), np.full(4, 0x07060504, "u4")
    selector = np.array([0x7654, 0x0123, 0x0000, 0x8CBF], "u4")
    got = compute("prmt.b32 %o, %a, %b, %c;", a, b, selector, out="u4")
    assert [f"{x:08x}" for x in got.tolist()] == ["07060504", "80818283", "80808080", "ff00ff00"]


def test_funnel_shift_and_three_way_logic():
    a, b = np.full(4, 0x11223344, "u4"), np.full(4, 0x55667788, "u4")
    c = np.array([0, 8, 32, 40], "u4")
    assert compute("shf.l.wrap.b32 %o, %a, %b, %c;", a, b, c, out="u4").tolist() == [0x55667788, 0x66778811] * 2
    assert compute("shf.l.clamp.b32 %o, %a, %b, %c;", a, b, c, out="u4").tolist() == [
        0x55667788,
        0x66778811,
        0x11223344,
        0x11223344,
    ]
    assert compute("shf.r.clamp.b32 %o, %a, %b, %c;", a, b, c, out="u4").tolist() == [
        0x11223344,
        0x88112233,
        0x55667788,
        0x55667788,
    ]
    x, y, z = np.array([0b11110000], "u4"), np.array([0b11001100], "u4"), np.array([0b10101010], "u4")
    assert compute("lop3.b32 %o, %a, %b, %c, 0x96;", x, y, z, out="u4")[0] == 0b10010110
    assert compute("sad.s32 %o, %a, %b, %c;", x, y, z, out="u4")[0] == 0b11110000 - 0b11001100 + 0b10101010


def test_packing_and_unpacking():
    a = np.array([0x1122334455667788], "u8")
    assert compute("mov.b64 {%r1, %r2}, %a; mov.b64 %o, {%r2, %r1};", a, out="u8")[0] == 0x5566778811223344
    four = "mov.b64 {%h1, %h2, %h3, %h4}, %a; mov.b64 %o, {%h4, %h3, %h2, %h1};"
    assert compute(four, a, out="u8")[0] == 0x7788556633441122
    assert (
        compute("mov.b64 {_, %r1}, %a; mov.b32 {%h1, %h2}, %r1; mov.b32 %o, {%h2, %h1};", a, out="u4")[0] == 0x33441122
    )


def test_literals():
    x = np.zeros(1, "u4")
    for text, bits in {
        "0f3F800000": 0x3F800000,
        "-1": 0xFFFFFFFF,
        "0x10": 16,
        "4294967295": 0xFFFFFFFF,
        "017": 15,
    }.items():
        assert compute(f"mov.b32 %o, {text};", x, out="u4")[0] == bits
    assert compute("mov.f64 %o, 0d3FF8000000000000;", x, out="f8")[0] == 1.5
    assert compute("add.f32 %o, 0f3F800000, 0f3F800000;", x, out="f4")[0] == 2


def test_special_registers_of_a_grid():
    body = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %tid.x; mov.u32 %r4, %tid.y; mov.u32 %r5, %ntid.x;
    mov.u32 %r6, %nctaid.x; mov.u32 %r7, %ntid.y; mov.u32 %r8, %laneid;
    mad.lo.u32 %r9, %r2, %r6, %r1; mul.lo.u32 %r10, %r5, %r7; mad.lo.u32 %r11, %r4, %r5, %r3; mad.lo.u32 %r12, %r9, %r10, %r11;
    mul.wide.u32 %rd1, %r12, 4; add.u64 %rd1, %rd1, %ptr0; shl.b32 %r13, %r1, 8; or.b32 %r13, %r13, %r8; st.global.u32 [%rd1], %r13;
    """
    (out,) = launch(body, ("u4", 3 * 2 * 20), grid=(3, 2), block=(5, 4))
    index = np.arange(120)
    assert (out == ((index // 20) % 3 << 8 | index % 20)).all()


def test_loads_extend_and_stores_truncate():
    body = """
    ld.global.s8 %r1, [%ptr0]; ld.global.u8 %r2, [%ptr0]; ld.global.s16 %rd1, [%ptr0]; ld.global.b8 %r3, [%ptr0+3];
    st.global.u32 [%ptr1], %r1; st.global.u32 [%ptr1+4], %r2; st.global.u64 [%ptr1+8], %rd1; st.global.u8 [%ptr1+16], %rd1;
    st.global.u16 [%ptr1+18], %r1; st.global.u32 [%ptr1+20], %r3;
    """
    _, out = launch(body, np.array([0x80FF, 0x7F00], "u2"), np.zeros(6, "u4"), block=1)
    assert out.tolist() == [0xFFFFFFFF, 0xFF, 0xFFFF80FF, 0xFFFFFFFF, 0xFFFF00FF, 0x7F]


def test_vectors_of_every_width():
    body = """
    ld.global.v4.u32 {%r1, %r2, %r3, %r4}, [%ptr0]; st.global.v4.u32 [%ptr1], {%r4, %r3, %r2, %r1};
    ld.global.v2.f64 {%fd1, %fd2}, [%ptr0+16]; st.global.v2.f64 [%ptr1+16], {%fd2, %fd1};
    ld.global.v2.u16 {%h1, %h2}, [%ptr0+32]; st.global.v2.u16 [%ptr1+32], {%h2, %h1};
    """
    data = np.arange(10, dtype="u4") * 0x01010101
    _, out = launch(body, data, np.zeros(10, "u4"), block=1)
    expected = [*data[3::-1], *data[6:8], *data[4:6], int(data[8]) >> 16 | (int(data[8]) & 0xFFFF) << 16, 0]
    assert out.tolist() == expected


@pytest.mark.parametrize(
    "body",
    [
        "frobnicate.u32 %r1, %r2;",
        "add.u33 %r1, %r2, %r3;",
        "add.sparkling.u32 %r1, %r2, %r3;",
        "add.u32 %r1, %r2;",
        "add.u32 %rd1, %r2, %r3;",
        "setp.lo.s32 %p1, %r1, %r2;",
        "mov.u32 %r1, %nosuchregister;",
        "mov.u32 %r1, nosuchsymbol;",
        "mma.sync.aligned.m8n8k4.row.col.f32.f16.f16.f32 {%f1,%f2,%f3,%f4}, {%r1,%r2}, {%r3}, {%f1,%f2,%f3,%f4};",
        "cp.async.bulk.shared::cluster.global [%r1], [%rd1], 16, [%r2];",
        "call.uni vprintf, ();",
        "bra nowhere;",
        "ld.global.evict_me.u32 %r1, [%ptr0];",
        ".reg .b128 %wide;",
        "cvt.s32.f32 %r1, %f1;",
    ],
)
def test_what_is_not_known_is_refused_before_anything_runs(body):
    with pytest.raises(UnknownInstruction, match=r"line \d+"):
        launch(f"bra DONE; {body}\nDONE:", np.zeros(4, "u4"))
