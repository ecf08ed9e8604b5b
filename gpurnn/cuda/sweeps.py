"""The buffers of a pass through time on CUDA, the same for all executors there, and what is done before and behind it.

Forward: one product projects all inputs into the slots, then an executor goes through time.  Backward: it goes back and
turns the slots into gradients in place, then one product each gives dW_ih, dW_hh and dx.  Nothing waits for the device.

In "bfloat16" these products have factors of 16 bits, each rounded once in a pass; backward goes through time piece by
piece then, so that the rounded gradients, half as large as the slots, never need more than PIECE_BYTES.  In "float16" only
the forward product has: gradients below 6e-8 would become 0 in it, so those products keep float32 factors (TF32's kernels).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.cuda.device import add_columns, product, rounded
from gpurnn.cuda.heads import Blocks, add_products
from gpurnn.cuda.moves import Moves
from gpurnn.executors import layout
from gpurnn.executors.contract import Backward, Job, States, Weights
from gpurnn.executors.layout import Ends, Tape, ordered
from gpurnn.executors.random import HEAD
from gpurnn.types import Array

PROJECTED, RETURNED = ("bfloat16", "float16"), ("bfloat16",)  # precisions whose factors are rounded: forward, and back
PIECE_BYTES = 256 << 20  # of gradients rounded to 16 bits
INFERENCE_BYTES = 256 << 20  # of slots; longer sequences are projected and run a piece at a time


class Sweep(NamedTuple):
    """One pass forward: `tape` (slots of `steps` time steps only without training), and what is not kept for backward."""

    tape: Tape
    ends: Ends
    bias: Array
    params: Array
    weight_hh: Array | None  # its gates in the order of the slots
    steps: int
    initial: Array  # (S, N, H)
    again: "Again"

    @property
    def whole(self) -> bool:
        """Whether states beyond h are kept at every step."""
        return self.tape.job.training or self.tape.job.all_states


class Again(NamedTuple):
    """A job's resets for kernels: before (T, N) uint8, fresh (S, H); None where there are none."""

    before: Array = None
    fresh: Array = None

    @classmethod
    def of(cls, job: Job) -> "Again":
        if job.resets is None:
            return cls()
        return cls(job.resets.before.view(np.uint8), backend.stacked(job.resets.state))

    def __bool__(self) -> bool:
        return self.before is not None

    def pointers(self, t0: int = 0) -> list[int]:
        """Of both, from step t0 on."""
        return [0, 0] if self.before is None else [self.before[t0:].data.ptr, self.fresh.data.ptr]


