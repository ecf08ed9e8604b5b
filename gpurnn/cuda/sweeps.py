"""The buffers of a pass through time on CUDA, the same for all executors there, and what is done before and behind it.

Forward: one product projects all inputs into the slots, then an executor goes through time.  Backward: it goes back and
turns the slots into gradients in place, then one product each gives dW_ih, dW_hh and dx.  Nothing waits for the device.

In "bfloat16" these products have factors of 16 bits, each rounded once in a pass; backward goes through time piece by
piece then, so that the rounded gradients, half as large as the slots, never need more than PIECE_BYTES.  In "float16" only
the forward product has: gradients below 6e-8 would become 0 in it, so those products keep float32 factors (TF32's kernels).
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.cuda.device import add_columns, product, rounded
from gpurnn.cuda.moves import Moves
from gpurnn.executors import layout
from gpurnn.executors.contract import States, Weights
from gpurnn.executors.layout import is_ragged, lengths_of, ordered
from gpurnn.types import Array

PROJECTED, RETURNED = ("bfloat16", "float16"), ("bfloat16",)  # precisions whose factors are rounded: forward, and back
PIECE_BYTES = 256 << 20  # of gradients rounded to 16 bits
INFERENCE_BYTES = 256 << 20  # of slots; longer sequences are projected and run a piece at a time


class Tape(NamedTuple):
    """What backward needs, the same of every CUDA executor: either may go back over what the other wrote.

    `slots` is overwritten by the gradients, unless a backward is told to keep it.  lengths: (N,) int64 on the device.
    """

    cell: Cell
    x: Array
    weights: Weights
    reverse: bool
    rows: np.ndarray
    lengths: Array
    slots: Array
    h: Array
    rest: Array
    precision: str


class Sweep(NamedTuple):
    """One pass forward: `tape` (slots of `steps` time steps only without training), and what is not kept for backward."""

    tape: Tape
    training: bool
    bias: Array
    params: Array
    weight_hh: Array | None  # its gates in the order of the slots
    steps: int
    initial: Array  # (S, N, H)


def begin(
    cell: Cell,
    x: Array,
    weights: Weights,
    state: tuple[Array, ...],
    rows: np.ndarray,
    reverse: bool,
    training: bool,
    precision: str,
) -> Sweep:
    """Buffers, with the initial states in their places."""
    xp = backend.xp
    T, N, _ = x.shape
    H, S, trace, dtype = state[0].shape[1], cell.states, cell.trace, x.dtype
    allocate = xp.zeros if is_ragged(rows, N) else xp.empty  # nothing but zeros may stand where a row has ended
    h = allocate((T + 1, N, H), dtype)
    rest = allocate((S - 1, T + 1 if training else 1, N, H), dtype)
    lengths = xp.asarray(lengths_of(rows, N)) if is_ragged(rows, N) else xp.empty(N, np.int64)
    initial, moves = xp.empty((S, N, H), dtype), Moves()
    for own, given in zip(initial, state, strict=True):
        moves.copy(own, given)
    if is_ragged(rows, N):
        for part, given in zip((h, *rest), state, strict=True):
            _place(part, given, lengths, reverse, part is h or training)
    else:
        moves.fill(lengths, T)
        for part, given in zip((h, *rest), state, strict=True):
            moves.copy(part[-1 if reverse else 0], given)
    bias = _bias(cell, weights, H, moves)
    moves.run()
    steps = T if training else max(1, min(T, INFERENCE_BYTES // max(1, N * trace.slots * H * dtype.itemsize)))
    slots = allocate((steps, N, trace.slots * H), dtype)
    tape = Tape(cell, x, weights, reverse, rows, lengths, slots, h, rest, precision)
    params = layout.params(weights, H, xp)
    return Sweep(tape, training, bias, params, ordered_weight_hh(cell, weights), steps, initial)


def _bias(cell: Cell, weights: Weights, H: int, moves: Moves) -> Array:
    """(slots, H), as `layout.biases`; there when the moves are done."""
    together = cell.trace.r_order == cell.trace.x_order == tuple(range(cell.trace.slots))
    if weights.bias_ih is None or weights.bias_hh is None or not together:
        return layout.biases(cell, weights, H, backend.xp)
    bias = backend.xp.empty((cell.gates, H), weights.bias_ih.dtype)
    moves.add(bias, weights.bias_ih, weights.bias_hh)
    return bias


def _place(states: Array, initial: Array, lengths: Array, reverse: bool, every: bool) -> None:
    """Where rows end at different steps.  every: whether `states` has a place for each step."""
    if every and reverse:
        states[lengths, backend.xp.arange(len(lengths))] = initial
    else:
        states[-1 if reverse else 0] = initial


def pieces(sweep: Sweep) -> Iterator[tuple[int, int, Array]]:
    """(t0, t1, slots of these steps with x projected into them), in the order in which time runs."""
    tape = sweep.tape
    precision = tape.precision
    factor = _factors(precision, PROJECTED)
    weight_x = factor(ordered(tape.weights.weight_ih, tape.cell.trace.x_order, tape.h.shape[2]))
    starts = range(0, len(tape.x), max(1, sweep.steps))
    for t0 in reversed(starts) if tape.reverse else starts:
        t1 = min(len(tape.x), t0 + sweep.steps)
        slots = tape.slots[: t1 - t0]
        product(_flat(factor(tape.x[t0:t1])), weight_x.T, x_slots(tape, slots), precision)
        yield t0, t1, slots


def x_slots(tape: Tape, slots: Array) -> Array:
    """The slots of x, or of dL/dx projected, as a matrix (T*N, G*H)."""
    H, start = tape.h.shape[2], tape.cell.trace.x_start
    return _flat(slots)[:, start * H : (start + tape.cell.gates) * H]


def r_slots(tape: Tape, slots: Array) -> Array:
    return _flat(slots)[:, : tape.cell.gates * tape.h.shape[2]]


def final(tape: Tape, training: bool) -> tuple[Array, ...]:
    """The states behind each row's last step, S arrays (N, H)."""
    xp, N = backend.xp, tape.h.shape[1]
    if tape.reverse or not is_ragged(tape.rows, N):
        at = 0 if tape.reverse else len(tape.x)
        ends, moves = xp.empty((tape.cell.states, *tape.h.shape[1:]), tape.h.dtype), Moves()
        for own, part in zip(ends, (tape.h[at], *(part[at if training else 0] for part in tape.rest)), strict=True):
            moves.copy(own, part)
        moves.run()
        return tuple(ends)
    lengths, row = tape.lengths, xp.arange(N)
    return (tape.h[lengths, row], *(part[lengths, row] if training else part[0] for part in tape.rest))


