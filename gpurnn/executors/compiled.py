"""The CPU executor: the whole time loop in compiled code (`loops`), the sums over time and batch behind it.

Forward, the loop walks through time in chunks of steps: one product projects a chunk's inputs into the slots, then come
its steps.  Backward it turns the slots into gradients in place, and a chunk of them into dx.  Threads take shares of the
batch, or of the units (`sharing`); the weights' gradients are shared out by their own rows.  All products run on our own
micro-kernels: weights are packed for them once per pass, by the threads together, where a pass is long enough for that.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.executors import layout, loops, sharing, threads
from gpurnn.executors.barrier import Barrier
from gpurnn.executors.cache import address_of
from gpurnn.executors.dot import dot
from gpurnn.executors.gemm import reduction_size
from gpurnn.executors.layout import add_ordered, is_ragged, lengths_of
from gpurnn.executors.numpy_loop import Backward, States, Weights
from gpurnn.executors.products import packed_backward, packed_forward, packing_pays, packing_pays_backwards
from gpurnn.executors.rows import backward_rows, clamp, forward_rows, squares

PROJECTED_ROWS = 128  # of all threads: enough to read W_ih once for, and few enough to be in cache when the loop comes


class Tape(NamedTuple):
    """What backward needs.  `slots` is overwritten by the gradients, unless a backward is told to keep it."""

    cell: Cell
    x: np.ndarray
    weights: Weights
    reverse: bool
    rows: np.ndarray
    slots: np.ndarray
    h: np.ndarray
    rest: np.ndarray


def forward(
    cell: Cell,
    x: np.ndarray,
    weights: Weights,
    state: tuple[np.ndarray, ...],
    rows: np.ndarray,
    reverse: bool,
    training: bool,
    precision: str = "float32",
) -> tuple[States, Tape | None]:
    """See `numpy_loop.forward`.  Without training, states are updated in place and the slots serve a few steps at a time."""
    T, N, I = x.shape
    H, dtype = weights.weight_hh.shape[1], x.dtype
    ragged = is_ragged(rows, N)
    threads.settle((T if training else 1) * N * cell.trace.slots * H * dtype.itemsize)
    allocate = np.zeros if ragged else np.empty  # nothing but zeros may stand where a row has ended
    h = allocate((T + 1, N, H), dtype)
    rest = _rest(cell.states - 1, T, N, H, dtype, allocate, training)
    ends = (lengths_of(rows, N), np.arange(N)) if ragged else T  # where states stand behind, or in reverse before, all
    first, last = (ends, 0) if reverse else (0, ends)
    h[first] = state[0]
    for part, values in zip(rest, state[1:], strict=True):
        part[first] = values
    bias, params = layout.biases(cell, weights, H, np), layout.params(weights, H, np)
    chunk = _chunk(T, N)
    slots = allocate((T if training else chunk, N, cell.trace.slots * H), dtype)
    cell_rows, orders = address_of(forward_rows(cell, dtype)), loops.orders(cell)
    run_through, plan = loops.forward_loop(dtype), sharing.plan_loop(cell, rows, T, N, I, H, dtype)
    lies = not packing_pays(1, T * N, I), not packing_pays(T, N, H)
    dots = [address_of(dot(dtype)) if as_it_lies else 0 for as_it_lies in lies]
    shared = None if plan.by_units else packed_forward(cell, lies, slice(0, H), I, H, dtype)

    def loop(part: int) -> None:
        share = plan.shares[part]
        packed, *starts = shared or packed_forward(cell, lies, share.units, I, H, dtype)
        run_through(
            rows, reverse, cell_rows, cell.trace.x_start, *plan.packing(part), *_numbers(share.rows, share.units),
            *plan.meeting, chunk, *dots, *starts, orders, x, slots, h, rest, bias, params, weights.weight_ih, weights.weight_hh, packed,
        )  # fmt: skip

    threads.run(loop, range(len(plan.shares)), plan.barrier)
    final = tuple(part[last].copy() for part in (h, *rest))
    visible = h
    if ragged and reverse:  # initial states stand in h behind each row's end
        visible = h.copy()
        visible[first] = 0
    return States(visible, final), Tape(cell, x, weights, reverse, rows, slots, h, rest) if training else None


def backward(
    tape: Tape, dy: np.ndarray, dstate: tuple[np.ndarray, ...], grads: Weights, options: Backward
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """See `numpy_loop.backward`."""
    cell, weights = tape.cell, tape.weights
    T, N, I = tape.x.shape
    H, dtype = weights.weight_hh.shape[1], tape.x.dtype
    if dy.strides[-1] != dtype.itemsize or not dy.flags.aligned:
        dy = dy.copy()
    threads.settle(tape.slots.nbytes)
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = np.stack(dstate).astype(dtype, copy=False)
    plan = sharing.plan_loop(cell, tape.rows, T, N, I, H, dtype)
    dparams = np.zeros((len(plan.shares), len(cell.params), H), dtype)
    flow = np.zeros((len(plan.shares), cell.states, T if options.flow is not None else 0))
    clamp_at = address_of(clamp(dtype)) if options.clip is not None else 0
    squares_at = address_of(squares(dtype)) if options.flow is not None else 0
    limit = np.array([options.clip or 0.0])
    params = layout.params(weights, H, np)
    cell_rows, orders = address_of(backward_rows(cell, dtype)), loops.orders(cell)
    run_back = loops.backward_loop(dtype)
    lies = not packing_pays_backwards(1, T * N, I, dtype), not packing_pays_backwards(T, N, H, dtype)
    apart = [n * dtype.itemsize if as_it_lies else 0 for n, as_it_lies in zip((I, H), lies, strict=True)]
    shared = None if plan.by_units else packed_backward(cell, lies, slice(0, I), slice(0, H), H, dtype)
    chunk = _chunk(T, N)
    gradient_x = (np.zeros if is_ragged(tape.rows, N) else np.empty)((T, N, I), dtype)

    def loop(part: int) -> None:
        share = plan.shares[part]
        packed, start = shared or packed_backward(cell, lies, share.inputs, share.units, H, dtype)
        run_back(
            tape.rows, tape.reverse, cell_rows, cell.trace.x_start, *plan.packing(part), *_numbers(*share), *plan.meeting,
            chunk, *apart, start, clamp_at, squares_at, orders, slots, tape.h, tape.rest, dy, passed, gradient_x, params, dparams[part],
            weights.weight_ih, weights.weight_hh, packed, limit, flow[part],
        )  # fmt: skip

    columns = sharing.plan_reduction(cell, T * N, I, H, plan)
    barrier = plan.barrier or sharing.barrier_for(columns)
    add_sums = _weight_gradients(tape, slots, grads, columns, barrier)

    def both(part: int) -> None:
        loop(part)
        if not (barrier and barrier.is_open):  # else another thread has failed, and what there is to add is not whole
            add_sums(part)

    if plan.barrier:  # in one go: nobody goes to sleep in between
        threads.run(both, range(len(plan.shares)), barrier)
    else:
        loop(0)
        threads.run(add_sums, range(len(columns)), barrier)
    for gradient, value in zip(grads.params, dparams.sum(0), strict=True):
        gradient += value
    if options.flow is not None:
        options.flow[...] += flow.sum(0)
    return gradient_x, tuple(passed)


def _weight_gradients(
    tape: Tape, slots: np.ndarray, grads: Weights, columns: list[slice], barrier: Barrier | None
) -> Callable[[int], None]:
    """For each of the threads that share `columns`: its part of the sums over time and batch; the first adds the biases'."""
    cell, trace, x = tape.cell, tape.cell.trace, tape.x
    (T, N, I), H, dtype = x.shape, tape.h.shape[2], x.dtype
    h_before = tape.h[1:] if tape.reverse else tape.h[:T]
    operands = slots.reshape(T * N, trace.slots * H), h_before.reshape(T * N, H), x.reshape(T * N, I)
    sums = np.zeros((trace.x_start + cell.gates) * H, dtype)
    orders = loops.orders(cell)

    def add_sums(part: int) -> None:
        if part >= len(columns):
            return
        slots, h, x = operands
        loops.reduction(dtype)(
            columns[part].start, columns[part].stop, len(columns), barrier.addresses[-1] if barrier else 0, slots, orders,
            trace.x_start, h, x, sums, grads.weight_hh, grads.weight_ih,
            np.empty(reduction_size(T * N, H, I, dtype), dtype),
        )  # fmt: skip
        if part == 0 and grads.bias_hh is not None and grads.bias_ih is not None:  # all have met
            add_ordered(grads.bias_hh, sums[: cell.gates * H], trace.r_order, H)
            add_ordered(grads.bias_ih, sums[trace.x_start * H :], trace.x_order, H)

    return add_sums


def _rest(count: int, T: int, N: int, H: int, dtype: np.dtype, allocate, training: bool) -> np.ndarray:
    """The states beyond h, (S-1, T+1, N, H).  Without training their stride in time is 0: each step replaces the last."""
    if training:
        return allocate((count, T + 1, N, H), dtype)
    place = allocate((count, N, H), dtype)
    return np.ndarray((count, T + 1, N, H), dtype, place, strides=(place.strides[0], 0, *place.strides[1:]))


def _numbers(*cuts: slice) -> list[int]:
    return [number for cut in cuts for number in (cut.start, cut.stop)]


def _chunk(T: int, N: int) -> int:
    """Steps whose inputs, or gradients of inputs, are one product."""
    return max(1, min(T, PROJECTED_ROWS // max(1, N)))
