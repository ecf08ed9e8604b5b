"""The CUDA executor for every shape: at each step one product by cuBLAS, then one kernel with all that is left of it.

It also goes back over what `resident` wrote, and the other way round: their tapes are the same.

Cells without a recurrent matrix need no product: one kernel runs all their steps (`unitwise`), unless the flow of gradients
is asked for.

All that stays from step to step is looked up before the loop, and addresses are counted on: about 1 us of Python a step.
A graph of the T steps would save that as well, but each pass has other addresses, and a captured step is one graph anyway.
"""

from collections.abc import Callable

from gpurnn import backend
from gpurnn.cuda import device, sweeps, unitwise
from gpurnn.executors.contract import Backward, Job, States, Weights
from gpurnn.executors.layout import Tape
from gpurnn.kernels import step
from gpurnn.types import Array


def forward(job: Job) -> tuple[States, Tape | None]:
    """See `contract.Executor.forward`."""
    sweep, reverse, training = sweeps.begin(job), job.reverse, job.training
    if sweep.weight_hh is None:
        return unitwise.forward(sweep)
    tape, trace = sweep.tape, job.cell.trace
    N, H = tape.h.shape[1:]
    kernel = device.kernel(step.forward, trace, dtype=job.x.dtype.name)
    draws = sweeps.draws(tape)
    rest_state, rest_step = tape.rest.strides[0] // job.x.itemsize, N * H if training else 0
    living_at = job.rows.tolist()
    for t0, t1, slots in sweeps.pieces(sweep):
        slots[:, :, : trace.x_start * H] = 0  # r of the split gates: the product is added to what is there
        h, rest = tape.h[t0 : t1 + 1], tape.rest[:, t0:] if training else tape.rest
        pointers = [array.data.ptr for array in (slots, sweep.bias, h, rest, sweep.params)] + [sweeps.pointer(draws)]
        launch = kernel.series(pointers, (N, H, int(reverse), rest_state, rest_step))
        add = device.adding(sweep.weight_hh.T, h.strides[1], slots.strides[1], job.precision)
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
    return sweeps.finish(sweep, sweeps.final(sweep))


def _nothing(*_: int) -> None:
    """The product of a cell that has none."""


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """See `contract.Executor.backward`."""
    job, (T, N, _), H = tape.job, tape.job.x.shape, tape.h.shape[2]
    if not job.cell.recurrent and options.flow is None:
        return unitwise.backward(tape, dy, dstate, grads, options)
    way = sweeps.begin_back(tape, dy, dstate, options)
    slots, dy, passed = way.slots, way.dy, way.passed
    kernel = device.kernel(step.backward, job.cell.trace, dtype=passed.dtype.name, clip=options.clip is not None)
    draws = sweeps.draws(tape)
    pointers = [array.data.ptr for array in way.arrays] + [sweeps.pointer(draws)]
    launch = kernel.series(pointers, (N, H, *way.numbers))
    add: Callable = _nothing
    if way.weight_hh is not None:
        add = device.adding(way.weight_hh, slots.strides[1], passed.strides[1], job.precision)
    dr, step_of_slots, dh, living_at, seen = pointers[0], slots.strides[0], pointers[4], job.rows.tolist(), 0
    for t in range(T) if job.reverse else reversed(range(T)):
        living = living_at[t]
        if not living:
            continue
        if options.flow is not None:
            _add_flow(options.flow[:, t], passed, dy[t], living, seen, options.clip)
        launch(-(-living * H // step.THREADS), t, living, seen)
        add(living, dr + t * step_of_slots, dh)
        seen = living
    if options.clip is not None and T:
        begun, limit = passed[:, : int(job.rows[0])], passed.dtype.type(options.clip)
        backend.xp.clip(begun, -limit, limit, out=begun)
    return sweeps.finish_back(way, tape, grads)


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
