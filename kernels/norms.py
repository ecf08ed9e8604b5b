"""The L2 norm of a flat buffer, and scaling by it, with nothing for the host to wait for.

Two stages, each in one order: a block sums squares in float64, then the last block sums the blocks' sums.  A thread
whose sum is not finite looks for its first wrong value; nobody else pays for that.  The norm reads 4 bytes a float32
value; scaling reads and writes them, or returns at once.

float64's squares may overflow or vanish: values beyond 2^+-500 are summed apart, scaled (Blue 1978).
"""

import math

from .build import Source
from .faults import FIRST, RECORD, VALUES, settle_first
from .last import is_last
from .numba_cuda import cuda, types
from .ptx import global_address, u64
from .vectors import WIDTH, accesses, finite, least

i64, f64 = types.int64, types.float64
THREADS = 256
BLOCKS = 512  # at most
LARGE, TINY = 2.0**500, 2.0**-500
DOWN, UP = 2.0**-700, 2.0**700
KINDS = 3  # of sums: plain, of large values scaled down, of tiny values scaled up


@cuda.jit(device=True)
def _block_sum(value, shared):
    """The sum over the block's threads, in thread 0."""
    tid = cuda.threadIdx.x
    cuda.syncthreads()  # the sum before may still be read
    shared[tid] = value
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if tid < half:
            shared[tid] += shared[tid + half]
        cuda.syncthreads()
        half //= 2
    return shared[0]


def norm(_, *, dtype):
    """out (2,) float64: assigned the norm of values (size,), and the factor that brings it down to max_norm; 1 where
    there is no need.

    partial (KINDS, BLOCKS) float64: assigned each block's sums of squares.  The first value that is not finite is a
    fault, named by `site`.  done: see `last`.
    """
    real = getattr(types, dtype)
    EACH, SCALED = WIDTH[dtype], dtype == "float64"
    load, _ = accesses(dtype)

    def norm_of_values(record, fractions, site, values, partial, size, max_norm, out, done):
        tid = i64(cuda.threadIdx.x)
        begin, stride = (i64(cuda.blockIdx.x) * THREADS + tid) * EACH, i64(cuda.gridDim.x) * THREADS * EACH
        shared = cuda.shared.array(THREADS, f64)
        x = cuda.local.array(EACH, real)
        plain, large, tiny = f64(0), f64(0), f64(0)
        k = begin
        while k < size:  # a range would divide to know its length
            load(values, k, x)
            for i in range(EACH):
                value = f64(x[i])
                if SCALED and abs(value) > LARGE:
                    large += value * DOWN * (value * DOWN)
                elif SCALED and abs(value) < TINY:
                    tiny += value * UP * (value * UP)
                else:
                    plain += value * value
            k += stride
        if not finite(plain + large):
            k, first = begin, size
            while k < size:
                load(values, k, x)
                for i in range(EACH):
                    if not finite(x[i]):
                        first = min(first, k + i)
                k += stride
            if first < size:
                least(global_address(record, FIRST), u64(first))
        block = cuda.blockIdx.x
        plain = _block_sum(plain, shared)
        if tid == 0:
            partial[block] = plain
        if SCALED:
            large = _block_sum(large, shared)
            tiny = _block_sum(tiny, shared)
            if tid == 0:
                partial[BLOCKS + block], partial[2 * BLOCKS + block] = large, tiny
        if is_last(done):
            finish(record, fractions, site, values, partial, max_norm, out, shared)

    @cuda.jit(device=True)
    def finish(record, fractions, site, values, partial, max_norm, out, shared):
        tid, blocks = i64(cuda.threadIdx.x), i64(cuda.gridDim.x)
        plain, large, tiny = f64(0), f64(0), f64(0)
        for block in range(tid, blocks, THREADS):
            plain += partial[block]
            if SCALED:
                large += partial[BLOCKS + block]
                tiny += partial[2 * BLOCKS + block]
        plain = _block_sum(plain, shared)
        if SCALED:
            large = _block_sum(large, shared)
            tiny = _block_sum(tiny, shared)
        if tid > 0:
            return
        settle_first(record, fractions, site, values)
        norm = math.sqrt(plain)
        if SCALED and large > 0:
            norm = math.sqrt(large + norm * DOWN * (norm * DOWN)) * UP
        elif SCALED:
            small = math.sqrt(tiny) * DOWN
            norm = math.sqrt(plain + small * small) if plain > 0 else small
        out[0] = norm
        out[1] = max_norm / norm if finite(norm) and norm > max_norm else f64(1)

    signature = (RECORD, VALUES, i64, types.CPointer(real), VALUES, i64, f64, VALUES, RECORD)
    return Source(norm_of_values, signature, THREADS)


def scale(_, *, dtype):
    """values (size,) *= norm[1], as `norm` left it."""
    real = getattr(types, dtype)
    EACH = WIDTH[dtype]
    load, store = accesses(dtype)

    def scale_by_norm(values, norm, size):
        k = (i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x) * EACH
        factor = norm[1]
        if k >= size or factor == 1:
            return
        x = cuda.local.array(EACH, real)
        load(values, k, x)
        for i in range(EACH):
            x[i] *= real(factor)
        store(values, k, x)

    return Source(scale_by_norm, (types.CPointer(real), VALUES, i64), THREADS)
