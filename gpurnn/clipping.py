"""The norm of all gradients together, and clipping by it or by value; each works on the flat buffer, in place.

On CUDA nothing here waits: a norm is a float64 scalar of the device, and a gradient that is not finite is raised by
`gpurnn.synchronize`.
"""

import math
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import positive, trained
from gpurnn.parameters import Array, Model, Parameters

SUM_BLOCK = 1 << 13  # values: OpenBLAS starts its threads for longer dot products, which costs more than it gains


def grad_norm(model: Model) -> Any:
    """The L2 norm of all gradients together, summed in float64; large and tiny gradients neither overflow nor vanish.

    A float; on CUDA a CuPy array of shape ().  Raises FloatingPointError with the name of the first gradient that is not
    finite, on CUDA by `gpurnn.synchronize`.
    """
    trained(model)
    if backend.name == "cuda":
        from gpurnn.cuda import launches

        return launches.norm(model.grads)[0]
    squares = _sum_of_squares(model.grads.flat)
    if 1e-200 < squares < math.inf:
        return math.sqrt(squares)
    raise_where_not_finite(model.grads)
    peak = max((float(abs(grad).max()) for grad in model.grads.values() if grad.size), default=0.0)
    if peak == 0:
        return 0.0
    return peak * math.sqrt(_sum_of_squares(model.grads.flat, peak))


def clip_grad_norm(model: Model, max_norm: float) -> Any:
    """Scales all gradients so that their common L2 norm is at most `max_norm` > 0; returns the norm before.

    (Pascanu, Mikolov and Bengio 2013.)  Norm and errors are those of `grad_norm`; where a gradient is not finite nothing
    changes.
    """
    max_norm = positive("max_norm", max_norm)
    trained(model)
    if backend.name == "cuda":
        from gpurnn.cuda import launches

        found = launches.norm(model.grads, max_norm)
        launches.scale(model.grads, found)
        return found[0]
    norm = grad_norm(model)
    if norm > max_norm:
        flat = model.grads.flat
        with np.errstate(all="ignore"):  # what underflows is 0, whatever the caller wants to hear of
            flat *= max_norm / norm
    return norm


def clip_grad_value(model: Model, limit: float) -> None:
    """Clips every gradient to [-limit, limit], limit > 0, infinite ones too.

    On NumPy NaN raises FloatingPointError with the gradient's name, and nothing has changed then.  On CUDA it stays, for
    the optimiser to find.
    """
    positive("limit", limit)
    trained(model)
    flat = model.grads.flat
    if backend.name == "numpy" and not all_finite(flat):
        raise_where_not_finite(model.grads, allow_inf=True)
    backend.xp.clip(flat, -float(limit), float(limit), out=flat)


def _sum_of_squares(flat: Array, unit: float = 1.0) -> float:
    """Sum of (flat / unit)^2 in float64: not finite where a value is not, or where float64's squares overflow."""
    total = 0.0
    work: Array = np.empty(min(flat.size, SUM_BLOCK))
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, SUM_BLOCK):
            block = flat[start : start + SUM_BLOCK]
            wide = work[: block.size]
            wide[...] = block
            if unit != 1.0:
                wide /= unit
            total += float(wide.dot(wide))
    return total


def all_finite(flat: Array) -> bool:
    """Whether all values are; without a temporary, for minimum and maximum hand NaN on."""
    return not flat.size or (math.isfinite(flat.max()) and math.isfinite(flat.min()))


def raise_where_not_finite(grads: Parameters, allow_inf: bool = False) -> None:
    for name, grad in grads.items():
        bad = np.isnan(grad) if allow_inf else ~np.isfinite(grad)
        count = int(bad.sum())
        if count:
            first = float(grad[bad][0])
            raise FloatingPointError(
                f"gradient of {name}: expected finite values, got {first} ({count} of {grad.size})"
            )
