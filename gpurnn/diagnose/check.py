"""check_gradients: holds a cell's or a layer's backward against central differences, entry by entry, in float64."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import at_least_0, generator, switch, whole
from gpurnn.cells import Cell
from gpurnn.parameters.buffers import check_memory
from gpurnn.recurrent import Recurrent

EPSILON = 1e-5  # central differences err by about eps^2 and 1e-16/eps: both near 1e-10 here


class GradientError(AssertionError):
    """A gradient differs from central differences by more than the tolerance."""


def check_gradients(
    subject: Cell | Recurrent,
    *,
    T: int = 4,
    N: int = 3,
    lengths: Any = None,
    resets: Any = None,
    all_states: bool = False,
    tolerance: float = 1e-6,
    executor: str | None = None,
    rng: Any = 0,
) -> dict[str, float]:
    """Compares every gradient of a cell or a recurrent layer with float64 central differences through T steps.

    subject    a Cell (checked in a small layer of its own), or a recurrent layer with dtype float64, small enough that
               two forward passes for each of its values are affordable.  Its parameters, gradients and count
               of dropout's masks come back as they were.  `clip_in_time` changes gradients on purpose: leave it out.
    lengths    each row's length, N whole numbers in 0..T.
    resets     (T, N) of bool, where rows begin again; (N, T) for a layer that is `batch_first`.
    all_states whether the loss is one of every state at every step, instead of h alone.
    Returns for x, each initial state and each parameter the largest error relative to that gradient's largest entry.
    Raises GradientError naming all that exceed `tolerance`.
    """
    T, N, tolerance, rng = whole("T", T), whole("N", N), at_least_0("tolerance", tolerance), generator(rng)
    layer = subject if isinstance(subject, Recurrent) else _layer_around(subject, rng)
    if layer.dtype != np.float64:
        raise ValueError(f"layer: expected dtype float64, which central differences need, got {layer.dtype}")
    check_memory(T * N * (layer.input_size + layer.hidden_size), layer.dtype, "values")
    before, layer.executor = layer.executor, layer.executor if executor is None else executor
    try:
        with layer.masks.held():
            options = {"lengths": lengths, "resets": resets, "all_states": switch("all_states", all_states)}
            errors = _errors(layer, T, N, options, rng)
    finally:
        layer.executor = before
    wrong = {name: error for name, error in errors.items() if not error <= tolerance}
    if wrong:
        listed = ", ".join(f"{name} by {error:.1e}" for name, error in wrong.items())
        raise GradientError(
            f"{layer.cell.name}: gradients differ from central differences (tolerance {tolerance:g}): {listed}"
        )
    return errors


def _layer_around(cell: Cell, rng: np.random.Generator) -> Recurrent:
    layer = Recurrent(cell, 3, 5, dtype="float64", rng=rng)
    for view in layer.params.values():
        view += backend.asarray(rng.normal(0, 0.3, view.shape), layer.dtype, "noise")
    return layer


def _errors(layer: Recurrent, T: int, N: int, options: Mapping[str, Any], rng: np.random.Generator) -> dict[str, float]:
    shape = (layer.num_layers * layer.directions, N, layer.hidden_size)
    lead = (N, T) if layer.batch_first else (T, N)
    x = rng.standard_normal((*lead, layer.input_size))
    state = tuple(rng.standard_normal(shape) for _ in layer.cell.state_names)
    states = layer.cell.states if options["all_states"] else 1
    dy = tuple(rng.standard_normal((*lead, layer.directions * layer.hidden_size)) for _ in range(states))
    dstate = tuple(rng.standard_normal(shape) for _ in state)
    # a layer with trained initial states uses them only where none is given
    given: Any = None if layer.trainable_h0 else (state if len(state) > 1 else state[0])

    def forward() -> tuple:
        with layer.masks.held():  # dropout has to be the same each time
            return layer(x, given, **options)

    def loss() -> float:
        y, final, _ = forward()
        values = (*_parts(y), *_parts(final))
        pairs = zip(values, (*dy, *dstate), strict=True)
        return sum(float((backend.to_numpy(value) * weight).sum()) for value, weight in pairs)

    _, _, backward = forward()
    kept = layer.grads.flat.copy()
    layer.zero_grad()
    dx, dinitial = backward(dy if len(dy) > 1 else dy[0], dstate if len(dstate) > 1 else dstate[0])
    gradients = {name: backend.to_numpy(value).copy() for name, value in layer.grads.items()}
    layer.grads.flat[...] = kept
    gradients["x"] = backend.to_numpy(dx)
    values: dict[str, Any] = {"x": x, **layer.params}
    if given is not None:
        for s, (name, part) in enumerate(zip(layer.cell.state_names, state, strict=True)):
            values[f"{name}_0"] = part
            gradients[f"{name}_0"] = backend.to_numpy(dinitial[s] if len(state) > 1 else dinitial)
    return {name: _error(loss, value, gradients[name]) for name, value in values.items()}


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _error(loss: Callable[[], float], value: Any, gradient: np.ndarray) -> float:
    """Largest difference to central differences over the entries of `value`, relative to the largest gradient."""
    numeric = np.empty(gradient.shape)
    for index in np.ndindex(*gradient.shape):
        keep = float(value[index])
        value[index] = keep + EPSILON
        up = loss()
        value[index] = keep - EPSILON
        down = loss()
        value[index] = keep
        numeric[index] = (up - down) / (2 * EPSILON)
    if not gradient.size:
        return 0.0
    scale = float(np.abs(numeric).max())
    error = float(np.abs(numeric - gradient).max())
    return error / scale if scale > 0 else error
