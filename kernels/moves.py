"""Many small copies and fills in one launch: each by itself would take the device longer to begin than to do.

Job after job, a thread has the same words of all of them: what a job reads a later one may write, word for word.
"""

from .build import Source
from .numba_cuda import cuda, types
from .ptx import global_address, u64

i64 = types.int64
THREADS = 256
MOST_BLOCKS = 1024
JOBS = 6


def move(_, *, size, dtype):
    """Of each job: target[0..count) is assigned source's words, or those of `pattern` (8 bytes) where source is 0.

    size: bytes of a word, 4 or 1.  longest: the largest count.  And out (count,): assigned a + b, of type `dtype`.
    """
    word, each = (types.uint32, 2) if size == 4 else (types.uint8, 8)

    @cuda.jit(device=True)
    def job(source, target, count, pattern, k):
        if k < count:
            if global_address(source, 0) != u64(0):
                target[k] = source[k]
            else:
                target[k] = word(u64(pattern) >> u64(8 * size * (k % each)))

    def move_all(
        s0, t0, n0, p0, s1, t1, n1, p1, s2, t2, n2, p2, s3, t3, n3, p3, s4, t4, n4, p4, s5, t5, n5, p5,
        longest, out, a, b, count
    ):  # fmt: skip
        k = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        while k < longest:
            job(s0, t0, n0, p0, k)
            job(s1, t1, n1, p1, k)
            job(s2, t2, n2, p2, k)
            job(s3, t3, n3, p3, k)
            job(s4, t4, n4, p4, k)
            job(s5, t5, n5, p5, k)
            k += i64(cuda.gridDim.x) * THREADS
        k = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        while k < count:
            out[k] = a[k] + b[k]
            k += i64(cuda.gridDim.x) * THREADS

    pointer, numbers = types.CPointer(word), (types.CPointer(getattr(types, dtype)),) * 3
    return Source(move_all, (pointer, pointer, i64, i64) * JOBS + (i64, *numbers, i64), THREADS)
