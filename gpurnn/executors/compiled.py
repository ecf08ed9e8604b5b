"""The CPU executor: the whole time loop in compiled code (`loops`), the sums over time and batch behind it.

Forward, the loop walks through time in chunks of steps: one product projects a chunk's inputs into the slots, then come
its steps.  Backward it turns the slots into gradients in place, and a chunk of them into dx.  Rows of a batch are
independent, so threads take shares of the batch and never wait for each other; the weights' gradients are shared out by
their own rows.  All products run on our own micro-kernels: weights are packed for them once per pass.
"""

import itertools
from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.environment import cpu_threads
from gpurnn.executors import layout, threads
from gpurnn.executors.gemm import reduction_sizes
from gpurnn.executors.layout import add_ordered, is_ragged, lengths_of, ordered
from gpurnn.executors.loops import loops, packer, reduction
from gpurnn.executors.numpy_loop import Backward, States, Weights
from gpurnn.executors.packing import packed_size, panel_columns

PARALLEL_STEP_FLOPS = 150_000  # below this a time step is shorter than what a second thread costs
PROJECTED_ROWS = 128  # of all threads: enough to read W_ih once for, and few enough to be in cache when the loop comes
PARALLEL_PACKING = 250_000  # elements


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
    T, N, _ = x.shape
    H, dtype = weights.weight_hh.shape[1], x.dtype
    ragged = is_ragged(rows, N)
    allocate = np.zeros if ragged else np.empty  # nothing but zeros may stand where a row has ended
    h = allocate((T + 1, N, H), dtype)
    rest = _rest(cell.states - 1, T, N, H, dtype, allocate, training)
    ends = (
        (lengths_of(rows, N), np.arange(N)) if ragged else T
    )  # where each row's last state stands, or in reverse its first
    first, last = (ends, 0) if reverse else (0, ends)
    h[first] = state[0]
    for part, values in zip(rest, state[1:], strict=True):
        part[first] = values
    bias, params = layout.biases(cell, weights, H, np), layout.params(weights, H, np)
    chunk = _chunk(T, N)
    slots = allocate((T if training else chunk, N, cell.trace.slots * H), dtype)
    packed = _packed_for_forward(cell, weights, H)
    kernel = loops(cell, dtype).forward

    def loop(share: slice) -> None:
        kernel(rows, reverse, share.start, share.stop, chunk, x, slots, h, rest, bias, params, *packed)

    threads.run(loop, _shares(cell, rows, N, H))
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
    shares = _shares(cell, tape.rows, N, H)
    dparams = np.zeros((len(shares), len(cell.params), H), dtype)
    flow = np.zeros((len(shares), cell.states, T if options.flow is not None else 0))
    params = layout.params(weights, H, np)
    kernel = loops(cell, dtype).backward
    packed_ih = _packed(ordered(weights.weight_ih, trace.x_order, H), transposed=False)
    packed_hh = _packed(ordered(weights.weight_hh, trace.r_order, H), transposed=False)
    chunk = _chunk(T, N)
    gradient_x = (np.zeros if is_ragged(tape.rows, N) else np.empty)((T, N, I), dtype)

    def loop(part: int) -> None:
        kernel(
            tape.rows, tape.reverse, shares[part].start, shares[part].stop, chunk, slots, tape.h, tape.rest, dy, passed,
            gradient_x, params, dparams[part], packed_ih, packed_hh, options.clip or 0.0, flow[part],
        )  # fmt: skip

    threads.run(loop, range(len(shares)))
    h_before = tape.h[1:] if tape.reverse else tape.h[:T]
    _add_weight_gradients(cell, slots.reshape(T * N, trace.slots * H), tape.x, h_before, grads)
    for gradient, value in zip(grads.params, dparams.sum(0), strict=True):
        gradient += value
    if options.flow is not None:
        options.flow[...] += flow.sum(0)
    return gradient_x, tuple(passed)


