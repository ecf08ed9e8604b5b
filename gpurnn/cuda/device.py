"""What the CUDA executors share: built kernels, matrix products by cuBLAS, and sums of columns.

Precisions of the products, which always add up in float32 (float64 in "float64"): "float32" and "float64" exactly,
"bfloat16", "float16" and "tf32" with both factors rounded to that.  Arrays, states and parameters keep their own type.
Of float32 factors cuBLAS may round less than it is allowed to, and does: on an H200 it takes TF32's kernels for all three.
Factors that are `rounded` before are 16 bits in memory too, and multiplied more than twice as fast.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.files import code_folder
from gpurnn.kernels import build, columns, rounding
from gpurnn.kernels.launch import Launcher
from gpurnn.kernels.plan import Chip
from gpurnn.types import Array

SIXTEEN_BITS = {"bfloat16": "H", "float16": "e"}  # the type character of `rounded` arrays; bfloat16's are their bits


def product(a: Array, b: Array, out: Array, precision: str, add: bool = False) -> Array:
    """out = a b, or out += a b with `add`, for matrices with unit stride along one axis; out along its rows.

    a and b are both of out's type, or both `rounded`.  cuBLAS counts by columns, so it is asked for out^T = b^T a^T.
    """
    (m, k), n = a.shape, b.shape[1]
    if not (m and n):
        return out
    if not k:
        if not add:
            out.fill(0)
        return out
    multiply, handle = _gemm()
    kind, compute, automatic = kinds(backend.xp, precision, a.dtype.char)
    of_out = kinds(backend.xp, precision, out.dtype.char)[0]
    one, beta = scales(out.dtype.char, add)
    (ta, lda), (tb, ldb) = leading(a), leading(b)
    multiply(
        handle, tb, ta, n, m, k, one, b.data.ptr, kind, ldb, a.data.ptr, kind, lda, beta, out.data.ptr, of_out,
        row_stride(out), compute, automatic,
    )  # fmt: skip
    return out


def rounded(array: Array, kind: str) -> Array:
    """A float32 array as one of `kind`, "bfloat16" or "float16", contiguous: see `kernels.rounding`."""
    array, out = backend.xp.ascontiguousarray(array), backend.xp.empty(array.shape, SIXTEEN_BITS[kind])
    if array.size:
        source, target = array.data.ptr, out.data.ptr
        wide = int(source % rounding.WIDE == 0 == target % rounding.WIDE)
        blocks = grid(array.size, rounding.EACH * rounding.THREADS)
        kernel(rounding.rounded, kind=kind)(blocks, source, target, array.size, wide)
    return out


def adding(b: Array, a_row: int, out_row: int, precision: str) -> Callable[[int, int, int], None]:
    """`add(m, a, out)`: out (m, n) += a (m, k) b, a and out at these addresses, their rows so many bytes apart.

    For the products of all time steps with one b, on the stream that is current now: a call of cuBLAS and no more.
    """
    (k, n), size = b.shape, b.itemsize
    multiply, handle = _gemm()
    kind, compute, automatic = kinds(backend.xp, precision, b.dtype.char)
    one, beta = scales(b.dtype.char, True)
    (tb, ldb), lda, ldc, factor = leading(b), a_row // size, out_row // size, b.data.ptr

    def add(m: int, a: int, out: int) -> None:
        multiply(handle, tb, 0, n, m, k, one, factor, kind, ldb, a, kind, lda, beta, out, kind, ldc, compute, automatic)

    return add


def _gemm() -> tuple[Any, int]:
    """cuBLAS's product, and the handle that it takes: CuPy's, unless a step is being captured."""
    cuda = backend.xp.cuda
    return (backend.thread.cublas or cuda.cublas).gemmEx, cuda.device.get_cublas_handle()


def leading(matrix: Array) -> tuple[int, int]:
    """(whether cuBLAS transposes it, leading dimension), seen as the transpose that a row-major matrix is to cuBLAS."""
    (rows, columns), (down, along), size = matrix.shape, matrix.strides, matrix.itemsize
    if along == size or columns == 1:
        return 0, max(row_stride(matrix), columns)  # CUBLAS_OP_N
    if down == size or rows == 1:
        return 1, max(along // size, rows)  # CUBLAS_OP_T
    raise ValueError(f"expected a matrix with unit stride along one axis, got strides {matrix.strides}")


def row_stride(matrix: Array) -> int:
    return matrix.strides[0] // matrix.itemsize if matrix.shape[0] > 1 else max(1, matrix.shape[1])


@functools.cache
def scales(dtype: str, add: bool) -> tuple[int, int]:
    """Where alpha = 1 and beta lie on the host, for as long as the process lives."""
    scales = np.array([1.0, float(add)], dtype)
    _kept.append(scales)
    return scales.ctypes.data, scales.ctypes.data + scales.itemsize


_kept: list[np.ndarray] = []


@functools.cache
def kinds(xp: Any, precision: str, dtype: str) -> tuple[int, int, int]:
    """cuBLAS's type of the arrays, how it computes, and that it may choose the way."""
    cublas, runtime = xp.cuda.cublas, xp.cuda.runtime
    if dtype == "d":
        return runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F, cublas.CUBLAS_GEMM_DEFAULT
    if dtype in SIXTEEN_BITS.values():
        kind = runtime.CUDA_R_16BF if dtype == SIXTEEN_BITS["bfloat16"] else runtime.CUDA_R_16F
        return kind, cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT
    compute = {
        "float32": cublas.CUBLAS_COMPUTE_32F,
        "bfloat16": cublas.CUBLAS_COMPUTE_32F_FAST_16BF,
        "float16": cublas.CUBLAS_COMPUTE_32F_FAST_16F,
        "tf32": cublas.CUBLAS_COMPUTE_32F_FAST_TF32,
    }
    return runtime.CUDA_R_32F, compute[precision], cublas.CUBLAS_GEMM_DEFAULT


def kernel(factory: Any, trace: Any = None, /, **constants: Any) -> Launcher:
    """The kernel of these constants for the current device, built once and loaded once."""
    return _launcher(build.recipe(factory, trace, **constants), backend.xp.cuda.Device().id)


@functools.lru_cache(maxsize=512)
def _launcher(recipe: build.Recipe, device: int) -> Launcher:
    return Launcher(build.build(recipe, _chip(device).capability, code_folder()))


def chip() -> Chip:
    """The current device."""
    return _chip(backend.xp.cuda.Device().id)


@functools.cache
def _chip(number: int) -> Chip:
    device = backend.xp.cuda.Device(number)
    digits, attributes = device.compute_capability, device.attributes
    capability = int(digits[:-1]), int(digits[-1])
    return Chip(number, capability, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


def grid(count: int, each: int) -> int:
    return -(-count // each)


def add_columns(values: Array, H: int, a: Array, b: Array | None = None, **orders: Any) -> None:
    """Adds the sums of the columns of values (rows, slots*H) to a, and to b: see `kernels.columns`, as for `orders`."""
    if values.size:
        add = kernel(columns.add, dtype=values.dtype.name, **orders)
        blocks, stride = grid(values.shape[1], columns.TILE), values.strides[0] // values.itemsize
        add(blocks, values.data.ptr, stride, len(values), H, a.data.ptr, 0 if b is None else b.data.ptr)
