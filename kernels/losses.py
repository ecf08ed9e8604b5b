"""Softmax cross-entropy of a row of logits, with its gradient.

    E = log(sum_c exp(x_c - top)) + top - x_target           dE/dx_c = exp(x_c - top) / sum - (c is the target)

`rows` gives each row to a warp, which keeps it in registers: a float32 logit is read once and its gradient written, 8
bytes.  `wide_rows` gives it to a block, for which it is too long: the maximum and the sum are found in one pass,
rescaled as the maximum grows (Milakov and Gimelshein 2018), and the row is read again, from the L2 cache if it is still
there: 8 to 12 bytes.  Sums over a row are in its own type and order; the rest of E is in float64.

A row whose largest logit is inf, -inf or NaN comes out as NaN without being looked for: inf - inf is NaN.
"""

import math

import numpy as np

from .build import Source
from .faults import FIRST, RECORD, VALUES, settle_first
from .last import is_last
from .numba_cuda import cuda, types
from .ptx import f32, global_address, instruction, u32, u64
from .vectors import division, least

i64, f64 = types.int64, types.float64
WARP = 32
WARPS = 8  # of a block of `rows`, each with a row
MOST_COLUMNS = {"float16": 32, "float32": 32, "float64": 16}  # logits of a row that a lane keeps
WIDE_THREADS = 512

# A float16 stands in the lower half of a uint32.
_from_half = instruction(
    "_from_half", "{ .reg .b16 h, z; mov.b32 {h, z}, $1; cvt.f32.f16 $0, h; }", (f32,), (u32,), pure=True
)
_to_half = instruction(
    "_to_half", "{ .reg .b16 h, z; mov.b16 z, 0; cvt.rn.f16.f32 h, $1; mov.b32 $0, {h, z}; }", (u32,), (f32,), pure=True
)


@cuda.jit(device=True)
def _load(pointer, k):
    return pointer[k]


@cuda.jit(device=True)
def _store(pointer, k, value):
    pointer[k] = value


@cuda.jit(device=True)
def _load_half(pointer, k):
    return _from_half(u32(pointer[k]))


@cuda.jit(device=True)
def _store_half(pointer, k, value):
    pointer[k] = types.uint16(_to_half(value))


@cuda.jit(device=True)
def _warp_max(value):
    for mask in (16, 8, 4, 2, 1):
        value = max(value, cuda.shfl_xor_sync(0xFFFFFFFF, value, mask))
    return value


@cuda.jit(device=True)
def _warp_sum(value):
    for mask in (16, 8, 4, 2, 1):
        value += cuda.shfl_xor_sync(0xFFFFFFFF, value, mask)
    return value


def _kinds(dtype):
    """How logits lie in memory, what is computed in, load and store."""
    if dtype == "float16":
        return types.uint16, types.float32, _load_half, _store_half
    real = getattr(types, dtype)
    return real, real, _load, _store


