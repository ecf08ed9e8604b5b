"""The CUDA executor for weights that fit one SM: one kernel runs all T steps, each block for a few rows of the batch.

Nothing is launched, and nothing leaves the SM, between two steps.  What fits: `kernels.plan`.
"""

import functools
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.executors import device, step
from gpurnn.executors.device import Tape
from gpurnn.executors.numpy_loop import Array, Backward, States, Weights
from gpurnn.kernels import plan, products, resident
from gpurnn.kernels.launch import Launcher
from gpurnn.kernels.products import Ffma, Mma, Shape

Tile = Ffma | Mma


def tile(cell: Cell, H: int, N: int, precision: str, transposed: bool) -> Tile | None:
    """How the product of one direction is laid out on an SM; None where it does not fit."""
    chip = device.chip()
    shape = Shape.of(cell.gates, H, transposed)
    pair = _registers(cell, transposed)
    if precision == "bfloat16":
        fit = plan.mma_tile(shape, pair, chip.shared)
        return fit and fit.tile
    best = None
    for rows in (1, 2, 4):  # as few as let all rows of the batch run at once, or as many as fit
        fit = plan.ffma_tile(shape, rows, pair, chip.shared, chip.capability >= (9, 0))
        if fit is None:
            break
        best = fit.tile
        if rows * chip.multiprocessors >= N:
            break
    return best


def fits(cell: Cell, H: int, N: int, dtype: np.dtype, precision: str) -> bool:
    """Whether both directions fit: forward and backward are chosen together."""
    return dtype == np.float32 and all(tile(cell, H, N, precision, transposed) for transposed in (False, True))


def _registers(cell: Cell, transposed: bool) -> int:
    """Of one (unit, batch row) pair, beside the weights."""
    trace, S, P = cell.trace, cell.states, len(cell.params)
    if transposed:
        return len(trace.kept) + 2 * S + 1 + S + 2 * P + 3
    return 3 * cell.gates + trace.x_start + S + P + 3


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
    """See `numpy_loop.forward`.  Raises ValueError where the dtype is not float32, or weight_hh does not fit."""
    if x.dtype != np.float32:
        raise ValueError(f"executor 'resident' computes in float32, got {x.dtype}: 'step' computes in float64 as well")
    sweep = device.begin(cell, x, weights, state, rows, reverse, training, precision)
    tape = sweep.tape
    N = tape.h.shape[1]
    carried = backend.xp.stack(state).astype(x.dtype, copy=False)
    kernel, packed, blocks = _prepared(resident.forward, tape, sweep.weight_hh, transposed=False, training=training)
    rest_state = tape.rest.strides[0] // x.itemsize
    for t0, t1, slots in device.pieces(sweep):
        rest = tape.rest[:, t0:] if training else tape.rest
        arrays = (packed, slots, sweep.bias, tape.h[t0:], rest, sweep.params, carried, tape.lengths)
        if N:
            kernel(blocks, *(array.data.ptr for array in arrays), t1 - t0, t0, N, int(reverse), rest_state)
    return device.finish(sweep, tuple(carried))


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...], grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """See `numpy_loop.backward`.  Where the flow of gradients is asked for, `step` goes back, which can stop to look."""
    if options.flow is not None:
        return step.backward(tape, dy, dstate, grads, options)
    xp, cell, dtype = backend.xp, tape.cell, tape.x.dtype
    N = tape.h.shape[1]
    dy = device.with_unit_stride(dy)
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = xp.stack(dstate).astype(dtype, copy=False)
    params, dparams = device.parameters(tape)
    clip = options.clip is not None
    weight_hh = device.ordered_weight_hh(cell, tape.weights)
    kernel, packed, blocks = _prepared(resident.backward, tape, weight_hh, transposed=True, clip=clip)
    arrays = (packed, slots, tape.h, tape.rest, dy, passed, params, dparams, tape.lengths)
    strides = (tape.rest.strides[0] // dtype.itemsize, *(stride // dtype.itemsize for stride in dy.strides[:2]))
    if N:
        pointers = (array.data.ptr for array in arrays)
        kernel(blocks, *pointers, N, int(tape.reverse), *strides, dtype.type(options.clip or 0.0))
    dx = device.weight_gradients(tape, slots, grads)
    for gradient, value in zip(grads.params, dparams, strict=True):
        gradient += value.sum(0)
    return dx, tuple(passed)


def _prepared(
    factory: Any, tape: Tape, weight_hh: Array, transposed: bool, **constants: bool
) -> tuple[Launcher, Array, int]:
    """The kernel, weight_hh in the order in which it reads it, and the number of blocks."""
    cell, (N, H) = tape.cell, tape.h.shape[1:]
    kernel, chosen = _fitted(factory, cell, H, N, tape.precision, transposed, device.chip(), tuple(constants.items()))
    shape = Shape.of(cell.gates, H, transposed)
    words = products.packed_words(shape, chosen)
    packed = backend.xp.empty(words, np.uint32 if isinstance(chosen, Mma) else np.float32)
    pack = device.kernel(products.pack, shape=shape, tile=chosen)
    pack(device.grid(words, products.PACK_THREADS), weight_hh.data.ptr, packed.data.ptr)
    return kernel, packed, device.grid(N, products.rows_of(chosen))


@functools.lru_cache(maxsize=512)
def _fitted(
    factory: Any, cell: Cell, H: int, N: int, precision: str, transposed: bool, chip: device.Chip, constants: tuple
) -> tuple[Launcher, Tile]:
    """Built with fewer weights in registers where a cell needs more of them than the plan thought.

    Raises ValueError where the weights do not fit one SM.
    """
    chosen = tile(cell, H, N, precision, transposed)
    if chosen is None:
        raise ValueError(
            f"executor 'resident': weight_hh of {cell.name} with {H} units does not fit one SM in {precision}; "
            "'step' runs every size"
        )
    for fewer in plan.relaxed(Shape.of(cell.gates, H, transposed), chosen, chip.shared):
        kernel = device.kernel(factory, cell.trace, H=H, tile=fewer, **dict(constants))
        chosen = fewer
        if not kernel.kernel.spilled:
            break
    return kernel, chosen
