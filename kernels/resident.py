"""All T steps of any cell in one block: weight_hh stays in its registers and shared memory, and it waits for nobody.

A block has a few batch rows and all H units.  A step is: the product (`products`), the cell, the new vector into the
other buffer, one barrier.  States never leave the registers; x projections, and what backward reads, are loaded a step
ahead.  Rows are sorted by length, longest first, so a block stops at its first row's end.

    forward    slots (x W_ih^T, no biases) -> h, the other states, and in the slots what backward reads
    backward   dy, dL/d(final state) -> in the slots dL/dr and dL/dx; dL/d(initial state)

Slots and states are laid out as in `step`, and both write the same: one's tape is the other's.
"""

from numba import cuda
from numba.cuda import types

from . import pointwise
from .build import Source
from .products import Ffma, Shape, product
from .ptx import advance

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32
ALIGNED = 16


def _accuracy(tile):
    return pointwise.EXACT if isinstance(tile, Ffma) else pointwise.APPROXIMATE


def forward(trace, *, H, tile, training):
    """slots, bias, h, rest, params: as in `step.forward`, at the first of T steps; slots are overwritten in training.

    packed: by `products.pack`.  state (S, N, H): the initial states; assigned the final ones.  lengths (N,): each row's
    steps, of which `start` lie before.  Without training only h and state are written.
    """
    G, S, P, SLOTS, START = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots, trace.x_start
    GIVEN, KEPT = G + START, len(trace.kept)
    make = product(Shape.of(G, H, transposed=False), tile)
    place, fetch, home, put, multiply = make.place, make.fetch, make.home, make.put, make.multiply
    THREADS, ROWS, PAIRS, WORDS, VECTOR = make.threads, make.rows, make.pairs, max(1, make.registers), make.vector
    word, element = make.word, make.element
    cell = pointwise.forward(trace, f32, _accuracy(tile))
    INPUTS, OUTPUTS = GIVEN + S + P, S + KEPT
    OWN, OWN_BIAS, OWN_STATE, OWN_PARAM, OWN_SUMS = PAIRS, PAIRS * GIVEN, PAIRS * S, max(1, PAIRS * P), PAIRS * G

    SLOT_STEP = SLOTS * H

    def resident_forward(packed, slots, bias, h, rest, params, state, lengths, T, start, N, reverse, rest_state):
        tid = i64(cuda.threadIdx.x)
        first = i64(cuda.blockIdx.x) * ROWS
        vector = cuda.shared.array(VECTOR, element, alignment=ALIGNED)
        weights = cuda.local.array(WORDS, word)
        length = cuda.local.array(OWN, i32)  # 0: the pair is another thread's, or lies beyond the batch
        spot = cuda.local.array(OWN, u32)  # of the pair's first value in the vector
        slot_at = cuda.local.array(OWN, i32)  # of the pair's first slot, in its step
        state_at = cuda.local.array(OWN, i32)
        biases = cuda.local.array(OWN_BIAS, f32)
        values = cuda.local.array(OWN_STATE, f32)
        own = cuda.local.array(OWN_PARAM, f32)
        x = cuda.local.array(OWN_SUMS, f32)
        sums = cuda.local.array(OWN_SUMS, f32)
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
        fetch(packed, weights)
        for k in range(tid, VECTOR, THREADS):
            vector[k] = 0
        steps = min(T, lengths[first] - start)
        now = advance(slots, (steps - 1 if reverse and steps > 0 else 0) * N * SLOT_STEP)
        cuda.syncthreads()
        for p in range(PAIRS):
            unit, row = place(tid, p)
            living = unit < H and first + row < N
            u, n = min(unit, H - 1), min(first + row, N - 1)  # so that every load is of something
            spot[p] = home(vector, row, u)
            slot_at[p], state_at[p] = n * SLOT_STEP + u, n * H + u
            length[p] = max(0, min(T, lengths[n] - start)) if living else 0
            for k in range(GIVEN):
                biases[p * GIVEN + k] = bias[k * H + u]
            for s in range(S):
                values[p * S + s] = state[s * N * H + state_at[p]]
            for k in range(P):
                own[p * P + k] = params[k * H + u]
            for g in range(G):
                x[p * G + g] = now[slot_at[p] + (START + g) * H]
            if living:  # into both buffers: going in reverse, a row may begin at any step
                put(spot[p], 0, 0, values[p * S])
                put(spot[p], 1, 0, values[p * S])
        cuda.syncthreads()
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            multiply(weights, vector, i & 1, sums)
            now, after = advance(slots, t * N * SLOT_STEP), (t + 1 - reverse) * N * H
            h_after, rest_after = advance(h, after), advance(rest, after)
            following = advance(slots, (t - 1 if reverse else t + 1) * N * SLOT_STEP)
            for p in range(PAIRS):
                for k in range(G):
                    given[k] = sums[p * G + k] + biases[p * GIVEN + k]
                    if k >= START:
                        given[k] += x[p * G + k - START]
                for k in range(START):
                    given[G + k] = x[p * G + G - START + k] + biases[p * GIVEN + G + k]
                for s in range(S):
                    given[GIVEN + s] = values[p * S + s]
                for k in range(P):
                    given[GIVEN + S + k] = own[p * P + k]
                if i + 1 < steps:
                    for g in range(G):
                        x[p * G + g] = following[slot_at[p] + (START + g) * H]
                cell(given, result)
                if t < length[p]:
                    for s in range(S):
                        values[p * S + s] = result[s]
                    put(spot[p], i & 1 ^ 1, 0, result[0])
                    h_after[state_at[p]] = result[0]
                    if training:
                        for s in range(S - 1):
                            rest_after[s * rest_state + state_at[p]] = result[1 + s]
                        for k in range(KEPT):
                            now[slot_at[p] + k * H] = result[S + k]
            cuda.syncthreads()
        for p in range(PAIRS):
            if length[p] > 0:
                for s in range(S):
                    state[s * N * H + state_at[p]] = values[p * S + s]

    pointers = (types.CPointer(word), *[types.CPointer(f32)] * 6, types.CPointer(i64))
    return Source(resident_forward, pointers + (i64,) * 5, THREADS, make.shared)


