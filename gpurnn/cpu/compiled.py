"""The CPU executor: the whole time loop in compiled code (`loops`), the sums over time and batch behind it.

Forward, the loop walks through time in chunks of steps: one product projects a chunk's inputs into the slots, then come
its steps.  Backward it turns the slots into gradients in place, and a chunk of them into dx.  Threads take shares of the
batch, or of the units (`sharing`); the weights' gradients are shared out by their own rows.  All products run on our own
micro-kernels: weights are packed for them once per pass, by the threads together, where a pass is long enough for that.
"""

import itertools
from collections.abc import Callable

import numpy as np

from gpurnn.cells import Cell
from gpurnn.cpu import costs, crew, memory, sharing
from gpurnn.cpu.combine import combine
from gpurnn.cpu.dot import dot
from gpurnn.cpu.loops import backward_loop, forward_loop, orders
from gpurnn.cpu.products import packed_backward, packed_forward, packing_pays, packing_pays_backwards
from gpurnn.cpu.reduction import few_are_summed, reduction, reduction_size
from gpurnn.cpu.restart import Again
from gpurnn.cpu.rows import add_above, backward_rows, clamp, forward_rows, squares
from gpurnn.cpu.simd import address
from gpurnn.executors import layout
from gpurnn.executors.contract import Backward, Job, Resets, States, Weights
from gpurnn.executors.layout import Ends, Tape, add_ordered, is_ragged

BYTES = np.dtype(np.uint8)
NO_ROOM = np.empty(0, BYTES)


def forward(job: Job) -> tuple[States, Tape | None]:
    """See `contract.Executor.forward`.  Without training, states are updated in place and the slots serve a few steps at a time."""
    rows = np.ascontiguousarray(job.rows, np.int64)
    if rows is not job.rows:
        job = job._replace(rows=rows)
    cell, x, weights, state, rows, reverse, training = job[:7]
    T, N, I = x.shape
    H, dtype, ends = state[0].shape[1], x.dtype, Ends.of(job, np)
    allocate = memory.empty if ends.lengths is None else memory.zeros
    h = allocate((T + 1, N, H), dtype)
    whole = training or job.all_states
    rest = _rest(cell.states - 1, T, N, H, dtype, allocate, whole, job.resets)
    h[ends.first] = state[0]
    for part, values in zip(rest, state[1:], strict=True):
        part[ends.first] = values
    bias, params = layout.biases(cell, weights, H, np), layout.params(weights, H, np)
    chunk = _chunk(T, N)
    window = T if training else chunk
    slots = allocate((window, N, cell.trace.slots * H), dtype)
    heads = job.heads
    plan, head = sharing.plan_loop(cell, rows, T, N, I, H, dtype, heads), H // heads
    lies = not packing_pays(1, T * N, I), not (cell.recurrent and packing_pays(T, N, head))
    dots = [dot(dtype).address if used and lie else 0 for used, lie in zip((True, cell.recurrent), lies, strict=True)]
    places, _room = _rooms(plan, lambda share: packed_forward(cell, lies, share.units, I, H, head, dtype))
    again = job.resets and Again.forward(job.resets, len(plan.shares) if plan.by_units else 1)
    anew = (_behind(rest), again.begin, again.runs, *again[3:6]) if again else (0,) * 6
    given = rows, orders(cell), x, slots, h, rest, bias, params, weights.weight_ih
    draws = _draws(job)
    crew.run(
        forward_loop(dtype),
        (
            T, N, I, H, head, cell.trace.slots, cell.gates, len(cell.trace.split), reverse, plan.meets, window, chunk,
            forward_rows(cell, dtype).address, *dots, *rest.strides[:2], *map(address, given),
            _recurrent(cell, weights), *anew, 0 if draws is None else address(draws),
        ),
        [
            (*plan.packing(part), *_numbers(share.rows, share.units), *places[part], again.copy(part, share.rows) if again else 0)
            for part, share in enumerate(plan.shares)
        ],
    )  # fmt: skip
    final = tuple(part[ends.last].copy() for part in (h, *rest))
    seen = ends.visible(rest) if job.all_states else None
    return States(ends.visible(h), final, seen), Tape(job, slots, h, rest) if training else None


