"""cuBLAS's matrix products on raw addresses, with `cupy.cuda.cublas`'s signatures.

Every operand has to lie within one live allocation, whole: a wrong leading dimension or block is an error here.
"""

import ctypes
from typing import Any

import numpy as np

from .graphs import capturing, recorded
from .memory import allocations
from .runtime import CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F, CUDA_R_64F

CUBLAS_OP_N, CUBLAS_OP_T, CUBLAS_OP_C = 0, 1, 2
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
CUBLAS_GEMM_DEFAULT, CUBLAS_GEMM_DEFAULT_TENSOR_OP = -1, 99
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC = 68, 69
CUBLAS_COMPUTE_32F_FAST_16F, CUBLAS_COMPUTE_32F_FAST_16BF, CUBLAS_COMPUTE_32F_FAST_TF32 = 74, 75, 77
CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_64F_PEDANTIC = 70, 71

_EXACT = (CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_PEDANTIC)
_FAST = {  # bits of a float32 that are rounded off; float16's short exponent is not modelled
    CUBLAS_COMPUTE_32F_FAST_16F: 13,
    CUBLAS_COMPUTE_32F_FAST_16BF: 16,
    CUBLAS_COMPUTE_32F_FAST_TF32: 13,
}
_DOUBLE = (CUBLAS_COMPUTE_64F, CUBLAS_COMPUTE_64F_PEDANTIC)
_TYPES = (  # compute type, type of A and B, type of C
    *((compute, CUDA_R_64F, CUDA_R_64F) for compute in _DOUBLE),
    *((compute, CUDA_R_32F, CUDA_R_32F) for compute in (*_EXACT, *_FAST)),
    *((compute, half, c) for compute in _EXACT for half in (CUDA_R_16BF, CUDA_R_16F) for c in (half, CUDA_R_32F)),
)
_MEMORY = {
    CUDA_R_32F: np.dtype(np.float32),
    CUDA_R_64F: np.dtype(np.float64),
    CUDA_R_16BF: np.dtype(np.uint16),
    CUDA_R_16F: np.dtype(np.float16),
}


class CUBLASError(RuntimeError):
    """As `cupy.cuda.cublas.CUBLASError`, with the reason."""


def gemmEx(
    handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, Atype: int, lda: int,
    B: int, Btype: int, ldb: int, beta: int, C: int, Ctype: int, ldc: int, computeType: int, algo: int,
) -> None:  # fmt: skip
    """C (m, n) = alpha op(A) op(B) + beta C, all column-major; alpha and beta lie on the host."""
    if capturing() is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    _gemm_ex(transa, transb, m, n, k, alpha, A, Atype, lda, B, Btype, ldb, beta, C, Ctype, ldc, computeType)


def gemmStridedBatchedEx(
    handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, Atype: int, lda: int, strideA: int,
    B: int, Btype: int, ldb: int, strideB: int, beta: int, C: int, Ctype: int, ldc: int, strideC: int, batchCount: int,
    computeType: int, algo: int,
) -> None:  # fmt: skip
    """The same of `batchCount` matrices each, so many values apart."""
    if capturing() is not None:
        raise NotImplementedError("calling cuBLAS API during stream capture is currently unsupported")
    _strided(
        transa, transb, m, n, k, alpha, A, Atype, lda, strideA, B, Btype, ldb, strideB, beta, C, Ctype, ldc, strideC,
        batchCount, computeType,
    )  # fmt: skip


def _strided(
    transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, Atype: int, lda: int, strideA: int, B: int,
    Btype: int, ldb: int, strideB: int, beta: int, C: int, Ctype: int, ldc: int, strideC: int, count: int, compute: int,
) -> None:  # fmt: skip
    """One product after the other: on a GPU they run at once, so that no two may write to one place."""
    if min(strideA, strideB, strideC) < 0 or (count > 1 and strideC < m):
        raise CUBLASError(f"matrices of C that are {strideC} values apart overlap")
    for each in range(count):
        a, b, c = (
            address + each * stride * _MEMORY[kind].itemsize
            for address, kind, stride in ((A, Atype, strideA), (B, Btype, strideB), (C, Ctype, strideC))
        )
        _gemm_ex(transa, transb, m, n, k, alpha, a, Atype, lda, b, Btype, ldb, beta, c, Ctype, ldc, compute)


def _gemm_ex(
    transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, Atype: int, lda: int, B: int, Btype: int,
    ldb: int, beta: int, C: int, Ctype: int, ldc: int, computeType: int,
) -> None:  # fmt: skip
    """alpha and beta are read at once, as cuBLAS reads them while it is captured."""
    scale = ctypes.c_double if computeType in _DOUBLE else ctypes.c_float
    scalars = _host_scalar("alpha", alpha, scale), _host_scalar("beta", beta, scale)
    _multiply(transa, transb, m, n, k, A, Atype, lda, B, Btype, ldb, C, Ctype, ldc, computeType, *scalars)


