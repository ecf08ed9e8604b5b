"""One case and phase: every implementation checked, then timed in turn in this one process; the lines that come of it.

Checked first: each implementation's results against the float64 reference, over so many first steps that the reference
is affordable; where the timed problem is longer, its y must agree over those steps too.  What is wrong is not timed.
Then rounds: in each, every implementation gives one sample, beginning with another one each round.  A sample is as many
steps as last target_s, after untimed ones for warm_s.  On a CPU it begins when the others' threads have gone to sleep,
and the warm-up is long because the scheduler takes some tens of milliseconds to spread threads that have just woken up
over the cores.  Samples that other processes disturbed are tried again; a line is flagged "noisy" where that did not
help for half of its samples, or where the samples scatter widely for reasons that the system does not tell.

Part "layer" is the whole layer, input projection included; part "recurrence" the loop over time alone, where an
implementation runs that by itself (FlashRNN does; ours and torch's do not, and nothing is subtracted to pretend it).
"""

import functools
import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bench import quiet, statistics
from bench.cases import Case
from bench.check import REQUIRED, Expected
from bench.floors import Machine, floor
from bench.peers import Implementation
from bench.peers.workload import Workload
from bench.problem import Problem, make
from bench.results import FORMAT, MOST_SAMPLES, Record
from bench.telemetry import Telemetry
from gpurnn.backend import one_line


@dataclass(frozen=True)
class Settings:
    """Rounds of samples of target_s each, until limit_s have passed, 3 at least.  energy_s: 0, or a burst's length."""

    rounds: int = 11
    target_s: float = 0.06
    warm_s: float = 0.06
    limit_s: float = 40.0
    retries: int = 4
    energy_s: float = 0.0


FEWEST_ROUNDS = 3
MOST_STEPS = 100_000  # in a sample
WIDE = 0.25  # from the 20th to the 80th percentile, as a part of the median


@dataclass
class Entrant:
    """One implementation of one part on its way through a case."""

    implementation: Implementation
    part: str
    workload: Workload | None = None
    error: float | None = None
    failure: str | None = None
    steps: int = 1
    warm_steps: int = 1
    samples: list[float] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)
    disturbed: int = 0
    kernels: list[str] = field(default_factory=list)
    peak_bytes: int | None = None
    flags: list[str] = field(default_factory=list)
    energy_per_step: float | None = None


def run(
    case: Case,
    phase: str,
    implementations: Sequence[Implementation],
    settings: Settings,
    machine: Machine,
    stamp: Record,
    telemetry: Telemetry | None = None,
) -> list[Record]:
    """The records of a case and phase, one for each implementation that does not refuse it; what fails is one too."""
    entrants = _entrants(case, phase, implementations)
    if not entrants:
        return []
    problem, expected = _posed(case)
    try:
        for entrant in entrants:
            _guarded(entrant, lambda e=entrant: _prepare(e, problem, phase, expected, settings))
        _interleave(entrants, settings, machine.device)
        for entrant in _running(entrants):
            _guarded(entrant, lambda e=entrant: _look_closer(e, settings, telemetry))
        return _records(entrants, problem, phase, machine, stamp, telemetry)
    finally:
        for entrant in entrants:
            if entrant.workload is not None:
                entrant.workload.close()
        gc.collect()


@functools.lru_cache(maxsize=1)
def _posed(case: Case) -> tuple[Problem, Expected]:
    """A case's phases stand one behind the other and share these."""
    problem = make(case)
    return problem, Expected(problem)


def _entrants(case: Case, phase: str, implementations: Sequence[Implementation]) -> list[Entrant]:
    parts = ("model",) if case.group == "train" else ("layer", "recurrence")
    pairs = [(implementation, part) for part in parts for implementation in implementations]
    return [Entrant(i, part) for i, part in pairs if i.refuses(case, phase, part) is None]


def _guarded(entrant: Entrant, work: Any) -> None:
    """Runs `work`; an exception in it takes the entrant out, with its message, and nothing else."""
    try:
        work()
    except Exception as error:
        entrant.failure = f"{type(error).__name__}: {one_line(error)}"
        if entrant.workload is not None:
            entrant.workload.close()
            entrant.workload = None


def _prepare(entrant: Entrant, problem: Problem, phase: str, expected: Expected, settings: Settings) -> None:
    """Builds and checks; finds how many steps make a sample."""
    build, part = entrant.implementation.build, entrant.part
    required = REQUIRED[part] if phase == "training" else ("y",)
    whole = expected.steps == problem.case.T
    if not whole:
        small = build(expected.problem, phase, part)
        small.prepare()
        entrant.error = expected.error(small.results(), required)
        _refuse_endless(small.time(1) * problem.case.T / expected.steps, settings)
        small.close()
    entrant.workload = workload = build(problem, phase, part)
    workload.prepare()
    if whole:
        entrant.error = expected.error(workload.results(), required)
    elif part != "model":
        first = {"y": workload.results()["y"][: expected.steps]}
        entrant.error = max(entrant.error or 0.0, expected.error(first, ("y",)))
    workload.time(1)
    once = workload.time(1)
    if once < settings.target_s / 4:
        tries = int(np.clip(settings.target_s / 4 / max(once, 1e-7), 1, 1000))
        once = workload.time(tries) / tries
    entrant.steps = int(np.clip(settings.target_s / max(once, 1e-7), 1, MOST_STEPS))
    longer = once > 10 * settings.warm_s  # then what the first moments cost is lost in the sample
    entrant.warm_steps = 0 if longer else int(np.clip(settings.warm_s / max(once, 1e-7), 1, MOST_STEPS))
    entrant.peak_bytes = workload.peak_bytes()


