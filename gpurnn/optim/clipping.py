"""The norm of all gradients together, and clipping by it or by value; each works on the flat buffer, in place.

On CUDA nothing here waits: a norm is a float64 scalar of the device, and a gradient that is not finite is raised by
`gpurnn.synchronize`.
"""

from typing import Any

from gpurnn import backend
from gpurnn.arguments import positive, trained
from gpurnn.parameters import Model


def grad_norm(model: Model) -> Any:
    """The L2 norm of all gradients together, summed in float64; large and tiny gradients neither overflow nor vanish.

    A float; on CUDA a CuPy array of shape ().  Raises FloatingPointError with the name of the first gradient that is not
    finite, on CUDA by `gpurnn.synchronize`.
    """
    return backend.ops.norm(trained(model).grads)


def clip_grad_norm(model: Model, max_norm: float) -> Any:
    """Scales all gradients so that their common L2 norm is at most `max_norm` > 0; returns the norm before.

    (Pascanu, Mikolov and Bengio 2013.)  Norm and errors are those of `grad_norm`; where a gradient is not finite nothing
    changes.
    """
    return backend.ops.clip_norm(trained(model).grads, positive("max_norm", max_norm))


def clip_grad_value(model: Model, limit: float) -> None:
    """Clips every gradient to [-limit, limit], limit > 0, infinite ones too.

    On NumPy NaN raises FloatingPointError with the gradient's name, and nothing has changed then.  On CUDA it stays, for
    the optimiser to find.
    """
    positive("limit", limit)
    backend.ops.check_finite(trained(model).grads, allow_inf=True)
    flat = model.grads.flat
    backend.xp.clip(flat, -float(limit), float(limit), out=flat)
