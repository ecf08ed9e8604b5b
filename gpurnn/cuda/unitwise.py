"""Cells without a recurrent matrix on CUDA: one kernel runs all T steps, and nothing in it waits (`kernels.unitwise`).

What stands before and behind it, x W_ih^T and the gradients of the weights, is that of the other executors (`sweeps`).
"""

from gpurnn.cuda import device, sweeps
from gpurnn.cuda.sweeps import Sweep, Tape
from gpurnn.executors.contract import Backward, States, Weights
from gpurnn.kernels import unitwise
from gpurnn.types import Array


def forward(sweep: Sweep) -> tuple[States, Tape | None]:
    """What `contract.Executor.forward` returns."""
    tape, training = sweep.tape, sweep.training
    N, H = tape.h.shape[1:]
    kernel = device.kernel(unitwise.forward, tape.cell.trace, dtype=tape.x.dtype.name)
    strides = (tape.rest.strides[0] // tape.x.itemsize, N * H if training else 0)
    for t0, t1, slots in sweeps.pieces(sweep):
        if N:
            arrays = (slots, sweep.bias, tape.h[t0:], tape.rest[:, t0:] if training else tape.rest, sweep.params)
            pointers = [array.data.ptr for array in (*arrays, tape.lengths)]
            kernel(device.grid(N * H, unitwise.THREADS), *pointers, t1 - t0, t0, N, H, int(tape.reverse), *strides)
    return sweeps.finish(sweep, sweeps.final(tape, training))


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """See `contract.Executor.backward`; `options.flow` is for `step`, which can stop to look."""
    dtype, (N, H) = tape.x.dtype, tape.h.shape[1:]
    dy = sweeps.with_unit_stride(dy)
    slots = tape.slots.copy() if options.keep else tape.slots
    passed = sweeps.passed_back(dstate, tape)
    params, dparams = sweeps.parameters(tape)
    if N and len(tape.x):
        kernel = device.kernel(unitwise.backward, tape.cell.trace, dtype=dtype.name, clip=options.clip is not None)
        arrays = (slots, tape.h, tape.rest, dy, passed, params, dparams, tape.lengths)
        strides = (tape.rest.strides[0] // dtype.itemsize, *(stride // dtype.itemsize for stride in dy.strides[:2]))
        kernel(
            device.grid(N * H, unitwise.THREADS), *(array.data.ptr for array in arrays), N, H, int(tape.reverse), *strides,
            dtype.type(options.clip or 0.0),
        )  # fmt: skip
    dx = sweeps.weight_gradients(tape, slots, grads)
    for gradient, value in zip(grads.params, dparams, strict=True):
        gradient += value.sum(0)
    return dx, tuple(passed)
