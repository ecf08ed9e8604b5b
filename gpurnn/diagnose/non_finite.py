"""Finds the first value that is not finite: by tensor, layer and time step."""

from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.diagnose.flow import Flow, raise_where_flow_is_not_finite
from gpurnn.diagnose.subject import layer_names, recurrent_part, run_steps, undisturbed
from gpurnn.diagnose.subject import raise_where_not_finite as raise_at_step
from gpurnn.parameters.values import raise_where_not_finite
from gpurnn.sequence import prepare_lengths
from gpurnn.types import Array


def raise_where_it_began(
    model: Any,
    x: Array,
    state: Any = None,
    lengths: Any = None,
    dout: Array = None,
    dstate: Any = None,
    resets: Any = None,
) -> None:
    """Goes forward and back again, and raises FloatingPointError at the first value that is not finite.

    model, x, state, lengths, resets: as it was called; dout, dstate: as its backward was.  The order of the search: parameters,
    x, h of each layer from the bottom up, the output, dout, dL/dstate from the last step of the top layer back, the
    parameters' gradients.  Dropout is left out.  Costs a pass in plain array code, and another of the model's own.
    Raises FloatingPointError, too, where all of that is finite: the value then came with dropout or from elsewhere.
    """
    for name, value in model.params.items():
        if not bool(backend.xp.isfinite(value).all()):
            raise FloatingPointError(f"parameter {name}: expected finite values, got some that are not")
    layer = recurrent_part(model)
    with np.errstate(all="ignore"), undisturbed(model):  # what overflows is what is looked for
        try:
            run_steps(model, _without_padding(x, lengths), state, resets)
        except ValueError as error:  # x
            raise FloatingPointError(str(error)) from None
        out, _, backward = model(x, state, lengths=lengths, **({} if resets is None else {"resets": resets}))
        raise_at_step("output", backend.to_numpy(out))
        if dout is not None:
            raise_at_step("dL/d(output)", backend.to_numpy(backend.asarray(dout, None, "dout")))
        norms = backend.xp.zeros((layer.num_layers * layer.directions, layer.cell.states, len(out)))
        backward(dout, dstate, flow=norms)
        raise_where_flow_is_not_finite(Flow(backend.to_numpy(norms), layer_names(layer), layer.cell.state_names))
        raise_where_not_finite(model.grads)
    raise FloatingPointError("a gradient is not finite, though this pass without dropout and earlier gradients is")


def _without_padding(x: Array, lengths: Any) -> Array:
    """x with 0 behind each row's end, where nothing is read."""
    x = backend.asarray(x, None, "x")
    prepared = prepare_lengths(lengths, *x.shape[:2])
    if prepared is None:
        return x
    x = x.copy()
    x[prepared.padding[..., 0]] = 0
    return x
