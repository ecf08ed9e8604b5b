"""LLVM vector code from expression graphs: a traced cell becomes explicit SIMD, with no alias checks and no scalar tail.

Numba compiles the loops around it; `emit` fills in what an `instruction` stands for.  Several arrays in one Numba loop
would otherwise fall to run-time alias checks, and `math.tanh` costs 12 ns an element.
"""

import ctypes
import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils

from gpurnn import variables
from gpurnn.kernels.deviates import LOG

I1, I32, I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)


class Target(NamedTuple):
    """What code is emitted for: the vector register and how many of them there are."""

    register_bytes: int
    registers: int
    x86: bool

    def width(self, dtype: np.dtype) -> int:
        return self.register_bytes // dtype.itemsize

    @property
    def masks(self) -> bool:
        """Whether some lanes of a vector are loaded as fast as all; else it is one lane after another, with branches."""
        return self.register_bytes > 16


@functools.cache
def host() -> Target:
    """The widest vectors of this CPU.  GPURNN_VECTOR_BYTES=16|32|64 asks for narrower ones, so that each can be tested."""
    features = binding.get_host_cpu_features()
    x86 = binding.get_process_triple().startswith(("x86_64", "i386", "i686"))
    widest = 64 if features.get("avx512f") else 32 if features.get("avx2") else 16
    asked = variables.given("GPURNN_VECTOR_BYTES")
    return Target(int(asked or widest), 32 if features.get("avx512f") or not x86 else 16, x86)