def _refuse_endless(seconds: float, settings: Settings) -> None:
    """Threads that spin at a barrier may take a thousand times as long while others want the cores."""
    allowed = settings.limit_s / 4
    if seconds > allowed:
        raise TimeoutError(f"a step would take about {seconds:.0f} s, {allowed:.0f} s are allowed")


def _running(entrants: Sequence[Entrant]) -> list[Entrant]:
    return [entrant for entrant in entrants if entrant.workload is not None]


def _interleave(entrants: Sequence[Entrant], settings: Settings, device: str) -> None:
    deadline = time.monotonic() + settings.limit_s
    for done in range(settings.rounds):
        if done >= FEWEST_ROUNDS and time.monotonic() > deadline:
            break
        running = _running(entrants)
        for k in range(len(running)):
            entrant = running[(k + done) % len(running)]
            _guarded(entrant, lambda e=entrant: _sample(e, settings, device, deadline))


def _sample(entrant: Entrant, settings: Settings, device: str, deadline: float) -> None:
    workload = entrant.workload
    assert workload is not None
    disturbed = False
    for attempt in range(settings.retries + 1):
        if device == "cpu":
            quiet.settle()
        workload.prepare()
        workload.time(entrant.warm_steps)
        before, began = quiet.mark(), time.monotonic()
        seconds = workload.time(entrant.steps)
        after, ended = quiet.mark(), time.monotonic()
        disturbed = device == "cpu" and quiet.disturbed(before, after)
        if not disturbed or ended > deadline:
            break
        time.sleep(0.02 * attempt)
    entrant.disturbed += disturbed
    workload.prepare()  # complains where something changed the threads meanwhile
    entrant.samples.append(seconds / entrant.steps)
    entrant.spans.append((began, ended))


def _look_closer(entrant: Entrant, settings: Settings, telemetry: Telemetry | None) -> None:
    """What would disturb the samples: the profiler, and a burst long enough for the energy counter."""
    assert entrant.workload is not None
    entrant.kernels, entrant.flags = entrant.workload.kernels(), entrant.workload.flags()
    if not settings.energy_s or telemetry is None:
        return
    steps = max(1, int(settings.energy_s / statistics.summary(entrant.samples)[0]))
    before = telemetry.energy()
    entrant.workload.time(steps)
    after = telemetry.energy()
    if before is not None and after is not None:
        entrant.energy_per_step = (after - before) / steps


def _records(
    entrants: Sequence[Entrant],
    problem: Problem,
    phase: str,
    machine: Machine,
    stamp: Record,
    telemetry: Telemetry | None,
) -> list[Record]:
    ours = {e.part: e for e in reversed(entrants) if e.implementation.ours and e.failure is None}
    return [_record(entrant, problem, phase, machine, stamp, telemetry, ours.get(entrant.part)) for entrant in entrants]


def _record(
    entrant: Entrant,
    problem: Problem,
    phase: str,
    machine: Machine,
    stamp: Record,
    telemetry: Telemetry | None,
    ours: Entrant | None,
) -> Record:
    case, part = problem.case, entrant.part
    record: Record = {"format": FORMAT, **stamp, "case": case.name}
    record |= {name: getattr(case, name) for name in ("group", "cell", "T", "N", "I", "H", "dtype", "lengths", "heads")}
    record |= {"phase": phase, "part": part, "implementation": entrant.implementation.name}
    least = floor(case, phase, part, machine, problem.tokens)
    record |= {"floor_us_per_step": 1e6 * least, "error": entrant.error, "flags": [*entrant.flags]}
    if entrant.failure is not None:
        return record | {"failure": entrant.failure, "median_s": None}
    samples = entrant.samples[-MOST_SAMPLES:]
    median, p20, p80 = statistics.summary(samples)
    record |= {"median_s": median, "p20_s": p20, "p80_s": p80, "samples_s": samples, "steps_per_sample": entrant.steps}
    record |= {"us_per_step": 1e6 * median / case.T, "tokens_per_s": problem.tokens / median}
    record |= {"percent_of_floor": 100 * least * case.T / median}
    if ours is not None and ours is not entrant:
        middle, low, high = statistics.ratio(ours.samples[-MOST_SAMPLES:], samples)
        record["ratio"] = {"to": ours.implementation.name, "median": middle, "low": low, "high": high}
    if entrant.peak_bytes is not None:
        record["peak_bytes"] = entrant.peak_bytes
    if median < least * case.T:  # the peak was measured in a bad moment
        record["flags"].append("beyond the floor")
    if entrant.disturbed * 2 > len(entrant.samples) or p80 - p20 > WIDE * median:
        record["flags"].append("noisy")
    if entrant.kernels:
        record["kernels"] = entrant.kernels
    if telemetry is not None:
        record["telemetry"] = told = telemetry.summary(entrant.spans)
        if entrant.energy_per_step is not None:
            told["energy_j_per_token"] = entrant.energy_per_step / problem.tokens
        if told.get("throttle_reasons"):
            record["flags"].append("throttled")
    return record
