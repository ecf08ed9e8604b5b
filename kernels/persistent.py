"""All T steps of any cell in one launch: weight_hh stays in the registers and shared memory of a group of blocks.

A group has a few batch rows and all H units; groups never wait for each other.  A block has some of the units, and a
thread all gates of a few (unit, row) pairs, whose states never leave its registers.  A step is: the product (`products`),
the cell, the new vector to all blocks of the group (`exchange`).  While the others' share is on its way a thread stores
what backward will read and loads what the next step needs.  With one block to a group nobody waits for another SM.

The first look for the others' share waits for those loads too, so memory's latency stands in every step.  Where the kernel
is AHEAD, they are given out before the product, into registers of their own.  That is so where it was faster on an H200
(bench/results): LSTM 768 forward 1.87 -> 1.68 us a step, LSTM 256 of 64 rows back 4.82 -> 3.70; cells of one gate lose.
`newer`: the chip has sm_90 or later; before, some kernels have no registers for it, nor for what makes a warp wait as one.

    forward    slots (x W_ih^T, no biases) -> h, the other states, and in the slots what backward reads
    backward   dy, dL/d(final state) -> in the slots dL/dr and dL/dx; dL/d(initial state)

Slots and states are laid out as in `step`, and both write the same: one's tape is the other's.  Rows are sorted by
length, longest first, so a group stops at its first row's end.  Work on persistent kernels and what it rests on: Diamos
et al., "Persistent RNNs: stashing recurrent weights on-chip", ICML 2016.
"""

from . import exchange as exchanges
from . import pointwise, tiles
from .build import Source
from .numba_cuda import cuda, types
from .products import columns, product
from .ptx import advance, behind_zero, load_shared_u, settled, shared_address, store_shared_u, written_out
from .tiles import Ffma, Shape, layout

i32, i64, u32, f32, f64 = types.int32, types.int64, types.uint32, types.float32, types.float64


def _accuracy(tile):
    return pointwise.EXACT if isinstance(tile, Ffma) else pointwise.APPROXIMATE


def _initial(shape, tile, word):
    """Puts a group's initial h, all units of it, into the first buffer; zeros where there is padding."""
    lay = layout(shape, tile)
    H, WIDTH, ROWS, THREADS, GRAIN, WORDS = (
        shape.H,
        lay.width,
        tile.rows,
        lay.threads,
        lay.grain,
        lay.stride // lay.grain,
    )
    unit_at = columns(lay).unit_at

    @cuda.jit(device=True)
    def initial(vector, state, first, N, tid):
        pair = cuda.local.array(2, f32)
        for k in range(tid, ROWS * WORDS, THREADS):
            n, place = first + k // WORDS, k % WORDS * GRAIN
            for half in range(GRAIN):
                unit = unit_at(place + half)
                pair[half] = state[n * H + unit] if n < N and unit < H and place < WIDTH else f32(0)
            store_shared_u(u32(vector + 4 * k), word(pair, 0))

    return initial


def _settling(count, needed):
    """What waits until all values of an array are there, before a loop, if that is `needed`.

    What is still on its way when a loop begins is waited for in every step, at its first use; and as scoreboards are few, so
    is what the step itself has loaded ahead.
    """

    @written_out
    def settle(b, values):
        for k in range(count if needed else 0):
            values[k] = settled.emit(b, values[k])[0]

    return settle