def backward(trace, *, H, tile, clip):
    """slots, h, rest, dy, params, clip: as in `step.backward`.  Assigns slots, dstate (S, N, H) and dparams (P, N, H).

    dstate: dL/d(final state) -> dL/d(initial state).  dparams of rows of length 0 are not written.
    """
    G, S, P, SLOTS = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots
    WRITTEN, KEPT = G + trace.x_start, len(trace.kept)
    STATE, NEXT, DY = KEPT, KEPT + S, KEPT + 2 * S  # of what is loaded at each step
    DNEXT, PARAM = DY, DY + S  # of what the cell is given
    READ = DY + 1
    make = product(Shape.of(G, H, transposed=True), tile)
    place, fetch, home, put, multiply = make.place, make.fetch, make.home, make.put, make.multiply
    THREADS, ROWS, PAIRS, WORDS, VECTOR = make.threads, make.rows, make.pairs, max(1, make.registers), make.vector
    word, element = make.word, make.element
    cell = pointwise.backward(trace, f32, _accuracy(tile))
    INPUTS, OUTPUTS = PARAM + P, WRITTEN + S + P
    OWN, OWN_READ, OWN_STATE, OWN_PARAM = PAIRS, PAIRS * READ, PAIRS * S, max(1, PAIRS * P)
    SLOT_STEP = SLOTS * H

    @cuda.jit(device=True)
    def clipped(value, limit):
        """NaN stays NaN."""
        value = limit if value > limit else value
        return -limit if value < -limit else value

    @cuda.jit(device=True)
    def load(ready, p, places, arrays, strides, t):
        """What step t of one pair needs, into registers."""
        slot_at, state_at, dy_at = places
        slots, h, rest, dy = arrays
        N, reverse, rest_state, dy_step = strides
        before, after = (t + reverse) * N * H, (t + 1 - reverse) * N * H
        now = advance(slots, t * N * SLOT_STEP)
        for k in range(KEPT):
            ready[p * READ + k] = now[slot_at[p] + k * H]
        ready[p * READ + STATE] = advance(h, before)[state_at[p]]
        ready[p * READ + NEXT] = advance(h, after)[state_at[p]]
        for s in range(S - 1):
            ready[p * READ + STATE + 1 + s] = advance(rest, s * rest_state + before)[state_at[p]]
            ready[p * READ + NEXT + 1 + s] = advance(rest, s * rest_state + after)[state_at[p]]
        ready[p * READ + DY] = advance(dy, t * dy_step)[dy_at[p]]

    def resident_backward(
        packed, slots, h, rest, dy, dstate, params, dparams, lengths, N, reverse, rest_state, dy_step, dy_row, limit
    ):
        tid = i64(cuda.threadIdx.x)
        first = i64(cuda.blockIdx.x) * ROWS
        vector = cuda.shared.array(VECTOR, element, alignment=ALIGNED)
        weights = cuda.local.array(WORDS, word)
        length = cuda.local.array(OWN, i32)  # 0: the pair is another thread's, or lies beyond the batch
        spot = cuda.local.array(OWN, u32)  # of the pair's first value in the vector
        slot_at = cuda.local.array(OWN, i32)  # of the pair's first slot, in its step
        state_at = cuda.local.array(OWN, i32)
        dy_at = cuda.local.array(OWN, i32)
        places, arrays, strides = (slot_at, state_at, dy_at), (slots, h, rest, dy), (N, reverse, rest_state, dy_step)
        values = cuda.local.array(OWN_STATE, f32)
        own = cuda.local.array(OWN_PARAM, f32)
        gradients = cuda.local.array(OWN_PARAM, f32)
        ready = cuda.local.array(OWN_READ, f32)
        sums = cuda.local.array(OWN, f32)
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
        fetch(packed, weights)
        for k in range(tid, VECTOR, THREADS):
            vector[k] = 0
        steps = lengths[first]
        for p in range(PAIRS):
            unit, row = place(tid, p)
            living = unit < H and first + row < N
            u, n = min(unit, H - 1), min(first + row, N - 1)  # so that every load is of something
            spot[p] = home(vector, row, u)
            slot_at[p], state_at[p], dy_at[p] = n * SLOT_STEP + u, n * H + u, n * dy_row + u
            length[p] = lengths[n] if living else 0
            for s in range(S):
                values[p * S + s] = dstate[s * N * H + state_at[p]]
            for k in range(P):
                own[p * P + k] = params[k * H + u]
                gradients[p * P + k] = f32(0)
            if steps > 0:
                t = 0 if reverse else steps - 1
                load(ready, p, places, arrays, strides, t)
        cuda.syncthreads()
        for i in range(steps):
            t = i if reverse else steps - 1 - i
            following = t + 1 if reverse else t - 1
            now = advance(slots, t * N * SLOT_STEP)
            for p in range(PAIRS):
                for k in range(DY):
                    given[k] = ready[p * READ + k]
                for s in range(S):
                    given[DNEXT + s] = values[p * S + s]
                given[DNEXT] += ready[p * READ + DY]
                for k in range(P):
                    given[PARAM + k] = own[p * P + k]
                if i + 1 < steps:
                    load(ready, p, places, arrays, strides, following)
                cell(given, result)
                if t < length[p]:
                    for k in range(WRITTEN):
                        now[slot_at[p] + k * H] = result[k]
                    for g in range(G):
                        put(spot[p], i & 1, g * H, result[g])
                    for s in range(S):
                        values[p * S + s] = result[WRITTEN + s]
                    for k in range(P):
                        gradients[p * P + k] += result[WRITTEN + S + k]
            cuda.syncthreads()
            multiply(weights, vector, i & 1, sums)
            for p in range(PAIRS):
                if t < length[p]:
                    values[p * S] += sums[p]
                    if clip:
                        for s in range(S):
                            values[p * S + s] = clipped(values[p * S + s], limit)
        for p in range(PAIRS):
            if length[p] > 0:
                for s in range(S):
                    dstate[s * N * H + state_at[p]] = values[p * S + s]
                for k in range(P):
                    dparams[k * N * H + state_at[p]] = gradients[p * P + k]

    pointers = (types.CPointer(word), *[types.CPointer(f32)] * 7, types.CPointer(i64))
    return Source(resident_backward, pointers + (i64,) * 5 + (f32,), THREADS, make.shared)
