"""`python -m bench cells`: the tables of docs/cells.md, never typed.

What a cell is and costs is read off its trace.  What an executor runs is tried: a small layer goes forward and back
with each feature.  On CUDA that is dry, on the tests' stand-in for CuPy, with kernels neither built nor launched.
Whether results are right is for the tests to say.  No GPU is needed, but the kernels' tools, of the `test` extra.
"""

import argparse
import functools
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np

import gpurnn
from bench.dry import Dry, Target, dry
from bench.model import GPUS
from bench.report import ROOT, fill
from gpurnn import backend
from gpurnn.cells import CELLS, Cell
from gpurnn.cells.trace import Graph
from gpurnn.cuda import device
from gpurnn.cuda.capture import Captured
from gpurnn.executors import AVAILABLE, ON_CHIP, PRECISIONS
from gpurnn.files import write_atomically
from gpurnn.kernels import build, step

PAGE = Path("docs", "cells.md")
COSTLY = ("tanh", "exp", "log", "sqrt", "div")  # what takes many times as long as a sum or a product
SOURCE = re.compile(
    r"""((?:[A-Z][a-z]\w*,\s)*[A-Z][a-z]\w*(?:\s&\s[A-Z][a-z]\w*|\set\sal\.)?)   # Song, Yang & Wang
        (?:,\s"[^"]*",)?                                                        # , "Training excitatory ...",
        [^()"]{0,30}?\s((?:19|20)\d\d)""",
    re.VERBOSE,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=ROOT, help="where docs/ is; default: this checkout")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is out of date")


def main(options: argparse.Namespace) -> int:
    """Writes the page, or with --check says whether it is out of date: then 1, else 0.  Raises ValueError on a GPU."""
    path = options.root / PAGE
    text = path.read_text(encoding="utf-8")
    new = fill(text, lambda name: TABLES[name](), list(TABLES), list(TABLES), str(path))
    if options.check:
        print(f"out of date: {path}" if new != text else f"up to date: {path}")
        return int(new != text)
    write_atomically(path, new.encode())
    print(path)
    return 0


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def cells() -> str:
    """Every cell that ships, in the order of `CELLS`."""
    head = ["cell", "source", "states", "gates", "parameters", "weight_hh", "forward", "backward", "kept", "slots"]
    return table(head, map(row, CELLS.values()))


def row(cell: Cell) -> list[str]:
    trace = cell.trace
    file = file_of(cell)
    gradients = [*trace.dx, *trace.dr, *trace.dstate, *trace.dparams]
    return [
        f"[`{cell.name}`](../gpurnn/cells/{file})",
        source(cell),
        ", ".join(cell.state_names),
        str(cell.gates),
        ", ".join(f"`{name}`" for name in cell.params) or "-",
        "yes" if cell.recurrent else "no",
        operations(trace.forward, trace.outputs),
        operations(trace.backward, [gradient.index for gradient in gradients]),
        str(len(trace.kept)),
        str(trace.slots),
    ]


def _module(cell: Cell) -> ModuleType:
    forward = cell.forward.func if isinstance(cell.forward, functools.partial) else cell.forward
    return sys.modules[forward.__module__]


def file_of(cell: Cell) -> str:
    return Path(inspect.getfile(_module(cell))).name


def source(cell: Cell) -> str:
    """Authors and year of the first paper that the cell's module names."""
    found = SOURCE.search(_module(cell).__doc__ or "")
    if found is None:
        raise ValueError(f"cell {cell.name}: expected authors and year in the docstring of {file_of(cell)}, found none")
    return " ".join(f"{found[1]} {found[2]}".split())


def operations(graph: Graph, outputs: Iterable[int]) -> str:
    """How many a unit takes a step, and which of them are costly: `28: 5 tanh`."""
    ops = Counter(graph.nodes[index].op for index in graph.reachable(outputs) if graph.nodes[index].args)
    costly = ", ".join(f"{ops[op]} {op}" for op in COSTLY if ops[op])
    return f"{ops.total()}: {costly}" if costly else str(ops.total())


NOTHING: Mapping[str, Any] = MappingProxyType({})


