"""Strange arguments everywhere: whatever they are, a call returns, or raises an error that gpurnn raises on purpose."""

import functools
import inspect
from pathlib import Path

import numpy as np
import pytest

from tests.fuzz import entries, values
from tests.fuzz.cases import each_case, not_on_purpose, seeds

ENTRIES = [function for name, function in vars(entries).items() if name.startswith("call_")]


@pytest.mark.parametrize("seeds", seeds(60))
def test_strange_arguments(seeds, tmp_path):
    each_case(case, seeds, tmp_path)


def case(seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    function = ENTRIES[seed % len(ENTRIES)]
    given = {p.name: p.default for p in inspect.signature(function).parameters.values()}
    given = {name: value() if isinstance(value, functools.partial) else value for name, value in given.items()}
    choices = [name for name in given if name.startswith("which")]
    given |= {name: given[name][rng.integers(len(given[name]))] for name in choices}
    open_to_all = sorted(given.keys() - set(choices))
    changed = rng.choice(open_to_all, min(len(open_to_all), 1 + (rng.random() < 0.2)), replace=False)
    pool = values.strange(rng)
    given |= {str(name): pool[rng.integers(len(pool))] for name in changed}
    try:
        function(**given)
    except Exception as error:
        wrong = not_on_purpose(error, Path(values.__file__))
        shown = ", ".join(f"{name}={_shown(given[str(name)])}" for name in changed)
        return wrong and f"{function.__name__}({shown}): {wrong}"
    return None


def _shown(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{type(value).__name__} {value.dtype} {value.shape}"
    return f"{type(value).__name__} {value!r:.60}"


def test_every_entry_runs_as_it_stands():
    """Else its errors would be of the fuzzer's own making."""
    for function in ENTRIES:
        given = {p.name: p.default for p in inspect.signature(function).parameters.values()}
        for name, value in given.items():
            given[name] = value() if isinstance(value, functools.partial) else value
            given[name] = value[0] if name.startswith("which") else given[name]
        function(**given)
