"""`python -m bench smoke`: is this GPU's side right, and does it hang?  All executors and exchanges in a minute.

Each case is a layer, forward and backward, whose results are held against the NumPy executor in float64 on the host;
or a few captured steps of a whole model.  Cases run in processes that are watched (`bench.watched`): what takes longer
than LIMIT is killed and named, and the rest goes on.
"""

import argparse
import contextlib
import fnmatch
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

from bench.peers.gpurnn_layer import LAYERS, GpurnnModel
from bench.watched import Outcome, watched
from gpurnn import backend
from gpurnn.backend import one_line
from gpurnn.cuda import faults

LIMIT = 60.0  # s for a case, its kernels included where they are not built yet
JOBS = 6  # processes on one GPU
EXCHANGES = ("clustered", "flagged", "counted")
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")
# Largest error relative to a tensor's largest entry, over the steps below
TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
RIGHT = ("ok", "skip")
STAND_IN = ("small/rnn/step/float32",)  # cheap to interpret


class DoesNotFit(Exception):
    """A case that this GPU is too small for, or too old."""


class Case(NamedTuple):
    """how: an executor, or `persistent-` and an exchange, or "model".  lengths: rows end at different steps."""

    size: str
    cell: str
    how: str
    precision: str
    shape: tuple[int, int, int, int]  # T, N, I, H
    lengths: bool

    @property
    def name(self) -> str:
        return f"{self.size}/{self.cell}/{self.how}/{self.precision}"


def _table() -> Iterator[Case]:
    persistent = [f"persistent-{exchange}" for exchange in EXCHANGES]
    for how, precision, cell in itertools.product(
        ("step", "resident", *persistent), PRECISIONS, ("lstm", "gru", "rnn")
    ):
        H = {"step": 100, "resident": 96}.get(how, 250)
        yield Case("usual", cell, how, precision, (37, 19, 20, H), cell == "lstm")
    # "small" cases are few, for compute-sanitizer, which takes a hundred times as long
    yield Case("usual", "gru", "step", "float64", (37, 19, 20, 100), True)
    yield Case("usual", "lstm", "numpy", "float32", (9, 5, 20, 33), True)
    for cell in ("lstm", "gru", "rnn"):
        yield Case("usual", cell, "model", "float32", (20, 7, 16, 48), False)
    for how, precision in itertools.product(persistent, ("float32", "bfloat16")):
        yield Case("large", "lstm", how, precision, (60, 70, 33, 300 if how.endswith("clustered") else 650), True)
    for how in ("step", "resident", *persistent):
        yield Case("small", "rnn", how, "float32", (5, 3, 4, 33), True)
        yield Case("small", "lstm", how, "bfloat16", (5, 3, 4, 33), False)
    yield Case("small", "gru", "model", "float32", (4, 3, 5, 9), False)


CASES = {case.name: case for case in _table()}


def find(name: str) -> Case:
    """Raises ValueError where there is no such case."""
    if name not in CASES:
        raise ValueError(f"case: expected one such as {next(iter(CASES))}, got {name!r}")
    return CASES[name]


def select(pattern: str | None) -> list[Case]:
    """Raises ValueError where nothing is left."""
    found = [case for name, case in CASES.items() if fnmatch.fnmatchcase(name, pattern or "*")]
    if not found:
        raise ValueError(f"no case matches {pattern!r}; there are {next(iter(CASES))} and the like")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--case", metavar="PATTERN", help="only cases of such names, * and ? as in a shell")
    add("--jobs", type=int, default=JOBS, metavar="N", help="processes (default: %(default)s)")
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help="for a case (default: %(default)s)")
    add(
        "--here",
        action="store_true",
        help="in this process, each array an allocation of its own: for compute-sanitizer",
    )
    add("--out", metavar="FILE", help="a line of JSON for each case")


def main(options: argparse.Namespace) -> int:
    """Prints a line for each case and what was not right last; 0 where all was."""
    names = [case.name for case in select(options.case)]
    if backend.name != "cuda":
        names = [name for name in STAND_IN if name in names] or names[:1]
        print(f"no GPU: stand-in and interpreter, {len(names)} cases; {backend.reason}", flush=True)
    began, bad = time.monotonic(), []
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.out, "a")) if options.out else None
        for outcome in _here(names) if options.here else watched("bench.smoke", names, options.jobs, options.limit):
            print(f"{outcome.case:42s} {outcome.verdict:5s} {outcome.text}  {outcome.seconds:.1f} s", flush=True)
            if outcome.verdict not in RIGHT:
                bad.append(outcome)
            if file is not None:
                print(json.dumps(outcome._asdict()), file=file, flush=True)
    print(f"{len(names) - len(bad)} of {len(names)} right in {time.monotonic() - began:.0f} s")
    for outcome in bad:
        print(f"{outcome.case}: {outcome.verdict}: {outcome.text}")
    return 1 if bad else 0


