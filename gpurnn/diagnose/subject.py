"""What the instruments share: the model under study, left as it was found, its steps, and gradients of many losses at once.

The steps are those of the NumPy executor, which is plain array code on either backend: its tape has every state and gate,
and `numpy_loop.step_backward` multiplies any number of gradients by one step's Jacobian.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from gpurnn import backend, losses
from gpurnn.arguments import loss_function, one_of, time_first
from gpurnn.cpu.threads import one_blas_thread
from gpurnn.executors import numpy_loop
from gpurnn.executors.contract import Job
from gpurnn.executors.numpy_loop import Tape
from gpurnn.model import SequenceModel
from gpurnn.recurrent import Recurrent
from gpurnn.sequence import checked_resets, prepare_lengths
from gpurnn.sequence.resets import Restarts
from gpurnn.types import Array

Loss = Callable[[Array, Any], tuple[Any, Array]]
BLOCK_BYTES = 64 << 20  # losses, or rows of a Jacobian, that travel back together


def recurrent_part(model: Any) -> Recurrent:
    """The recurrent layers of a SequenceModel, or the layer itself; TypeError for anything else."""
    layer = model.recurrent if isinstance(model, SequenceModel) else model
    if not isinstance(layer, Recurrent):
        raise TypeError(f"model: expected a SequenceModel or a recurrent layer, got {type(model).__name__}")
    return time_first(layer)


def at_every_step(model: Any) -> Any:
    """`model` if it answers at every step; ValueError where it pools them, since then no step has a loss of its own."""
    pooling = getattr(model, "pooling", None)
    if pooling is not None:
        raise ValueError(f"model: expected an answer at every step, got one with pooling {pooling!r}")
    return model


def layer_names(layer: Recurrent) -> tuple[str, ...]:
    """l0, l0_reverse, l1, ...: what stands behind the parameters' names."""
    directions = ("", "_reverse")[: layer.directions]
    return tuple(f"l{k}{way}" for k, way in itertools.product(range(layer.num_layers), directions))


def layer_index(layer: Recurrent, name: str) -> int:
    names = layer_names(layer)
    return names.index(one_of("layer", name, names))


def step_number(step: Any, T: int) -> int:
    """`step` counted from 0; a negative one counts from the end.  ValueError where there is no such step."""
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or not -T <= step < T:
        raise ValueError(f"step: expected a whole number from {-T} to {T - 1}, got {step!r}")
    return int(step) % T


@contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Without dropout, random numbers as their means, and with gradients of 0 inside; everything as it was afterwards.

    NumPy's warnings are off meanwhile: what is not finite is told by name.
    """
    layer = recurrent_part(model)
    between, behind = layer.dropout, getattr(model, "dropout", None) if model is not layer else None
    of_weights = layer.weight_dropout
    probability = behind.p if behind is not None else 0.0
    kept = model.grads.flat.copy()
    cell = layer.cell
    layer.dropout, layer.weight_dropout, layer.cell = 0.0, 0.0, cell.mean
    if behind is not None:
        behind.p = 0.0
    model.zero_grad()
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        layer.dropout, layer.weight_dropout, layer.cell = between, of_weights, cell
        if behind is not None:
            behind.p = probability
        model.grads.flat[...] = kept


def checked_input(model: Any, x: Any, lengths: Any = None) -> Array:
    """x as the model takes it, with at least one step and one row; ValueError where a value that is read is not finite."""
    layer = recurrent_part(model)
    embedded = model is not layer and model.embedding is not None
    x = backend.asarray(x, None if embedded else layer.dtype, "x")
    form, axes = ("tokens (T, N)", 2) if embedded else (f"(T, N, I) = (T, N, {layer.input_size})", 3)
    if x.ndim != axes or (not embedded and x.shape[2] != layer.input_size):
        raise ValueError(f"x: expected {form}, got {x.shape}")
    if 0 in x.shape[:2]:
        raise ValueError(f"x: expected at least one step and one row, got {x.shape}")
    if not embedded:
        prepared = prepare_lengths(lengths, *x.shape[:2])
        read = x if prepared is None else backend.xp.where(prepared.padding, backend.xp.zeros((), x.dtype), x)
        raise_where_not_finite("x", backend.to_numpy(read), ValueError)
    return x


def raise_where_not_finite(name: str, values: np.ndarray, kind: type[Exception] = FloatingPointError) -> None:
    """Names the first value that is not finite by its step, row and unit."""
    bad = ~np.isfinite(values)
    if bad.any():
        at = tuple(int(i) for i in np.argwhere(bad)[0])
        raise kind(
            f"{name}: expected finite values, got {values[at]} at step {at[0]}, row {at[1]}, unit {at[2]} "
            f"({bad.sum()} of {bad.size})"
        )


def output_gradient(out: Array, targets: Any, loss: Loss | None, lengths: Any = None) -> Array:
    """dL/dout, with lengths of the valid steps alone; without a loss, L is the sum of all outputs."""
    if loss is None:
        if targets is not None:
            raise ValueError("loss: expected a function loss(out, targets) for these targets, got None")
        return backend.xp.ones_like(out)
    _, dout = losses.evaluate(loss_function(loss), out, targets, lengths)
    return dout


def run_steps(model: Any, x: Any, state: Any = None, resets: Any = None) -> tuple[list[Tape], Array]:
    """The steps of every layer and direction, in the order of `layer_names`, and the top layer's output (T, N, D*H).

    resets: as the model takes them.

    Bytes kept: for each layer, direction, step, row and unit about 2S + 2G values.
    Raises FloatingPointError where a state is not finite.
    """
    layer, x = recurrent_part(model), checked_input(model, x)
    if x.ndim == 2:
        x, _ = model.embedding(x, training=False)
    T, N, _ = x.shape
    initial = layer.unpacked(state, N, "state", layer.trainable_h0)
    restarts = Restarts.of(checked_resets(resets, T, N), layer.fresh, None)
    tapes: list[Tape] = []
    below: Array | None = None
    for level in range(layer.num_layers):
        outputs = []
        for direction in range(layer.directions):
            at, again = len(tapes), None
            begin = tuple(part[at] for part in initial)
            if restarts is not None:
                begin, again = restarts.begun(begin, at, direction == 1), restarts.job(at, direction == 1)
            weights = layer.weights(layer.params, level, direction)
            job = Job(layer.cell.mean, x, weights, begin, np.full(T, N), direction == 1, True, resets=again)
            with one_blas_thread, np.errstate(all="ignore"):  # a state that is not finite is told by name
                states, tape = numpy_loop.forward(job)
            outputs.append(states.h[:T] if direction else states.h[1:])
            raise_where_not_finite(f"h of {layer_names(layer)[len(tapes)]}", backend.to_numpy(outputs[-1]))
            assert tape is not None
            tapes.append(tape)
        x = outputs[0] if layer.directions == 1 else backend.xp.concatenate(outputs, axis=2)
        below = x = x + below if layer.residual and below is not None else x
    return tapes, x


def steps_of(model: Any, name: str, x: Any, state: Any = None) -> Tape:
    """The steps of the layer and direction called `name`."""
    at = layer_index(recurrent_part(model), name)
    return run_steps(model, x, state)[0][at]


def blocks(items: Sequence, bytes_each: int) -> Iterator[Sequence]:
    """`items` in turn, as many at once as BLOCK_BYTES hold, at least one."""
    size = max(1, BLOCK_BYTES // max(1, bytes_each))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def back_through(
    layer: Recurrent, tapes: list[Tape], dy: Array, visit: Callable[[int, tuple, tuple], None] | None = None
) -> Array:
    """Takes R gradients of the top output back through all layers and steps, each by itself: dy (R, t, N, D*H).

    t may be less than T in a network that only looks back: later steps have no part in these losses.
    visit(at, step, (dgates_x, dgates_r, dparams)) sees each step of tape number `at`, gradients (R, N, ...).
    Returns dx (R, t, N, I).
    """
    H, D, xp = layer.hidden_size, layer.directions, backend.xp
    R, until, N, _ = dy.shape
    for level in reversed(range(layer.num_layers)):
        dx = None
        for direction in range(D):
            at = level * D + direction
            tape = tapes[at]
            weight_ih = tape.job.weights.weight_ih
            part = xp.empty((R, until, N, weight_ih.shape[1]), layer.dtype)
            passed = tuple(xp.zeros((R, N, H), layer.dtype) for _ in range(layer.cell.states))
            for step in reversed(tape.steps[:until]):
                t = step[0]
                dnext = (passed[0] + dy[:, t, :, direction * H : (direction + 1) * H], *passed[1:])
                with one_blas_thread:
                    dgates_x, dgates_r, passed, dparams = numpy_loop.step_backward(tape, step, dnext)
                    part[:, t] = (dgates_x.reshape(R * N, -1) @ weight_ih).reshape(R, N, -1)
                    if visit is not None:
                        visit(at, step, (dgates_x, dgates_r, dparams))
            dx = part if dx is None else dx + part
        dy = dx + dy if layer.residual and level else dx
    return dy
