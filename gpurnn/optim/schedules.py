"""Learning-rate schedules: functions from the step, counted from 0, to what the base learning rate is multiplied by.

They pickle, and are equal where they give the same.

optimizer.lr = base * schedule(step)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from gpurnn.arguments import number, whole

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """Always 1."""

    return _Constant()


def warmup_cosine(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Up to 1 in `warmup` steps, then down to `floor` on half a cosine (Loshchilov and Hutter 2017; no restarts)."""
    return _warmup_then(total, warmup, floor, _half_cosine)


def linear_decay(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Up to 1 in `warmup` steps, then down to `floor` on a straight line."""
    return _warmup_then(total, warmup, floor, _line)


def _warmup_then(total: int, warmup: int, floor: float, shape: Callable[[float], float]) -> Schedule:
    warmup = whole("warmup", warmup, 0)
    total = whole("total", total, warmup + 1)
    return _WarmupThen(total, warmup, number("floor", floor, lambda v: 0 <= v <= 1, "in [0, 1]"), shape)


def step_decay(every: int, factor: float) -> Schedule:
    """Times `factor`, in (0, 1], after each `every` steps."""
    return _StepDecay(whole("every", every, 1), number("factor", factor, lambda v: 0 < v <= 1, "in (0, 1]"))


def exponential_decay(rate: float) -> Schedule:
    """Times `rate`, in (0, 1], after each step."""
    return step_decay(1, number("rate", rate, lambda v: 0 < v <= 1, "in (0, 1]"))


def _half_cosine(progress: float) -> float:
    return 0.5 + 0.5 * math.cos(math.pi * progress)


def _line(progress: float) -> float:
    return 1.0 - progress


@dataclass(frozen=True)
class _Constant:
    def __call__(self, step: int) -> float:
        whole("step", step, 0)
        return 1.0


@dataclass(frozen=True)
class _WarmupThen:
    """(step + 1) / (warmup + 1) before step `warmup`, which is the first at 1; `floor` from step `total` on."""

    total: int
    warmup: int
    floor: float
    shape: Callable[[float], float]

    def __call__(self, step: int) -> float:
        step = whole("step", step, 0)
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        progress = min(1.0, (step - self.warmup) / (self.total - self.warmup))
        return self.floor + (1 - self.floor) * self.shape(progress)


@dataclass(frozen=True)
class _StepDecay:
    every: int
    factor: float

    def __call__(self, step: int) -> float:
        return self.factor ** (whole("step", step, 0) // self.every)


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "warmup_cosine": warmup_cosine,
    "linear_decay": linear_decay,
    "step_decay": step_decay,
    "exponential_decay": exponential_decay,
}
