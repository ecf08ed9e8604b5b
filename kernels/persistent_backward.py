"""Backward through all T steps of any cell in one launch: see `persistent`."""

from . import pointwise
from .build import Source
from .group import group_of, loading_flags, own_pair, settling
from .numba_cuda import cuda, types
from .ptx import advance, behind_zero, load_shared_u, shared_address, store_shared_u, written_out
from .tiles import Shape

i32, i64, u32, f32, f64 = types.int32, types.int64, types.uint32, types.float32, types.float64


@cuda.jit(device=True)
def _clipped(value, limit):
    """NaN stays NaN."""
    value = limit if value > limit else value
    return -limit if value < -limit else value


def _at_step(SLOT_STEP, H):
    """Device functions: where a step's slots, the states before it and its dy begin; the same for the step behind."""

    @cuda.jit(device=True)
    def placed(arrays, strides, t):
        slots, h, rest, dy = arrays
        N, reverse, _, dy_step = strides
        before = (t + reverse) * N * H
        return advance(slots, t * N * SLOT_STEP), advance(h, before), advance(rest, before), advance(dy, t * dy_step)

    @cuda.jit(device=True)
    def behind(walked, strides):
        now, h, rest, dy = walked
        N, reverse, _, dy_step = strides
        on = i64(1 if reverse else -1)
        return (
            advance(now, on * N * SLOT_STEP),
            advance(h, on * N * H),
            advance(rest, on * N * H),
            advance(dy, on * dy_step),
        )

    return placed, behind


def _loading(KEPT, READ, S, H):
    """Device functions: loads what a step of one pair needs, but for next states; loads a step's states alone."""
    STATE, DY = KEPT, READ - 1

    @cuda.jit(device=True)
    def load(ready, p, places, at, strides):
        slot_at, state_at, dy_at = places
        now, h, rest, dy = at
        for k in range(KEPT):
            ready[p * READ + k] = now[slot_at[p] + k * H]
        load_states(ready, p * READ + STATE, state_at[p], h, rest, strides)
        ready[p * READ + DY] = dy[dy_at[p]]

    @cuda.jit(device=True)
    def load_states(ready, to, state_at, h, rest, strides):
        ready[to] = h[state_at]
        for s in range(S - 1):
            ready[to + 1 + s] = advance(rest, s * strides[2])[state_at]

    return load, load_states


def _going_back(trace, of, place, H, RESETS):
    """A device function: one step of a thread's pairs by the cell alone; rows that have not begun keep dL/dstate.

    reset: which pairs began this step anew, their units, and what they were set back to.
    """
    S, P, WRITTEN, KEPT = trace.cell.states, len(trace.cell.params), trace.cell.gates + trace.x_start, len(trace.kept)
    DY = KEPT + 2 * S  # the place of dy among what is ready
    DNEXT, PARAM, READ = DY, DY + S, DY + 1
    INPUTS, OUTPUTS = PARAM + P, WRITTEN + S + P
    cell, PAIRS = pointwise.backward(trace, f32, of.accuracy), of.pairs

    @cuda.jit(device=True)
    def go_back(step, length, ready, own, values, written, gradients, drawn, state_at, reset):
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
        for p in range(PAIRS):
            for k in range(DY):
                given[k] = ready[p * READ + k]
            if RESETS:
                flags, unit, fresh = reset
                if flags[p]:
                    for s in range(S):
                        given[KEPT + s] = fresh[s * H + unit[p]]
            for s in range(S):
                given[DNEXT + s] = values[p * S + s]
            given[DNEXT] += ready[p * READ + DY]
            for k in range(P):
                given[PARAM + k] = own[p * P + k]
            cell(given, result, place(drawn, p, step, state_at))
            for k in range(WRITTEN):
                written[p * WRITTEN + k] = result[k]
            if step < length[p]:
                for s in range(S):
                    values[p * S + s] = result[WRITTEN + s]
                for k in range(P):
                    gradients[p * P + k] += f64(result[WRITTEN + S + k])

    return go_back


