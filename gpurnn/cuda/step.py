"""The CUDA executor for every shape: at each step one product by cuBLAS, then one kernel with all that is left of it.

It also goes back over what `resident` wrote, and the other way round: their tapes are the same.

Cells without a recurrent matrix need no product: one kernel runs all their steps (`unitwise`), unless the flow of gradients
is asked for.

All that stays from step to step is looked up before the loop, and addresses are counted on: about 1 us of Python a step.
A graph of the T steps would save that as well, but each pass has other addresses, and a captured step is one graph anyway.
"""

from collections.abc import Callable

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.cuda import device, sweeps, unitwise
from gpurnn.cuda.sweeps import Tape
from gpurnn.executors.contract import Backward, States, Weights
from gpurnn.kernels import step
from gpurnn.types import Array


def forward(
    cell: Cell,
    x: Array,
    weights: Weights,
    state: tuple[Array, ...],
    rows: np.ndarray,
    reverse: bool,
    training: bool,
    precision: str = "float32",
) -> tuple[States, Tape | None]:
    """See `contract.Executor.forward`."""
    sweep = sweeps.begin(cell, x, weights, state, rows, reverse, training, precision)
    if sweep.weight_hh is None:
        return unitwise.forward(sweep)
    tape, trace = sweep.tape, cell.trace
    N, H = tape.h.shape[1:]
    kernel = device.kernel(step.forward, trace, dtype=x.dtype.name)
    rest_state, rest_step = tape.rest.strides[0] // x.itemsize, N * H if training else 0
    living_at = rows.tolist()
    for t0, t1, slots in sweeps.pieces(sweep):
        slots[:, :, : trace.x_start * H] = 0  # r of the split gates: the product is added to what is there
        h, rest = tape.h[t0 : t1 + 1], tape.rest[:, t0:] if training else tape.rest
        pointers = [array.data.ptr for array in (slots, sweep.bias, h, rest, sweep.params)]
        launch = kernel.series(pointers, (N, H, int(reverse), rest_state, rest_step))
        add = device.adding(sweep.weight_hh.T, h.strides[1], slots.strides[1], precision)
        before, states, r, step_of_slots = (
            h.data.ptr + reverse * h.strides[0],
            h.strides[0],
            pointers[0],
            slots.strides[0],
        )
        for t in reversed(range(t1 - t0)) if reverse else range(t1 - t0):
            living = living_at[t0 + t]
            if living:
                add(living, before + t * states, r + t * step_of_slots)
                launch(-(-living * H // step.THREADS), t, living)
    return sweeps.finish(sweep, sweeps.final(tape, training))


def _nothing(*_: int) -> None:
    """The product of a cell that has none."""


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """See `contract.Executor.backward`."""
    if not tape.cell.recurrent and options.flow is None:
        return unitwise.backward(tape, dy, dstate, grads, options)
    xp, cell, trace = backend.xp, tape.cell, tape.cell.trace
    T, N = tape.x.shape[:2]
    H, dtype = tape.h.shape[2], tape.x.dtype
    dy = sweeps.with_unit_stride(dy)
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = sweeps.passed_back(dstate, tape)
    params, dparams = sweeps.parameters(tape)
    weight_hh = sweeps.ordered_weight_hh(cell, tape.weights)
    kernel = device.kernel(step.backward, trace, dtype=dtype.name, clip=options.clip is not None)
    pointers = [array.data.ptr for array in (slots, tape.h, tape.rest, dy, passed, params, dparams)]
    strides = (tape.rest.strides[0] // dtype.itemsize, *(stride // dtype.itemsize for stride in dy.strides[:2]))
    seen, limit = 0, dtype.type(options.clip or 0.0)
    launch = kernel.series(pointers, (N, H, int(tape.reverse), *strides, limit))
    add: Callable = _nothing
    if weight_hh is not None:
        add = device.adding(weight_hh, slots.strides[1], passed.strides[1], tape.precision)
    dr, step_of_slots, dh, living_at = pointers[0], slots.strides[0], pointers[4], tape.rows.tolist()
    for t in range(T) if tape.reverse else reversed(range(T)):
        living = living_at[t]
        if not living:
            continue
        if options.flow is not None:
            _add_flow(options.flow[:, t], passed, dy[t], living, seen, options.clip)
        launch(-(-living * H // step.THREADS), t, living, seen)
        add(living, dr + t * step_of_slots, dh)
        seen = living
    if options.clip is not None and T:
        begun = passed[:, : int(tape.rows[0])]
        xp.clip(begun, -limit, limit, out=begun)
    dx = sweeps.weight_gradients(tape, slots, grads)
    for gradient, value in zip(grads.params, dparams, strict=True):
        gradient += value.sum(0)
    return dx, tuple(passed)


def _add_flow(flow: Array, passed: Array, dy: Array, living: int, seen: int, clip: float | None) -> None:
    """flow (S,): += sums of squares of dL/dstate_t, as the step's kernel is about to read it."""
    xp = backend.xp
    for s, part in enumerate(passed):
        gradient = part[:living].copy()
        if clip is not None:
            gradient[:seen] = xp.clip(gradient[:seen], -clip, clip)
        if s == 0:
            gradient += dy[:living]
        flow[s] += (gradient.astype(xp.float64) ** 2).sum()
