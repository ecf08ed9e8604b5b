"""The CPU executor: the whole time loop in compiled code (`loops`), the sums over time and batch behind it.

Forward, the loop walks through time in chunks of steps: one product projects a chunk's inputs into the slots, then come
its steps.  Backward it turns the slots into gradients in place, and a chunk of them into dx.  Threads take shares of the
batch, or of the units (`sharing`); the weights' gradients are shared out by their own rows.  All products run on our own
micro-kernels: weights are packed for them once per pass.
"""

from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.environment import cpu_threads
from gpurnn.executors import layout, sharing, threads
from gpurnn.executors.gemm import reduction_sizes
from gpurnn.executors.layout import add_ordered, is_ragged, lengths_of, ordered
from gpurnn.executors.loops import loops, packer, reduction
from gpurnn.executors.numpy_loop import Backward, States, Weights
from gpurnn.executors.packing import packed_size, panel_columns
from gpurnn.executors.sharing import Share

PROJECTED_ROWS = 128  # of all threads: enough to read W_ih once for, and few enough to be in cache when the loop comes
PARALLEL_PACKING = 1_000_000  # elements


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
    threads.settle()
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
    kernel, plan = loops(cell, dtype).forward, sharing.plan_loop(cell, rows, T, N, I, H, dtype)
    packed = None if plan.by_units else _packed_for_forward(cell, weights, H)

    def loop(share: Share) -> None:
        own = packed or _packed_gates(cell, weights, H, share.units)
        kernel(
            rows, reverse, *_numbers(share.rows, share.units), *plan.meeting, chunk, x, slots, h, rest, bias, params, *own
        )  # fmt: skip

    threads.run(loop, plan.shares, plan.barrier)
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
    cell, trace, weights = tape.cell, tape.cell.trace, tape.weights
    T, N, I = tape.x.shape
    H, dtype = weights.weight_hh.shape[1], tape.x.dtype
    if dy.strides[-1] != dtype.itemsize or not dy.flags.aligned:
        dy = dy.copy()
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = np.stack(dstate).astype(dtype, copy=False)
    plan = sharing.plan_loop(cell, tape.rows, T, N, I, H, dtype)
    dparams = np.zeros((len(plan.shares), len(cell.params), H), dtype)
    flow = np.zeros((len(plan.shares), cell.states, T if options.flow is not None else 0))
    params = layout.params(weights, H, np)
    kernel = loops(cell, dtype).backward
    matrices = ordered(weights.weight_ih, trace.x_order, H), ordered(weights.weight_hh, trace.r_order, H)
    packed = None if plan.by_units else tuple(_packed_by_all(matrix, transposed=False) for matrix in matrices)
    chunk = _chunk(T, N)
    gradient_x = (np.zeros if is_ragged(tape.rows, N) else np.empty)((T, N, I), dtype)

    def loop(part: int) -> None:
        share = plan.shares[part]
        own = packed or [_packed(m[:, cut], transposed=False) for m, cut in zip(matrices, share[:0:-1], strict=True)]
        kernel(
            tape.rows, tape.reverse, *_numbers(*share), *plan.meeting, chunk, slots, tape.h, tape.rest, dy, passed,
            gradient_x, params, dparams[part], *own, options.clip or 0.0, flow[part],
        )  # fmt: skip

    threads.run(loop, range(len(plan.shares)), plan.barrier)
    h_before = tape.h[1:] if tape.reverse else tape.h[:T]
    _add_weight_gradients(
        cell, slots.reshape(T * N, trace.slots * H), tape.x.reshape(T * N, I), h_before.reshape(T * N, H), grads
    )
    for gradient, value in zip(grads.params, dparams.sum(0), strict=True):
        gradient += value
    if options.flow is not None:
        options.flow[...] += flow.sum(0)
    return gradient_x, tuple(passed)


def _add_weight_gradients(cell: Cell, slots: np.ndarray, x: np.ndarray, h: np.ndarray, grads: Weights) -> None:
    """Sums over time and batch, each thread for its share of the gates' rows."""
    trace, dtype, H, I = cell.trace, slots.dtype, h.shape[1], x.shape[1]
    sums = np.zeros((trace.x_start + cell.gates) * H, dtype)
    orders = np.array(trace.r_order), np.array(trace.x_order)
    kernel, plan = reduction(dtype), sharing.plan_reduction(cell, len(slots), I, H)

    def reduce(columns: slice) -> None:
        work = (np.empty(size, dtype) for size in reduction_sizes(H, I, dtype))
        kernel(
            columns.start, columns.stop, *plan.meeting, slots, *orders, trace.x_start, h, x, sums, grads.weight_hh,
            grads.weight_ih, *work,
        )  # fmt: skip

    threads.run(reduce, plan.shares, plan.barrier)
    if grads.bias_hh is not None and grads.bias_ih is not None:
        add_ordered(grads.bias_hh, sums[: cell.gates * H], trace.r_order, H)
        add_ordered(grads.bias_ih, sums[trace.x_start * H :], trace.x_order, H)


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


def _packed_for_forward(cell: Cell, weights: Weights, H: int) -> tuple[np.ndarray, ...]:
    """The transposes of W_ih, of W_hh's split and of its joint gates, all in slot order."""
    weight_hh, split = ordered(weights.weight_hh, cell.trace.r_order, H), len(cell.trace.split) * H
    weight_ih = ordered(weights.weight_ih, cell.trace.x_order, H)
    return tuple(_packed_by_all(w, transposed=True) for w in (weight_ih, weight_hh[:split], weight_hh[split:]))


def _packed_gates(cell: Cell, weights: Weights, H: int, units: slice) -> tuple[np.ndarray, ...]:
    """The same for some units, each gate's rows packed by themselves: what the thread that calls needs, and nobody else."""
    trace, count, dtype = cell.trace, units.stop - units.start, weights.weight_hh.dtype

    def packed(weight: np.ndarray, gates: tuple[int, ...]) -> np.ndarray:
        k = weight.shape[1]
        out = np.empty((len(gates), packed_size(k, count, dtype)), dtype)
        for gate, place in zip(gates, out, strict=True):
            packer(dtype)(weight[gate * H + units.start : gate * H + units.stop], True, place)
        return out.ravel()

    split = len(trace.split)
    return (
        packed(weights.weight_ih, trace.x_order),
        packed(weights.weight_hh, trace.r_order[:split]),
        packed(weights.weight_hh, trace.r_order[split:]),
    )


def _packed(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    """The matrix, its rows contiguous, or its transpose, as the micro-kernels read it."""
    k, n = matrix.shape[::-1] if transposed else matrix.shape
    out = np.empty(packed_size(k, n, matrix.dtype), matrix.dtype)
    packer(matrix.dtype)(matrix, transposed, out)
    return out


def _packed_by_all(matrix: np.ndarray, transposed: bool) -> np.ndarray:
    """The same, a share of the panels laid out by each thread; not to be called in a thread's share of other work."""
    if matrix.size < PARALLEL_PACKING:
        return _packed(matrix, transposed)
    k, n = matrix.shape[::-1] if transposed else matrix.shape
    dtype, wide = matrix.dtype, panel_columns(matrix.dtype)
    out, kernel = np.empty(packed_size(k, n, dtype), dtype), packer(dtype)

    def pack(panels: slice) -> None:
        columns = slice(panels.start * wide, panels.stop * wide)
        kernel(matrix[columns] if transposed else matrix[:, columns], transposed, out[k * columns.start :])

    threads.run(pack, threads.shares(-(-n // wide), cpu_threads()))
    return out
