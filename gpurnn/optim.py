"""Optimisers with PyTorch's formulas and defaults.

They work on any object with `.params` and `.grads`, two `Parameters` of the same shapes, and on the two flat
buffers behind them, in place.  They are looked up anew at every call: a layer's are re-bound when it joins a model.

An update is bound by memory: NumPy passes over the data once for every operation.  So a buffer is taken in blocks that
stay in cache between the passes, and the only temporaries are two arrays of one block.  Passes per block, with weight
decay in brackets: SGD 2 (+2), RMSprop 9 (+2), centered 15 (+2), Adam 12 (+2), AdamW 13; momentum takes 2 more, Nesterov
another 2; the gradient check is 2 passes that only read.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import at_least_0, positive, probability
from gpurnn.clipping import all_finite, raise_where_not_finite
from gpurnn.parameters import Array, Model, Parameters

BLOCK = {"numpy": 1 << 16, "cuda": 1 << 22}  # values: some of the L2 cache; enough to hide a kernel's launch


class Optimizer:
    """What the optimisers share.  `lr` is a plain attribute, free to be set: `opt.lr = base * schedule(step)`."""

    def __init__(self, model: Model, lr: float, weight_decay: float, moments: tuple[str, ...]):
        self.model = model
        self.lr = at_least_0("lr", lr)
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        self.steps = 0
        params = model.params
        self.moments = {name: Parameters(params.shapes, params.dtype) for name in moments}
        self._work = backend.xp.empty((2, min(params.flat.size, BLOCK[backend.name])), params.dtype)

    def step(self) -> None:
        """Updates `model.params` from `model.grads`, which it leaves as they are.

        On NumPy a gradient that is not finite raises FloatingPointError with its name, and nothing has changed then.
        """
        self.lr = at_least_0("lr", self.lr)
        params, grads = self.model.params.flat, self.model.grads.flat
        # Looking would make the host wait for a device; there the CUDA engine's error flag takes this check's place.
        if backend.name == "numpy" and not all_finite(grads):
            raise_where_not_finite(self.model.grads)
        self.steps += 1
        moments = [moment.flat for moment in self.moments.values()]
        block = max(self._work.shape[1], 1)
        for start in range(0, params.size, block):
            cut = slice(start, start + block)
            param = params[cut]
            work, spare = self._work[:, : param.size]
            self._update(param, grads[cut], work, spare, *(moment[cut] for moment in moments))

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        """Updates one block of the parameters and of the moments.  Overwrites work and spare, never grad."""
        raise NotImplementedError

    def _decayed(self, param: Array, grad: Array, spare: Array) -> Array:
        """grad + weight_decay param, in `spare`; grad itself where there is no decay."""
        if self.weight_decay == 0:
            return grad
        backend.xp.multiply(param, self.weight_decay, out=spare)
        spare += grad
        return spare

    def state_dict(self) -> dict[str, np.ndarray]:
        """Moments by parameter, such as "exp_avg.head.weight", and "step" (int64, shape ()); copies on the host."""
        state = {name: np.array(backend.to_numpy(view)) for name, view in self._named().items()}
        return {"step": np.array(self.steps, np.int64), **state}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, bit for bit.  Nothing is written unless all of it fits.

        Raises KeyError where names are missing or unknown; ValueError where a shape differs, a value is NaN or "step"
        is negative; TypeError where a value is no array of numbers.
        """
        views = self._named()
        expected = ["step", *views]
        missing = [name for name in expected if name not in values]
        unknown = [name for name in values if name not in expected]
        if missing or unknown:
            raise KeyError(f"expected the names {expected}; missing {missing}, unknown {unknown}")
        steps = backend.to_numpy(backend.asarray(values["step"], np.int64, "step"))
        if steps.shape != () or steps < 0:
            raise ValueError(f"step: expected one integer >= 0, got {steps.tolist()}")
        arrays = {}
        for name, view in views.items():
            arrays[name] = array = backend.asarray(values[name], view.dtype, name)
            if array.shape != view.shape:
                raise ValueError(f"{name}: expected {view.shape}, got {array.shape}")
            # inf may be honest, a squared gradient that overflowed; NaN never is, and would reach the parameters.
            if bool(backend.xp.isnan(array).any()):
                raise ValueError(f"{name}: expected numbers, got some NaN")
        for name, array in arrays.items():
            views[name][...] = array
        self.steps = int(steps)

    def _named(self) -> dict[str, Array]:
        """Views of all moments, under the names the parameters have now."""
        return {f"{m}.{name}": view for m, moment in self.moments.items() for name, view in moment.items()}


