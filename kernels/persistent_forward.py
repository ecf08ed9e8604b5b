"""Forward through all T steps of any cell in one launch: see `persistent`."""

from . import pointwise
from .build import Source
from .group import group_of, loading_flags, own_pair, settling
from .numba_cuda import cuda, types
from .products import columns
from .ptx import advance, shared_address, store_shared_u, written_out
from .tiles import Shape, layout

i32, i64, u32, f32 = types.int32, types.int64, types.uint32, types.float32


def _initial(shape, tile, word, heads):
    """Puts a group's initial h, all units of it, into the first buffer; zeros where there is padding.

    before: units of the layer that lie in heads before.
    """
    lay = layout(shape, tile)
    HEAD, H, WIDTH, ROWS, THREADS, GRAIN = shape.H, heads * shape.H, lay.width, tile.rows, lay.threads, lay.grain
    WORDS = lay.stride // GRAIN
    unit_at = columns(lay).unit_at

    @cuda.jit(device=True)
    def initial(vector, state, first, before, N, tid):
        pair = cuda.local.array(2, f32)
        for k in range(tid, ROWS * WORDS, THREADS):
            n, place = first + k // WORDS, k % WORDS * GRAIN
            for half in range(GRAIN):
                unit = unit_at(place + half)
                pair[half] = state[n * H + before + unit] if n < N and unit < HEAD and place < WIDTH else f32(0)
            store_shared_u(u32(vector + 4 * k), word(pair, 0))

    return initial


def _advancing(trace, of, place, H, RESETS):
    """A device function: one step of a thread's pairs, from their sums; rows that have ended keep their states.

    reset: which pairs are set back then, their units, and what they are set back to.
    """
    G, S, P, START = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.x_start
    GIVEN, OUTPUTS, PAIRS = G + START, S + len(trace.kept), of.pairs
    INPUTS = GIVEN + S + P
    cell = pointwise.forward(trace, f32, of.accuracy)

    @cuda.jit(device=True)
    def advance_pairs(step, length, sums, x, fixed, values, results, outgoing, drawn, start, state_at, reset):
        biases, own = fixed
        given = cuda.local.array(INPUTS, f32)
        result = cuda.local.array(OUTPUTS, f32)
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
            cell(given, result, place(drawn, p, start + step, state_at))
            for k in range(OUTPUTS):
                results[p * OUTPUTS + k] = result[k]
            if step < length[p]:
                for s in range(S):
                    values[p * S + s] = result[s]
            if RESETS:
                flags, unit, fresh = reset
                if flags[p]:
                    for s in range(S):
                        values[p * S + s] = fresh[s * H + unit[p]]
            outgoing[p] = values[p * S]

    return advance_pairs


def _beginning(trace, of, shape, tile, heads):
    """A device function: a thread's pairs as the time loop begins.  Returns whether its last pair is this thread's.

    corner, places: as for `own_pair`.  given: what is read.  Assigned: `fixed`, which all steps read, and `moving`.
    """
    G, S, P, START, H = trace.cell.gates, trace.cell.states, len(trace.cell.params), trace.x_start, heads * shape.H
    GIVEN, PAIRS, AHEAD = G + START, of.pairs, of.ahead
    own_pair_of = own_pair(of, shape, tile, trace.slots, heads)
    settle_biases, settle_states, settle_params, settle_x = (
        settling(PAIRS * count, AHEAD) for count in (GIVEN, S, P, G)
    )

    @cuda.jit(device=True)
    def begin_pairs(tid, corner, size, vector, places, given, fixed, moving):
        N, T, start = size
        bias, params, state, lengths, now = given
        length, biases, own, unit_of, row_at = fixed
        values, x, coming = moving
        slot_at, state_at = places[1], places[2]
        owner = False
        for p in range(PAIRS):
            owner, living, u, n = own_pair_of(tid, p, corner, N, vector, places)
            length[p] = max(0, min(T, lengths[n] - start)) if living else 0
            unit_of[p], row_at[p] = u, n
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
        return owner

    return begin_pairs


def _moving(trace, of, H, training):
    """Device functions: load what living pairs get of the next step's slots; send the new h; store a step's results."""
    G, S, KEPT, START = trace.cell.gates, trace.cell.states, len(trace.kept), trace.x_start
    PAIRS, SENT, OUTPUTS = of.pairs, of.sent, S + KEPT
    word, send, tidy = of.make.word, of.post.send, of.post.tidy

    @cuda.jit(device=True)
    def load_x(x, following, length, slot_at):
        """Of living pairs: the slots of another thread's pair may change at any time."""
        for p in range(PAIRS):
            if length[p] > 0:
                for g in range(G):
                    x[p * G + g] = following[slot_at[p] + (START + g) * H]

    @cuda.jit(device=True)
    def send_all(mail, vector, spot, i, outgoing):
        for k in range(SENT):
            send(mail, vector, spot[k], 0, i, word(outgoing, k))
        for k in range(SENT):
            tidy(mail, spot[k], 0, i)

    @cuda.jit(device=True)
    def store(step, length, places, to, rest_state, results):
        slot_at, state_at = places
        now, h_after, rest_after = to
        for p in range(PAIRS):
            if step < length[p]:
                h_after[state_at[p]] = results[p * OUTPUTS]
                if training:
                    for s in range(S - 1):
                        rest_after[s * rest_state + state_at[p]] = results[p * OUTPUTS + 1 + s]
                    for k in range(KEPT):
                        now[slot_at[p] + k * H] = results[p * OUTPUTS + S + k]

    return load_x, send_all, store


