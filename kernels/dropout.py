"""Dropout whose mask nobody keeps: whether a value stays is a function of a seed, the call and the place.

Values 4k to 4k + 3 share the random words of Philox with counter (k, call) and key seed, each number low word first.  A
value stays where its word is at least `threshold`.  Forward and backward are the same kernel: 8 bytes a float32 value.
"""

from . import philox
from .build import Source
from .faults import RECORD, WARP
from .numba_cuda import cuda, types
from .vectors import WIDTH, accesses

i64, u32, u64 = types.int64, types.uint32, types.uint64
THREADS = 256
EACH = 4  # values of a thread

random_words = cuda.jit(device=True)(philox.generator(u32, u64))


def advance(_):
    """before (1,) int64: assigned how many calls there were; calls (1,) int64: one more."""

    def advance_calls(calls, before):
        if cuda.threadIdx.x == 0:
            before[0] = calls[0]
            calls[0] += 1

    return Source(advance_calls, (RECORD, RECORD), WARP)


def drop(_, *, dtype, aligned):
    """y (count,): assigned x (count,) times scale where a value stays, times 0 elsewhere.

    before (1,) int64: as by `advance`.  low, high: the words of the seed.  aligned: x and y are, to 16 bytes.
    """
    real = getattr(types, dtype)
    WORDS, AT_ONCE = EACH, WIDTH[dtype]
    load, store = accesses(dtype)

    def drop_values(x, y, count, before, low, high, threshold, scale):
        block = i64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        first, call = block * EACH, before[0]
        if first >= count:
            return
        words = cuda.local.array(WORDS, u32)
        words[0], words[1], words[2], words[3] = random_words(
            u32(block), u32(block >> 32), u32(call), u32(call >> 32), u32(low), u32(high)
        )
        if aligned and first + EACH <= count:
            values = cuda.local.array(AT_ONCE, real)
            for half in range(0, EACH, AT_ONCE):
                load(x, first + half, values)
                for i in range(AT_ONCE):
                    values[i] *= scale if i64(words[half + i]) >= threshold else real(0)
                store(y, first + half, values)
        else:
            for i in range(min(EACH, count - first)):
                y[first + i] = x[first + i] * (scale if i64(words[i]) >= threshold else real(0))

    pointer = types.CPointer(real)
    return Source(drop_values, (pointer, pointer, i64, RECORD, i64, i64, i64, real), THREADS)
