"""Tables of mutants for `test_cpu_mutants`, by room: {"kind: what is wrong then": (file, text, text instead, tests ...)}.

file: without .py.  tests: "optim::schedules" is test_schedules in tests/*/test_optim.py; those that ought to see it, and quick ones.
A mutant is a slip that somebody could make.  One that no input tells from the original is none: it is replaced.
"""

from tests.cpu_mutants import (
    benchmarks,
    commands,
    executors,
    files,
    heads,
    laboratory,
    layers,
    optimisers,
    resets,
    training,
)

ROOMS = {
    "executors": executors.MUTANTS,
    "heads": heads.MUTANTS,
    "layers": layers.MUTANTS,
    "optimisers": optimisers.MUTANTS,
    "resets": resets.MUTANTS,
    "training": training.MUTANTS,
    "files": files.MUTANTS,
    "commands": commands.MUTANTS,
    "laboratory": laboratory.MUTANTS,
    "benchmarks": benchmarks.MUTANTS,
}

SURVIVORS: dict[str, str] = {}  # "room, name": why no test sees it