@recorded
def _multiply(
    transa: int, transb: int, m: int, n: int, k: int, A: int, Atype: int, lda: int, B: int, Btype: int, ldb: int, C: int,
    Ctype: int, ldc: int, computeType: int, factor: float, keep: float,
) -> None:  # fmt: skip
    if Atype != Btype or (computeType, Atype, Ctype) not in _TYPES:
        raise CUBLASError(f"not supported: types {Atype}, {Btype}, {Ctype} with compute type {computeType}")
    if min(m, n, k) < 0:
        raise CUBLASError(f"invalid value: m, n, k = {m}, {n}, {k}")
    if not (m and n):
        return
    a = _matrix("A", A, Atype, lda, m, k, transa)
    b = _matrix("B", B, Btype, ldb, k, n, transb)
    c = _matrix("C", C, Ctype, ldc, m, n, CUBLAS_OP_N)
    if np.shares_memory(a, c) or np.shares_memory(b, c):
        raise CUBLASError("C overlaps A or B")
    a, b = (_rounded(_widened(factor, Atype), _FAST.get(computeType, 0)) for factor in (a, b))
    with np.errstate(all="ignore"):
        value = a.dtype.type(factor) * (a @ b)
        if keep:  # beta 0 never reads C, which may hold NaN
            value += a.dtype.type(keep) * _widened(c, Ctype)
    c[...] = _rounded(value, 16).view(np.uint32) >> 16 if Ctype == CUDA_R_16BF else value


class Library:
    """libcublas itself, as ctypes would have it: it may be captured, once it has a stream and a workspace."""

    def __init__(self) -> None:
        self._set: set[str] = set()

    def cublasCreate_v2(self, handle: Any) -> int:
        return 0

    def cublasSetStream_v2(self, handle: Any, stream: int) -> int:
        self._set = {"stream"}  # cuBLAS forgets the workspace
        return 0

    def cublasSetWorkspace_v2(self, handle: Any, workspace: int, size: int) -> int:
        allocations.bytes_at(workspace, size)
        self._set.add("workspace")
        return 0

    def cublasGemmEx(self, handle: Any, *arguments: int) -> int:
        if self._set != {"stream", "workspace"}:
            return 1
        _gemm_ex(*arguments[:-1])
        return 0

    def cublasGemmStridedBatchedEx(self, handle: Any, *arguments: int) -> int:
        if self._set != {"stream", "workspace"}:
            return 1
        _strided(*arguments[:-1])
        return 0


def sgemm(
    handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, lda: int, B: int, ldb: int,
    beta: int, C: int, ldc: int,
) -> None:  # fmt: skip
    types = (CUDA_R_32F, CUBLAS_COMPUTE_32F)
    _gemm(types, handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc)


def dgemm(
    handle: int, transa: int, transb: int, m: int, n: int, k: int, alpha: int, A: int, lda: int, B: int, ldb: int,
    beta: int, C: int, ldc: int,
) -> None:  # fmt: skip
    types = (CUDA_R_64F, CUBLAS_COMPUTE_64F)
    _gemm(types, handle, transa, transb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc)


def setPointerMode(handle: int, mode: int) -> None:
    if mode != CUBLAS_POINTER_MODE_HOST:
        raise NotImplementedError("scalars in device memory are not modelled")


def setMathMode(handle: int, mode: int) -> None:
    if mode:
        raise NotImplementedError("only CUBLAS_DEFAULT_MATH is modelled")


def _gemm(types: tuple[int, int], handle: int, ta: int, tb: int, m: int, n: int, k: int, alpha: int, A: int, lda: int,
          B: int, ldb: int, beta: int, C: int, ldc: int) -> None:  # fmt: skip
    kind, compute = types
    gemmEx(handle, ta, tb, m, n, k, alpha, A, kind, lda, B, kind, ldb, beta, C, kind, ldc, compute, CUBLAS_GEMM_DEFAULT)


def _matrix(name: str, address: int, kind: int, leading: int, rows: int, columns: int, transposed: int) -> np.ndarray:
    """op(matrix), a view (rows, columns) of what lies column-major in device memory."""
    if transposed:
        return _matrix(name, address, kind, leading, columns, rows, CUBLAS_OP_N).T
    dtype = _MEMORY[kind]
    if leading < max(1, rows):
        raise CUBLASError(f"invalid value: the leading dimension of {name} is {leading}, it has {rows} rows")
    if address % dtype.itemsize:
        raise CUBLASError(f"{name} is not aligned to its values")
    if not columns or not rows:
        return np.empty((rows, columns), dtype)
    nbytes = ((columns - 1) * leading + rows) * dtype.itemsize
    try:
        memory = allocations.bytes_at(address, nbytes)
    except LookupError as error:
        raise CUBLASError(f"{name} ({rows}, {columns}) with leading dimension {leading}: {error}") from None
    return np.ndarray((rows, columns), dtype, memory, strides=(dtype.itemsize, leading * dtype.itemsize))


def _host_scalar(name: str, address: int, kind: Any) -> float:
    try:
        _, _, where = allocations.find(address)
    except LookupError:
        return kind.from_address(address).value
    raise CUBLASError(f"{name} lies in device memory ({where}), the pointer mode is the host's")


def _widened(matrix: np.ndarray, kind: int) -> np.ndarray:
    """bfloat16 is the upper half of a float32."""
    if kind == CUDA_R_16F:
        return matrix.astype(np.float32)
    return (matrix.astype(np.uint32) << 16).view(np.float32) if kind == CUDA_R_16BF else matrix


def _rounded(values: np.ndarray, dropped: int) -> np.ndarray:
    """float32 with its last `dropped` bits rounded off, to nearest, ties to even; NaN and inf stay."""
    if not dropped:
        return values
    bits = np.ascontiguousarray(values).view(np.uint32)
    tie = (bits >> np.uint32(dropped)) & np.uint32(1)
    up = (bits + np.uint32((1 << (dropped - 1)) - 1) + tie) & np.uint32(-(1 << dropped) & 0xFFFFFFFF)
    return np.where(np.isfinite(values), up.view(np.float32), values)
