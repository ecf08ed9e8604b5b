"""Optimisers with PyTorch's formulas and defaults.

They work on any object with `.params` and `.grads`, two `Parameters` of the same shapes, and on the two flat
buffers behind them, in place.  They are looked up anew at every call: a layer's are re-bound when it joins a model.

No finite gradient and no setting brings a value that is not finite into a parameter.  A gradient whose square would
overflow counts, for Adam and RMSprop, as the largest whose square does not.  A parameter whose update is not finite keeps
its value, and FloatingPointError names it.  What NumPy does about underflow, `np.errstate`, has no say in an update.

On CUDA nothing waits: a gradient that is not finite lets nothing change and is raised by `gpurnn.synchronize`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import at_least_0, mapping, positive, probability, switch, trained
from gpurnn.cuda import faults
from gpurnn.parameters import Model, Parameters
from gpurnn.types import Array

SQUARES = ("exp_avg_sq", "square_avg")  # moments that are means of squares
MOST_STEPS = 1 << 62


class Optimizer:
    """What the optimisers share.  `lr` is a plain attribute, free to be set: `opt.lr = base * schedule(step)`.

    rule: its name in `cpu.updates` and `kernels.optim`, which take the settings from here.
    """

    rule: str

    def __init__(self, model: Model, lr: float, weight_decay: float, moments: tuple[str, ...]):
        self.model = model
        params = model.params
        self._updates = backend.ops.Updates(params)
        self.lr = lr
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        self.moments = {name: Parameters(params.shapes, params.dtype) for name in moments}

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = self._updates.lr = at_least_0("lr", value)

    @property
    def steps(self) -> int:
        """The updates done; on CUDA the device has to be asked, which waits."""
        return self._updates.steps

    def step(self) -> None:
        """Updates `model.params` from `model.grads`, which it leaves as they are.

        A gradient that is not finite raises FloatingPointError with its name, and nothing has changed then; on CUDA
        `gpurnn.synchronize` raises it.  A parameter whose update is not finite raises it as well, and keeps its value.
        """
        backend.ops.check_finite(self.model.grads)
        self.update()

    def update(self, loss: Any = None) -> None:
        """`step` without a look at the gradients, for whoever has taken their norm, which looks at all of them.

        loss: a float64 scalar; where it is not finite, FloatingPointError says so and nothing has changed (on CUDA
        `gpurnn.synchronize` raises it).
        """
        self._updates.run(self.rule, self, self.model, self.moments, loss)

    def numbers(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """As `kernels.optim` takes them: the rule's a, b and decay; beta1 and beta2 (0: none), and eps."""
        raise NotImplementedError

    def options(self) -> dict[str, bool]:
        """The constants of the rule's kernel."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, np.ndarray]:
        """Moments by parameter, such as "exp_avg.head.weight", and "step" (int64, shape ()); copies on the host.

        Raises what `gpurnn.synchronize` raises.
        """
        faults.check()
        state = {name: np.array(backend.to_numpy(view)) for name, view in self._named().items()}
        return {"step": np.array(self.steps, np.int64), **state}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, bit for bit.  Nothing is written unless all of it fits.

        Raises KeyError where names are missing or unknown; ValueError where a shape differs, a value is not finite, a mean
        of squares is negative, or "step" is; TypeError where a value is no array of numbers.
        """
        mapping(values)
        views = self._named()
        expected = ["step", *views]
        missing = [name for name in expected if name not in values]
        unknown = [name for name in values if name not in expected]
        if missing or unknown:
            raise KeyError(f"expected the names {expected}; missing {missing}, unknown {unknown}")
        steps = backend.to_numpy(backend.asarray(values["step"], np.int64, "step"))
        if steps.shape != () or steps < 0 or steps > MOST_STEPS:
            below = f" and at most {MOST_STEPS}" if (steps > MOST_STEPS).any() else ""
            raise ValueError(f"step: expected one integer >= 0{below}, got {steps.tolist()}")
        arrays = {}
        for name, view in views.items():
            with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
                arrays[name] = array = backend.asarray(values[name], view.dtype, name)
            if array.shape != view.shape:
                raise ValueError(f"{name}: expected {view.shape}, got {array.shape}")
            if not bool(backend.xp.isfinite(array).all()):
                raise ValueError(f"{name}: expected finite {view.dtype} values, got some that are not")
            if name.partition(".")[0] in SQUARES and bool((array < 0).any()):
                raise ValueError(f"{name}: expected values from 0, means of squares, got {array.min()}")
        for name, array in arrays.items():
            views[name][...] = array
        self._updates.steps = int(steps)

    def _named(self) -> dict[str, Array]:
        """Views of all moments, under the names the parameters have now."""
        return {f"{m}.{name}": view for m, moment in self.moments.items() for name, view in moment.items()}


