"""The norm of all gradients together, and clipping by it or by value; each works on the flat buffer, in place.

A model is a layer, a model, or a list or mapping of such, whose gradients count together.  What is frozen has none: its
gradient is set to 0 here.

On CUDA nothing here waits: a norm is a float64 scalar of the device, and a gradient that is not finite is raised by
`gpurnn.synchronize`.
"""

import functools
from typing import Any

from gpurnn import backend
from gpurnn.arguments import positive
from gpurnn.model import pieces
from gpurnn.parameters import Trainable


def zero_grad(model: Any) -> None:
    """Sets every gradient to 0."""
    for part in pieces(model):
        backend.ops.clear(part.grads.flat)


def grad_norm(model: Any) -> Any:
    """The L2 norm of all gradients together, summed in float64; large and tiny gradients neither overflow nor vanish.

    A float; on CUDA a CuPy array of shape ().  Raises FloatingPointError with the name of the first gradient that is not
    finite, on CUDA by `gpurnn.synchronize`.
    """
    norms = [backend.ops.norm(part.grads) for part in _quiet(model)]
    return norms[0] if len(norms) == 1 else _together(norms)


def clip_grad_norm(model: Any, max_norm: float) -> Any:
    """Scales all gradients so that their common L2 norm is at most `max_norm` > 0; returns the norm before.

    (Pascanu, Mikolov and Bengio 2013.)  Norm and errors are those of `grad_norm`; where a gradient is not finite nothing
    changes.
    """
    parts, max_norm = _quiet(model), positive("max_norm", max_norm)
    if len(parts) == 1:
        return backend.ops.clip_norm(parts[0].grads, max_norm)
    xp, norm = backend.xp, _together([backend.ops.norm(part.grads) for part in parts])
    factor = xp.minimum(max_norm / xp.maximum(norm, max_norm), 1.0)
    for part in parts:
        flat = part.grads.flat
        flat *= factor.astype(flat.dtype)
    return norm


def clip_grad_value(model: Any, limit: float) -> None:
    """Clips every gradient to [-limit, limit], limit > 0, infinite ones too.

    On NumPy NaN raises FloatingPointError with the gradient's name, and nothing has changed then.  On CUDA it stays, for
    the optimiser to find.
    """
    positive("limit", limit)
    parts = _quiet(model)
    for part in parts:
        backend.ops.check_finite(part.grads, allow_inf=True)
    for part in parts:
        flat = part.grads.flat
        backend.xp.clip(flat, -float(limit), float(limit), out=flat)


def quieten(model: Trainable) -> None:
    """Sets the gradients of what is frozen to 0."""
    for start, stop in model.params.frozen_ranges():
        model.grads.flat[start:stop] = 0


def _quiet(model: Any) -> list[Trainable]:
    parts = pieces(model)
    for part in parts:
        quieten(part)
    return parts


def _together(norms: list) -> Any:
    return functools.reduce(backend.xp.hypot, norms)
