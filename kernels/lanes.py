"""Python's operators on LLVM values: what is written for NumPy's arrays emits code for vectors, or for one number.

Whole numbers are unsigned, of 32 or 64 bits; floats are float32, and each operation is rounded by itself: nothing here
lets a product and a sum become one.  A Python number takes the type of what it meets.
"""

import numpy as np
from llvmlite import ir

from . import deviates, philox

LOW = 0xFFFFFFFF
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Lanes:
    """A value, and the builder that emits what is done with it.  add, mul: (builder, a, b) of floats."""

    def __init__(self, builder, value, add=ir.IRBuilder.fadd, mul=ir.IRBuilder.fmul):
        self.builder, self.value, self._add, self._mul = builder, value, add, mul

    def like(self, value):
        return Lanes(self.builder, value, self._add, self._mul)

    def of(self, kind):
        """The type of `kind`s, as many as there are here."""
        return ir.VectorType(kind, self.value.type.count) if isinstance(self.value.type, ir.VectorType) else kind

    @property
    def element(self):
        return self.value.type.element if isinstance(self.value.type, ir.VectorType) else self.value.type

    def _other(self, other):
        if isinstance(other, Lanes):
            return other.value
        number = float(np.float32(other)) if self.element == F32 else int(other)
        kind = self.value.type
        return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)

    def _made(self, emit, other, turned=False):
        a, b = self.value, self._other(other)
        return self.like(emit(self.builder, *((b, a) if turned else (a, b))))

    def __add__(self, other):
        return self._made(self._add if self.element == F32 else ir.IRBuilder.add, other)

    def __mul__(self, other):
        return self._made(self._mul if self.element == F32 else ir.IRBuilder.mul, other)

    __rmul__ = __mul__

    def __sub__(self, other):
        return self._made(ir.IRBuilder.fsub if self.element == F32 else ir.IRBuilder.sub, other)

    def __rsub__(self, other):
        return self._made(ir.IRBuilder.fsub if self.element == F32 else ir.IRBuilder.sub, other, turned=True)

    def __xor__(self, other):
        return self._made(ir.IRBuilder.xor, other)

    def __and__(self, other):
        return self._made(ir.IRBuilder.and_, other)

    def __rshift__(self, other):
        return self._made(ir.IRBuilder.lshr, other)

    def __lshift__(self, other):
        return self._made(ir.IRBuilder.shl, other)

    def __lt__(self, other):
        if self.element == F32:
            return self._made(lambda builder, a, b: builder.fcmp_ordered("<", a, b), other)
        return self._made(lambda builder, a, b: builder.icmp_unsigned("<", a, b), other)


def u32(value):
    """The low half of 64 bits.  Vectors stay as wide, whatever stands in the other half: to narrow and widen them again
    between multiplications would cost as much as these do."""
    if isinstance(value, Lanes) and value.element == I64 and not isinstance(value.value.type, ir.VectorType):
        return value.like(value.builder.trunc(value.value, I32))
    return value


def u64(value):
    if not isinstance(value, Lanes):
        return value
    return value & LOW if value.element == I64 else value.like(value.builder.zext(value.value, value.of(I64)))


def narrow(value):
    return value.like(value.builder.trunc(value.value, value.of(I32))) if value.element == I64 else value


class Machine:
    """What `deviates.normal` asks for."""

    @staticmethod
    def f32(value):
        if isinstance(value, Lanes):  # below 2^31, so that signed is unsigned
            return value.like(value.builder.sitofp(value.value, value.of(F32)))
        return value

    @staticmethod
    def bits(value):
        return value.like(value.builder.bitcast(value.value, value.of(I32)))

    @staticmethod
    def real(value):
        return value.like(value.builder.bitcast(value.value, value.of(F32)))

    @staticmethod
    def where(condition, a, b):
        return a.like(a.builder.select(condition.value, a.value, b.value))


random_words = philox.generator(u32, u64)


def words(key, call, row, step, unit, block):
    """`deviates.words` of Lanes; key: a pair of them; block: a number."""
    if isinstance(unit.value.type, ir.VectorType):
        unit, row, step, call, *key = (u64(value) for value in (unit, row, step, call, *key))
    return tuple(map(narrow, deviates.words(random_words, key, call, row, step, unit, block)))


def deviate(random, word, one, zero):
    """What a cell asks for, of its word: a value of the type of `one` and `zero`, to which a float32 is widened."""
    if random.kind == "bernoulli":
        return word.builder.select((word < deviates.threshold(random.p)).value, one, zero)
    value = deviates.normal(word, Machine).value
    return value if value.type == one.type else word.builder.fpext(value, one.type)
