"""`python -m bench calibrate`: the CPU side's measured constants (`gpurnn/cpu/costs.py`), measured again here.

An experiment runs both sides of a choice, or all sizes of a block, with our own code: in turn, several rounds, of each
the fastest run (on one thread by its own CPU time, where it takes several by the clock on the wall).  What a value
costs is then arithmetic: in each case the library's own rule picks a side, and its time over the fastest one's is what
that costs; over all cases the geometric mean.

  kept           the value in `costs`, for this CPU
  measured here  the values that cost the least, within CLOSE, of those tried: which ones, says `measure`
  costs          what the kept value takes over the best one: 1.00 is as fast; in brackets by each half of the rounds
  at worst       the same of the one case where the kept value picks worst, over that case's fastest side

A row of `costs.BY_CPU` wants a gain that both halves show, in a second run as well, on a machine that is left alone;
another value may change results' last bits.
"""

import argparse
import math
import time
from collections.abc import Iterable

from bench import quiet
from bench.calibrate import blocks, loops, steps
from bench.calibrate.measure import Experiment, Found, Settings, found
from gpurnn import backend
from gpurnn.cpu import costs
from gpurnn.environment import compiles, cpu_family, cpu_threads, describe

EXPERIMENTS: dict[str, Experiment] = {**loops.EXPERIMENTS, **blocks.EXPERIMENTS, **steps.EXPERIMENTS}
SAMPLE = 0.012  # s
QUICK = Settings(rounds=1, seconds=0.0, quick=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="an experiment, or the constant that it is for; repeatable"
    )
    parser.add_argument(
        "--rounds", type=int, default=7, help="samples of each way (%(default)s); more where others work"
    )
    parser.add_argument("--quick", action="store_true", help="few cases, once each: does it all work?")


def main(options: argparse.Namespace) -> int:
    """Prints the table.  ValueError for what makes no sense, and where there is no compiled executor to measure."""
    if options.rounds < 1:
        raise ValueError(f"--rounds: expected 1 or more, got {options.rounds}")
    if backend.name != "numpy" or not compiles():
        raise ValueError("the compiled executor runs on the CPU: set GPURNN_BACKEND=numpy, and no NUMBA_DISABLE_JIT")
    chosen, settings = selected(options.only), QUICK if options.quick else Settings(options.rounds, SAMPLE)
    print(f"{describe()['cpu']} ({' '.join(cpu_family())}), {cpu_threads()} threads")
    print("| constant | unit | kept | measured here | costs | at worst |\n" + "|---" * 6 + "|")
    disturbed, begun = 0.0, time.perf_counter()
    for name in chosen:
        experiment, before = EXPERIMENTS[name], quiet.mark()
        if experiment.threads > cpu_threads():
            print(
                f"| {', '.join(experiment.constants)} | | | not measured: it takes {experiment.threads} threads | | |"
            )
            continue
        for line in found(experiment, settings):
            print(row(line), flush=True)
        disturbed += _taken(before, quiet.mark())
    if options.quick:
        print("quick: that it runs is all that this says")
    wall = time.perf_counter() - begun
    print(f"{wall:.0f} s; other processes took {disturbed / wall:.2f} CPUs of them meanwhile")
    return 0


def selected(names: Iterable[str] | None) -> list[str]:
    """The experiments by that name, or for that constant; for None all.  ValueError for a name that is neither."""
    if names is None:
        return list(EXPERIMENTS)
    chosen = []
    for name in names:
        fitting = [key for key, experiment in EXPERIMENTS.items() if name == key or name in experiment.constants]
        if not fitting:
            raise ValueError(f"--only: expected an experiment ({', '.join(EXPERIMENTS)}) or a constant, got {name!r}")
        chosen += fitting
    return list(dict.fromkeys(chosen))


def row(line: Found) -> str:
    kept, low, high = getattr(costs, line.constant), *line.best
    if low > 0 and high < math.inf:
        here = _number(low) if low == high else f"{_number(low)} to {_number(high)}"
    else:
        here = f"{_number(low)} or more" if low > 0 else f"{_number(high)} or less" if high < math.inf else "any"
    whole, first, second = line.costs
    cells = line.constant, annotations()[line.constant].unit, _number(kept), here
    return f"| {' | '.join(cells)} | {whole:.2f} ({first:.2f}, {second:.2f}) | {line.worst:.2f}, {line.where} |"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) and value < 10_000 else f"{float(f'{value:.3g}'):,.12g}"


def annotations() -> dict[str, costs.Cost]:
    """What `costs` says of each constant."""
    return {name: costs.__annotations__[name].__metadata__[0] for name in costs.NAMES}


def _taken(before: quiet.Mark, after: quiet.Mark) -> float:
    """CPU seconds of others."""
    if before.busy is None or after.busy is None:
        return 0.0
    return max(0.0, after.busy - before.busy - (after.own - before.own))
