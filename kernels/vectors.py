"""Flat buffers of float32 or float64, sixteen bytes at a time; and what kernels over them have in common.

Sizes are multiples of WIDTH values and addresses of 16 bytes, as those of `gpurnn.parameters` are.
"""

import math

from .numba_cuda import cuda, types
from .ptx import f32, f64, global_address, instruction, load_global_4f, u64

store_global_4f = instruction("store_global_4f", "st.global.v4.f32 [$0], {$1,$2,$3,$4};", (), (u64,) + (f32,) * 4)
load_global_2d = instruction("load_global_2d", "ld.global.v2.f64 {$0,$1}, [$2];", (f64,) * 2, (u64,))
store_global_2d = instruction("store_global_2d", "st.global.v2.f64 [$0], {$1,$2};", (), (u64, f64, f64))
root_single = instruction("root_single", "sqrt.approx.f32 $0, $1;", (f32,), (f32,), pure=True)
ratio_single = instruction("ratio_single", "div.full.f32 $0, $1, $2;", (f32,), (f32, f32), pure=True)
least = instruction("least", "red.global.min.u64 [$0], $1;", (), (u64, u64))

WIDTH = {"float32": 4, "float64": 2}
i64 = types.int64


def division(dtype):
    """`root(x)` and `ratio(a, b)`: of float32 within 2 ulp, and in line."""
    return (root_single, ratio_single) if dtype == "float32" else (_root_double, _ratio_double)


@cuda.jit(device=True)
def _root_double(value):
    return math.sqrt(value)


@cuda.jit(device=True)
def _ratio_double(a, b):
    return a / b


def accesses(dtype):
    """`load(pointer, k, values)` and `store(pointer, k, values)`: values[0..WIDTH) are the elements from k on."""
    return (_load_single, _store_single) if dtype == "float32" else (_load_double, _store_double)


@cuda.jit(device=True)
def _load_single(pointer, k, values):
    values[0], values[1], values[2], values[3] = load_global_4f(global_address(pointer, k))


@cuda.jit(device=True)
def _store_single(pointer, k, values):
    store_global_4f(global_address(pointer, k), values[0], values[1], values[2], values[3])


@cuda.jit(device=True)
def _load_double(pointer, k, values):
    values[0], values[1] = load_global_2d(global_address(pointer, k))


@cuda.jit(device=True)
def _store_double(pointer, k, values):
    store_global_2d(global_address(pointer, k), values[0], values[1])


@cuda.jit(device=True)
def finite(value):
    """x - x is 0 for numbers and NaN for what is none."""
    return value - value == value - value
