"""Rows of a table by token, and the gradient of that: a sum for each row, in one order, without sorting or atomics."""

import math

from .build import Source
from .faults import NOWHERE, RECORD, VALUES, note
from .numba_cuda import cuda, types

i64, f64 = types.int64, types.float64
WARP, WARPS = 32, 8
THREADS = WARP * WARPS
COLUMNS = 4  # values of a row that a lane sums
SPAN = WARP * COLUMNS  # values of a row that a block sums
PARTIAL = WARPS * SPAN


def gather(_, *, dtype, index):
    """weight (V, dim), tokens (count,) of type `index` -> y (count, dim).  A warp has a token; 8 bytes a float32 value.

    A token outside [0, V) gives NaN.  One block more than they need looks for the first of them, makes a fault of it.
    """
    real, whole = getattr(types, dtype), getattr(types, index)

    def gather_rows(record, fractions, site, weight, tokens, y, count, dim, V):
        if i64(cuda.blockIdx.x) == i64(cuda.gridDim.x) - 1:
            look(record, fractions, site, tokens, count, V)
            return
        lane = i64(cuda.threadIdx.x) % WARP
        k = i64(cuda.blockIdx.x) * WARPS + cuda.threadIdx.x // WARP
        if k >= count:
            return
        token = i64(tokens[k])
        inside = 0 <= token < V
        for d in range(lane, dim, WARP):
            y[k * dim + d] = weight[token * dim + d] if inside else real(math.nan)

    @cuda.jit(device=True)
    def look(record, fractions, site, tokens, count, V):
        tid, first = i64(cuda.threadIdx.x), i64(NOWHERE)
        firsts = cuda.shared.array(THREADS, i64)
        for k in range(tid, count, THREADS):
            if not 0 <= i64(tokens[k]) < V:
                first = min(first, k)
        firsts[tid] = first
        cuda.syncthreads()
        half = i64(THREADS // 2)
        while half > 0:
            if tid < half:
                firsts[tid] = min(firsts[tid], firsts[tid + half])
            cuda.syncthreads()
            half //= 2
        if tid == 0 and firsts[0] != NOWHERE:
            note(record, fractions, site, firsts[0], f64(tokens[firsts[0]]))

    pointer = types.CPointer(real)
    signature = (RECORD, VALUES, i64, pointer, types.CPointer(whole), pointer) + (i64,) * 3
    return Source(gather_rows, signature, THREADS)


def add_rows(_, *, dtype, index):
    """Adds to row r of target (V, dim) the sum, in float64, of values (count, dim) over the tokens (count,) that are r.

    A block has one row's SPAN values, `spans` blocks a row.  Its warps share the tokens out, 32 at a time, and add up
    what they find in order; then their sums are added in order.  Tokens are read by every block, from a cache: V count
    comparisons, cheap against a softmax over V classes.  A row that does not occur is neither read nor written.
    """
    real = getattr(types, dtype)

    def add_to_rows(target, tokens, values, count, dim, spans):
        lane, warp = i64(cuda.threadIdx.x) % WARP, i64(cuda.threadIdx.x) // WARP
        block = types.uint32(cuda.blockIdx.x)
        row = i64(block // types.uint32(spans))
        first = (i64(block) - row * spans) * SPAN
        partial = cuda.shared.array(PARTIAL, f64)
        hits = cuda.shared.array(WARPS, types.int32)
        sums = cuda.local.array(COLUMNS, f64)
        for i in range(COLUMNS):
            sums[i] = 0
        found = types.int32(0)
        for base in range(warp * WARP, count, THREADS):
            mine = base + lane < count and i64(tokens[min(base + lane, count - 1)]) == row
            mask = types.uint32(cuda.ballot_sync(0xFFFFFFFF, mine))
            while mask != 0:
                k = base + cuda.ffs(mask) - 1
                mask &= mask - types.uint32(1)
                found = types.int32(1)
                for i in range(COLUMNS):
                    d = first + lane + WARP * i
                    if d < dim:
                        sums[i] += f64(values[k * dim + d])
        for i in range(COLUMNS):
            partial[warp * SPAN + lane + WARP * i] = sums[i]
        if lane == 0:
            hits[warp] = found
        cuda.syncthreads()
        d = i64(cuda.threadIdx.x)
        if d >= SPAN or first + d >= dim:
            return
        total, found = f64(0), types.int32(0)
        for w in range(WARPS):
            total += partial[w * SPAN + d]
            found |= hits[w]
        if found != 0:
            target[row * dim + first + d] += real(total)

    pointer = types.CPointer(real)
    return Source(add_to_rows, (pointer, types.CPointer(getattr(types, index)), pointer) + (i64,) * 3, THREADS)
