"""Shifts and other work on bits."""

import numpy as np

from tests.ptx.elementwise import BITS, INTEGERS, elementwise
from tests.ptx.parse import WIDTH
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE, UNSIGNED

u32, u64 = np.uint32, np.uint64


def shift(left: bool):
    def build(m: Modifiers, x: Operands):
        kind = m.type(*(BITS if left else (*INTEGERS, *BITS)))
        destination, value, amount = m.operands(3)
        a, b = x.read(value, kind), x.read(amount, "u32")
        write = x.write(destination, kind)
        dtype, bits = DTYPE[kind], WIDTH[kind]

        def execute(active):
            count = b(active)
            within = np.minimum(count, u32(bits - 1)).astype(dtype)
            if left:
                write(active, np.where(count < bits, a(active) << within, dtype.type(0)))
            else:
                beyond = dtype.type(0) if dtype.kind == "u" else a(active) >> dtype.type(bits - 1)
                write(active, np.where(count < bits, a(active) >> within, beyond))

        return execute

    return build


def shf(m: Modifiers, x: Operands):
    """A shift of the pair b:a by up to 32 bits; the upper word of a left shift, the lower of a right one."""
    m.type("b32")
    left = m.one("l", "r") == "l"
    wrap = m.one("wrap", "clamp") == "wrap"
    destination, a, b, c = m.operands(4)
    reads = x.read(a, "u32"), x.read(b, "u32"), x.read(c, "u32")
    write = x.write(destination, "u32")

    def execute(active):
        low, high, amount = (read(active) for read in reads)
        count = (amount & u32(31) if wrap else np.minimum(amount, u32(32))).astype(u64)
        pair = high.astype(u64) << u64(32) | low
        write(active, ((pair << count) >> u64(32) if left else pair >> count).astype(u32))

    return execute


def bfe(m: Modifiers, x: Operands):
    kind = m.type("u32", "s32", "u64", "s64")
    destination, a, b, c = m.operands(4)
    reads = x.read(a, kind), x.read(b, "u32"), x.read(c, "u32")
    write = x.write(destination, kind)
    dtype, bits = DTYPE[kind], WIDTH[kind]

    def execute(active):
        value, start, length = reads[0](active), reads[1](active) & u32(255), reads[2](active) & u32(255)
        unsigned = UNSIGNED[dtype.itemsize].type
        moved = np.where(start < bits, value >> np.minimum(start, u32(bits - 1)).astype(dtype), dtype.type(0))
        mask = np.where(
            length < bits,
            (unsigned(1) << np.minimum(length, u32(bits - 1)).astype(unsigned)) - unsigned(1),
            ~unsigned(0),
        )
        field = moved.astype(unsigned) & mask
        if dtype.kind == "i":
            last = np.minimum(start.astype(np.int64) + length - 1, bits - 1)
            negative = (value >> np.maximum(last, 0).astype(dtype) & dtype.type(1)) == 1
            field = np.where(negative & (length > 0), field | ~mask, field)
            field = np.where(negative & (length > 0) & (start >= bits), ~unsigned(0), field)
        write(active, field.astype(dtype))

    return execute


def bfi(m: Modifiers, x: Operands):
    kind = m.type("b32", "b64")
    destination, a, b, c, d = m.operands(5)
    reads = x.read(a, kind), x.read(b, kind), x.read(c, "u32"), x.read(d, "u32")
    write = x.write(destination, kind)
    kind, bits = DTYPE[kind].type, WIDTH[kind]

    def execute(active):
        value, onto, start, length = (read(active) for read in reads)
        start, length = start & u32(255), np.minimum(length & u32(255), u32(bits))
        ones = np.where(length < bits, (kind(1) << np.minimum(length, u32(bits - 1)).astype(kind)) - kind(1), ~kind(0))
        by = np.minimum(start, u32(bits - 1)).astype(kind)
        mask = np.where(start < bits, ones << by, kind(0))
        write(active, (onto & ~mask) | (value << by & mask))

    return execute


def prmt(m: Modifiers, x: Operands):
    """Each nibble of the selector picks one of the eight bytes of b:a; its top bit asks for its sign."""
    m.type("b32")
    destination, a, b, c = m.operands(4)
    reads = x.read(a, "u32"), x.read(b, "u32"), x.read(c, "u32")
    write = x.write(destination, "u32")

    def execute(active):
        low, high, selector = (active.full(read(active)) for read in reads)
        pair = high.astype(u64) << u64(32) | low
        result = np.zeros(len(active), u32)
        for k in range(4):
            nibble = selector >> u32(4 * k) & u32(15)
            byte = (pair >> (nibble & u32(7)).astype(u64) * u64(8) & u64(255)).astype(u32)
            sign = np.where(byte & u32(128), u32(255), u32(0))
            result |= np.where(nibble & u32(8), sign, byte) << u32(8 * k)
        write(active, result)

    return execute


def counting(function):
    """The result is a u32 whatever the source's width."""

    def build(m: Modifiers, x: Operands):
        return elementwise(x, m.type("b32", "b64"), lambda a: function(a).astype(u32), m.operands(2), "u32")

    return build


def leading_zeros(a):
    bits = 8 * a.dtype.itemsize
    smeared = a
    for by in (1, 2, 4, 8, 16, 32)[: bits.bit_length() - 1]:
        smeared = smeared | smeared >> a.dtype.type(by)
    return bits - np.bitwise_count(smeared).astype(np.int64)


def brev(m: Modifiers, x: Operands):
    kind = m.type("b32", "b64")
    bits, dtype = WIDTH[kind], DTYPE[kind].type

    def reverse(a):
        mask, by = ~dtype(0), bits // 2
        while by:
            mask = mask ^ mask << dtype(by)
            a = (a >> dtype(by) & mask) | (a & mask) << dtype(by)
            by //= 2
        return a

    return elementwise(x, kind, reverse, m.operands(2))


def bfind(m: Modifiers, x: Operands):
    """The highest set bit, of a negative number the highest clear one, or all ones."""
    kind = m.type("u32", "u64", "s32", "s64")
    unsigned, last = UNSIGNED[WIDTH[kind] // 8].type, WIDTH[kind] - 1
    amount = m.flag("shiftamt")

    def find(a):
        bits = np.where(a < 0, ~a, a).astype(unsigned)
        zeros = leading_zeros(bits)
        return np.where(zeros > last, 0xFFFFFFFF, zeros if amount else last - zeros).astype(u32)

    return elementwise(x, kind, find, m.operands(2), "u32")


def lop3(m: Modifiers, x: Operands):
    m.type("b32")
    destination, a, b, c, table = m.operands(5)
    chosen = int(table.text, 0)

    def look_up(a, b, c):
        result = np.zeros_like(a)
        for k in range(8):
            if chosen >> k & 1:
                result = result | (a if k & 4 else ~a) & (b if k & 2 else ~b) & (c if k & 1 else ~c)
        return result

    return elementwise(x, "b32", look_up, (destination, a, b, c))


def sad(m: Modifiers, x: Operands):
    return elementwise(x, m.type(*INTEGERS), lambda a, b, c: c + np.where(a < b, b - a, a - b), m.operands(4))


TABLE = {
    **{"shl": shift(True), "shr": shift(False), "shf": shf, "bfe": bfe, "bfi": bfi, "prmt": prmt, "brev": brev},
    **{"bfind": bfind, "lop3": lop3, "sad": sad, "popc": counting(np.bitwise_count), "clz": counting(leading_zeros)},
}
