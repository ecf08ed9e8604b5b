"""Optimisers with PyTorch's formulas and defaults.

They work on any object with `.params` and `.grads`, two `Parameters` of the same shapes, and on the two flat
buffers behind them, in place.  They are looked up anew at every call: a layer's are re-bound when it joins a model.

An update is bound by memory: NumPy passes over the data once for every operation.  So a buffer is taken in blocks that
stay in cache between the passes, and the only temporaries are two arrays of one block.  Passes per block, with weight
decay in brackets: SGD 2 (+2), RMSprop 9 (+2), centered 15 (+2), Adam 12 (+2), AdamW 13; momentum takes 2 more, Nesterov
another 2; the gradient check is 2 passes that only read.  One more copies what is finite into the parameters.

No finite gradient and no setting brings a value that is not finite into a parameter.  A gradient whose square would
overflow counts, for Adam and RMSprop, as the largest whose square does not.  A parameter whose update is not finite keeps
its value, and FloatingPointError names it.  What NumPy does about underflow, `np.errstate`, has no say in an update.

On CUDA one kernel reads and writes each buffer once, and nothing waits: the count of updates and the learning rate lie on
the device, and a gradient that is not finite lets nothing change and is raised by `gpurnn.synchronize`.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import at_least_0, mapping, positive, probability, switch, trained
from gpurnn.clipping import all_finite, grad_norm, raise_where_not_finite
from gpurnn.cuda import faults
from gpurnn.parameters import Array, Model, Parameters

BLOCK = 1 << 16  # values: some of the L2 cache
SQUARES = ("exp_avg_sq", "square_avg")  # moments that are means of squares
MOST_STEPS = 1 << 62


class Optimizer:
    """What the optimisers share.  `lr` is a plain attribute, free to be set: `opt.lr = base * schedule(step)`."""

    def __init__(self, model: Model, lr: float, weight_decay: float, moments: tuple[str, ...]):
        self.model = model
        params = model.params
        self._most = float(np.finfo(params.dtype).max)  # of settings beyond it, 0 times one is 0 and not NaN
        self._limit = math.sqrt(self._most) / 2  # of a gradient whose square is to be finite
        if backend.name == "cuda":
            from gpurnn.cuda.launches import Clock

            self._clock = Clock(params.dtype)
        else:
            self._steps = 0
            self._flagged = False
            self._work = np.empty((2, min(params.flat.size, BLOCK)), params.dtype)
        self.lr = lr
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        self.moments = {name: Parameters(params.shapes, params.dtype) for name in moments}

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = at_least_0("lr", value)
        if backend.name == "cuda":
            self._clock.lr.fill(self._lr)

    @property
    def steps(self) -> int:
        """The updates done; on CUDA the device has to be asked, which waits."""
        return int(self._clock.steps[0]) if backend.name == "cuda" else self._steps

    def step(self) -> None:
        """Updates `model.params` from `model.grads`, which it leaves as they are.

        A gradient that is not finite raises FloatingPointError with its name, and nothing has changed then; on CUDA
        `gpurnn.synchronize` raises it.  A parameter whose update is not finite raises it as well, and keeps its value.
        """
        if backend.name == "cuda":
            grad_norm(self.model)
        elif not all_finite(self.model.grads.flat):
            raise_where_not_finite(self.model.grads)
        self.update()

    def update(self, loss: Any = None) -> None:
        """`step` without a look at the gradients, for whoever has taken their norm, which looks at all of them.

        loss: a float64 scalar; where it is not finite, FloatingPointError says so and nothing has changed (on CUDA
        `gpurnn.synchronize` raises it).
        """
        params, grads = self.model.params, self.model.grads
        if backend.name == "cuda":
            self._on_device(params, grads, [moment.flat for moment in self.moments.values()], loss)
            return
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)}")
        self._steps += 1
        moments = [moment.flat for moment in self.moments.values()]
        block = max(self._work.shape[1], 1)
        lost = None  # the first place whose update is not finite
        with np.errstate(under="ignore", over="call", invalid="call", divide="call", call=self._flag):
            for start in range(0, params.flat.size, block):
                cut = slice(start, start + block)
                param = params.flat[cut]
                work, spare = self._work[:, : param.size]
                self._update(param, grads.flat[cut], work, spare, *(moment[cut] for moment in moments))
                at = self._move(param, work)
                lost = start + at if lost is None and at is not None else lost
        if lost is not None:
            raise faults.wrong_update(params.places, lost)

    def _flag(self, kind: str, flags: int) -> None:
        """NumPy's call where an operation overflowed or had no number for an answer: from then on updates look closely."""
        self._flagged = True

    def _move(self, param: Array, step: Array) -> int | None:
        """param -= step, but where that is not finite, whose first place it returns.  Overwrites step."""
        moved = np.subtract(param, step, out=step)
        if not self._flagged:
            param[...] = moved
            return None
        good = np.isfinite(moved)
        np.copyto(param, moved, where=good)
        return None if good.all() else int(np.argmin(good))

    def _average_square(self, mean: Array, grad: Array, keep: float, work: Array, spare: Array) -> Array:
        """mean = keep mean + (1 - keep) grad^2; returns grad, in `spare` where it had to be limited."""
        np.multiply(grad, grad, out=work)
        if self._flagged:
            grad = np.clip(grad, -self._limit, self._limit, out=spare)
            np.multiply(grad, grad, out=work)
        work *= 1 - keep
        mean *= keep
        mean += work
        if self._flagged:
            np.minimum(mean, self._most, out=mean)
        return grad

    def _on_device(self, params: Parameters, grads: Parameters, moments: list[Array], loss: Any) -> None:
        """The same by one kernel: `self._clock.update`."""
        raise NotImplementedError

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        """Updates one block of the moments; leaves in `work` what the parameters lose.  Overwrites spare, never grad."""
        raise NotImplementedError

    def _decayed(self, param: Array, grad: Array, spare: Array) -> Array:
        """grad + weight_decay param, in `spare`; grad itself where there is no decay."""
        if self.weight_decay == 0:
            return grad
        np.multiply(param, min(self.weight_decay, self._most), out=spare)
        spare += grad
        return spare

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
        if backend.name == "cuda":
            self._clock.steps.fill(int(steps))
        else:
            self._steps = int(steps)

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
        trained(model)
        self.momentum = at_least_0("momentum", momentum)
        self.nesterov = switch("nesterov", nesterov)
        if nesterov and momentum == 0:
            raise ValueError("nesterov: expected momentum > 0 with it, got momentum 0")
        super().__init__(model, lr, weight_decay, ("momentum_buffer",) if momentum else ())

    def _on_device(self, params: Parameters, grads: Parameters, moments: list[Array], loss: Any) -> None:
        numbers, options = (
            (self.momentum, 0.0, self.weight_decay),
            {"momentum": bool(moments), "nesterov": self.nesterov},
        )
        self._clock.update("sgd", params, grads, moments, numbers, (0.0, 0.0, 0.0), loss, **options)

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        direction = self._decayed(param, grad, spare)
        for buffer in moments:  # one, or none without momentum
            buffer *= self.momentum
            buffer += direction
            if self.nesterov:
                np.multiply(buffer, self.momentum, out=work)
                work += direction
                direction = work
            else:
                direction = buffer
        np.multiply(direction, min(self.lr, self._most), out=work)


