"""The oracle: the time loop in plain array code, one cell call a step.  It runs on NumPy and on CuPy arrays.

It shares no layout, no graph and no compiled code with the other executors: what they compute is what stands here.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

from gpurnn import backend
from gpurnn.executors import heads
from gpurnn.executors.contract import Backward, Job, States, Weights
from gpurnn.executors.random import Step
from gpurnn.types import Array


class Tape(NamedTuple):
    """What backward needs, step by step in the order in which forward went."""

    job: Job
    steps: list[tuple]  # (t, m, saved, state, next_state) of the m rows that live at t
    derivative: Callable  # the cell's backward


def forward(job: Job) -> tuple[States, Tape | None]:
    """See `contract.Executor.forward`."""
    xp = backend.xp
    cell, x, weights, state, rows, reverse, training = job[:7]
    T, N, _ = x.shape
    H = state[0].shape[1]
    gates_x = x @ weights.weight_ih.T
    if weights.bias_ih is not None:
        gates_x = gates_x + weights.bias_ih
    h = xp.zeros((T + 1, N, H), x.dtype)
    rest = xp.zeros((cell.states - 1, T + 1, N, H), x.dtype) if job.all_states else None
    if T:
        h[T if reverse else 0] = state[0]  # overwritten where a row begins later; y never shows it
    current = tuple(part.copy() for part in state)
    equations, derivative = cell.functions()
    steps: list[tuple] = []
    for t in range(T - 1, -1, -1) if reverse else range(T):
        m = int(rows[t])
        before = tuple(part[:m].copy() for part in current)
        if job.resets is not None:
            again = job.resets.before[t, :m, None]
            before = tuple(xp.where(again, *pair) for pair in zip(job.resets.state, before, strict=True))
        split_r: tuple = (0.0,) * cell.gates  # for a cell that does not read it
        if weights.weight_hh is not None:
            gates_r = heads.product(before[0], weights.weight_hh)
            if weights.bias_hh is not None:
                gates_r = gates_r + weights.bias_hh
            split_r = tuple(gates_r[:, g * H : (g + 1) * H] for g in range(cell.gates))
        split_x = tuple(gates_x[t, :m, g * H : (g + 1) * H] for g in range(cell.gates))
        after, saved = _with_random(equations, job, t, m, H)(split_x, split_r, before, weights.params)
        for part, value in zip(current, after, strict=True):
            part[:m] = value
        h[t if reverse else t + 1, :m] = after[0]
        if rest is not None:
            for part, value in zip(rest, after[1:], strict=True):
                part[t if reverse else t + 1, :m] = value
        if training:
            steps.append((t, m, saved, before, tuple(part[:m].copy() for part in current)))
    tape = Tape(job, steps, derivative) if training else None
    return States(h, current, rest), tape


def backward(
    tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
) -> tuple[Array, tuple[Array, ...]]:
    """Backpropagation through time.  Adds to `grads`; returns dx (T, N, I) and dL/d(initial state), S arrays (N, H).

    dy (T, N, H) is read at living rows only; dstate: S arrays (N, H), dL/d(final state); None: zeros.
    """
    xp = backend.xp
    cell, x, weights = tape.job[:3]
    tape = tape._replace(derivative=cell.functions()[1])  # what it reads may have changed since forward
    T, N, I = x.shape
    H = dy.shape[2]
    dparams_totals = [(grad, xp.zeros(grad.shape)) for grad in grads.params]  # long sums are in float64
    dweight_hh = None if grads.weight_hh is None else xp.zeros(grads.weight_hh.shape)
    dbias_hh = xp.zeros(cell.gates * H)
    dgates_x = xp.zeros((T, N, cell.gates * H), x.dtype)
    if dstate is None:
        passed = tuple(xp.zeros((N, H), x.dtype) for _ in range(cell.states))
    else:
        passed = tuple(part.copy() for part in dstate)
    for t, m, saved, before, after in reversed(tape.steps):
        dabove = (dy, *(options.drest or (None,) * (cell.states - 1)))
        dnext = tuple(
            part[:m] + (0 if above is None else above[t, :m]) for part, above in zip(passed, dabove, strict=True)
        )
        if options.flow is not None:
            for s, part in enumerate(dnext):
                options.flow[s, t] += (part.astype("float64") ** 2).sum()
        dgates_x[t, :m], dgates_r, before_this, dparams = step_backward(tape, (t, m, saved, before, after), dnext)
        for part, gradient in zip(passed, before_this, strict=True):
            part[:m] = gradient if options.clip is None else xp.clip(gradient, -options.clip, options.clip)
        if tape.job.resets is not None:
            again = tape.job.resets.before[t, :m, None]
            for part, total in zip(passed, options.dfresh, strict=True):
                nothing = xp.zeros((), part.dtype)
                total[:m] += xp.where(again, part[:m], nothing)
                part[:m] = xp.where(again, nothing, part[:m])
        if dweight_hh is not None:
            dweight_hh += heads.gradient(dgates_r, before[0], dweight_hh.shape[1])
            dbias_hh += dgates_r.sum(0, dtype="float64")
        for (_, total), value in zip(dparams_totals, dparams, strict=True):
            total += value.sum(0, dtype="float64")
    for grad, total in [*dparams_totals, *([] if grads.weight_hh is None else [(grads.weight_hh, dweight_hh)])]:
        grad[...] += total.astype(grad.dtype)
    flat = dgates_x.reshape(T * N, cell.gates * H)
    grads.weight_ih[...] += flat.T @ x.reshape(T * N, I)
    if grads.bias_hh is not None:
        grads.bias_hh[...] += dbias_hh.astype(x.dtype)
    if grads.bias_ih is not None:
        grads.bias_ih[...] += flat.sum(0, dtype="float64").astype(x.dtype)
    return dgates_x @ weights.weight_ih, passed


def step_backward(
    tape: Tape, step: tuple, dnext: tuple[Array, ...]
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:
    """The backward product of one step of `tape.steps` alone.

    dnext: S arrays (..., m, H), dL/d(the states that the step leaves), for any number of losses L side by side.
    Returns dgates_x and dgates_r (..., m, G*H), dL/d(the states before the step), and for each of the cell's own
    parameters its gradient at each row and unit (..., m, H).
    """
    xp = backend.xp
    cell, weight_hh, dtype = tape.job.cell, tape.job.weights.weight_hh, tape.job.x.dtype
    _, _, saved, before, after = step
    shape = dnext[0].shape
    H = shape[-1]
    derivative = _with_random(tape.derivative, tape.job, step[0], step[1], H)
    dx, dr, direct, dparams = derivative(dnext, saved, before, after, tape.job.weights.params)
    dgates_x, dgates_r = (xp.empty((*shape[:-1], cell.gates * H), dtype) for _ in range(2))
    for g in range(cell.gates):
        dgates_x[..., g * H : (g + 1) * H] = dx[g]
        dgates_r[..., g * H : (g + 1) * H] = dr[g]

    def full(value: Array) -> Array:  # a cell may answer with a number
        return xp.broadcast_to(xp.asarray(value, dtype), shape)

    first = full(direct[0])
    if weight_hh is not None:
        first = first + heads.product_back(dgates_r, weight_hh, H)
    return dgates_x, dgates_r, (first, *map(full, direct[1:])), tuple(map(full, dparams))


def _with_random(function: Callable, job: Job, t: int, m: int, H: int) -> Callable:
    """A cell's function with the random numbers of m batch rows at step t."""
    if job.draws is None:
        return function
    return functools.partial(function, random=Step(job.draws.numbers(job.x.shape[1]), t, m, H, job.x.dtype))
