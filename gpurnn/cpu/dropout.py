"""Dropout on a CPU: the same bits as `kernels.dropout`, compiled, several threads where there is much to drop."""

import functools

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from gpurnn.cpu import cache, costs, threads
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.simd import address
from gpurnn.environment import cpu_threads
from gpurnn.kernels import philox

u32, u64, i64 = types.uint32, types.uint64, types.int64
EACH = 4  # values that share the words of one counter


@functools.cache
def _drop(dtype: np.dtype) -> Compiled:
    """drop(x, y, begin, end, call, seed, threshold, scale): values [begin, end) of y, begin a multiple of EACH.

    scale: the address of one value.
    """
    random_words = njit(philox.generator(u32, u64))
    values = types.CPointer(getattr(types, dtype.name))

    @intrinsic
    def pointer(typing, address):
        return values(address), lambda context, b, sig, args: b.inttoptr(args[0], context.get_value_type(values))

    def drop(x, y, begin, end, call, seed, threshold, scale):
        x, y, factors = pointer(x), pointer(y), pointer(scale)
        factor, nothing = factors[0], factors[0] * 0
        for k in range(begin // EACH, end // EACH):
            a, b, c, d = random_words(u32(k), u32(k >> 32), u32(call), u32(call >> 32), u32(seed), u32(seed >> 32))
            at = k * EACH
            y[at] = x[at] * (factor if i64(a) >= threshold else nothing)
            y[at + 1] = x[at + 1] * (factor if i64(b) >= threshold else nothing)
            y[at + 2] = x[at + 2] * (factor if i64(c) >= threshold else nothing)
            y[at + 3] = x[at + 3] * (factor if i64(d) >= threshold else nothing)
        k = end // EACH
        last = random_words(u32(k), u32(k >> 32), u32(call), u32(call >> 32), u32(seed), u32(seed >> 32))
        for i in range(end % EACH):
            y[k * EACH + i] = x[k * EACH + i] * (factor if i64(last[i]) >= threshold else nothing)

    return cache.external(drop, dtype.str)


def drop(x: np.ndarray, seed: int, call: int, threshold: int, scale: np.floating) -> np.ndarray:
    """x times scale where a value stays, times 0 elsewhere: what `launches.drop` does.  call: its number."""
    x, factor = np.asarray(x, order="C"), np.array(scale)
    y = np.empty_like(x)
    work = _drop(x.dtype).python
    blocks = -(-x.size // EACH)

    def part(cut: slice) -> None:
        begin, end = cut.start * EACH, min(cut.stop * EACH, x.size)
        work(address(x), address(y), begin, end, call, seed, threshold, address(factor))

    if x.size:
        threads.run(part, threads.shares(blocks, min(cpu_threads(), -(-x.size // costs.DROPOUT_VALUES))))
    return y
