"""The CPU executor: the whole time loop in compiled code (`loops`), the large products as one GEMM each around it.

Forward: one product projects all inputs into the slots, then the loop runs through time.  Backward: the loop turns the
slots into gradients in place, then one product each gives dW_ih, dW_hh and dx.  Rows of a batch are independent, so
threads take shares of the batch and never wait for each other.
"""

import itertools
from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.environment import cpu_threads
from gpurnn.executors import layout, threads
from gpurnn.executors.gemm import packed_size
from gpurnn.executors.layout import add_ordered, is_ragged, lengths_of, ordered
from gpurnn.executors.loops import loops, packer
from gpurnn.executors.numpy_loop import Backward, States, Weights

PARALLEL_STEP_FLOPS = 150_000  # below this a time step is shorter than what a second thread costs
INFERENCE_BYTES = 2 << 20  # slots of a chunk of time steps that are still in cache when the loop reads them


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
    first = lengths_of(rows, N) if reverse else np.zeros(N, np.int64)
    h[first, np.arange(N)] = state[0]
    for s, part in enumerate(state[1:]):
        rest[s, first, np.arange(N)] = part
    bias, params = layout.biases(cell, weights, H, np), layout.params(weights, H, np)
    steps = T if training else max(1, min(T, INFERENCE_BYTES // max(1, N * cell.trace.slots * H * dtype.itemsize)))
    slots = allocate((steps, N, cell.trace.slots * H), dtype)
    kernel = loops(cell, dtype).forward
    with threads.one_blas_thread:
        packed = _packed_for_forward(cell, weights.weight_hh)
        weight_x = ordered(weights.weight_ih, cell.trace.x_order, H).T
        chunks = range(0, T, max(1, steps))
        for t0 in reversed(chunks) if reverse else chunks:
            t1 = min(T, t0 + steps)
            part = slots[: t1 - t0]
            _project(cell, x[t0:t1], weight_x, part)

            def loop(share: slice, t0=t0, t1=t1, part=part) -> None:
                kernel(
                    rows[t0:t1], reverse, share.start, share.stop, part, h[t0 : t1 + 1], rest[:, t0 : t1 + 1], bias,
                    params, packed,
                )  # fmt: skip

            threads.run(loop, _shares(cell, rows, N, H))
    end = np.zeros(N, np.int64) if reverse else lengths_of(rows, N)
    final = (h[end, np.arange(N)], *(part[end, np.arange(N)] for part in rest))
    visible = h
    if ragged and reverse:  # initial states stand in h behind each row's end
        visible = h.copy()
        visible[first, np.arange(N)] = 0
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
    with threads.one_blas_thread:
        weight_hh = ordered(weights.weight_hh, trace.r_order, H)
        packed = np.empty(packed_size(cell.gates * H, H, dtype), dtype)
        packer(dtype)(weight_hh, packed)

        def loop(part: int) -> None:
            kernel(
                tape.rows, tape.reverse, shares[part].start, shares[part].stop, slots, tape.h, tape.rest, dy, passed,
                params, dparams[part], packed, options.clip or 0.0, flow[part],
            )  # fmt: skip

        threads.run(loop, range(len(shares)))
        flat = slots.reshape(T * N, trace.slots * H)
        dr = flat[:, : cell.gates * H]
        dx = flat[:, trace.x_start * H : (trace.x_start + cell.gates) * H]
        h_before = (tape.h[1:] if tape.reverse else tape.h[:T]).reshape(T * N, H)
        add_ordered(grads.weight_hh, threads.matmul(dr.T, h_before), trace.r_order, H)
        add_ordered(grads.weight_ih, threads.matmul(dx.T, tape.x.reshape(T * N, I)), trace.x_order, H)
        ones = np.ones((1, T * N), dtype)  # a product sums columns faster than a reduction does
        if grads.bias_ih is not None:
            add_ordered(grads.bias_ih, (ones @ dx)[0], trace.x_order, H)
        if grads.bias_hh is not None:
            add_ordered(grads.bias_hh, (ones @ dr)[0], trace.r_order, H)
        gradient_x = threads.matmul(dx, ordered(weights.weight_ih, trace.x_order, H)).reshape(T, N, I)
    for gradient, value in zip(grads.params, dparams.sum(0), strict=True):
        gradient += value
    if options.flow is not None:
        options.flow[...] += flow.sum(0)
    return gradient_x, tuple(passed)


def _rest(count: int, T: int, N: int, H: int, dtype: np.dtype, allocate, training: bool) -> np.ndarray:
    """The states beyond h, (S-1, T+1, N, H).  Without training their stride in time is 0: each step replaces the last."""
    if training:
        return allocate((count, T + 1, N, H), dtype)
    place = allocate((count, N, H), dtype)
    strides = (place.strides[0], 0, *place.strides[1:])
    return np.lib.stride_tricks.as_strided(place, (count, T + 1, N, H), strides)


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


def _packed_for_forward(cell: Cell, weight_hh: np.ndarray) -> np.ndarray:
    H, dtype = weight_hh.shape[1], weight_hh.dtype
    packed = np.empty((cell.gates, packed_size(H, H, dtype)), dtype)
    for k, gate in enumerate(cell.trace.r_order):
        packer(dtype)(weight_hh[gate * H : (gate + 1) * H].T, packed[k])
    return packed


def _project(cell: Cell, x: np.ndarray, weight_x: np.ndarray, slots: np.ndarray) -> None:
    """x W_ih^T into the x slots."""
    steps, N, I = x.shape
    start = cell.trace.x_start * (slots.shape[2] // cell.trace.slots)
    columns = slice(start, start + weight_x.shape[1])
    threads.matmul(x.reshape(steps * N, I), weight_x, out=slots.reshape(steps * N, slots.shape[2])[:, columns])
