"""The CUDA executor for every shape: at each step one product by cuBLAS, then one kernel with all that is left of it.

It also goes back over what `resident` wrote, and the other way round: their tapes are the same.

Cells without a recurrent matrix need no product: one kernel runs all their steps (`unitwise`), unless the flow of gradients
is asked for.

All that stays from step to step is looked up before the loop, and addresses are counted on: about 1 us of Python a step.
A graph of the T steps would save that as well, but each pass has other addresses, and a captured step is one graph anyway.
"""

from collections.abc import Callable

from gpurnn import backend
from gpurnn.cuda import device, heads, sweeps, unitwise
from gpurnn.executors.contract import Backward, Job, States, Weights
from gpurnn.executors.layout import Tape
from gpurnn.kernels import step
from gpurnn.types import Array


def forward(job: Job) -> tuple[States, Tape | None]:
    """See `contract.Executor.forward`."""
    sweep, reverse = sweeps.begin(job), job.reverse
    if sweep.weight_hh is None:
        return unitwise.forward(sweep)
    tape, trace = sweep.tape, job.cell.trace
    N, H = tape.h.shape[1:]
    again, whole = sweep.again, sweep.whole
    kernel = device.kernel(step.forward, trace, dtype=job.x.dtype.name, **sweeps.if_any(resets=again))
    rest_state, rest_step = tape.rest.strides[0] // job.x.itemsize, N * H if whole else 0
    begun = sweep.initial[0].copy() if again else None  # h as a step begins with it
    draws = sweeps.draws(tape)
    living_at = job.rows.tolist()
    for t0, t1, slots in sweeps.pieces(sweep):
        slots[:, :, : trace.x_start * H] = 0  # r of the split gates: the product is added to what is there
        h, rest = tape.h[t0 : t1 + 1], tape.rest[:, t0:] if whole else tape.rest
        pointers = [array.data.ptr for array in (slots, sweep.bias, h, rest, sweep.params)]
        pointers += [sweeps.pointer(draws), *again.pointers(t0), 0 if begun is None else begun.data.ptr]
        last = (0 if reverse else len(job.x) - 1) - t0
        launch = kernel.series(pointers, (N, H, int(reverse), rest_state, rest_step, last))
        if job.heads > 1:
            add = heads.adding(sweep.weight_hh, H, h.strides[1], slots.strides[1], job.precision)
        else:
            add = device.adding(sweep.weight_hh.T, h.strides[1], slots.strides[1], job.precision)
        before, states, r, step_of_slots = (
            h.data.ptr + reverse * h.strides[0] if begun is None else begun.data.ptr,
            h.strides[0] if begun is None else 0,
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
    if not job.cell.recurrent and options.flow is None and options.drest is None:
        return unitwise.backward(tape, dy, dstate, grads, options)
    way = sweeps.begin_back(tape, dy, dstate, options)
    slots, dy, passed = way.slots, way.dy, way.passed
    drest = None if options.drest is None else backend.stacked(options.drest)
    constants = {"clip": options.clip is not None, **sweeps.if_any(resets=way.again, above=drest is not None)}
    kernel = device.kernel(step.backward, job.cell.trace, dtype=passed.dtype.name, **constants)
    draws = sweeps.draws(tape)
    pointers = [array.data.ptr for array in way.arrays] + [sweeps.pointer(draws)]
    pointers += [*way.reset_pointers, sweeps.pointer(drest)]
    launch = kernel.series(pointers, (N, H, *way.numbers, T * N * H))
    add: Callable = _nothing
    if job.heads > 1:
        add = heads.adding_back(way.weight_hh, H, slots.strides[1], passed.strides[1], job.precision)
    elif way.weight_hh is not None:
        add = device.adding(way.weight_hh, slots.strides[1], passed.strides[1], job.precision)
    dr, step_of_slots, dh, living_at, seen = pointers[0], slots.strides[0], pointers[4], job.rows.tolist(), 0
    for t in range(T) if job.reverse else reversed(range(T)):
        living = living_at[t]
        if not living:
            continue
        if options.flow is not None:
            above = (dy[t], *(() if drest is None else drest[:, t]))
            last = t - 1 if job.reverse else t + 1  # the step before in this order
            cut = way.again.before[last, :seen] if way.again and seen else None
            _add_flow(options.flow[:, t], passed, above, (living, seen), options.clip, cut)
        launch(-(-living * H // step.THREADS), t, living, seen)
        add(living, dr + t * step_of_slots, dh)
        seen = living
    if options.clip is not None and T:
        begun, limit = passed[:, : int(job.rows[0])], passed.dtype.type(options.clip)
        backend.xp.clip(begun, -limit, limit, out=begun)
    return sweeps.finish_back(way, tape, grads)


def _add_flow(
    flow: Array, passed: Array, above: tuple, rows: tuple[int, int], clip: float | None, cut: Array | None
) -> None:
    """flow (S,): += sums of squares of dL/dstate_t, as the step's kernel is about to read it.

    above: dL/d(the step's states) from outside.  cut: of rows seen, those that have been reset since.
    """
    xp, (living, seen) = backend.xp, rows
    for s, part in enumerate(passed):
        gradient = part[:living].copy()
        if clip is not None:
            gradient[:seen] = xp.clip(gradient[:seen], -clip, clip)
        if cut is not None:
            gradient[:seen] = xp.where(cut[:, None] != 0, xp.zeros((), gradient.dtype), gradient[:seen])
        if s < len(above):
            gradient += above[s][:living]
        flow[s] += (gradient.astype(xp.float64) ** 2).sum()