class SGD(Optimizer):
    """Gradient descent: param -= lr (grad + weight_decay param), optionally with momentum.

    momentum: buf = momentum buf + grad takes the gradient's place (Sutskever et al. 2013, in PyTorch's form: lr is
    outside of buf); nesterov: grad + momentum buf does.
    Raises ValueError for negative settings and for nesterov without momentum.
    """

    def __init__(
        self, model: Model, lr: float, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0
    ):
        self.momentum = at_least_0("momentum", momentum)
        self.nesterov = nesterov
        if nesterov and momentum == 0:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum 0")
        super().__init__(model, lr, weight_decay, ("momentum_buffer",) if momentum else ())

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        direction = self._decayed(param, grad, spare)
        for buffer in moments:  # one, or none without momentum
            buffer *= self.momentum
            buffer += direction
            if self.nesterov:
                backend.xp.multiply(buffer, self.momentum, out=work)
                work += direction
                direction = work
            else:
                direction = buffer
        backend.xp.multiply(direction, self.lr, out=work)
        param -= work


class RMSprop(Optimizer):
    """Divides the gradient by the root of its running mean square (Hinton 2012; centered: minus its mean, Graves 2013).

    param -= lr grad / (sqrt(square_avg) + eps), or the same through a momentum buffer.
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0.
    """

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
        self.alpha, self.eps = probability("alpha", alpha), positive("eps", eps)
        self.momentum, self.centered = at_least_0("momentum", momentum), centered
        moments = ["square_avg"] + ["grad_avg"] * bool(centered) + ["momentum_buffer"] * bool(momentum)
        super().__init__(model, lr, weight_decay, tuple(moments))

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        xp = backend.xp
        named = dict(zip(self.moments, moments, strict=True))
        square_avg = named["square_avg"]
        grad = self._decayed(param, grad, spare)
        _average_square(square_avg, grad, self.alpha, work)
        if self.centered:
            _average(named["grad_avg"], grad, self.alpha, work)
            xp.multiply(named["grad_avg"], named["grad_avg"], out=work)
            xp.subtract(square_avg, work, out=work)
            xp.maximum(work, 0, out=work)  # a variance, but rounding can take that of a steady gradient below 0
            xp.sqrt(work, out=work)
        else:
            xp.sqrt(square_avg, out=work)
        work += self.eps
        xp.divide(grad, work, out=work)
        if self.momentum:
            buffer = named["momentum_buffer"]
            buffer *= self.momentum
            buffer += work
            xp.multiply(buffer, self.lr, out=work)
        else:
            work *= self.lr
        param -= work


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): m and v, running means of grad and grad^2, corrected for starting at 0.

    param -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).  weight_decay is added to the gradient (L2).
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0.
    """

    decoupled = False

    def __init__(
        self,
        model: Model,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas}")
        self.betas = probability("betas[0]", betas[0]), probability("betas[1]", betas[1])
        self.eps = positive("eps", eps)
        super().__init__(model, lr, weight_decay, ("exp_avg", "exp_avg_sq"))

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        exp_avg, exp_avg_sq = moments
        beta1, beta2 = self.betas
        if self.decoupled:
            if self.weight_decay:
                param *= 1 - self.lr * self.weight_decay
        else:
            grad = self._decayed(param, grad, spare)
        _average(exp_avg, grad, beta1, work)
        _average_square(exp_avg_sq, grad, beta2, work)
        # sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c): the division by sqrt(c) goes into the step size.
        root = math.sqrt(1 - beta2**self.steps)
        backend.xp.sqrt(exp_avg_sq, out=work)
        work += self.eps * root
        backend.xp.divide(exp_avg, work, out=work)
        work *= self.lr * root / (1 - beta1**self.steps)
        param -= work


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


def _average(mean: Array, value: Array, keep: float, work: Array) -> None:
    """mean += (1 - keep) (value - mean)."""
    backend.xp.subtract(value, mean, out=work)
    work *= 1 - keep
    mean += work


def _average_square(mean: Array, value: Array, keep: float, work: Array) -> None:
    """mean = keep mean + (1 - keep) value^2."""
    backend.xp.multiply(value, value, out=work)
    work *= 1 - keep
    mean *= keep
    mean += work
