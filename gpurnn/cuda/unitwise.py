"""Cells without a recurrent matrix on CUDA: one kernel runs all T steps, and nothing in it waits (`kernels.unitwise`).

What stands before and behind it, x W_ih^T and the gradients of the weights, is that of the other executors (`sweeps`).
"""

from typing import cast

from gpurnn.cuda import device, sweeps
from gpurnn.cuda.sweeps import Sweep
from gpurnn.executors.contract import Backward, States, Weights
from gpurnn.executors.layout import Tape
from gpurnn.kernels import unitwise
from gpurnn.types import Array


def forward(sweep: Sweep) -> tuple[States, Tape | None]:
    """What `contract.Executor.forward` returns."""
    tape, job = sweep.tape, sweep.tape.job
    N, H = tape.h.shape[1:]
    constants = sweeps.if_any(resets=sweep.again)
    kernel = device.kernel(unitwise.forward, job.cell.trace, dtype=job.x.dtype.name, **constants)
    draws = sweeps.draws(tape)
    strides = (tape.rest.strides[0] // job.x.itemsize, N * H if sweep.whole else 0)
    for t0, t1, slots in sweeps.pieces(sweep):
        if N:
            rest = tape.rest[:, t0:] if sweep.whole else tape.rest
            arrays = (slots, sweep.bias, tape.h[t0:], rest, sweep.params, cast(Array, tape.lengths))
            pointers = [*(array.data.ptr for array in arrays), sweeps.pointer(draws), *sweep.again.pointers(t0)]
            kernel(device.grid(N * H, unitwise.THREADS), *pointers, t1 - t0, t0, N, H, int(job.reverse), *strides)
    return sweeps.finish(sweep, sweeps.final(sweep))


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """See `contract.Executor.backward`; `options.flow` and `drest` are for `step`."""
    job, (N, H) = tape.job, tape.h.shape[1:]
    way = sweeps.begin_back(tape, dy, dstate, options)
    if N and len(job.x):
        constants = {"clip": options.clip is not None, **sweeps.if_any(resets=way.again)}
        kernel = device.kernel(unitwise.backward, job.cell.trace, dtype=tape.h.dtype.name, **constants)
        draws = sweeps.draws(tape)
        pointers = [array.data.ptr for array in (*way.arrays, cast(Array, tape.lengths))]
        pointers += [sweeps.pointer(draws), *way.reset_pointers]
        kernel(device.grid(N * H, unitwise.THREADS), *pointers, N, H, *way.numbers)
    return sweeps.finish_back(way, tape, grads)
