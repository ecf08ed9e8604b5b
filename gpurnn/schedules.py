"""Learning-rate schedules: functions from the step, counted from 0, to what the base learning rate is multiplied by.

optimizer.lr = base * schedule(step)
"""

import math
from collections.abc import Callable

from gpurnn.arguments import number, whole

Schedule = Callable[[int], float]


def constant() -> Schedule:
    """Always 1."""

    def schedule(step: int) -> float:
        whole("step", step, 0)
        return 1.0

    return schedule


def warmup_cosine(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Up to 1 in `warmup` steps, then down to `floor` on half a cosine (Loshchilov and Hutter 2017; no restarts)."""
    return _warmup_then(total, warmup, floor, lambda progress: 0.5 + 0.5 * math.cos(math.pi * progress))


def linear_decay(total: int, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Up to 1 in `warmup` steps, then down to `floor` on a straight line."""
    return _warmup_then(total, warmup, floor, lambda progress: 1.0 - progress)


def _warmup_then(total: int, warmup: int, floor: float, shape: Callable[[float], float]) -> Schedule:
    """(step + 1) / (warmup + 1) before step `warmup`, which is the first at 1; `floor` from step `total` on."""
    whole("warmup", warmup, 0)
    whole("total", total, warmup + 1)
    number("floor", floor, lambda v: 0 <= v <= 1, "in [0, 1]")

    def schedule(step: int) -> float:
        whole("step", step, 0)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return floor + (1 - floor) * shape(min(1.0, (step - warmup) / (total - warmup)))

    return schedule


def step_decay(every: int, factor: float) -> Schedule:
    """Times `factor`, in (0, 1], after each `every` steps."""
    whole("every", every, 1)
    number("factor", factor, lambda v: 0 < v <= 1, "in (0, 1]")

    def schedule(step: int) -> float:
        whole("step", step, 0)
        return float(factor) ** (step // every)

    return schedule


def exponential_decay(rate: float) -> Schedule:
    """Times `rate`, in (0, 1], after each step."""
    return step_decay(1, number("rate", rate, lambda v: 0 < v <= 1, "in (0, 1]"))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "constant": constant,
    "warmup_cosine": warmup_cosine,
    "linear_decay": linear_decay,
    "step_decay": step_decay,
    "exponential_decay": exponential_decay,
}