def _reduced(row_by_row, threads, memory, index, counted, totalled):
    """The kernel: `row_by_row`, and what the last block does when all rows are there."""

    def cross_entropy(
        record, fractions, site, logits, targets, losses, dlogits, count, R, C, ignore, scale, done, divisor, total
    ):  # fmt: skip
        row_by_row(record, logits, targets, losses, dlogits, count, R, C, ignore, scale)
        if not is_last(done):
            return
        tid = i64(cuda.threadIdx.x)
        if totalled:
            sums = cuda.shared.array(threads, f64)
            own = f64(0)
            for row in range(tid, R, threads):
                own += losses[row]
            sums[tid] = own
            cuda.syncthreads()
            half = i64(threads // 2)
            while half > 0:
                if tid < half:
                    sums[tid] += sums[tid + half]
                cuda.syncthreads()
                half //= 2
            if tid == 0:
                total[0] = sums[0] / (f64(count[0]) if counted else divisor)
        if tid == 0:
            settle_first(record, fractions, site, targets)

    pointer = types.CPointer(memory)
    signature = (RECORD, VALUES, i64, pointer, types.CPointer(getattr(types, index)), VALUES, pointer, RECORD)
    return Source(cross_entropy, signature + (i64,) * 3 + (f64, RECORD, f64, VALUES), threads)


def rows(_, *, dtype, index, columns, ignoring, counted, totalled):
    """logits (R, C), C <= 32 columns; targets (R,) of type `index` -> losses (R,) float64, dlogits (R, C) times scale.

    ignoring: rows whose target is `ignore` are not read, and come out as 0.  counted: count (1,) divides the
    gradient too.
    totalled: total (1,) is assigned the sum of losses, in one order, divided by count or `divisor`.
    A target outside [0, C) makes its row NaN, and a fault of the first one.  done: see `last`.
    """
    memory, real, load, store = _kinds(dtype)
    nothing = real(-math.inf)
    _, ratio = division("float64" if dtype == "float64" else "float32")

    @cuda.jit(device=True)
    def row_by_row(record, logits, targets, losses, dlogits, count, R, C, ignore, scale):
        lane = i64(cuda.threadIdx.x) % WARP
        row = i64(cuda.blockIdx.x) * WARPS + cuda.threadIdx.x // WARP
        if row >= R:
            return
        start, target = row * C, i64(targets[row])
        if ignoring and target == ignore:
            for c in range(lane, C, WARP):
                store(dlogits, start + c, real(0))
            if lane == 0:
                losses[row] = 0
            return
        x = cuda.local.array(columns, real)
        top, total = nothing, real(0)
        for k in range(columns):
            c = lane + WARP * k
            x[k] = load(logits, start + c) if c < C else nothing
            top = max(top, x[k])
        top = _warp_max(top)
        for k in range(columns):
            x[k] = math.exp(x[k] - top)
            total += x[k]
        total = _warp_sum(total)
        inside = 0 <= target < C
        one = ratio(real(scale), real(count[0])) if counted else real(scale)
        factor = ratio(one, total) if inside else real(math.nan)
        for k in range(columns):
            c = lane + WARP * k
            if c < C:
                store(dlogits, start + c, x[k] * factor - (one if c == target else real(0)))
        if lane == 0:
            losses[row] = math.nan
            if inside:
                losses[row] = f64(top) - f64(load(logits, start + target)) + math.log(f64(total))
            else:
                least(global_address(record, FIRST), u64(row))

    return _reduced(row_by_row, WARPS * WARP, memory, index, counted, totalled)


def wide_rows(_, *, dtype, index, ignoring, counted, totalled):
    """As `rows`, for any C."""
    memory, real, load, store = _kinds(dtype)
    THREADS, LANES = WIDE_THREADS, WIDE_THREADS // WARP
    _, ratio = division("float64" if dtype == "float64" else "float32")
    lowest = real(np.finfo(np.float64 if dtype == "float64" else np.float32).min)  # finite: -inf - lowest is no NaN

    @cuda.jit(device=True)
    def row_by_row(record, logits, targets, losses, dlogits, count, R, C, ignore, scale):
        tid, row = i64(cuda.threadIdx.x), i64(cuda.blockIdx.x)
        if row >= R:  # there are none at all
            return
        tops = cuda.shared.array(LANES, real)
        totals = cuda.shared.array(LANES, real)
        start, target = row * C, i64(targets[row])
        if ignoring and target == ignore:
            for c in range(tid, C, THREADS):
                store(dlogits, start + c, real(0))
            if tid == 0:
                losses[row] = 0
            return
        top, total = lowest, real(0)
        for c in range(tid, C, THREADS):
            x = load(logits, start + c)
            if x > top:
                total = total * math.exp(top - x) + real(1)
                top = x
            else:
                total += math.exp(x - top)
        highest = _warp_max(top)
        total = _warp_sum(total * math.exp(top - highest))
        if tid % WARP == 0:
            tops[tid // WARP], totals[tid // WARP] = highest, total
        cuda.syncthreads()
        top = _warp_max(tops[tid % LANES])
        total = _warp_sum(totals[tid % LANES] * math.exp(tops[tid % LANES] - top)) / real(WARP // LANES)
        inside = 0 <= target < C
        one = ratio(real(scale), real(count[0])) if counted else real(scale)
        factor = ratio(one, total) if inside and total > 0 else real(math.nan)  # 0: all of the row is -inf
        for c in range(tid, C, THREADS):
            x = math.exp(load(logits, start + c) - top) * factor
            store(dlogits, start + c, x - (one if c == target else real(0)))
        if tid == 0:
            losses[row] = math.nan
            if not inside:
                least(global_address(record, FIRST), u64(row))
            elif total > 0:
                losses[row] = f64(top) - f64(load(logits, start + target)) + math.log(f64(total))

    return _reduced(row_by_row, THREADS, memory, index, counted, totalled)