def _add_weight_gradients(cell: Cell, slots: np.ndarray, x: np.ndarray, h: np.ndarray, grads: Weights) -> None:
    """Sums over time and batch, each thread for its share of the gates' rows."""
    trace, dtype = cell.trace, slots.dtype
    rows, H, I = len(slots), h.shape[2], x.shape[2]
    wide = cell.gates * H
    products = (
        (slots[:, :wide], trace.r_order, h.reshape(rows, H), grads.bias_hh, grads.weight_hh),
        (slots[:, trace.x_start * H :][:, :wide], trace.x_order, x.reshape(rows, I), grads.bias_ih, grads.weight_ih),
    )
    sums = np.zeros((len(products), wide), dtype)
    kernel = reduction(dtype)

    def reduce(share: slice) -> None:
        for (d, order, b, _, weight), total in zip(products, sums, strict=True):
            work = (np.empty(size, dtype) for size in reduction_sizes(b.shape[1], dtype))
            kernel(d, share.start, share.stop, np.array(order), b, total, weight, *work)

    flops = 2 * rows * wide * (H + I)
    threads.run(reduce, threads.shares(wide, cpu_threads() if flops >= threads.PARALLEL_FLOPS else 1))
    for (_, order, _, bias, _), total in zip(products, sums, strict=True):
        if bias is not None:
            add_ordered(bias, total, order, H)


def _rest(count: int, T: int, N: int, H: int, dtype: np.dtype, allocate, training: bool) -> np.ndarray:
    """The states beyond h, (S-1, T+1, N, H).  Without training their stride in time is 0: each step replaces the last."""
    if training:
        return allocate((count, T + 1, N, H), dtype)
    place = allocate((count, N, H), dtype)
    return np.ndarray((count, T + 1, N, H), dtype, place, strides=(place.strides[0], 0, *place.strides[1:]))


def _shares(cell: Cell, rows: np.ndarray, N: int, H: int) -> list[slice]:
    """The batch cut into one share per thread, of equal numbers of living steps; one share where a step is too small."""
    parts = cpu_threads()
    if N < 2 or parts < 2 or 2 * N * cell.gates * H * H < PARALLEL_STEP_FLOPS:
        return [slice(0, N)]
    if not is_ragged(rows, N):
        return threads.shares(N, parts)
    work = np.cumsum(lengths_of(rows, N))
    edges = np.searchsorted(work, work[-1] * np.arange(1, parts) / parts, side="left") + 1
    edges = np.unique(np.concatenate([[0], np.minimum(edges, N), [N]]))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _chunk(T: int, N: int) -> int:
    """Steps whose inputs, or gradients of inputs, are one product."""
    return max(1, min(T, PROJECTED_ROWS // max(1, N)))


def _packed_for_forward(cell: Cell, weights: Weights, H: int) -> tuple[np.ndarray, ...]:
    """The transposes of W_ih, of W_hh's split and of its joint gates, all in slot order."""
    weight_hh, split = ordered(weights.weight_hh, cell.trace.r_order, H), len(cell.trace.split) * H
    weight_ih = ordered(weights.weight_ih, cell.trace.x_order, H)
    return tuple(_packed(w, transposed=True) for w in (weight_ih, weight_hh[:split], weight_hh[split:]))


def _packed(weight: np.ndarray, transposed: bool) -> np.ndarray:
    """The matrix, or its transpose, as the micro-kernels read it; each thread lays out a share of the panels."""
    weight = np.ascontiguousarray(weight)
    k, n = weight.shape[::-1] if transposed else weight.shape
    dtype, wide = weight.dtype, panel_columns(weight.dtype)
    out = np.empty(packed_size(k, n, dtype), dtype)
    if weight.size < PARALLEL_PACKING:
        packer(dtype)(weight, transposed, 0, n, out)
        return out

    def pack(share: slice) -> None:
        packer(dtype)(weight, transposed, share.start * wide, min(n, share.stop * wide), out)

    threads.run(pack, threads.shares(-(-n // wide), cpu_threads()))
    return out