class SGD(Optimizer):
    """Gradient descent: param -= lr (grad + weight_decay param), optionally with momentum.

    momentum: buf = momentum buf + grad takes the gradient's place (Sutskever et al. 2013, in PyTorch's form: lr is
    outside of buf); nesterov: grad + momentum buf does.
    Raises ValueError for negative settings and for nesterov without momentum.
    """

    rule = "sgd"

    def __init__(
        self, model: Model, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ):
        trained(model)
        self.momentum = at_least_0("momentum", momentum)
        self.nesterov = switch("nesterov", nesterov)
        if nesterov and momentum == 0:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum 0")
        super().__init__(model, lr, weight_decay, ("momentum_buffer",) if momentum else ())

    def numbers(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return (self.momentum, 0.0, self.weight_decay), (0.0, 0.0, 0.0)

    def options(self) -> dict[str, bool]:
        return {"momentum": bool(self.moments), "nesterov": self.nesterov}


class RMSprop(Optimizer):
    """Divides the gradient by the root of its running mean square (Hinton 2012; centered: minus its mean, Graves 2013).

    param -= lr grad / (sqrt(square_avg) + eps), or the same through a momentum buffer.
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
    """

    rule = "rmsprop"

    def __init__(
        self,
        model: Model,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        weight_decay: float = 0.0,
    ):
        trained(model)
        self.alpha, self.eps = probability("alpha", alpha), _eps(eps, 0.0, model.params.dtype)
        self.momentum = at_least_0("momentum", momentum)
        self.centered = switch("centered", centered)
        moments = ["square_avg"] + ["grad_avg"] * bool(centered) + ["momentum_buffer"] * bool(momentum)
        super().__init__(model, lr, weight_decay, tuple(moments))

    def numbers(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return (self.alpha, self.momentum, self.weight_decay), (0.0, 0.0, self.eps)

    def options(self) -> dict[str, bool]:
        return {"centered": self.centered, "momentum": bool(self.momentum)}


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): m and v, running means of grad and grad^2, corrected for starting at 0.

    param -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).  weight_decay is added to the gradient (L2).
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
    """

    rule = "adam"

    decoupled = False

    def __init__(
        self,
        model: Model,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        trained(model)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r:.80}")
        self.betas = probability("betas[0]", betas[0]), probability("betas[1]", betas[1])
        self.eps = _eps(eps, self.betas[1], model.params.dtype)
        super().__init__(model, lr, weight_decay, ("exp_avg", "exp_avg_sq"))

    def numbers(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        return (*self.betas, self.weight_decay), (*self.betas, self.eps)

    def options(self) -> dict[str, bool]:
        return {"decoupled": self.decoupled}


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): param *= 1 - lr weight_decay comes first."""

    decoupled = True

    def __init__(
        self,
        model: Model,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ):
        super().__init__(model, lr, betas, eps, weight_decay)


def _eps(eps: Any, beta: float, dtype: np.dtype) -> float:
    """`eps`, or the least that does not vanish in `dtype`, where it is multiplied by sqrt(1 - beta) or more."""
    return max(positive("eps", eps), float(np.finfo(dtype).tiny) / math.sqrt(1 - beta))