def _here(names: list[str]) -> Iterator[Outcome]:
    if backend.name == "cuda":
        backend.xp.cuda.set_allocator(None)  # a pool's blocks lie side by side, and hide what runs over an end
    with _on_stand_in() if backend.name != "cuda" else contextlib.nullcontext():
        yield from map(judged, names)


def judged(name: str) -> Outcome:
    """Runs a case; what comes of it, errors too."""
    began = time.monotonic()
    try:
        verdict, text = _compared(find(name))
    except DoesNotFit as error:
        verdict, text = "skip", str(error)
    except Exception as error:
        verdict, text = "ERROR", f"{type(error).__name__}: {one_line(error)}"
    return Outcome(name, verdict, text, round(time.monotonic() - began, 2))


def _compared(case: Case) -> tuple[str, str]:
    with _on_the_host():
        expected = on_device(case._replace(how="numpy", precision="float64") if case.how != "model" else case)
    got = on_device(case)
    faults.synchronize()
    errors = {name: _error(backend.to_numpy(got[name]), np.asarray(value)) for name, value in expected.items()}
    wrong = {name: error for name, error in errors.items() if not error <= TOLERANCE[case.precision]}  # NaN is not
    shown = wrong or dict([max(errors.items(), key=lambda pair: pair[1])])
    return "WRONG" if wrong else "ok", ", ".join(f"{name} off by {error:.0e}" for name, error in shown.items())


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape:
        raise ValueError(f"expected shape {expected.shape}, got {got.shape}")
    return float(np.abs(got - expected).max(initial=0) / max(np.abs(expected).max(initial=0), 1e-30))


def on_device(case: Case) -> dict[str, Any]:
    """Results by name, arrays of the backend: of a layer forward (with and without a tape) and backward; of a model."""
    if case.how == "model":
        return _model(case)
    T, N, I, H = case.shape
    executor, _, exchange = case.how.partition("-")
    rng, dtype = np.random.default_rng(0), "float64" if case.precision == "float64" else "float32"
    layer = LAYERS[case.cell](
        I, H, dtype=dtype, precision="float32" if dtype == "float64" else case.precision, executor=executor, rng=1
    )
    x, dy = (rng.standard_normal((T, N, width)).astype("float32") for width in (I, H))
    lengths = rng.integers(0, T + 1, N) if case.lengths else None
    x, dy = (backend.asarray(value, dtype, "values") for value in (x, dy))
    with _forced(exchange):
        y, _, backward = layer(x, lengths=lengths)
        assert backward is not None
        dx, _ = backward(dy)
        inference, _, _ = layer(x, lengths=lengths, training=False)
    return {"y": y, "dx": dx, "inference": inference, **{f"d{name}": grad for name, grad in layer.grads.items()}}


@contextlib.contextmanager
def _forced(exchange: str) -> Iterator[None]:
    """The cheapest plan of that exchange, where one is named.  Raises DoesNotFit where there is none."""
    if not exchange:
        yield
        return
    from gpurnn.cuda import device, on_chip, tuning

    def choice(self: Any, cell: Any, H: int, N: int, precision: str, transposed: bool) -> Any:
        every = tuning.choices(tuning.Question(cell, H, N, precision, transposed, False), device.chip())
        found = next((choice for choice in every if choice.exchange == exchange), None)
        if found is None:
            raise DoesNotFit(f"no plan with a {exchange} exchange fits this GPU")
        return found

    with patch.object(on_chip.OnChip, "choice", choice):
        yield


def _model(case: Case) -> dict[str, Any]:
    """Losses and norms of three steps, the last one captured on CUDA."""
    from bench import cases, problem

    T, N, I, H = case.shape
    made = problem.make(cases.Case("train", case.cell, T, N, I, H, case.precision), sets=1)
    return GpurnnModel(made, "numpy" if backend.name == "numpy" else "step").results()


@contextlib.contextmanager
def _on_the_host() -> Iterator[None]:
    """gpurnn as on a machine without a GPU."""
    with patch.object(backend, "name", "numpy"), patch.object(backend, "xp", np):
        yield


@contextlib.contextmanager
def _on_stand_in() -> Iterator[None]:
    from tests.interpreted import interpreted

    with interpreted():
        yield


if __name__ == "__main__":  # a process of `watched`: case names come in, outcomes go out
    with _on_stand_in() if backend.name != "cuda" else contextlib.nullcontext():
        for line in sys.stdin:
            outcome = judged(line.strip())
            print(json.dumps(outcome), flush=True)
            if outcome.verdict == "ERROR":  # the device may be unusable from here on
                os._exit(1)
