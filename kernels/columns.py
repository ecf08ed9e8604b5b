"""Sums of a matrix's columns, added to the gradients of biases.

A block has TILE columns, whose values in a row fill a sector of memory, and its threads share out the rows.  CHUNK rows
are added up in the matrix's own type, their sums in float64: a sum of 10^7 float32 values is as good as one of a few.
The order is always the same.  4 bytes a float32 value.
"""

from .build import Source
from .numba_cuda import cuda, types

i64, u32, f64 = types.int64, types.uint32, types.float64
THREADS = 512
TILE = 8
LANES = THREADS // TILE
CHUNK = 16


def _chooser(order):
    """`gate(slot)`: order[slot], without an array."""

    @cuda.jit(device=True)
    def none(slot):
        return i64(0)

    def or_else(place, own, others):
        @cuda.jit(device=True)
        def gate(slot):
            return i64(own) if slot == place else others(slot)

        return gate

    gate = none
    for place, own in enumerate(order):
        gate = or_else(place, own, gate)
    return gate


def add(_, *, dtype, first, second, start):
    """values (rows, slots*H), `stride` elements from row to row; adds to a (gates*H,) and b (gates*H,).

    The sums of slot k go to gate first[k] of a; slot start + k to gate second[k] of b.  Without b second is ().
    """
    real = getattr(types, dtype)
    first_gate, second_gate = _chooser(first), _chooser(second)
    OF_A, OF_B = len(first), len(second)
    SLOTS = max(OF_A, start + OF_B)

    def add_columns(values, stride, rows, H, a, b):
        tid = i64(cuda.threadIdx.x)
        column, lane = i64(cuda.blockIdx.x) * TILE + tid % TILE, tid // TILE
        shared = cuda.shared.array(THREADS, f64)
        total = f64(0)
        if column < SLOTS * H:
            row = lane
            while row < rows:
                chunk = real(0)
                for i in range(CHUNK):
                    if row + i * LANES < rows:
                        chunk += values[(row + i * LANES) * stride + column]
                total += f64(chunk)
                row += CHUNK * LANES
        shared[tid] = total
        cuda.syncthreads()
        half = LANES // 2
        while half > 0:
            if lane < half:
                shared[tid] += shared[tid + half * TILE]
            cuda.syncthreads()
            half //= 2
        if lane == 0 and column < SLOTS * H:
            slot = i64(u32(column) // u32(H))
            unit = column - slot * H
            if slot < OF_A:
                a[first_gate(slot) * H + unit] += real(shared[tid])
            if OF_B > 0 and slot >= start:
                b[second_gate(slot - start) * H + unit] += real(shared[tid])

    pointer = types.CPointer(real)
    return Source(add_columns, (pointer, i64, i64, i64, pointer, pointer), THREADS)
