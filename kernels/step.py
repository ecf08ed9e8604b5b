"""One time step of any cell: what is left of a step once cuBLAS has multiplied by weight_hh.

    forward    slots (x W_ih^T and h W_hh^T, no biases), states -> next states, and in the slots what backward reads
    backward   dL/dnext state, the slots, states -> in the slots dL/dr and dL/dx, and dL/dstate by the direct path

One thread has one unit of one batch row, all its gates; units run along the threads, so every access is coalesced.
The slots are laid out as a traced cell's: `r of the split gates | joint gates | x of the split gates`, each H wide.
"""

from . import pointwise
from .build import Source
from .numba_cuda import cuda, types

THREADS = 256
DRAWS = types.CPointer(types.int64)  # of random numbers, see `pointwise.place_of`


def forward(trace, *, dtype, resets=False):
    """slots (T, N, slots*H): overwritten.  bias (slots, H).  h (T+1, N, H), rest (S-1, T+1 or 1, N, H): written
    at one step.  params (P, H).  t: the step, of `rows` living batch rows.  reverse: 1 where time runs backwards.
    rest_state, rest_step: how far apart, in elements, states and steps stand in `rest`.

    Where there are resets, again (T, N) says which rows begin step t with fresh (S, H); begun (N, H) receives the h
    that the step behind t begins with, unless t is the last.
    """
    real = getattr(types, dtype)
    cell, place = pointwise.forward(trace, real, pointwise.EXACT), pointwise.place_of(trace.randoms)
    S, P, SLOTS = trace.cell.states, len(trace.cell.params), trace.slots
    GIVEN, KEPT = trace.cell.gates + trace.x_start, len(trace.kept)
    INPUTS, OUTPUTS = GIVEN + S + P, S + KEPT

    def step_forward(
        slots, bias, h, rest, params, draws, again, fresh, begun, t, rows, N, H, reverse, rest_state, rest_step, last
    ):  # fmt: skip
        k = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if k >= rows * H:
            return
        n = types.int64(types.uint32(k) // types.uint32(H))  # 64 bits would call a function
        u = k - n * H
        before, after = t + reverse, t + 1 - reverse
        given = cuda.local.array(INPUTS, real)
        result = cuda.local.array(OUTPUTS, real)
        slot = (t * N + n) * SLOTS * H + u
        for s in range(GIVEN):
            given[s] = slots[slot + s * H] + bias[s * H + u]
        given[GIVEN] = h[before * N * H + k]
        for s in range(S - 1):
            given[GIVEN + 1 + s] = rest[s * rest_state + before * rest_step + k]
        if resets and again[t * N + n]:
            for s in range(S):
                given[GIVEN + s] = fresh[s * H + u]
        for p in range(P):
            given[GIVEN + S + p] = params[p * H + u]
        cell(given, result, place(draws, n, t, u))
        h[after * N * H + k] = result[0]
        if resets and t != last:
            begun[k] = fresh[u] if again[(t + 1 - 2 * reverse) * N + n] else result[0]
        for s in range(S - 1):
            rest[s * rest_state + after * rest_step + k] = result[1 + s]
        for s in range(KEPT):
            slots[slot + s * H] = result[S + s]

    pointer = types.CPointer(real)
    pointers = (pointer,) * 5 + (DRAWS, types.CPointer(types.uint8)) + (pointer,) * 2
    return Source(step_forward, pointers + (types.int64,) * 8, THREADS)


def backward(trace, *, dtype, clip, resets=False, above=False):
    """Assigns slots and dstate (S, N, H), adds to dparams (P, N, H), which are in float64.

    dy: (T, N, H), steps and rows dy_step and dy_row elements apart.  rows: living at t; of them the first `seen` have
    been at the step processed before, and there weight_hh's product was added to dstate[0].
    clip: whether what one step passes to the one before is kept within [-limit, limit].
    again, fresh: as forward.  dfresh (S, N, H), in float64: what the step processed before passes to fresh states is
    added to it.
    above: whether drest is to be added, dL/d(the states beyond h behind each step) (S-1, T, N, H), `drest_state` apart.
    """
    real = getattr(types, dtype)
    cell, place = pointwise.backward(trace, real, pointwise.EXACT), pointwise.place_of(trace.randoms)
    G, S, P, SLOTS = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots
    WRITTEN, KEPT = G + trace.x_start, len(trace.kept)
    STATE, NEXT, DNEXT, PARAM = KEPT, KEPT + S, KEPT + 2 * S, KEPT + 3 * S
    INPUTS, OUTPUTS = PARAM + P, WRITTEN + S + P

    def step_backward(
        slots, h, rest, dy, dstate, params, dparams, draws, again, fresh, dfresh, drest, t, rows, seen, N, H, reverse,
        rest_state, dy_step, dy_row, limit, drest_state,
    ):  # fmt: skip
        k = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if k >= rows * H:
            return
        n = types.int64(types.uint32(k) // types.uint32(H))  # 64 bits would call a function
        u = k - n * H
        before, after = t + reverse, t + 1 - reverse
        given = cuda.local.array(INPUTS, real)
        result = cuda.local.array(OUTPUTS, real)
        slot = (t * N + n) * SLOTS * H + u
        for s in range(KEPT):
            given[s] = slots[slot + s * H]
        given[STATE] = h[before * N * H + k]
        given[NEXT] = h[after * N * H + k]
        for s in range(S - 1):
            given[STATE + 1 + s] = rest[s * rest_state + before * N * H + k]
            given[NEXT + 1 + s] = rest[s * rest_state + after * N * H + k]
        if resets and again[t * N + n]:
            for s in range(S):
                given[STATE + s] = fresh[s * H + u]
        for s in range(S):
            value = dstate[s * N * H + k]
            if clip and n < seen:
                value = clipped(value, limit)
            if resets and n < seen and again[(t + 1 - 2 * reverse) * N + n]:
                dfresh[s * N * H + k] += types.float64(value)
                value = real(0)
            given[DNEXT + s] = value
        given[DNEXT] += dy[t * dy_step + n * dy_row + u]
        if above:
            for s in range(S - 1):
                given[DNEXT + 1 + s] += drest[s * drest_state + t * N * H + k]
        for p in range(P):
            given[PARAM + p] = params[p * H + u]
        cell(given, result, place(draws, n, t, u))
        for s in range(WRITTEN):
            slots[slot + s * H] = result[s]
        for s in range(S):
            dstate[s * N * H + k] = result[WRITTEN + s]
        for p in range(P):
            dparams[p * N * H + k] += types.float64(result[WRITTEN + S + p])

    @cuda.jit(device=True)
    def clipped(value, limit):
        """NaN stays NaN."""
        value = limit if value > limit else value
        return -limit if value < -limit else value

    pointer = types.CPointer(real)
    double = types.CPointer(types.float64)
    pointers = ((pointer,) * 6, (double, DRAWS, types.CPointer(types.uint8), pointer, double, pointer))
    return Source(step_backward, sum(pointers, ()) + (types.int64,) * 9 + (real, types.int64), THREADS)