def forward(trace, *, H, tile, blocks, exchange, training, newer=True, resets=False, heads=1):
    """slots, bias, h, rest, params: as in `step.forward`, at the first of T steps; slots are overwritten in training.

    packed: by `packing.pack`.  state (S, N, H): the initial states.  final (S, N, H): assigned the final ones of rows
    that have any step here.  lengths (N,): each row's steps, of which `start` lie before.  draws: see
    `pointwise.place_of`.  mail: `exchange.mail_words` for each group, all as its kind of exchange begins
    (`exchange.beginning`).  fault: 1 where a wait was given up.
    begun: groups that earlier launches had.  Without training only h and final are written.
    heads: that the H units stand in; `packed` has one after the other, and a group's number says which one it has.
    resets, again, fresh: as in `step.forward`; `state` is what the first step begins with.
    """
    G, S, P = trace.cell.gates, trace.cell.states, len(trace.cell.params)
    HEADS, HEAD, SLOTS, SLOT_STEP = heads, H // heads, trace.slots, trace.slots * H
    shape = Shape(HEAD, G, False, blocks)
    of = group_of(shape, tile, exchange, newer)
    fetch, multiply, post = of.make.fetch, of.make.multiply, of.post
    open, release, left, wait, close = post.open, post.release, post.left, post.wait, post.close
    initial, begin_pairs = _initial(shape, tile, of.make.word, heads), _beginning(trace, of, shape, tile, heads)
    begin_draws, place = pointwise.drawing(trace.randoms, of.pairs, H)
    advance_pairs, (load_x, send_all, store) = _advancing(trace, of, place, H, resets), _moving(trace, of, H, training)
    load_flags = loading_flags(of)
    BLOCKS, ROWS, UNITS, THREADS, PAIRS, SENT = of.blocks, of.rows, of.units, of.threads, of.pairs, of.sent
    WORDS, PACKED, SHARE, MAIL = of.weights, of.make.packed, of.share, of.mail
    AT, BUFFERS, BUFFER, AHEAD, WALKS = of.vector, of.buffers, of.buffer, of.ahead, of.walks
    OWN_BIAS, OWN_STATE, OWN_PARAM = PAIRS * (G + trace.x_start), PAIRS * S, max(1, PAIRS * P)
    OWN_SUMS, OWN_OUTPUTS = PAIRS * G, PAIRS * (S + len(trace.kept))
    OWN_COMING, DRAWN = OWN_SUMS if AHEAD else 1, pointwise.drawn_words(trace.randoms, PAIRS)

    @written_out
    def take(b, x, coming):
        for k in range(OWN_COMING):
            x[k] = coming[k]

    def persistent_forward(
        packed, slots, bias, h, rest, params, state, final, lengths, draws, again, fresh, mail, fault, T, start, begun,
        N, reverse, rest_state,
    ):  # fmt: skip
        tid = i64(cuda.threadIdx.x)
        group, member = i64(cuda.blockIdx.x) // BLOCKS, i64(cuda.blockIdx.x) % BLOCKS
        head, base = (begun + group) % HEADS, member * UNITS
        first, before = (begun + group) // HEADS * ROWS, head * HEAD
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
        results = cuda.local.array(OWN_OUTPUTS, f32)
        outgoing = cuda.local.array(PAIRS, f32)
        unit_of = cuda.local.array(PAIRS, i32)
        row_at = cuda.local.array(PAIRS, i32)
        flags = cuda.local.array(PAIRS, i32)  # whether a pair is set back behind a step
        drawn = cuda.local.array(DRAWN, u32)
        vector = shared_address(cuda.shared.array(0, u32), AT // 4)
        fetch(advance(packed, (head * BLOCKS + member) * SHARE), weights)
        initial(vector, state, first, before, N, tid)
        for k in range(BUFFER + 4 * tid, BUFFERS * BUFFER, 4 * THREADS):
            store_shared_u(u32(vector + k), u32(0))
        steps = min(T, lengths[first] - start)
        begin = i64(steps - 1 if reverse and steps > 0 else 0)
        now, after = advance(slots, begin * N * SLOT_STEP), (begin + 1 - reverse) * N * H
        h_after, rest_after = advance(h, after), advance(rest, after)
        states_on = -N * H if reverse else N * H  # from a step to the next
        slots_on = states_on * SLOTS
        owner = begin_pairs(
            tid, (first, base, before), (N, T, start), vector, (spot, slot_at, state_at),
            (bias, params, state, lengths, now), (length, biases, own, unit_of, row_at), (values, x, coming),
        )  # fmt: skip
        begin_draws(draws, state_at, drawn)
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
                load_x(coming, following, length, slot_at)
            if resets:
                load_flags(flags, advance(again, (t + 1 - 2 * reverse) * N), length, row_at, i + 1 < steps)
            multiply(weights, u32(vector + (i & BUFFERS - 1) * BUFFER), sums)
            advance_pairs(
                step, length, sums, x, (biases, own), values, results, outgoing, drawn, start, state_at,
                (flags, unit_of, fresh),
            )  # fmt: skip
            if i + 1 < steps and owner:
                send_all(mail, vector, spot, i, outgoing)
            if i + 1 < steps:
                release(mail, vector, i)
                if left(vector, i):
                    break
            if not WALKS:
                now, after = advance(slots, t * N * SLOT_STEP), (t + 1 - reverse) * N * H
                h_after, rest_after = advance(h, after), advance(rest, after)
            store(step, length, (slot_at, state_at), (now, h_after, rest_after), rest_state, results)
            if not AHEAD and i + 1 < steps:
                load_x(x, following, length, slot_at)
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

    pointers = (types.CPointer(PACKED), *[types.CPointer(f32)] * 7, *[types.CPointer(i64)] * 2)
    pointers += (types.CPointer(types.uint8), types.CPointer(f32), *[types.CPointer(u32)] * 2)
    return Source(persistent_forward, pointers + (i64,) * 6, THREADS, of.shared, *of.launched)