class RMSprop(Optimizer):
    """Divides the gradient by the root of its running mean square (Hinton 2012; centered: minus its mean, Graves 2013).

    param -= lr grad / (sqrt(square_avg) + eps), or the same through a momentum buffer.
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
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
        trained(model)
        self.alpha, self.eps = probability("alpha", alpha), _eps(eps, 0.0, model.params.dtype)
        self.momentum = at_least_0("momentum", momentum)
        self.centered = switch("centered", centered)
        moments = ["square_avg"] + ["grad_avg"] * bool(centered) + ["momentum_buffer"] * bool(momentum)
        super().__init__(model, lr, weight_decay, tuple(moments))

    def _on_device(self, params: Parameters, grads: Parameters, moments: list[Array], loss: Any) -> None:
        numbers, corrections = (self.alpha, self.momentum, self.weight_decay), (0.0, 0.0, self.eps)
        options = {"centered": bool(self.centered), "momentum": bool(self.momentum)}
        self._clock.update("rmsprop", params, grads, moments, numbers, corrections, loss, **options)

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        named = dict(zip(self.moments, moments, strict=True))
        square_avg = named["square_avg"]
        grad = self._average_square(square_avg, self._decayed(param, grad, spare), self.alpha, work, spare)
        if self.centered:
            _average(named["grad_avg"], grad, self.alpha, work)
            np.multiply(named["grad_avg"], named["grad_avg"], out=work)
            np.subtract(square_avg, work, out=work)
            np.maximum(work, 0, out=work)  # a variance, but rounding can take that of a steady gradient below 0
            np.sqrt(work, out=work)
        else:
            np.sqrt(square_avg, out=work)
        work += self.eps
        np.divide(grad, work, out=work)
        if self.momentum:
            buffer = named["momentum_buffer"]
            buffer *= self.momentum
            buffer += work
            np.multiply(buffer, min(self.lr, self._most), out=work)
        else:
            work *= min(self.lr, self._most)


class Adam(Optimizer):
    """Adam (Kingma and Ba 2015): m and v, running means of grad and grad^2, corrected for starting at 0.

    param -= lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps).  weight_decay is added to the gradient (L2).
    Raises ValueError for settings out of range; eps must be > 0, for a gradient that is always 0 would give 0/0, and
    counts as the least number that the parameters' type does not lose, where it is smaller.
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
        trained(model)
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ValueError(f"betas: expected two numbers, got {betas!r:.80}")
        self.betas = probability("betas[0]", betas[0]), probability("betas[1]", betas[1])
        self.eps = _eps(eps, self.betas[1], model.params.dtype)
        super().__init__(model, lr, weight_decay, ("exp_avg", "exp_avg_sq"))

    def _on_device(self, params: Parameters, grads: Parameters, moments: list[Array], loss: Any) -> None:
        numbers = (*self.betas, self.weight_decay)
        self._clock.update(
            "adam", params, grads, moments, numbers, (*self.betas, self.eps), loss, decoupled=self.decoupled
        )

    def _update(self, param: Array, grad: Array, work: Array, spare: Array, *moments: Array) -> None:
        exp_avg, exp_avg_sq = moments
        beta1, beta2 = self.betas
        lost = self.lr * self.weight_decay if self.decoupled else 0.0
        if self.decoupled and lost <= 2:
            param *= 1 - lost
        elif not self.decoupled:
            grad = self._decayed(param, grad, spare)
        grad = self._average_square(exp_avg_sq, grad, beta2, work, spare)
        _average(exp_avg, grad, beta1, work)
        # sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c): the division by sqrt(c) goes into the step size.
        root = math.sqrt(1 - beta2**self._steps)
        np.sqrt(exp_avg_sq, out=work)
        work += self.eps * root
        np.divide(exp_avg, work, out=work)
        work *= min(self.lr * root / (1 - beta1**self._steps), self._most)
        if lost > 2:  # it may overflow
            np.multiply(param, min(lost, self._most), out=spare)
            work += spare


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


def _average(mean: Array, value: Array, keep: float, work: Array) -> None:
    """mean += (1 - keep) (value - mean)."""
    np.subtract(value, mean, out=work)
    work *= 1 - keep
    mean += work
