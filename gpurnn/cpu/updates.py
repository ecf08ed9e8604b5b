"""Optimisers' updates on NumPy: the rules by name, as `kernels.optim` has them for a device.

An update is bound by memory: NumPy passes over the data once for every operation.  So a buffer is taken in blocks that
stay in cache between the passes, and the only temporaries are two arrays of one block.  Passes per block, with weight
decay in brackets: SGD 2 (+2), RMSprop 9 (+2), centered 15 (+2), Adam 12 (+2), AdamW 13; momentum takes 2 more, Nesterov
another 2; one more copies what is finite into the parameters.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn.arguments import wrong_update
from gpurnn.cpu import costs
from gpurnn.parameters import Parameters
from gpurnn.parameters.buffers import Portion


class Updates:
    """The updates of one optimiser: how many there were, the learning rate, and memory for a block of the next.

    steps: the updates done.  lr: a float.  rate, decay, clock: of the portion under way its learning rate, weight decay and
    number of updates.
    """

    rate, decay, clock = 0.0, 0.0, 0

    def __init__(self, params: Parameters):
        self.steps, self.lr = 0, 0.0
        self.most = float(np.finfo(params.dtype).max)  # of settings beyond it, 0 times one is 0 and not NaN
        self.limit = math.sqrt(self.most) / 2  # of a gradient whose square is to be finite
        self._work = np.empty((2, min(params.flat.size, costs.UPDATE_VALUES)), params.dtype)
        self._portions: list[Portion] = []
        self._flagged = False  # whether an operation ever overflowed: from then on updates look closely

    def take(self, portions: list[Portion], params: Parameters) -> None:
        """From now on an update is one of these parts of the buffer."""
        self._portions = portions

    def run(self, rule: str, settings: Any, model: Any, moments: dict[str, Parameters], loss: Any) -> None:
        """One update of model.params from model.grads by `rule`, whose numbers are attributes of `settings`.

        Raises FloatingPointError where the loss is not finite, nothing changed then, or for the first parameter whose
        update is not; that one keeps its value.
        """
        if loss is not None and not math.isfinite(loss):
            raise FloatingPointError(f"the loss is {float(loss)}")
        params, grads, change = model.params, model.grads, RULES[rule]
        self.steps += 1
        block = max(self._work.shape[1], 1)
        lost = None  # the first place whose update is not finite
        with np.errstate(under="ignore", over="call", invalid="call", divide="call", call=self._flag):
            for portion in self._portions:
                self.rate, self.decay = self.lr * portion.rate, portion.decay
                self.clock = self.steps - portion.skipped
                for start in range(portion.start, portion.stop, block):
                    cut = slice(start, min(start + block, portion.stop))
                    param, parts = params.flat[cut], {name: moment.flat[cut] for name, moment in moments.items()}
                    work, spare = self._work[:, : param.size]
                    change(self, settings, param, grads.flat[cut], work, spare, parts)
                    at = self._move(param, work)
                    lost = start + at if lost is None and at is not None else lost
        if lost is not None:
            raise wrong_update(params.places, lost)

    def _flag(self, kind: str, flags: int) -> None:
        """NumPy's call where an operation overflowed or had no number for an answer."""
        self._flagged = True

    def _move(self, param: np.ndarray, step: np.ndarray) -> int | None:
        """param -= step, but where that is not finite, whose first place it returns.  Overwrites step."""
        moved = np.subtract(param, step, out=step)
        if not self._flagged:
            param[...] = moved
            return None
        good = np.isfinite(moved)
        np.copyto(param, moved, where=good)
        return None if good.all() else int(np.argmin(good))

    def decayed(self, param: np.ndarray, grad: np.ndarray, decay: float, spare: np.ndarray) -> np.ndarray:
        """grad + decay param, in `spare`; grad itself where there is no decay."""
        if decay == 0:
            return grad
        np.multiply(param, min(decay, self.most), out=spare)
        spare += grad
        return spare

    def average_square(
        self, mean: np.ndarray, grad: np.ndarray, keep: float, work: np.ndarray, spare: np.ndarray
    ) -> np.ndarray:
        """mean = keep mean + (1 - keep) grad^2; returns grad, in `spare` where it had to be limited."""
        np.multiply(grad, grad, out=work)
        if self._flagged:
            grad = np.clip(grad, -self.limit, self.limit, out=spare)
            np.multiply(grad, grad, out=work)
        work *= 1 - keep
        mean *= keep
        mean += work
        if self._flagged:
            np.minimum(mean, self.most, out=mean)
        return grad