def begin(job: Job) -> Sweep:
    """Buffers, with the initial states in their places."""
    xp = backend.xp
    cell, x, weights, state, _, _, training = job[:7]
    T, N, _ = x.shape
    H, S, trace, dtype, ends = state[0].shape[1], cell.states, cell.trace, x.dtype, Ends.of(job, xp)
    allocate = xp.empty if ends.lengths is None else xp.zeros
    h = allocate((T + 1, N, H), dtype)
    rest = allocate((S - 1, T + 1 if training or job.all_states else 1, N, H), dtype)
    initial, moves = xp.empty((S, N, H), dtype), Moves()
    for own, given in zip(initial, state, strict=True):
        moves.copy(own, given)
    lengths = ends.lengths
    if lengths is None:
        lengths = xp.empty(N, np.int64)
        moves.fill(lengths, T)
    for part, given in zip((h, *rest), state, strict=True):
        at = ends.first if len(part) > T else 0
        if isinstance(at, tuple):  # row by row
            part[at] = given
        else:
            moves.copy(part[at], given)
    bias = _bias(cell, weights, H, moves)
    moves.run()
    steps = T if training else max(1, min(T, INFERENCE_BYTES // max(1, N * trace.slots * H * dtype.itemsize)))
    slots = allocate((steps, N, trace.slots * H), dtype)
    tape, params = Tape(job, slots, h, rest, lengths), layout.params(weights, H, xp)
    return Sweep(tape, ends, bias, params, ordered_weight_hh(cell, weights), steps, initial, Again.of(job))


def _bias(cell: Cell, weights: Weights, H: int, moves: Moves) -> Array:
    """(slots, H), as `layout.biases`; there when the moves are done."""
    together = cell.trace.r_order == cell.trace.x_order == tuple(range(cell.trace.slots))
    if weights.bias_ih is None or weights.bias_hh is None or not together:
        return layout.biases(cell, weights, H, backend.xp)
    bias = backend.xp.empty((cell.gates, H), weights.bias_ih.dtype)
    moves.add(bias, weights.bias_ih, weights.bias_hh)
    return bias


def pieces(sweep: Sweep) -> Iterator[tuple[int, int, Array]]:
    """(t0, t1, slots of these steps with x projected into them), in the order in which time runs."""
    tape = sweep.tape
    precision = tape.job.precision
    cell, x, weights, reverse = tape.job.cell, tape.job.x, tape.job.weights, tape.job.reverse
    factor = _factors(precision, PROJECTED)
    weight_x = factor(ordered(weights.weight_ih, cell.trace.x_order, tape.h.shape[2]))
    starts = range(0, len(x), max(1, sweep.steps))
    for t0 in reversed(starts) if reverse else starts:
        t1 = min(len(x), t0 + sweep.steps)
        slots = tape.slots[: t1 - t0]
        product(_flat(factor(x[t0:t1])), weight_x.T, x_slots(tape, slots), precision)
        yield t0, t1, slots


def if_any(**constants: Any) -> dict[str, bool]:
    """Those of a kernel's constants that hold: what is left out does not make it another kernel."""
    return {name: True for name, value in constants.items() if value}


def x_slots(tape: Tape, slots: Array) -> Array:
    """The slots of x, or of dL/dx projected, as a matrix (T*N, G*H)."""
    H, cell = tape.h.shape[2], tape.job.cell
    start = cell.trace.x_start
    return _flat(slots)[:, start * H : (start + cell.gates) * H]


def r_slots(tape: Tape, slots: Array) -> Array:
    return _flat(slots)[:, : tape.job.cell.gates * tape.h.shape[2]]


def final(sweep: Sweep) -> tuple[Array, ...]:
    """The states behind each row's last step, S arrays (N, H)."""
    tape, last = sweep.tape, sweep.ends.last
    places = [(part, last if len(part) > len(tape.job.x) else 0) for part in (tape.h, *tape.rest)]
    if isinstance(last, tuple):  # row by row
        return tuple(part[at] for part, at in places)
    ends, moves = backend.xp.empty((len(places), *tape.h.shape[1:]), tape.h.dtype), Moves()
    for own, (part, at) in zip(ends, places, strict=True):
        moves.copy(own, part[at])
    moves.run()
    return tuple(ends)


def finish(sweep: Sweep, final: tuple[Array, ...]) -> tuple[States, Tape | None]:
    tape, job, visible = sweep.tape, sweep.tape.job, sweep.ends.visible
    rest = visible(tape.rest) if job.all_states else None
    return States(visible(tape.h), final, rest), tape if job.training else None


def draws(tape: Tape) -> Array | None:
    """The random numbers of a cell that asks for them, as its kernels read them: `Draws.numbers`, on the device."""
    own, N = tape.job.draws, tape.h.shape[1]
    if own is None:
        return None
    xp, moves = backend.xp, Moves()
    numbers = xp.empty(HEAD + N, np.int64)
    for k, word in enumerate(own.key):
        moves.fill(numbers[k : k + 1], word)
    moves.copy(numbers[2:HEAD], own.call)
    moves.copy(numbers[HEAD:], xp.arange(N) if own.rows is None else own.rows)
    moves.run()
    return numbers


def pointer(array: Array | None) -> int:
    return 0 if array is None else array.data.ptr


class Return(NamedTuple):
    """One pass back along a tape: what its kernels are given, and weight_hh, its gates in the order of the slots.

    numbers  in reverse or not; how far apart states of `rest`, steps of dy and its rows are, in values; the largest
             magnitude that a step passes on, 0 for any.
    """

    slots: Array
    h: Array
    rest: Array
    dy: Array
    passed: Array  # (S, N, H): dL/d(final state), which they turn into dL/d(initial state)
    params: Array
    dparams: Array
    numbers: tuple[Any, ...]
    weight_hh: Array | None
    again: Again
    dfresh: Array | None

    @property
    def arrays(self) -> tuple[Array, ...]:
        return self[:7]

    @property
    def reset_pointers(self) -> list[int]:
        """Of what `again` has, and of dfresh."""
        return [*self.again.pointers(), 0 if self.dfresh is None else self.dfresh.data.ptr]


def begin_back(tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, options: Backward) -> Return:
    job, dtype, xp = tape.job, tape.h.dtype, backend.xp
    dy = with_unit_stride(dy)
    slots = tape.slots.copy() if options.keep else tape.slots
    if dstate is None:
        passed = xp.zeros((job.cell.states, *tape.h.shape[1:]), dtype)
    else:
        passed = backend.stacked(dstate).astype(dtype, copy=False)
    apart = (stride // dtype.itemsize for stride in (tape.rest.strides[0], *dy.strides[:2]))
    numbers = int(job.reverse), *apart, dtype.type(options.clip or 0.0)
    weight_hh = ordered_weight_hh(job.cell, job.weights)
    given = *parameters(tape), numbers, weight_hh, Again.of(job), options.dfresh
    return Return(slots, tape.h, tape.rest, dy, passed, *given)


def finish_back(way: Return, tape: Tape, grads: Weights) -> tuple[Array, tuple[Array, ...]]:
    """Adds to `grads`; returns dx and dL/d(initial state)."""
    dx = weight_gradients(tape, way.slots, grads)
    for gradient, value in zip(grads.params, way.dparams, strict=True):
        gradient += value.sum(0)
    return dx, tuple(way.passed)


def parameters(tape: Tape) -> tuple[Array, Array]:
    """The cell's own parameters (P, H), and zeros (P, N, H) in float64 for their gradients, row by row: sums over T."""
    N, H = tape.h.shape[1:]
    params = layout.params(tape.job.weights, H, backend.xp)
    return params, backend.xp.zeros((len(params), N, H))


def ordered_weight_hh(cell: Cell, weights: Weights) -> Array | None:
    """weight_hh (G*H, H/K), its gates in the order of the slots; None where the cell has none."""
    if weights.weight_hh is None:
        return None
    return backend.xp.ascontiguousarray(
        ordered(weights.weight_hh, cell.trace.r_order, len(weights.weight_hh) // cell.gates)
    )


def with_unit_stride(dy: Array) -> Array:
    """dy as kernels read it, unit by unit; steps and rows may stand anywhere, a step's rows within 2^31 values."""
    near = dy.shape[1] * dy.strides[1] < dy.itemsize << 31
    return dy if dy.strides[-1] == dy.itemsize and near else backend.xp.ascontiguousarray(dy)


def weight_gradients(tape: Tape, slots: Array, grads: Weights) -> Array:
    """Adds dW_ih, dW_hh and the biases' gradients, from the gradients in the slots; returns dx (T, N, I)."""
    cell, x, weights, _, _, reverse, _, precision = tape.job[:8]
    trace, T, H, dx = cell.trace, len(x), tape.h.shape[2], backend.xp.empty(x.shape, x.dtype)
    factor = _factors(precision, RETURNED)
    weight_x = factor(backend.xp.ascontiguousarray(ordered(weights.weight_ih, trace.x_order, H)))
    before = tape.h[1:] if reverse else tape.h[:T]
    if tape.job.resets is not None:
        resets = tape.job.resets
        before = backend.xp.where(resets.before[..., None], resets.state[0], before)
    steps = T if factor is _as_it_is else max(1, PIECE_BYTES // max(1, 2 * slots[:1].size))
    for t0 in range(0, T, max(1, steps)):
        piece = slice(t0, t0 + steps)
        gradients, inputs = (factor(array[piece]) for array in (slots, x))
        if grads.weight_hh is not None:
            _add_weight_hh(grads.weight_hh, trace.r_order, r_slots(tape, gradients), factor(before[piece]), precision)
        _add_product(grads.weight_ih, trace.x_order, x_slots(tape, gradients), inputs, precision)
        product(x_slots(tape, gradients), weight_x, _flat(dx[piece]), precision)
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


def _add_weight_hh(target: Array, order: tuple[int, ...], gradients: Array, h: Array, precision: str) -> None:
    """The same for weight_hh, of heads block by block: of each only the gradients and the units of its own head."""
    h, H, width = _flat(h), h.shape[2], target.shape[1]
    if width == H:
        _add_product(target, order, gradients, h[None], precision)
        return
    for place, gate in enumerate(order):
        first = gradients[:, place * H : place * H + width].T
        blocks = Blocks(first, width), Blocks(h[:, :width], width), Blocks(target[gate * H :][:width], width * width)
        add_products(*blocks, H // width, precision)


def _factors(precision: str, kinds: tuple[str, ...]) -> Callable[[Array], Array]:
    """What makes an array a factor of a product in `precision`: rounded where it is one of `kinds`."""
    return functools.partial(rounded, kind=precision) if precision in kinds else _as_it_is


def _as_it_is(array: Array) -> Array:
    return array


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])
