"""All time steps of a cell without a recurrent matrix: one thread walks through time with a unit of a batch row.

    forward    slots (x W_ih^T, no biases), initial states -> states, and in the slots what backward reads
    backward   dL/dstate, the slots -> in the slots dL/dx, and dL/d(initial state)

Nobody waits for anybody.  States, their gradients, biases and the cell's own parameters stay in registers; what a step
reads is loaded AHEAD steps before.  Units run along the threads, so every access is coalesced, and the time that it
takes is that of its bytes.  The layout of the slots is that of a traced cell without r: its gates one behind another,
each H wide.
"""

from . import pointwise
from .build import Source
from .numba_cuda import cuda, types
from .pointwise import at_step

THREADS = 128
# Steps: at 500 threads on an SM as many loads of 4 bytes are in flight then as its share of the memory's speed needs.
AHEAD = 4


def forward(trace, *, dtype, resets=False):
    """slots (steps, N, slots*H): overwritten.  bias (slots, H).  h (steps+1, N, H), rest (S-1, steps+1 or 1, N, H): the
    states before the first step are read, the others written.  params (P, H).  lengths (N,): of rows, from `begin`
    steps ago.

    reverse: 1 where time runs backwards.  rest_state, rest_step: how far apart, in elements, states and steps stand in
    `rest`.  resets, again, fresh: as in `step.forward`.
    """
    real = getattr(types, dtype)
    cell, place = pointwise.forward(trace, real, pointwise.EXACT), pointwise.place_of(trace.randoms)
    S, P, SLOTS, KEPT = trace.cell.states, len(trace.cell.params), trace.slots, len(trace.kept)
    GIVEN = trace.cell.gates
    COMING, INPUTS, OUTPUTS = AHEAD * GIVEN, GIVEN + S + P, S + KEPT

    def unitwise_forward(
        slots, bias, h, rest, params, lengths, draws, again, fresh, steps, begin, N, H, reverse, rest_state, rest_step
    ):  # fmt: skip
        k = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if k >= N * H:
            return
        n = types.int64(types.uint32(k) // types.uint32(H))  # 64 bits would call a function
        u = k - n * H
        count = min(steps, lengths[n] - begin)
        if count <= 0:
            return
        way = 1 - 2 * reverse
        first = reverse * (count - 1)
        unit = place(draws, n, begin, u)
        slot, slot_step = (first * N + n) * SLOTS * H + u, way * N * SLOTS * H
        state, state_step = (first + reverse) * N * H + k, way * N * H
        other, other_step = (first + reverse) * rest_step + k, way * rest_step
        coming = cuda.local.array(COMING, real)
        own = cuda.local.array(INPUTS, real)  # biases, states, parameters
        given = cuda.local.array(INPUTS, real)
        result = cuda.local.array(OUTPUTS, real)
        flags = cuda.local.array(AHEAD, types.int32)
        flag, flag_step = first * N + n, way * N
        if resets:
            for a in range(AHEAD):
                flags[a] = types.int32(again[flag + a * flag_step]) if a < count else types.int32(0)
        for s in range(COMING):
            coming[s] = real(0)
            if s // GIVEN < count:
                coming[s] = slots[slot + s // GIVEN * slot_step + s % GIVEN * H]
        for s in range(GIVEN):
            own[s] = bias[s * H + u]
        own[GIVEN] = h[state]
        for s in range(S - 1):
            own[GIVEN + 1 + s] = rest[s * rest_state + other]
        for p in range(P):
            own[GIVEN + S + p] = params[p * H + u]
        for step in range(count):
            if resets:
                if flags[0]:
                    for s in range(S):
                        own[GIVEN + s] = fresh[s * H + u]
                for a in range(AHEAD - 1):
                    flags[a] = flags[a + 1]
                if step + AHEAD < count:
                    flags[AHEAD - 1] = types.int32(again[flag + AHEAD * flag_step])
                flag += flag_step
            for s in range(GIVEN):
                given[s] = coming[s] + own[s]
            for s in range(S + P):
                given[GIVEN + s] = own[GIVEN + s]
            for s in range(COMING - GIVEN):
                coming[s] = coming[s + GIVEN]
            if step + AHEAD < count:
                for s in range(GIVEN):
                    coming[COMING - GIVEN + s] = slots[slot + AHEAD * slot_step + s * H]
            cell(given, result, at_step(unit, begin + first + way * step))
            state += state_step
            other += other_step
            h[state] = result[0]
            for s in range(S - 1):
                rest[s * rest_state + other] = result[1 + s]
            for s in range(S):
                own[GIVEN + s] = result[s]
            for s in range(KEPT):
                slots[slot + s * H] = result[S + s]
            slot += slot_step

    pointer = types.CPointer(real)
    pointers = (pointer,) * 5 + (types.CPointer(types.int64),) * 2 + (types.CPointer(types.uint8), pointer)
    return Source(unitwise_forward, pointers + (types.int64,) * 7, THREADS)


def backward(trace, *, dtype, clip, resets=False):
    """Assigns slots (T, N, slots*H) and dstate (S, N, H), adds to dparams (P, N, H), which are in float64.

    dy: (T, N, H), steps and rows dy_step and dy_row elements apart.  lengths (N,): of rows.
    clip: whether what one step passes to the one before is kept within [-limit, limit].
    resets, again, fresh, dfresh: as in `step.backward`.
    """
    real = getattr(types, dtype)
    cell, place = pointwise.backward(trace, real, pointwise.EXACT), pointwise.place_of(trace.randoms)
    G, S, P, SLOTS, KEPT = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots, len(trace.kept)
    STATE, NEXT, DNEXT, PARAM = KEPT, KEPT + S, KEPT + 2 * S, KEPT + 3 * S
    EACH = KEPT + S + 1  # what a step loads: what was kept, the states before it, dy
    DY, COMING, INPUTS, OUTPUTS, SUMS = KEPT + S, AHEAD * EACH, PARAM + P, G + S + P, max(1, P)

    def unitwise_backward(
        slots, h, rest, dy, dstate, params, dparams, lengths, draws, again, fresh, dfresh, N, H, reverse, rest_state,
        dy_step, dy_row, limit,
    ):  # fmt: skip
        k = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if k >= N * H:
            return
        n = types.int64(types.uint32(k) // types.uint32(H))  # 64 bits would call a function
        u = k - n * H
        count = lengths[n]
        way = 2 * reverse - 1
        first = (1 - reverse) * (count - 1)
        unit = place(draws, n, 0, u)
        slot, slot_step = (first * N + n) * SLOTS * H + u, way * N * SLOTS * H
        state, state_step = (first + reverse) * N * H + k, way * N * H
        above, above_step = first * dy_step + n * dy_row + u, way * dy_step
        coming = cuda.local.array(COMING, real)
        given = cuda.local.array(INPUTS, real)
        result = cuda.local.array(OUTPUTS, real)
        passed = cuda.local.array(S, real)
        behind = cuda.local.array(S, real)  # the states behind a step, where its own are replaced by fresh ones
        flags = cuda.local.array(AHEAD, types.int32)
        flag, flag_step = first * N + n, way * N
        if resets:
            for a in range(AHEAD):
                flags[a] = types.int32(again[flag + a * flag_step]) if a < count else types.int32(0)
        sums = cuda.local.array(SUMS, types.float64)
        for s in range(COMING):
            coming[s] = real(0)
        for a in range(AHEAD):
            if a < count:
                for s in range(KEPT):
                    coming[a * EACH + s] = slots[slot + a * slot_step + s * H]
                coming[a * EACH + STATE] = h[state + a * state_step]
                for s in range(S - 1):
                    coming[a * EACH + STATE + 1 + s] = rest[s * rest_state + state + a * state_step]
                coming[a * EACH + DY] = dy[above + a * above_step]
        for s in range(S):
            passed[s] = dstate[s * N * H + k]
        for p in range(P):
            given[PARAM + p] = params[p * H + u]
            sums[p] = 0.0
        if count > 0:  # the states behind the last step; before it they become those behind the next one
            given[STATE] = h[state - state_step]
            for s in range(S - 1):
                given[STATE + 1 + s] = rest[s * rest_state + state - state_step]
        if resets:
            for s in range(S):
                behind[s] = given[STATE + s]
        for step in range(count):
            for s in range(S):
                given[NEXT + s] = behind[s] if resets else given[STATE + s]
                given[DNEXT + s] = passed[s]
            for s in range(KEPT + S):
                given[s] = coming[s]
            if resets:
                for s in range(S):
                    behind[s] = given[STATE + s]
                if flags[0]:
                    for s in range(S):
                        given[STATE + s] = fresh[s * H + u]
            given[DNEXT] += coming[DY]
            for s in range(COMING - EACH):
                coming[s] = coming[s + EACH]
            if step + AHEAD < count:
                for s in range(KEPT):
                    coming[COMING - EACH + s] = slots[slot + AHEAD * slot_step + s * H]
                coming[COMING - EACH + STATE] = h[state + AHEAD * state_step]
                for s in range(S - 1):
                    coming[COMING - EACH + STATE + 1 + s] = rest[s * rest_state + state + AHEAD * state_step]
                coming[COMING - EACH + DY] = dy[above + AHEAD * above_step]
            cell(given, result, at_step(unit, first + way * step))
            for s in range(G):
                slots[slot + s * H] = result[s]
            for s in range(S):
                passed[s] = clipped(result[G + s], limit) if clip else result[G + s]
            if resets:
                if flags[0]:
                    for s in range(S):
                        dfresh[s * N * H + k] += types.float64(passed[s])
                        passed[s] = real(0)
                for a in range(AHEAD - 1):
                    flags[a] = flags[a + 1]
                if step + AHEAD < count:
                    flags[AHEAD - 1] = types.int32(again[flag + AHEAD * flag_step])
                flag += flag_step
            for p in range(P):
                sums[p] += types.float64(result[G + S + p])
            slot += slot_step
            state += state_step
            above += above_step
        for s in range(S):
            dstate[s * N * H + k] = passed[s]
        for p in range(P):
            dparams[p * N * H + k] += sums[p]

    @cuda.jit(device=True)
    def clipped(value, limit):
        """NaN stays NaN."""
        value = limit if value > limit else value
        return -limit if value < -limit else value

    pointer = types.CPointer(real)
    double, whole = types.CPointer(types.float64), types.CPointer(types.int64)
    pointers = (pointer,) * 6 + (double, whole, whole, types.CPointer(types.uint8), pointer, double)
    return Source(unitwise_backward, pointers + (types.int64,) * 6 + (real,), THREADS)