def finish(sweep: Sweep, final: tuple[Array, ...]) -> tuple[States, Tape | None]:
    tape = sweep.tape
    N = tape.x.shape[1]
    visible = tape.h
    if is_ragged(tape.rows, N) and tape.reverse:  # initial states stand in h behind each row's end
        visible = tape.h.copy()
        visible[tape.lengths, backend.xp.arange(N)] = 0
    return States(visible, final), tape if sweep.training else None


def parameters(tape: Tape) -> tuple[Array, Array]:
    """The cell's own parameters (P, H), and zeros (P, N, H) in float64 for their gradients, row by row: sums over T."""
    N, H = tape.h.shape[1:]
    params = layout.params(tape.weights, H, backend.xp)
    return params, backend.xp.zeros((len(params), N, H))


def ordered_weight_hh(cell: Cell, weights: Weights) -> Array | None:
    """weight_hh (G*H, H), its gates in the order of the slots; None where the cell has none."""
    if weights.weight_hh is None:
        return None
    return backend.xp.ascontiguousarray(ordered(weights.weight_hh, cell.trace.r_order, weights.weight_hh.shape[1]))


def passed_back(dstate: tuple[Array, ...] | None, tape: Tape) -> Array:
    """(S, N, H), to be overwritten: dL/d(final state), zeros for None."""
    dtype = tape.x.dtype
    if dstate is None:
        return backend.xp.zeros((tape.cell.states, *tape.h.shape[1:]), dtype)
    return backend.stacked(dstate).astype(dtype, copy=False)


def with_unit_stride(dy: Array) -> Array:
    """dy as kernels read it, unit by unit; steps and rows may stand anywhere, a step's rows within 2^31 values."""
    near = dy.shape[1] * dy.strides[1] < dy.itemsize << 31
    return dy if dy.strides[-1] == dy.itemsize and near else backend.xp.ascontiguousarray(dy)


def weight_gradients(tape: Tape, slots: Array, grads: Weights) -> Array:
    """Adds dW_ih, dW_hh and the biases' gradients, from the gradients in the slots; returns dx (T, N, I)."""
    trace, T, H, dx = tape.cell.trace, len(tape.x), tape.h.shape[2], backend.xp.empty(tape.x.shape, tape.x.dtype)
    factor = _factors(tape.precision, RETURNED)
    weight_x = factor(backend.xp.ascontiguousarray(ordered(tape.weights.weight_ih, trace.x_order, H)))
    before = tape.h[1:] if tape.reverse else tape.h[:T]
    steps = T if factor is _as_it_is else max(1, PIECE_BYTES // max(1, 2 * slots[:1].size))
    for t0 in range(0, T, max(1, steps)):
        piece = slice(t0, t0 + steps)
        gradients, x = (factor(array[piece]) for array in (slots, tape.x))
        if grads.weight_hh is not None:
            _add_product(
                grads.weight_hh, trace.r_order, r_slots(tape, gradients), factor(before[piece]), tape.precision
            )
        _add_product(grads.weight_ih, trace.x_order, x_slots(tape, gradients), x, tape.precision)
        product(x_slots(tape, gradients), weight_x, _flat(dx[piece]), tape.precision)
    if grads.bias_ih is not None and grads.bias_hh is None:
        add_columns(_flat(slots), H, grads.bias_ih, first=trace.x_order, second=(), start=0)
    elif grads.bias_ih is not None:
        orders = {"first": trace.r_order, "second": trace.x_order, "start": trace.x_start}
        add_columns(_flat(slots), H, grads.bias_hh, grads.bias_ih, **orders)
    return dx


def _add_product(target: Array, order: tuple[int, ...], gradients: Array, factor: Array, precision: str) -> None:
    """target += gradients^T factor, the gates of its rows in `order`.  gradients (T*N, G*H), factor (T, N, columns)."""
    factor = _flat(factor)
    if order == tuple(range(len(order))):
        product(gradients.T, factor, target, precision, add=True)
    else:
        value = product(gradients.T, factor, backend.xp.empty(target.shape, target.dtype), precision)
        layout.add_ordered(target, value, order, target.shape[0] // len(order))


def _factors(precision: str, kinds: tuple[str, ...]) -> Callable[[Array], Array]:
    """What makes an array a factor of a product in `precision`: rounded where it is one of `kinds`."""
    return functools.partial(rounded, kind=precision) if precision in kinds else _as_it_is


def _as_it_is(array: Array) -> Array:
    return array


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])