class Emitter:
    """Vector operations on a builder, for one element type and one width.

    `contract` lets a*b+c become one fused operation; nothing here assumes that NaN and infinity do not occur, and
    minima, maxima and clamps are written so that a NaN passes through them: it must reach whoever checks for it.
    """

    FLAGS = ("contract",)

    def __init__(self, builder: ir.IRBuilder, dtype: np.dtype, width: int):
        self.builder, self.dtype, self.width = builder, dtype, width
        self.scalar = ir.FloatType() if dtype.itemsize == 4 else ir.DoubleType()
        self.bits = I32 if dtype.itemsize == 4 else I64
        self.type = ir.VectorType(self.scalar, width)
        self.mask_type = ir.VectorType(I1, width)
        self.suffix = f"v{width}f{8 * dtype.itemsize}"

    def constant(self, value: float) -> ir.Constant:
        return ir.Constant(self.type, [float(self.dtype.type(value))] * self.width)

    def integers(self, value: int) -> ir.Constant:
        return ir.Constant(ir.VectorType(self.bits, self.width), [value] * self.width)

    def splat(self, value: ir.Value) -> ir.Value:
        kind = ir.VectorType(value.type, self.width)
        one = self.builder.insert_element(ir.Constant(kind, ir.Undefined), value, I32(0))
        lanes = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), lanes)

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """The mask of lanes 0..count-1."""
        lanes = ir.Constant(ir.VectorType(I64, self.width), list(range(self.width)))
        return self.builder.icmp_signed("<", lanes, self.splat(count))

    def intrinsic(self, name: str, *args: ir.Value) -> ir.Value:
        kind = ir.FunctionType(self.type, [self.type] * len(args))
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.{self.suffix}")
        return self.builder.call(function, args)

    def load(self, address: ir.Value, mask: ir.Value | None = None) -> ir.Value:
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        if mask is None:
            return self.builder.load(pointer, align=self.dtype.itemsize)
        kind = ir.FunctionType(self.type, [pointer.type, I32, self.mask_type, self.type])
        name = f"llvm.masked.load.{self.suffix}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, [pointer, I32(self.dtype.itemsize), mask, self.constant(0)])

    def prefetch(self, address: ir.Value, to_write: bool = False) -> None:
        """What stands there may be on its way to the nearest cache; it need not be memory of ours."""
        pointer = self.builder.inttoptr(address, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        function = cgutils.get_or_insert_function(self.builder.module, kind, "llvm.prefetch.p0")
        self.builder.call(function, [pointer, I32(int(to_write)), I32(3), I32(1)])

    def store(self, value: ir.Value, address: ir.Value, mask: ir.Value | None = None) -> None:
        pointer = self.builder.inttoptr(address, self.type.as_pointer())
        if mask is None:
            self.builder.store(value, pointer, align=self.dtype.itemsize)
            return
        kind = ir.FunctionType(ir.VoidType(), [self.type, pointer.type, I32, self.mask_type])
        name = f"llvm.masked.store.{self.suffix}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(function, [value, pointer, I32(self.dtype.itemsize), mask])

    def transposed(self, rows: list[ir.Value]) -> list[ir.Value]:
        """The transpose of a square block.  Each round shuffles pairs: row r, r + width/2 become rows 2r and 2r + 1."""
        half = self.width // 2
        low, high = (
            ir.Constant(
                ir.VectorType(I32, self.width),
                [lane // 2 + start + lane % 2 * self.width for lane in range(self.width)],
            )
            for start in (0, half)
        )
        for _ in range(self.width.bit_length() - 1):
            pairs = zip(rows[:half], rows[half:], strict=True)
            rows = [self.builder.shuffle_vector(*pair, lanes) for pair in pairs for lanes in (low, high)]
        return rows

    def add(self, a, b):
        return self.builder.fadd(a, b, flags=self.FLAGS)

    def sub(self, a, b):
        return self.builder.fsub(a, b, flags=self.FLAGS)

    def mul(self, a, b):
        return self.builder.fmul(a, b, flags=self.FLAGS)

    def div(self, a, b):
        return self.builder.fdiv(a, b, flags=self.FLAGS)

    def neg(self, a):
        return self.builder.fneg(a)

    def fma(self, a, b, c):
        return self.intrinsic("fma", a, b, c)

    def abs(self, a):
        return self.intrinsic("fabs", a)

    def sqrt(self, a):
        return self.intrinsic("sqrt", a)

    def log(self, x):
        """log by x = m 2**e with m between sqrt(1/2) and sqrt(2), then Cephes' polynomial or rational form of m - 1 (Moshier).

        Subnormal numbers count as zero, as everywhere in compiled loops.
        """
        b, bits = self.builder, self.integers(0).type
        single = self.dtype.itemsize == 4
        mantissa, root = (23, 0x3F3504F3) if single else (52, 0x3FE6A09E667F3BCD)  # sqrt(1/2)
        pattern = b.bitcast(x, bits)
        exponent = b.ashr(b.sub(pattern, self.integers(root)), self.integers(mantissa))
        m = b.bitcast(b.sub(pattern, b.shl(exponent, self.integers(mantissa))), self.type)
        e, f = b.sitofp(exponent, self.type), self.sub(m, self.constant(1))
        ff = self.mul(f, f)
        if single:
            ratio = self.polynomial(f, LOG)
        else:
            ratio = self.div(self.polynomial(f, LOG_F64_P), self.polynomial(f, LOG_F64_Q))
        high, low = 0.693359375, -2.121944400546905827679e-4  # of log 2; e times the first is exact
        small = self.fma(e, self.constant(low), self.mul(self.mul(f, ff), ratio))
        value = self.fma(e, self.constant(high), self.add(f, self.fma(self.constant(-0.5), ff, small)))
        infinite = self.constant(float("inf"))
        value = self.where(b.fcmp_ordered("==", x, infinite), infinite, value)
        value = self.where(b.fcmp_unordered("<", x, self.constant(0)), self.constant(float("nan")), value)  # NaN too
        return self.where(b.fcmp_ordered("==", x, self.constant(0)), self.neg(infinite), value)

    def less(self, a, b):
        return self.builder.fcmp_ordered("<", a, b)

    def less_equal(self, a, b):
        return self.builder.fcmp_ordered("<=", a, b)

    def where(self, condition, a, b):
        return self.builder.select(condition, a, b)

    def maximum(self, a, b):
        """Like np.maximum: NaN where either is NaN."""
        larger = self.where(self.builder.fcmp_unordered(">=", a, b), a, b)
        return self.where(self.builder.fcmp_unordered("uno", b, b), b, larger)

    def minimum(self, a, b):
        smaller = self.where(self.builder.fcmp_unordered("<=", a, b), a, b)
        return self.where(self.builder.fcmp_unordered("uno", b, b), b, smaller)

    def clamp(self, a, limit: ir.Value):
        """a within [-limit, limit]; NaN stays NaN."""
        a = self.where(self.less(limit, a), limit, a)
        low = self.neg(limit)
        return self.where(self.less(a, low), low, a)

    def polynomial(self, x, coefficients):
        """Horner's rule, highest power first."""
        value = self.constant(coefficients[0])
        for coefficient in coefficients[1:]:
            value = self.fma(value, x, self.constant(coefficient))
        return value

    def exp(self, x):
        """exp by reduction to |r| <= ln2/2 (Cody & Waite 1980), then a polynomial or Cephes' rational form (Moshier)."""
        single = self.dtype.itemsize == 4
        highest, lowest = (88.72283, -87.33654) if single else (709.782712893384, -708.3964185322641)
        inside = self.where(self.less(self.constant(highest), x), self.constant(highest), x)
        inside = self.where(self.less(inside, self.constant(lowest)), self.constant(lowest), inside)
        n = self.intrinsic("rint", self.mul(inside, self.constant(1.4426950408889634)))
        high, low = (0.693359375, -2.12194440e-4) if single else (6.93145751953125e-1, 1.42860682030941723212e-6)
        r = self.fma(n, self.constant(-low), self.fma(n, self.constant(-high), inside))
        rr = self.mul(r, r)
        if single:
            p = self.polynomial(r, EXP_F32)
            value = self.fma(p, rr, self.add(r, self.constant(1)))
        else:
            p = self.mul(r, self.polynomial(rr, EXP_F64_P))
            q = self.polynomial(rr, EXP_F64_Q)
            value = self.fma(self.constant(2), self.div(p, self.sub(q, p)), self.constant(1))
        for factor in self._powers_of_two(n):
            value = self.mul(value, factor)
        value = self.where(self.less(self.constant(highest), x), self.constant(float("inf")), value)
        return self.where(self.less(x, self.constant(lowest)), self.constant(0), value)

    def _powers_of_two(self, n):
        """Two factors of 2**n for whole n, by way of the exponent field: n may reach the largest exponent + 1."""
        b, bits = self.builder, self.integers(0).type
        mantissa, bias = (23, 127) if self.dtype.itemsize == 4 else (52, 1023)
        whole = b.fptosi(n, bits)
        half = b.ashr(whole, self.integers(1))
        factors = []
        for part in (half, b.sub(whole, half)):
            field = b.shl(b.add(part, self.integers(bias)), self.integers(mantissa))
            factors.append(b.bitcast(field, self.type))
        return factors

    def tanh(self, x):
        """float32: one rational function on the clamped argument (error 3e-7).  float64: Cephes' (Moshier), 1e-16."""
        if self.dtype.itemsize == 4:
            x = self.clamp(x, self.constant(7.99881172180175781))  # where it is exactly 1: saturated gradients are 0
            u = self.mul(x, x)
            return self.div(self.mul(x, self.polynomial(u, TANH_F32_P)), self.polynomial(u, TANH_F32_Q))
        s = self.mul(x, x)
        ratio = self.div(self.polynomial(s, TANH_F64_P), self.polynomial(s, TANH_F64_Q))
        small = self.fma(self.mul(x, s), ratio, x)
        size = self.abs(x)
        e = self.exp(self.add(size, size))
        large = self.sub(self.constant(1), self.div(self.constant(2), self.add(e, self.constant(1))))
        large = self.intrinsic("copysign", large, x)
        return self.where(self.less(size, self.constant(0.625)), small, large)


EXP_F32 = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
LOG_F64_P = (
    1.01875663804580931796e-4,
    4.97494994976747001425e-1,
    4.70579119878881725854,
    1.44989225341610930846e1,
    1.79368678507819816313e1,
    7.70838733755885391666,
)
LOG_F64_Q = (
    1.0,
    1.12873587189167450590e1,
    4.52279145837532221105e1,
    8.29875266912776603211e1,
    7.11544750618563894466e1,
    2.31251620126765340583e1,
)
EXP_F64_P = (1.26177193074810590878e-4, 3.02994407707441961300e-2, 9.99999999999999999910e-1)
EXP_F64_Q = (3.00198505138664455042e-6, 2.52448340349684104192e-3, 2.27265548208155028766e-1, 2.0)
TANH_F32_P = (
    -2.76076847742355e-16,
    2.00018790482477e-13,
    -8.60467152213735e-11,
    5.12229709037114e-08,
    1.48572235717979e-05,
    6.37261928875436e-04,
    4.89352455891786e-03,
)
TANH_F32_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
TANH_F64_P = (-9.64399179425052238628e-1, -9.92877231001918586564e1, -1.61468768441708447952e3)
TANH_F64_Q = (1.0, 1.12811678491631932401e2, 2.23548839060100448583e3, 4.84406305325125486048e3)


def address(array: np.ndarray) -> int:
    """Where an array's elements begin.  `array.ctypes.data` and `__array_interface__` say the same in ten times the time."""
    return _word_at(id(array) + _DATA).value if _DATA else array.__array_interface__["data"][0]


_word_at = ctypes.c_ssize_t.from_address


def _place_of_data() -> int:
    """How far into an array object its elements' address stands: behind the object's head, as in every NumPy so far.

    0 where it does not.
    """
    place, probe = object.__basicsize__, np.empty(1)
    return place if _word_at(id(probe) + place).value == probe.ctypes.data else 0


_DATA = _place_of_data()


def add_wide(emit: Emitter, value: ir.Value, target: ir.Value, offset: ir.Value, mask: ir.Value | None) -> None:
    """Adds a vector to the float64 at `target`: `offset` says where, in bytes of the vector's own type."""
    b, wide = emit.builder, Emitter(emit.builder, np.dtype(np.float64), emit.width)
    place = b.add(target, b.mul(offset, I64(8 // emit.dtype.itemsize)))
    value = b.fpext(value, wide.type) if emit.dtype.itemsize == 4 else value
    wide.store(wide.add(wide.load(place, mask), value), place, mask)


def vector_loop(builder: ir.IRBuilder, dtype: np.dtype, count: ir.Value, body: Callable) -> None:
    """`body(emit, offset, mask)` for every vector of `count` elements: offset in bytes, mask None except in the tail."""
    width = host().width(dtype)
    emit = Emitter(builder, dtype, width)
    whole = builder.and_(count, I64(-width))
    before = builder.block
    check, full = builder.append_basic_block("check"), builder.append_basic_block("full")
    tail_check, tail = builder.append_basic_block("tail.check"), builder.append_basic_block("tail")
    done = builder.append_basic_block("done")
    builder.branch(check)
    builder.position_at_end(check)
    i = builder.phi(I64)
    i.add_incoming(I64(0), before)
    builder.cbranch(builder.icmp_signed("<", i, whole), full, tail_check)
    builder.position_at_end(full)
    body(emit, builder.mul(i, I64(dtype.itemsize)), None)
    i.add_incoming(builder.add(i, I64(width)), builder.block)
    builder.branch(check)
    builder.position_at_end(tail_check)
    builder.cbranch(builder.icmp_signed("<", whole, count), tail, done)
    builder.position_at_end(tail)
    body(emit, builder.mul(whole, I64(dtype.itemsize)), emit.first_lanes(builder.sub(count, whole)))
    builder.branch(done)
    builder.position_at_end(done)