# Each updates one block of the moments and leaves in `work` what the parameters lose.  It overwrites spare, never grad.


def sgd(
    own: Updates, s: Any, param: np.ndarray, grad: np.ndarray, work: np.ndarray, spare: np.ndarray, moments: dict
) -> None:
    direction = own.decayed(param, grad, own.decay, spare)
    for buffer in moments.values():  # one, or none without momentum
        buffer *= s.momentum
        buffer += direction
        if s.nesterov:
            np.multiply(buffer, s.momentum, out=work)
            work += direction
            direction = work
        else:
            direction = buffer
    np.multiply(direction, min(own.rate, own.most), out=work)


def rmsprop(
    own: Updates, s: Any, param: np.ndarray, grad: np.ndarray, work: np.ndarray, spare: np.ndarray, moments: dict
) -> None:
    square_avg = moments["square_avg"]
    grad = own.average_square(square_avg, own.decayed(param, grad, own.decay, spare), s.alpha, work, spare)
    if s.centered:
        grad_avg = moments["grad_avg"]
        _average(grad_avg, grad, s.alpha, work)
        np.multiply(grad_avg, grad_avg, out=work)
        np.subtract(square_avg, work, out=work)
        np.maximum(work, 0, out=work)  # a variance, but rounding can take that of a steady gradient below 0
        np.sqrt(work, out=work)
    else:
        np.sqrt(square_avg, out=work)
    work += s.eps
    np.divide(grad, work, out=work)
    if s.momentum:
        buffer = moments["momentum_buffer"]
        buffer *= s.momentum
        buffer += work
        np.multiply(buffer, min(own.rate, own.most), out=work)
    else:
        work *= min(own.rate, own.most)


def adam(
    own: Updates, s: Any, param: np.ndarray, grad: np.ndarray, work: np.ndarray, spare: np.ndarray, moments: dict
) -> None:
    exp_avg, exp_avg_sq = moments["exp_avg"], moments["exp_avg_sq"]
    beta1, beta2 = s.betas
    lost = own.rate * own.decay if s.decoupled else 0.0
    if s.decoupled and lost <= 2:
        param *= 1 - lost
    elif not s.decoupled:
        grad = own.decayed(param, grad, own.decay, spare)
    grad = own.average_square(exp_avg_sq, grad, beta2, work, spare)
    _average(exp_avg, grad, beta1, work)
    # sqrt(v / c) + eps = (sqrt(v) + eps sqrt(c)) / sqrt(c): the division by sqrt(c) goes into the step size.
    root = math.sqrt(1 - beta2**own.clock)
    np.sqrt(exp_avg_sq, out=work)
    work += s.eps * root
    np.divide(exp_avg, work, out=work)
    work *= min(own.rate * root / (1 - beta1**own.clock), own.most)
    if lost > 2:  # it may overflow
        np.multiply(param, min(lost, own.most), out=spare)
        work += spare


def _average(mean: np.ndarray, value: np.ndarray, keep: float, work: np.ndarray) -> None:
    """mean += (1 - keep) (value - mean)."""
    np.subtract(value, mean, out=work)
    work *= 1 - keep
    mean += work


RULES: dict[str, Callable[..., None]] = {"sgd": sgd, "rmsprop": rmsprop, "adam": adam}
