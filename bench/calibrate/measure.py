"""Times of all ways to do one thing, and what a value of a constant costs by them."""

import contextlib
import math
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from gpurnn.cpu import costs

CLOSE = 1.01  # values that cost so little more than the best one are as good
ASLEEP = 0.004  # s, in which workers go to sleep
FACTORS = [2.0 ** (k / 2) for k in range(-10, 11)]  # of the kept value: those that a threshold is tried with


class Settings(NamedTuple):
    """rounds: samples of each way.  seconds: of a sample.  quick: with few cases."""

    rounds: int
    seconds: float
    quick: bool = False


Patches = tuple[tuple[Any, str, Any], ...]


class Way(NamedTuple):
    """run: what is timed.  patches: (object, name, value), what stands otherwise meanwhile."""

    run: Callable[[], Any]
    patches: Patches = ()


class Case(NamedTuple):
    """One thing to do.  pick: of which way the library does it, by `costs` as they are when it is asked.

    asleep: whether its threads sleep when it begins.
    """

    name: str
    ways: Mapping[Any, Way]
    pick: Callable[[], Hashable]
    asleep: bool = False


def either(
    name: str, run: Callable[[], Any], pick: Callable[[], bool], yes: Patches, no: Patches, asleep: bool = False
) -> Case:
    """Two ways to `run`: what the library does where `pick` says True, and what it does where that says False."""
    return Case(name, {True: Way(run, yes), False: Way(run, no)}, pick, asleep)


def sized(name: str, run: Callable[[], Any], constant: str, values: Iterable[int]) -> Case:
    """A way to `run` for each value of a constant that is read as it runs."""
    ways = {value: Way(run, settings_of(**{constant: value})) for value in values}
    return Case(name, ways, lambda: getattr(costs, constant))


class Experiment(NamedTuple):
    """cases: for `quick` or not.  values: of each constant that are tried; by FACTORS where it says nothing of one.

    threads: how many it needs.  For one, time is its own CPU time, without what other processes take.
    """

    constants: tuple[str, ...]
    cases: Callable[[bool], list[Case]]
    values: Mapping[str, Sequence[float]] = {}
    threads: int = 1


class Found(NamedTuple):
    """Of a constant.

    best    the least and the greatest of its best values, infinite where none beyond was tried.
    costs   what the kept value takes over the best one: by all rounds, and by each half of them, which tells chance.
    worst   the same in the case where the kept value picks worst, over that case's fastest way; where: its name.
    """

    constant: str
    best: tuple[float, float]
    costs: tuple[float, float, float]
    worst: float
    where: str


Samples = dict[Hashable, list[float]]  # seconds of a run, in each round
Clock = Callable[[Case, Callable[[], Any], float], float]


def found(experiment: Experiment, settings: Settings) -> list[Found]:
    cases = experiment.cases(settings.quick)
    clock = by_its_own_time if experiment.threads == 1 else by_the_wall
    return judged(experiment, cases, [timed(case, settings, clock) for case in cases])


def judged(experiment: Experiment, cases: Sequence[Case], samples: Sequence[Samples]) -> list[Found]:
    """What the times say of each constant, the others as they are kept."""
    lines = []
    for constant in experiment.constants:
        kept = getattr(costs, constant)
        wanted = {*experiment.values.get(constant, [_like(kept, kept * factor) for factor in FACTORS]), kept}
        picks = {value: _picked(constant, value, cases) for value in sorted(wanted)}
        tried = [v for v in picks if all(way in own for way, own in zip(picks[v], samples, strict=True))]
        mean, *halves = (
            {value: float(np.mean(_losses(picks[value], samples, rounds))) for value in tried}
            for rounds in (slice(None), slice(0, None, 2), slice(1, None, 2))
        )
        fastest = min(tried, key=lambda value: mean[value])
        best = _around(kept, [v for v in tried if mean[v] <= mean[fastest] + math.log(CLOSE)], tried)
        own = _losses(picks[kept], samples, slice(None))
        worst = int(np.argmax(own))
        whole, first, second = (math.exp(loss[kept] - loss[fastest]) for loss in (mean, *halves))
        lines.append(Found(constant, best, (whole, first, second), math.exp(own[worst]), cases[worst].name))
    return lines


def timed(case: Case, settings: Settings, clock: Clock) -> Samples:
    """Seconds of a run of each way in each round, every round beginning with another one."""
    samples: Samples = {way: [] for way in case.ways}
    for round in range(settings.rounds):
        names = list(case.ways)
        for place in range(len(names)):
            name = names[(place + round) % len(names)]
            with patched(case.ways[name].patches):
                samples[name].append(clock(case, case.ways[name].run, settings.seconds))
    return samples


@contextlib.contextmanager
def patched(patches: Patches) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for where, name, value in patches:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def settings_of(**values: float) -> Patches:
    """Patches of `costs`."""
    return tuple((costs, name, value) for name, value in values.items())


def some(values: Sequence[int], kept: int, quick: bool) -> list[int]:
    """The values to be tried, the kept one among them; where it has to be quick, that and one other."""
    return sorted({kept, *(values[-1:] if quick else values)})


def fresh(factory: Any, *arguments: Any, **values: float) -> Any:
    """What a cached factory of compiled code makes with these costs; the one that the library has stays as it is."""
    with patched(settings_of(**values)):
        return factory.__wrapped__(*arguments)


def always(value: Any) -> Callable[..., Any]:
    """What stands in for a factory: it gives `value`, whatever it is asked for."""
    return lambda *_: value


def by_the_wall(case: Case, run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest run."""
    run()
    fastest, end = math.inf, time.perf_counter() + seconds
    while True:
        if case.asleep:
            time.sleep(ASLEEP)
        begun = time.perf_counter()
        run()
        now = time.perf_counter()
        fastest = min(fastest, now - begun)
        if now >= end:
            return fastest


def by_its_own_time(case: Case, run: Callable[[], Any], seconds: float) -> float:
    """Seconds of CPU time of this thread, the mean of all runs: what a host takes from a guest is booked late."""
    run()
    count, begun, end = 0, time.thread_time(), time.perf_counter() + seconds
    while True:
        run()
        count += 1
        spent = time.thread_time() - begun
        if spent > 0 and time.perf_counter() >= end:
            return spent / count


def _picked(constant: str, value: float, cases: Sequence[Case]) -> list[Hashable]:
    with patched(settings_of(**{constant: value})):
        return [case.pick() for case in cases]


def _losses(picked: Sequence[Hashable], samples: Sequence[Samples], rounds: slice) -> list[float]:
    """For each case the logarithm of what the way picked takes over the fastest, by the fastest of these rounds."""
    losses = []
    for way, own in zip(picked, samples, strict=True):
        fastest = {name: min(times[rounds] or times) for name, times in own.items()}
        losses.append(math.log(fastest[way] / min(fastest.values())))
    return losses


def _like(kept: float, value: float) -> float:
    return max(1, round(value)) if isinstance(kept, int) else round(value, 2)


def _around(kept: float, best: Sequence[float], tried: Sequence[float]) -> tuple[float, float]:
    """The run of neighbours, among the best values, that holds the kept one, or comes nearest to it: see `Found`."""
    nearest = min(best, key=lambda value: abs(math.log(value / kept)))
    low = high = tried.index(nearest)
    while low > 0 and tried[low - 1] in best:
        low -= 1
    while high + 1 < len(tried) and tried[high + 1] in best:
        high += 1
    return tried[low] if low else -math.inf, tried[high] if high < len(tried) - 1 else math.inf