def backward(
    tape: Tape, dy: np.ndarray, dstate: tuple[np.ndarray, ...] | None, grads: Weights, options: Backward
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """See `contract.Executor.backward`."""
    job = tape.job
    cell, x, weights, _, rows, reverse = job[:6]
    T, N, I = x.shape
    H, dtype = tape.h.shape[2], x.dtype
    if dy.strides[-1] != dtype.itemsize or not dy.flags.aligned:
        dy = dy.copy()
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = (memory.zeros if dstate is None else memory.empty)((cell.states, N, H), dtype)
    if dstate is not None:
        for own, value in zip(passed, dstate, strict=True):
            own[...] = value
    heads = job.heads
    plan, head = sharing.plan_loop(cell, rows, T, N, I, H, dtype, heads), H // heads
    dparams = np.zeros((len(plan.shares), len(cell.params), H))
    flow = np.zeros((len(plan.shares), cell.states, T if options.flow is not None else 0))
    sums = address(dparams), dparams.strides[0], address(flow), flow.strides[0]
    clamp_at = clamp(dtype).address if options.clip is not None else 0
    squares_at = squares(dtype).address if options.flow is not None else 0
    limit, params = np.array([options.clip or 0.0]), layout.params(weights, H, np)
    lies = (
        not packing_pays_backwards(1, T * N, I, dtype),
        not (cell.recurrent and packing_pays_backwards(T, N, head, dtype)),
    )
    apart = I * dtype.itemsize if lies[0] else 0, lies[1]
    combine_one, draws = combine(dtype).address if T * N == 1 else 0, _draws(job)
    places, _room = _rooms(plan, lambda share: packed_backward(cell, lies, share.inputs, share.units, H, head, dtype))
    gradient_x = (memory.zeros if is_ragged(rows, N) else memory.empty)((T, N, I), dtype)
    again = job.resets and Again.backward(job.resets)
    anew = (_behind(tape.rest), *again[1:6]) if again else (0,) * 6
    drest = None if options.drest is None else np.stack(options.drest)
    add, above = (0, 0) if drest is None else (add_above(dtype).address, address(drest))
    given = (
        rows, orders(cell), slots, tape.h, tape.rest, dy, passed, gradient_x, params, limit, weights.weight_ih,
    )  # fmt: skip
    crew.run(
        backward_loop(dtype),
        (
            T, N, I, H, head, cell.trace.slots, cell.gates, len(cell.trace.split), cell.states, reverse, plan.meets,
            _chunk(T, N), backward_rows(cell, dtype).address, *apart, combine_one, clamp_at, squares_at,
            *tape.rest.strides[:2], *dy.strides[:2], *map(address, given), _recurrent(cell, weights), add, above,
            *anew, 0 if options.dfresh is None else address(options.dfresh), 0 if draws is None else address(draws),
        ),
        [
            (*plan.packing(part), *_numbers(*share), *places[part], sums[0] + part * sums[1], sums[2] + part * sums[3])
            for part, share in enumerate(plan.shares)
        ],
    )  # fmt: skip
    _add_weight_gradients(tape, slots, grads, sharing.plan_reduction(cell, T * N, I, H, head, plan))
    if cell.params:
        for gradient, value in zip(grads.params, dparams.sum(0), strict=True):
            gradient += value
    if options.flow is not None:
        options.flow[...] += flow.sum(0)
    return gradient_x, tuple(passed)


def _add_weight_gradients(tape: Tape, slots: np.ndarray, grads: Weights, columns: list[slice]) -> None:
    """Adds the sums over time and batch, of the slots' `columns` in each of several threads."""
    cell, x = tape.job.cell, tape.job.x
    trace, (T, N, I) = cell.trace, x.shape
    H, dtype, split = tape.h.shape[2], x.dtype, len(trace.split)
    h_before = tape.h[1:] if tape.job.reverse else tape.h[:T]
    if tape.job.resets is not None:
        own, h_before = h_before, memory.empty((T, N, H), dtype)
        np.copyto(h_before, own)
        h_before[tape.job.resets.before] = tape.job.resets.state[0]
    sums = np.zeros((split + cell.gates) * H)
    head = H // tape.job.heads
    work = memory.empty((len(columns), reduction_size(T * N, H, head, I, dtype)), dtype)
    combine_few = combine(dtype).address if few_are_summed(T * N) else 0
    given = slots, orders(cell), h_before, x, sums, grads.weight_ih
    crew.run(
        reduction(dtype),
        (T * N, H, head, I, trace.slots, cell.gates, split, combine_few, *map(address, given), _recurrent(cell, grads)),
        [(cut.start, cut.stop, address(room)) for cut, room in zip(columns, work, strict=True)],
    )
    sums = sums.astype(dtype)
    if grads.bias_hh is not None:
        add_ordered(grads.bias_hh, sums[: cell.gates * H], trace.r_order, H)
    if grads.bias_ih is not None:
        add_ordered(grads.bias_ih, sums[split * H :], trace.x_order, H)


def _rooms(plan: sharing.Plan, sizes: Callable[[sharing.Share], tuple[int, ...]]) -> tuple[list[list[int]], np.ndarray]:
    """Where each thread's packed weights have room, so many bytes each, those of shares of rows in common; and the memory."""
    wanted = [sizes(share) for share in (plan.shares if plan.by_units else plan.shares[:1])]
    total = sum(map(sum, wanted))
    if not total:  # nothing is packed
        return [list(wanted[0])] * len(plan.shares), NO_ROOM
    room = memory.empty((total,), BYTES)
    places, begin = [], address(room)
    for own in wanted:
        *starts, begin = itertools.accumulate(own, initial=begin)
        places.append(starts)
    return places if plan.by_units else places * len(plan.shares), room


def _rest(
    count: int, T: int, N: int, H: int, dtype: np.dtype, allocate: Callable, whole: bool, resets: Resets | None
) -> np.ndarray:
    """The states beyond h, (S-1, T+1, N, H); unless they are kept whole their stride in time is 0: each step replaces the last.

    `_behind` a state's steps stands what resets set it back to.
    """
    steps = T + 1 if whole else 1
    place = allocate((count, steps + (resets is not None), N, H), dtype)
    if resets is not None:
        for part, fresh in zip(place, resets.state[1:], strict=True):
            part[-1, 0] = fresh
    if whole:
        return place[:, : T + 1]
    return np.ndarray((count, T + 1, N, H), dtype, place, strides=(place.strides[0], 0, *place.strides[2:]))


def _behind(rest: np.ndarray) -> int:
    """Where the memory of the first state's steps ends: see `_rest`."""
    return address(rest) + max(rest.shape[1] * rest.strides[1], rest.shape[2] * rest.strides[2])


def _draws(job: Job) -> np.ndarray | None:
    if job.draws is not None:
        return job.draws.numbers(job.x.shape[1])
    if job.cell.random:
        raise TypeError(f"job: expected draws for {job.cell.name}, which asks for random numbers, got None")
    return None


def _recurrent(cell: Cell, weights: Weights) -> int:
    """Where weight_hh lies; 0 where the cell has none, for which no room is made either."""
    return address(weights.weight_hh) if cell.recurrent and weights.weight_hh is not None else 0


def _numbers(*cuts: slice) -> list[int]:
    return [edge for cut in cuts for edge in (cut.start, cut.stop)]


def _chunk(T: int, N: int) -> int:
    """Steps whose inputs, or gradients of inputs, are one product."""
    return max(1, min(T, costs.PROJECTED_ROWS // max(1, N)))