class Feature(NamedTuple):
    """layer, call: options of one and of the other.  flow, captured: whether it is asked for."""

    layer: Mapping[str, Any] = NOTHING
    call: Mapping[str, Any] = NOTHING
    cell: str = "lstm"
    flow: bool = False
    captured: bool = False


T, N, I = 3, 4, 8
HIDDEN = {"persistent": 64}  # units that several blocks share; elsewhere:
SMALL = 32
FEATURES = {
    "lengths": Feature(call={"lengths": [3, 3, 2, 0]}),
    "resets": Feature(call={"resets": np.arange(T * N).reshape(T, N) % 3 == 1}),
    "heads": Feature({"heads": 2}),
    "random numbers": Feature({"zoneout": 0.1, "recurrent_dropout": 0.1, "noise": 0.1}),
    "all_states": Feature(call={"all_states": True}),
    "clip_in_time": Feature({"clip_in_time": 1.0}),
    "flow": Feature(flow=True),
    "captured": Feature(captured=True),
    "no weight_hh": Feature(cell="mingru"),
}


def executors() -> str:
    """Which executor runs which feature in which precision."""
    if backend.name != "numpy":
        raise ValueError(f"backend: expected numpy, from which both machines can be tried, got {backend.name}")
    rows = []
    for machine, names in (("CPU", AVAILABLE["numpy"]), ("CUDA", AVAILABLE["cuda"])):
        kinds = ("float32", "float64") if machine == "CPU" else (*PRECISIONS, "float64")
        for name in names:
            answers: dict[tuple[str, ...], list[str]] = {}
            for kind in kinds:
                answers.setdefault(tuple(tried(machine, name, kind, f) for f in FEATURES.values()), []).append(kind)
            rows += [[machine, f"`{name}`", ", ".join(same), *answer] for answer, same in answers.items()]
    return table(["machine", "executor", "precision", *FEATURES], rows)


def tried(machine: str, executor: str, kind: str, feature: Feature) -> str:
    """`yes`; `no`, where a call is refused with a ValueError; `back: step` where that executor goes backward.

    Raises ValueError where there is no such layer at all.
    """
    options: dict[str, Any] = {"dtype": kind} if kind == "float64" else {"precision": kind} if machine == "CUDA" else {}
    with unbuilt() if machine == "CUDA" else as_it_is() as asked:
        layer = gpurnn.Recurrent(
            feature.cell, I, HIDDEN.get(executor, SMALL), executor=executor, rng=0, **options, **feature.layer
        )
        try:
            reason = passes(layer, feature)
        except ValueError:
            return "no"
    if reason is not None:
        return "no"
    return "back: step" if executor in ON_CHIP and step.backward in asked else "yes"


def passes(layer: gpurnn.Recurrent, feature: Feature) -> str | None:
    """Goes forward and back; says why that was not captured, where it was to be."""

    def there_and_back(x: Any) -> Any:
        y, _, backward = layer(x, **feature.call)
        dy = tuple(map(backend.xp.ones_like, y)) if isinstance(y, tuple) else backend.xp.ones_like(y)
        flow = backend.xp.zeros((1, layer.cell.states, T)) if feature.flow else None
        return backward(dy, flow=flow)[0]

    x = backend.xp.ones((T, N, I), layer.dtype)
    run = Captured(there_and_back, quiet=True) if feature.captured else there_and_back
    for _ in range(3 if feature.captured else 1):  # the third call is the one that is recorded
        run(x)
    return getattr(run, "reason", None)


@contextmanager
def as_it_is() -> Iterator[set]:
    yield set()


@contextmanager
def unbuilt() -> Iterator[set]:
    """The CUDA backend, dry; kernels are not even built.  Gives the factories of those that were asked for."""
    asked: set = set()
    kernel: Any = SimpleNamespace(name="unbuilt", cooperative=False, spilled=0)

    def launcher(recipe: build.Recipe, number: int) -> Dry:
        asked.add(recipe.factory)
        return Dry(kernel)

    with dry(Target(GPUS["h200"].chip)), patch.object(device, "_launcher", launcher):
        yield asked


TABLES: dict[str, Callable[[], str]] = {"cells": cells, "executors": executors}