def _sending(of, G, WRITTEN):
    """A device function: dL/dr of all gates, each a part of the vector, to all blocks."""
    PAIRS, SENT, WIDTH, word, send, tidy = of.pairs, of.sent, of.width, of.make.word, of.post.send, of.post.tidy

    @cuda.jit(device=True)
    def send_all(mail, vector, spot, i, length, written, outgoing):
        for g in range(G):
            for p in range(PAIRS):
                # padding has no gradient; what the cell makes of nothing may be NaN, which 0 weights do not stop
                outgoing[p] = written[p * WRITTEN + g] if length[p] > 0 else f32(0)
            for k in range(SENT):
                send(mail, vector, spot[k], g * WIDTH, i, word(outgoing, k))
        for g in range(G):
            for k in range(SENT):
                tidy(mail, spot[k], g * WIDTH, i)

    return send_all


def _beginning(trace, of, shape, tile, heads, placed, loads):
    """A device function: a thread's pairs as the time loop begins.  Returns whether its last pair is this thread's.

    corner: as for `own_pair`.  given, stored: what is read, `walked` the first step's.  Assigned: `spots`; `fixed`,
    which all steps read; `moving`.
    """
    S, P, H, PAIRS, AHEAD = trace.cell.states, len(trace.cell.params), heads * shape.H, of.pairs, of.ahead
    NEXT, READ = len(trace.kept) + S, len(trace.kept) + 2 * S + 1
    own_pair_of, (load, load_states) = own_pair(of, shape, tile, trace.slots, heads), loads
    settle_states, settle_params, settle_ready = (settling(PAIRS * count, AHEAD) for count in (S, P, READ))

    @cuda.jit(device=True)
    def begin_pairs(tid, corner, size, vector, spots, dy_row, given, stored, walked, fixed, moving):
        steps, last = size
        spot, slot_at, state_at, dy_at = spots
        dstate, params, lengths = given
        arrays, strides = stored
        length, own, gradients, unit_of, row_at = fixed
        values, ready, coming = moving
        places, h, rest, N, reverse = (slot_at, state_at, dy_at), arrays[1], arrays[2], strides[0], strides[1]
        owner = False
        for p in range(PAIRS):
            owner, living, u, n = own_pair_of(tid, p, corner, N, vector, (spot, slot_at, state_at))
            dy_at[p] = n * dy_row + u
            length[p] = lengths[n] if living else 0
            unit_of[p], row_at[p] = u, n
            for s in range(S):
                values[p * S + s] = dstate[s * N * H + state_at[p]] if length[p] > 0 else f32(0)
            for k in range(P):
                own[p * P + k] = params[k * H + u]
                gradients[p * P + k] = f64(0)
            for k in range(READ):
                ready[p * READ + k] = f32(0)
                if AHEAD:
                    coming[p * READ + k] = f32(0)
            if length[p] > 0:
                load(ready, p, places, walked, strides)
                load_states(ready, p * READ + NEXT, state_at[p], advance(h, last), advance(rest, last), strides)
                if AHEAD and steps > 1:
                    load(coming, p, places, placed(arrays, strides, i64(1 if reverse else steps - 2)), strides)
        settle_states(values)
        settle_params(own)
        settle_ready(ready)
        settle_ready(coming)
        return owner

    return begin_pairs


def _between_steps(trace, of, clip):
    """Device functions: hand next states on, take what was loaded ahead, add the product to dL/dh of living rows; give
    the gradients of pairs that began a step anew to the states that they were set back to.
    """
    S, KEPT, PAIRS = trace.cell.states, len(trace.kept), of.pairs
    STATE, NEXT, READ = KEPT, KEPT + S, KEPT + 2 * S + 1
    OWN_COMING = PAIRS * READ if of.ahead else 1

    @written_out
    def hand_on(b, ready):
        """The next states of the step to come: what this one began with."""
        for p in range(PAIRS):
            for s in range(S):
                ready[p * READ + NEXT + s] = ready[p * READ + STATE + s]

    @written_out
    def take(b, ready, coming, zero):
        """Takes once the zero is there: else the assembler would wait for memory before it looks for mail."""
        for k in range(OWN_COMING):
            if not NEXT <= k % READ < NEXT + S:
                ready[k] = behind_zero.emit(b, coming[k], zero)[0]

    @cuda.jit(device=True)
    def add_product(step, length, sums, values, limit):
        for p in range(PAIRS):
            if step < length[p]:
                values[p * S] += sums[p]
                if clip:
                    for s in range(S):
                        values[p * S + s] = _clipped(values[p * S + s], limit)

    @cuda.jit(device=True)
    def give_back(flags, values, dfresh, size, state_at):
        for p in range(PAIRS):
            if flags[p]:
                for s in range(S):
                    dfresh[s * size + state_at[p]] += f64(values[p * S + s])
                    values[p * S + s] = f32(0)

    return hand_on, take, add_product, give_back