def forward(trace, *, H, tile, blocks, exchange, training, newer=True):
    """slots, bias, h, rest, params: as in `step.forward`, at the first of T steps; slots are overwritten in training.

    packed: by `packing.pack`.  state (S, N, H): the initial states.  final (S, N, H): assigned the final ones of rows that
    have any step here.  lengths (N,): each row's steps, of which `start` lie before.  mail: `exchange.mail_words` for each
    group, all as its kind of exchange begins (`exchange.beginning`).  fault: 1 where a wait was given up.  row: the first batch row of this launch.  Without training only h and final are written.
    """
    G, S, P, SLOTS, START = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots, trace.x_start
    GIVEN, KEPT = G + START, len(trace.kept)
    shape = Shape(H, G, False, blocks)
    make, lay = product(shape, tile), layout(shape, tile)
    post = exchanges.exchange(exchange, shape, tile, make.barriers, newer)
    place, fetch, word, multiply = make.place, make.fetch, make.word, make.multiply
    open, address, send, tidy = post.open, post.spot, post.send, post.tidy
    release, left, wait, close = post.release, post.left, post.wait, post.close
    cell, column, initial = (
        pointwise.forward(trace, f32, _accuracy(tile)),
        columns(lay).column,
        _initial(shape, tile, word),
    )
    BLOCKS, ROWS, UNITS, THREADS, GRAIN = blocks, tile.rows, lay.units, lay.threads, lay.grain
    PAIRS, WORDS, AT, BUFFERS = make.pairs, max(1, make.registers), make.vector, post.buffers
    BUFFER, SHARED = tiles.vector_bytes(shape, tile), AT + exchanges.shared_bytes(exchange, shape, tile, make.barriers)
    SHARE, MAIL = tiles.packed_words(shape, tile) // blocks, exchanges.mail_words(exchange, shape, tile)
    INPUTS, OUTPUTS, SENT = GIVEN + S + P, S + KEPT, PAIRS // GRAIN
    OWN_BIAS, OWN_STATE, OWN_PARAM, OWN_SUMS, OWN_OUTPUTS = (
        PAIRS * GIVEN,
        PAIRS * S,
        max(1, PAIRS * P),
        PAIRS * G,
        PAIRS * OUTPUTS,
    )
    SLOT_STEP, PACKED = SLOTS * H, make.packed
    AHEAD, WALKS = newer and tiles.ahead(shape, tile, exchange), blocks == 1
    OWN_COMING = OWN_SUMS if AHEAD else 1
    settle_biases, settle_states, settle_params, settle_x = (
        _settling(count, AHEAD) for count in (OWN_BIAS, OWN_STATE, OWN_PARAM if P else 0, OWN_SUMS)
    )

    @written_out
    def take(b, x, coming):
        for k in range(OWN_COMING):
            x[k] = coming[k]

    def persistent_forward(
        packed, slots, bias, h, rest, params, state, final, lengths, mail, fault, T, start, row, N, reverse, rest_state
    ):
        tid = i64(cuda.threadIdx.x)
        group, member = i64(cuda.blockIdx.x) // BLOCKS, i64(cuda.blockIdx.x) % BLOCKS
        first, base = row + group * ROWS, member * UNITS
        mail = advance(mail, group * MAIL)
        weights = cuda.local.array(WORDS, PACKED)
        length = cuda.local.array(PAIRS, i32)  # 0: the pair is another thread's, or lies beyond units or batch
        spot = cuda.local.array(SENT, u32)  # of a word in the vector
        slot_at = cuda.local.array(PAIRS, i32)  # of the pair's first slot, in its step
        state_at = cuda.local.array(PAIRS, i32)
        biases = cuda.local.array(OWN_BIAS, f32)
        values = cuda.local.array(OWN_STATE, f32)
        own = cuda.local.array(OWN_PARAM, f32)
        x = cuda.local.array(OWN_SUMS, f32)
        coming = cuda.local.array(OWN_COMING, f32)  # x of the next step, where that is loaded ahead
        sums = cuda.local.array(OWN_SUMS, f32)
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
        results = cuda.local.array(OWN_OUTPUTS, f32)
        outgoing = cuda.local.array(PAIRS, f32)
        vector = shared_address(cuda.shared.array(0, u32), AT // 4)
        fetch(advance(packed, member * SHARE), weights)
        initial(vector, state, first, N, tid)
        for k in range(BUFFER + 4 * tid, BUFFERS * BUFFER, 4 * THREADS):
            store_shared_u(u32(vector + k), u32(0))
        steps = min(T, lengths[first] - start)
        begin = i64(steps - 1 if reverse and steps > 0 else 0)
        now, after = advance(slots, begin * N * SLOT_STEP), (begin + 1 - reverse) * N * H
        h_after, rest_after = advance(h, after), advance(rest, after)
        states_on = -N * H if reverse else N * H  # from a step to the next
        slots_on = states_on * SLOTS
        owner = False
        for p in range(PAIRS):
            part, r = place(tid, p)
            unit, n = base + part, first + r
            owner = part < UNITS
            living = owner and unit < H and n < N
            u, n = min(unit, H - 1), min(n, N - 1)  # so that every load is of something
            if p % GRAIN == 0:
                spot[p // GRAIN] = address(vector, r, column(base + part)) if owner else u32(0)
            slot_at[p], state_at[p] = n * SLOT_STEP + u, n * H + u
            length[p] = max(0, min(T, lengths[n] - start)) if living else 0
            for k in range(GIVEN):
                biases[p * GIVEN + k] = bias[k * H + u]
            for s in range(S):
                values[p * S + s] = state[s * N * H + state_at[p]] if length[p] > 0 else f32(0)
            for k in range(P):
                own[p * P + k] = params[k * H + u]
            for g in range(G):
                x[p * G + g] = now[slot_at[p] + (START + g) * H] if length[p] > 0 else f32(0)
                if AHEAD:
                    coming[p * G + g] = f32(0)
        settle_biases(biases)
        settle_states(values)
        settle_params(own)
        settle_x(x)
        open(vector, fault)
        cuda.syncthreads()
        if left(vector, 0):
            steps = i64(0)
        for i in range(steps):
            t = steps - 1 - i if reverse else i
            step = i32(t)
            further = (t - 1 if reverse else t + 1) * N * SLOT_STEP
            following = advance(now, slots_on) if WALKS else advance(slots, further)
            if AHEAD and i + 1 < steps:
                for p in range(PAIRS):
                    if length[p] > 0:  # the slots of another thread's pair may change at any time
                        for g in range(G):
                            coming[p * G + g] = following[slot_at[p] + (START + g) * H]
            multiply(weights, u32(vector + (i & BUFFERS - 1) * BUFFER), sums)
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
                cell(given, result)
                for k in range(OUTPUTS):
                    results[p * OUTPUTS + k] = result[k]
                if step < length[p]:
                    for s in range(S):
                        values[p * S + s] = result[s]
                outgoing[p] = values[p * S]
            if i + 1 < steps and owner:
                for k in range(SENT):
                    send(mail, vector, spot[k], 0, i, word(outgoing, k))
                for k in range(SENT):
                    tidy(mail, spot[k], 0, i)
            if i + 1 < steps:
                release(mail, vector, i)
                if left(vector, i):
                    break
            if not WALKS:
                now, after = advance(slots, t * N * SLOT_STEP), (t + 1 - reverse) * N * H
                h_after, rest_after = advance(h, after), advance(rest, after)
            for p in range(PAIRS):
                if step < length[p]:
                    h_after[state_at[p]] = results[p * OUTPUTS]
                    if training:
                        for s in range(S - 1):
                            rest_after[s * rest_state + state_at[p]] = results[p * OUTPUTS + 1 + s]
                        for k in range(KEPT):
                            now[slot_at[p] + k * H] = results[p * OUTPUTS + S + k]
            if not AHEAD and i + 1 < steps:
                for p in range(PAIRS):
                    if length[p] > 0:
                        for g in range(G):
                            x[p * G + g] = following[slot_at[p] + (START + g) * H]
            if i + 1 < steps:
                wait(mail, vector, i, fault)
            if AHEAD:
                take(x, coming)
            if WALKS:
                now, h_after, rest_after = following, advance(h_after, states_on), advance(rest_after, states_on)
        for p in range(PAIRS):
            if length[p] > 0:
                for s in range(S):
                    final[s * N * H + state_at[p]] = values[p * S + s]
        close()

    pointers = (types.CPointer(PACKED), *[types.CPointer(f32)] * 7, types.CPointer(i64), *[types.CPointer(u32)] * 2)
    return Source(persistent_forward, pointers + (i64,) * 6, THREADS, SHARED, *exchanges.launched(exchange, shape))


def backward(trace, *, H, tile, blocks, exchange, clip, newer=True):
    """slots, h, rest, dy, params, clip: as in `step.backward`.  Assigns slots, dstate (S, N, H) and dparams (P, N, H).

    dstate: dL/d(final state) -> dL/d(initial state).  dparams: in float64, not written where a row has length 0.
    packed, lengths, mail, fault, row: as in `forward`.
    """
    G, S, P, SLOTS = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.slots
    WRITTEN, KEPT = G + trace.x_start, len(trace.kept)
    STATE, NEXT, DY = KEPT, KEPT + S, KEPT + 2 * S  # of what a step needs; its next states are those of the step before
    DNEXT, PARAM = DY, DY + S  # of what the cell is given
    READ = DY + 1
    shape = Shape(H, G, True, blocks)
    make, lay = product(shape, tile), layout(shape, tile)
    post = exchanges.exchange(exchange, shape, tile, make.barriers, newer)
    place, fetch, word, multiply = make.place, make.fetch, make.word, make.multiply
    open, address, send, tidy = post.open, post.spot, post.send, post.tidy
    release, left, wait, close = post.release, post.left, post.wait, post.close
    cell, column = pointwise.backward(trace, f32, _accuracy(tile)), columns(lay).column
    BLOCKS, ROWS, UNITS, WIDTH, THREADS, GRAIN = blocks, tile.rows, lay.units, lay.width, lay.threads, lay.grain
    PAIRS, WORDS, AT, BUFFERS = make.pairs, max(1, make.registers), make.vector, post.buffers
    BUFFER, SHARED = tiles.vector_bytes(shape, tile), AT + exchanges.shared_bytes(exchange, shape, tile, make.barriers)
    SHARE, MAIL = tiles.packed_words(shape, tile) // blocks, exchanges.mail_words(exchange, shape, tile)
    INPUTS, OUTPUTS, SENT = PARAM + P, WRITTEN + S + P, PAIRS // GRAIN
    OWN_READ, OWN_STATE, OWN_PARAM, OWN_WRITTEN = PAIRS * READ, PAIRS * S, max(1, PAIRS * P), PAIRS * WRITTEN
    SLOT_STEP, PACKED, FLAGS_AT = SLOTS * H, make.packed, exchanges.flags_at(exchange, shape, tile, make.barriers)
    AHEAD, WALKS = newer and tiles.ahead(shape, tile, exchange), blocks == 1
    OWN_COMING = OWN_READ if AHEAD else 1
    settle_states, settle_params, settle_ready = (
        _settling(count, AHEAD) for count in (OWN_STATE, OWN_PARAM if P else 0, OWN_READ)
    )

    @written_out
    def hand_on(b, ready):
        """The next states of the step to come: what this one began with."""
        for p in range(PAIRS):
            for s in range(S):
                ready[p * READ + NEXT + s] = ready[p * READ + STATE + s]

    @written_out
    def take(b, ready, coming, zero):
        """When the zero is there: the assembler would take first, and wait for memory before it looks for mail."""
        for k in range(OWN_COMING):
            if not NEXT <= k % READ < NEXT + S:
                ready[k] = behind_zero.emit(b, coming[k], zero)[0]

    @cuda.jit(device=True)
    def clipped(value, limit):
        """NaN stays NaN."""
        value = limit if value > limit else value
        return -limit if value < -limit else value

    @cuda.jit(device=True)
    def placed(arrays, strides, t):
        """Where step t's slots, the states before it and its dy begin."""
        slots, h, rest, dy = arrays
        N, reverse, _, dy_step = strides
        before = (t + reverse) * N * H
        return advance(slots, t * N * SLOT_STEP), advance(h, before), advance(rest, before), advance(dy, t * dy_step)

    @cuda.jit(device=True)
    def behind(walked, strides):
        """Where those of the step behind `walked` do."""
        now, h, rest, dy = walked
        N, reverse, _, dy_step = strides
        on = i64(1 if reverse else -1)
        return (
            advance(now, on * N * SLOT_STEP),
            advance(h, on * N * H),
            advance(rest, on * N * H),
            advance(dy, on * dy_step),
        )

    @cuda.jit(device=True)
    def load(ready, p, places, at, strides):
        """What a step of one pair needs, into registers; but for next states."""
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

    def persistent_backward(
        packed, slots, h, rest, dy, dstate, params, dparams, lengths, mail, fault, row, N, reverse, rest_state, dy_step,
        dy_row, limit,
    ):  # fmt: skip
        tid = i64(cuda.threadIdx.x)
        group, member = i64(cuda.blockIdx.x) // BLOCKS, i64(cuda.blockIdx.x) % BLOCKS
        first, base = row + group * ROWS, member * UNITS
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
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
        written = cuda.local.array(OWN_WRITTEN, f32)
        outgoing = cuda.local.array(PAIRS, f32)
        vector = shared_address(cuda.shared.array(0, u32), AT // 4)
        fetch(advance(packed, member * SHARE), weights)
        for k in range(4 * tid, BUFFERS * BUFFER, 4 * THREADS):
            store_shared_u(u32(vector + k), u32(0))
        steps = lengths[first]
        walked = placed(arrays, strides, i64(0 if reverse else steps - 1))
        last = i64(0 if reverse else steps) * N * H  # where the last states begin
        owner = False
        for p in range(PAIRS):
            part, r = place(tid, p)
            unit, n = base + part, first + r
            owner = part < UNITS
            living = owner and unit < H and n < N
            u, n = min(unit, H - 1), min(n, N - 1)  # so that every load is of something
            if p % GRAIN == 0:
                spot[p // GRAIN] = address(vector, r, column(base + part)) if owner else u32(0)
            slot_at[p], state_at[p], dy_at[p] = n * SLOT_STEP + u, n * H + u, n * dy_row + u
            length[p] = lengths[n] if living else 0
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
        open(vector, fault)
        cuda.syncthreads()
        if left(vector, 0):
            steps = i64(0)
        for i in range(steps):
            t = i if reverse else steps - 1 - i
            step = i32(t)
            for p in range(PAIRS):
                for k in range(DY):
                    given[k] = ready[p * READ + k]
                for s in range(S):
                    given[DNEXT + s] = values[p * S + s]
                given[DNEXT] += ready[p * READ + DY]
                for k in range(P):
                    given[PARAM + k] = own[p * P + k]
                cell(given, result)
                for k in range(WRITTEN):
                    written[p * WRITTEN + k] = result[k]
                if step < length[p]:
                    for s in range(S):
                        values[p * S + s] = result[WRITTEN + s]
                    for k in range(P):
                        gradients[p * P + k] += f64(result[WRITTEN + S + k])
            if owner:
                for g in range(G):
                    for p in range(PAIRS):
                        # padding has no gradient; what the cell makes of nothing may be NaN, which 0 weights do not stop
                        outgoing[p] = written[p * WRITTEN + g] if length[p] > 0 else f32(0)
                    for k in range(SENT):
                        send(mail, vector, spot[k], g * WIDTH, i, word(outgoing, k))
                for g in range(G):
                    for k in range(SENT):
                        tidy(mail, spot[k], g * WIDTH, i)
            release(mail, vector, i)
            if left(vector, i):
                break
            if WALKS:
                now, following = walked[0], behind(walked, strides)
            else:
                now, following = advance(slots, t * N * SLOT_STEP), placed(arrays, strides, t + 1 if reverse else t - 1)
            hand_on(ready)
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
            for p in range(PAIRS):
                if step < length[p]:
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
        close()

    pointers = (types.CPointer(PACKED), *[types.CPointer(f32)] * 6, types.CPointer(f64), types.CPointer(i64))
    pointers += (types.CPointer(u32),) * 2
    return Source(
        persistent_backward, pointers + (i64,) * 6 + (f32,), THREADS, SHARED, *exchanges.launched(exchange, shape)
    )
