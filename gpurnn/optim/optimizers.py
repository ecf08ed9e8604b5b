"""Optimisers with PyTorch's formulas and defaults; what they have in common is in `optimizer`."""

import math
from typing import Any

import numpy as np

from gpurnn.arguments import at_least_0, positive, probability, switch
from gpurnn.model import together
from gpurnn.optim.optimizer import Optimizer


def _betas(name: str, betas: Any) -> tuple[float, float]:
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise ValueError(f"{name}: expected two numbers, got {betas!r:.80}")
    return probability(f"{name}[0]", betas[0]), probability(f"{name}[1]", betas[1])


class SGD(Optimizer):
    """Gradient descent: param -= lr (grad + weight_decay param), optionally with momentum.

    momentum: buf = momentum buf + grad takes the gradient's place (Sutskever et al. 2013, in PyTorch's form: lr is
    outside of buf); nesterov: grad + momentum buf does.
    Raises ValueError for negative settings and for nesterov without momentum.
    """

    rule = "sgd"
    settings = Optimizer.settings | {"momentum": at_least_0, "nesterov": switch}

    def __init__(
        self,
        model: Any,
        lr: float,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        *,
        groups: Any = None,
    ):
        model = together(model)
        self.momentum = at_least_0("momentum", momentum)
        self.nesterov = switch("nesterov", nesterov)
        if nesterov and momentum == 0:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum 0")
        super().__init__(model, lr, weight_decay, ("momentum_buffer",) if momentum else (), groups)

    def numbers(self) -> tuple[tuple[float, float], tuple[float, float, float]]:
        return (self.momentum, 0.0), (0.0, 0.0, 0.0)

    def options(self) -> dict[str, bool]:
        return {"momentum": bool(self.moments), "nesterov": self.nesterov}


class RMSprop(Optimizer):
    """Divides the gradient by the root of its running mean square (Hinton 2012; centered: minus its mean, Graves 2013).

    param -= lr grad / (sqrt(square_avg) + eps), or the same through a momentum buffer.
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
    """

    rule = "rmsprop"
    settings = Optimizer.settings | {"alpha": probability, "eps": positive, "momentum": at_least_0, "centered": switch}

    def __init__(
        self,
        model: Any,
        lr: float = 0.01,
        alpha: float = 0.99,
        eps: float = 1e-8,
        momentum: float = 0.0,
        centered: bool = False,
        weight_decay: float = 0.0,
        *,
        groups: Any = None,
    ):
        model = together(model)
        self.alpha, self.eps = probability("alpha", alpha), _eps(eps, 0.0, model.params.dtype)
        self.momentum = at_least_0("momentum", momentum)
        self.centered = switch("centered", centered)
        moments = ["square_avg"] + ["grad_avg"] * bool(centered) + ["momentum_buffer"] * bool(momentum)
        super().__init__(model, lr, weight_decay, tuple(moments), groups)

    def numbers(self) -> tuple[tuple[float, float], tuple[float, float, float]]:
        return (self.alpha, self.momentum), (0.0, 0.0, self.eps)

    def options(self) -> dict[str, bool]:
        return {"centered": self.centered, "momentum": bool(self.momentum)}


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): m and v, running means of grad and grad^2, corrected for starting at 0.

    param -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).  weight_decay is added to the gradient (L2).
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
    """

    rule = "adam"
    settings = Optimizer.settings | {"betas": _betas, "eps": positive}

    decoupled = False

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        groups: Any = None,
    ):
        model = together(model)
        self.betas = _betas("betas", betas)
        self.eps = _eps(eps, self.betas[1], model.params.dtype)
        super().__init__(model, lr, weight_decay, ("exp_avg", "exp_avg_sq"), groups)

    def numbers(self) -> tuple[tuple[float, float], tuple[float, float, float]]:
        return self.betas, (*self.betas, self.eps)

    def options(self) -> dict[str, bool]:
        return {"decoupled": self.decoupled}


class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019): param *= 1 - lr weight_decay comes first."""

    decoupled = True

    def __init__(
        self,
        model: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        groups: Any = None,
    ):
        super().__init__(model, lr, betas, eps, weight_decay, groups=groups)


def _eps(eps: Any, beta: float, dtype: np.dtype) -> float:
    """`eps`, or the least that does not vanish in `dtype`, where it is multiplied by sqrt(1 - beta) or more."""
    return max(positive("eps", eps), float(np.finfo(dtype).tiny) / math.sqrt(1 - beta))