def backward(trace, *, H, tile, blocks, exchange, clip, newer=True, resets=False, heads=1):
    """slots, h, rest, dy, params, clip: as in `step.backward`.  Assigns slots, dstate (S, N, H) and dparams (P, N, H).

    dstate: dL/d(final state) -> dL/d(initial state).  dparams: in float64, not written where a row has length 0.
    packed, lengths, draws, mail, fault, begun, heads: as in `forward`.  resets, again, fresh, dfresh: as in
    `step.backward`.
    """
    G, S, P = trace.cell.gates, trace.cell.states, len(trace.cell.params)
    WRITTEN, KEPT, SLOT_STEP = G + trace.x_start, len(trace.kept), trace.slots * H
    HEADS, HEAD = heads, H // heads
    READ = KEPT + 2 * S + 1  # what a pair needs of a step: kept values, states, next states, dy
    shape = Shape(HEAD, G, True, blocks)
    of = group_of(shape, tile, exchange, newer)
    fetch, multiply, post = of.make.fetch, of.make.multiply, of.post
    open, release, left, wait, close = post.open, post.release, post.left, post.wait, post.close
    (placed, behind), (load, load_states) = _at_step(SLOT_STEP, H), _loading(KEPT, READ, S, H)
    begin_pairs = _beginning(trace, of, shape, tile, heads, placed, (load, load_states))
    begin_draws, place = pointwise.drawing(trace.randoms, of.pairs, H)
    go_back, send_all = _going_back(trace, of, place, H, resets), _sending(of, G, WRITTEN)
    hand_on, take, add_product, give_back = _between_steps(trace, of, clip)
    load_flags = loading_flags(of)
    BLOCKS, ROWS, UNITS, THREADS, PAIRS, SENT = of.blocks, of.rows, of.units, of.threads, of.pairs, of.sent
    WORDS, PACKED, SHARE, MAIL = of.weights, of.make.packed, of.share, of.mail
    AT, BUFFERS, BUFFER, FLAGS_AT, AHEAD, WALKS = of.vector, of.buffers, of.buffer, of.flags, of.ahead, of.walks
    OWN_READ, OWN_STATE, OWN_PARAM, OWN_WRITTEN = PAIRS * READ, PAIRS * S, max(1, PAIRS * P), PAIRS * WRITTEN
    OWN_COMING, DRAWN = OWN_READ if AHEAD else 1, pointwise.drawn_words(trace.randoms, PAIRS)

    def persistent_backward(
        packed, slots, h, rest, dy, dstate, params, dparams, lengths, draws, again, fresh, dfresh, mail, fault, begun,
        N, reverse, rest_state, dy_step, dy_row, limit,
    ):  # fmt: skip
        tid = i64(cuda.threadIdx.x)
        group, member = i64(cuda.blockIdx.x) // BLOCKS, i64(cuda.blockIdx.x) % BLOCKS
        head, base = (begun + group) % HEADS, member * UNITS
        first, before = (begun + group) // HEADS * ROWS, head * HEAD
        mail = advance(mail, group * MAIL)
        weights = cuda.local.array(WORDS, PACKED)
        length = cuda.local.array(PAIRS, i32)  # 0: the pair is another thread's, or lies beyond units or batch
        spot = cuda.local.array(SENT, u32)  # of a word in the vector's first part
        slot_at = cuda.local.array(PAIRS, i32)  # of the pair's first slot, in its step
        state_at = cuda.local.array(PAIRS, i32)
        dy_at = cuda.local.array(PAIRS, i32)
        places, arrays, strides = (slot_at, state_at, dy_at), (slots, h, rest, dy), (N, reverse, rest_state, dy_step)
        values = cuda.local.array(OWN_STATE, f32)
        own = cuda.local.array(OWN_PARAM, f32)
        gradients = cuda.local.array(OWN_PARAM, f64)
        ready = cuda.local.array(OWN_READ, f32)
        coming = cuda.local.array(OWN_COMING, f32)  # what is ready in the next step, where that is loaded ahead
        sums = cuda.local.array(PAIRS, f32)
        written = cuda.local.array(OWN_WRITTEN, f32)
        outgoing = cuda.local.array(PAIRS, f32)
        unit_of = cuda.local.array(PAIRS, i32)
        row_at = cuda.local.array(PAIRS, i32)
        flags = cuda.local.array(PAIRS, i32)  # whether a pair began the step anew
        next_flags = cuda.local.array(PAIRS, i32)
        drawn = cuda.local.array(DRAWN, u32)
        vector = shared_address(cuda.shared.array(0, u32), AT // 4)
        fetch(advance(packed, (head * BLOCKS + member) * SHARE), weights)
        for k in range(4 * tid, BUFFERS * BUFFER, 4 * THREADS):
            store_shared_u(u32(vector + k), u32(0))
        steps = lengths[first]
        walked = placed(arrays, strides, i64(0 if reverse else steps - 1))
        last = i64(0 if reverse else steps) * N * H  # where the last states begin
        owner = begin_pairs(
            tid, (first, base, before), (steps, last), vector, (spot, slot_at, state_at, dy_at), dy_row,
            (dstate, params, lengths), (arrays, strides), walked, (length, own, gradients, unit_of, row_at),
            (values, ready, coming),
        )  # fmt: skip
        if resets:
            load_flags(flags, advance(again, i64(0 if reverse else steps - 1) * N), length, row_at, steps > 0)
        begin_draws(draws, state_at, drawn)
        open(vector, fault)
        cuda.syncthreads()
        if left(vector, 0):
            steps = i64(0)
        for i in range(steps):
            t = i if reverse else steps - 1 - i
            step = i32(t)
            go_back(step, length, ready, own, values, written, gradients, drawn, state_at, (flags, unit_of, fresh))
            if owner:
                send_all(mail, vector, spot, i, length, written, outgoing)
            release(mail, vector, i)
            if left(vector, i):
                break
            if WALKS:
                now, following = walked[0], behind(walked, strides)
            else:
                now, following = advance(slots, t * N * SLOT_STEP), placed(arrays, strides, t + 1 if reverse else t - 1)
            hand_on(ready)
            if resets:
                load_flags(next_flags, advance(again, (t - 1 + 2 * reverse) * N), length, row_at, i + 1 < steps)
            for p in range(PAIRS):
                if step < length[p]:
                    for k in range(WRITTEN):
                        now[slot_at[p] + k * H] = written[p * WRITTEN + k]
                if not AHEAD and i + 1 < steps and length[p] > 0:  # another thread's slots may change at any time
                    load(ready, p, places, following, strides)
            wait(mail, vector, i, fault)
            if WALKS:
                walked = following
            if AHEAD:
                take(ready, coming, load_shared_u(u32(vector + (FLAGS_AT + 4 * (i + 1 & 1)))))
                if i + 2 < steps:
                    for p in range(PAIRS):
                        if length[p] > 0:  # the slots of another thread's pair may change at any time
                            load(coming, p, places, placed(arrays, strides, t + 2 if reverse else t - 2), strides)
            multiply(weights, u32(vector + (i + 1 & BUFFERS - 1) * BUFFER), sums)
            add_product(step, length, sums, values, limit)
            if resets:
                give_back(flags, values, dfresh, N * H, state_at)
                for p in range(PAIRS):
                    flags[p] = next_flags[p]
        for p in range(PAIRS):
            if length[p] > 0:
                for s in range(S):
                    dstate[s * N * H + state_at[p]] = values[p * S + s]
                for k in range(P):
                    dparams[k * N * H + state_at[p]] = gradients[p * P + k]
        close()

    pointers = (types.CPointer(PACKED), *[types.CPointer(f32)] * 6, types.CPointer(f64), *[types.CPointer(i64)] * 2)
    pointers += (types.CPointer(types.uint8), types.CPointer(f32), types.CPointer(f64), *[types.CPointer(u32)] * 2)
    return Source(persistent_backward, pointers + (i64,) * 6 + (f32,), THREADS, of.shared, *of.launched)
