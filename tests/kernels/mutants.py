"""Plants bugs in the CUDA kernels and runs a small training step on them: for `test_kernel_mutants`, `test_exchange_mutants`.

A mutant is an edit of a kernel's source.  Its kernel takes the place of the library's in the executor that launches it,
and the step goes through the PTX interpreter, which must refuse it or come out with wrong numbers.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

import gpurnn.kernels
from gpurnn.cells import Cell, noisy, sigmoid, tanh
from gpurnn.cuda import on_chip, passes, step, sweeps, unitwise
from gpurnn.executors import numpy_loop
from gpurnn.executors.contract import Backward, Job, Resets, Weights
from gpurnn.executors.random import Draws
from gpurnn.kernels import plan, tiles
from gpurnn.kernels.tiles import Tile
from tests import fake_cupy
from tests.interpreted import interpreted, reference

I = 3
CLIP = 0.5  # less than many of the gradients
FOLDER = Path(gpurnn.kernels.__path__[0])
PERSISTENT = ("persistent_forward", "persistent_backward")
MODULES = ("products", "exchange", "mail", "clusters", "group", *PERSISTENT)  # each imports only those before it
TOLERANCES = {"float32": 2e-6, "tf32": 4e-3, "bfloat16": 4e-2}  # of every result, as a fraction of its largest value


def cell_forward(x, r, state, params):
    z = sigmoid(x[0] + r[0] + params[0] * state[1])
    n = tanh(x[1] + z * r[1])
    c = z * state[1] + (1 - z) * n
    m = n * params[1] + 0.5 * state[2]
    return (c + tanh(m), c, m), (z, n, r[1])


def cell_backward(dnext, saved, state, next_state, params):
    z, n, r = saved
    tanh_m = tanh(next_state[2])
    dm = dnext[2] + dnext[0] * (1 - tanh_m * tanh_m)
    dc = dnext[1] + dnext[0]
    dn = (dc * (1 - z) + dm * params[1]) * (1 - n * n)
    dz = (dc * (state[1] - n) + dn * r) * z * (1 - z)
    return (dz, dn), (dz, dn * z), (0, dc * z + dz * params[0], 0.5 * dm), (dz * state[1], dm * n)


# One gate is split and one is not, states and parameters are several: every stride in a kernel matters.
CELL = Cell("every_stride", 2, 3, cell_forward, cell_backward, params=("w_c", "w_m"))
NOISY = noisy(CELL, zoneout=0.3, noise=0.2)


class Wrong(Exception):
    """Nothing was refused, but a result is further from NumPy's than TOLERANCES allows."""


class Case(NamedTuple):
    """lengths: of the rows, longest first.  tiles: forward and back; None: the executor `step`.

    training: if not, in pieces of two steps.  back: whether to go back as well; bugs of what both directions share are
    planted in the last one.  running: blocks at once.  seed: of a random order of warps.  resets: rows begin again.
    """

    lengths: tuple[int, ...]
    tiles: tuple[Tile, Tile] | None = None
    blocks: int = 1
    exchange: str = "alone"
    reverse: bool = False
    training: bool = True
    back: bool = True
    cell: Cell = CELL
    H: int = 35
    running: int = 132
    heads: int = 1
    seed: int | None = None
    resets: bool = False

    @property
    def precision(self) -> str:
        return getattr(self.tiles[0], "kind", "float32") if self.tiles else "float32"


class Problem(NamedTuple):
    """float32 arrays.  x is 0 and dy NaN behind each row's end; dy stands in rows of H + 3."""

    x: np.ndarray
    dy: np.ndarray
    state: tuple[np.ndarray, ...]
    dstate: tuple[np.ndarray, ...]
    weights: Weights
    rows: np.ndarray
    resets: np.ndarray
    fresh: tuple[np.ndarray, ...]


def problem(case) -> Problem:
    rng, T, N, H = np.random.default_rng(7), case.lengths[0], len(case.lengths), case.H
    G, S, P = case.cell.gates, case.cell.states, len(case.cell.params)

    def draw(*shape):
        return rng.standard_normal(shape).astype("f4")

    padding = np.arange(T)[:, None] >= np.array(case.lengths)
    x, dy = draw(T, N, I), draw(T, N, H + 3)
    x[padding], dy[padding] = 0, np.nan
    scale = np.float32((H // case.heads) ** -0.5)
    weights = Weights(draw(G * H, I), draw(G * H, H // case.heads) * scale, draw(G * H), draw(G * H), tuple(draw(P, H)))
    if not case.cell.recurrent:
        weights = weights._replace(weight_hh=None, bias_hh=None)
    state, dstate, fresh, often = (
        tuple(draw(S, N, H)),
        tuple(draw(S, N, H)),
        tuple(draw(S, H)),
        rng.random((T, N)) < 0.4,
    )
    inside = ~padding & np.roll(~padding, -1 if case.reverse else 1, 0)  # a row's first step is not among them
    inside[-1 if case.reverse else 0] = False
    return Problem(x, dy, state, dstate, weights, (~padding).sum(1), often & inside, fresh)


def training_step(engine, case, precision, put, xp=np):
    """Every result of a pass forward and a pass back, by name, in float64.  put: host array -> the engine's."""
    given, T = problem(case), case.lengths[0]
    *matrices, params = given.weights
    weights = Weights(*(None if part is None else put(part) for part in matrices), tuple(map(put, params)))
    state, dstate, dy = tuple(map(put, given.state)), tuple(map(put, given.dstate)), put(given.dy)[:, :, : case.H]
    resets = Resets(put(given.resets).astype("?"), tuple(map(put, given.fresh))) if case.resets else None
    job = Job(case.cell, put(given.x), weights, state, given.rows, case.reverse, case.training, precision, resets)
    if case.cell.random:  # the caller's rows stand the other way round
        job = job._replace(draws=Draws(5, xp.full(1, 3 << 32 | 7), xp.arange(len(case.lengths))[::-1], at=1))
    states, tape = engine.forward(job)
    found = {"y": (states.h[:T] if case.reverse else states.h[1:],), "final states": states.final}
    if case.training and case.back:
        zeros = [None if part is None else put(0 * part) for part in matrices]
        grads = Weights(*zeros, tuple(put(0 * part) for part in params))
        dfresh = put(np.zeros((case.cell.states, len(case.lengths), case.H))) if case.resets else None
        dx, dinitial = engine.backward(tape, dy, dstate, grads, Backward(clip=CLIP, dfresh=dfresh))
        found |= {"dx": (dx,), "dinitial states": dinitial, "dparams": grads.params}
        found |= {"dfresh": (dfresh,)} if case.resets else {}
        found |= {
            f"d{name}": (part,) for name, part in zip(Weights._fields[:-1], zeros, strict=True) if part is not None
        }
    return {name: np.stack([reference(part) for part in parts]) for name, parts in found.items() if parts}


@functools.cache
def expected(case):
    return training_step(numpy_loop, case, "float32", lambda array: array.astype("f8"))


def run(case, seed=None):
    """`training_step` on the interpreted kernels.  seed: where the case has none.  Raises PtxError."""
    seed = seed if case.seed is None else case.seed
    with interpreted(seed=seed), pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.interpreted.RUNNING", case.running)
        slots = case.cell.trace.slots * len(case.lengths) * case.H
        patch.setattr(sweeps, "INFERENCE_BYTES", 2 * 4 * slots)
        patch.setattr(on_chip.OnChip, "choice", lambda *given: _choice(case, transposed=given[5]))
        passes.fitted.cache_clear()  # it remembers launchers, which know how many blocks run at once
        return training_step(
            on_chip.PERSISTENT if case.tiles else step, case, case.precision, fake_cupy.asarray, fake_cupy
        )


def check(case, seed=None):
    """Raises PtxError or Wrong."""
    found = run(case, seed)
    for name, want in expected(case).items():
        error = np.abs(found[name] - want).max() / np.abs(want).max()
        if not error <= TOLERANCES[case.precision]:  # nor is NaN
            raise Wrong(f"{name}: off by {error:.1e}")


def _choice(case, transposed):
    return plan.Choice(case.tiles[transposed], case.blocks, case.exchange, plan.Cost(1.0, 1.0, 1.0, 1))


def edited(name, function, edits):
    """The text of kernels/`name`.py, edited within one top-level function, or anywhere where that is ""."""
    text = (FOLDER / f"{name}.py").read_text()
    before, start, rest = text.partition(f"\ndef {function}(" if function else "\n")
    assert start, f"{name} has no {function}"
    body, end, after = rest.partition("\ndef ") if function else (rest, "", "")
    for old, new in edits:
        assert body.count(old) == 1, f"{name}.{function} has {body.count(old)} times {old!r}"
        body = body.replace(old, new)
    return before + start + body + end + after


def mutated(name, function, edits):
    """kernels/`name`.py with the edits, as a module of its own."""
    path = FOLDER / f"{name}.py"
    spec = importlib.util.spec_from_loader(f"gpurnn.kernels.{name}", None, origin=str(path))
    module = importlib.util.module_from_spec(spec)
    exec(compile(edited(name, function, edits), path, "exec"), vars(module))
    return module


def plant(patch, case, where, edits):
    """Lets the executors launch kernels that have the edits; the others stay, and need not be compiled again.

    where: a module and a function of it, or the module alone, "module.".  What imports the module is made anew as well.
    """
    name, function = where.split(".")
    if name == "packing":
        patch.setattr(passes, "packing", mutated(name, function, edits))
    elif name == "unitwise":
        factory = getattr(mutated(name, function, edits), function)
        patch.setattr(unitwise, "unitwise", SimpleNamespace(**vars(unitwise.unitwise) | {function: factory}))
    elif name == "step":
        factory = getattr(mutated(name, function, edits), function)
        patch.setattr(step, "step", SimpleNamespace(**vars(step.step) | {function: factory}))
    elif name == "tiles":  # in its place, as many have imported it
        patch.setattr(getattr(tiles, function), "__code__", getattr(mutated(name, function, edits), function).__code__)
        plant(patch, case, "group.", ())
    else:
        made = anew(name, function, edits)
        if "exchange" in made:
            patch.setattr(passes, "exchange", made["exchange"])
        back = case.back and case.training if name not in PERSISTENT else name == PERSISTENT[True]
        factory = getattr(made[PERSISTENT[back]], "backward" if back else "forward")
        direction = "BACKWARD" if back else "FORWARD"
        patch.setattr(on_chip, direction, getattr(on_chip, direction)._replace(factory=factory))


def anew(name, function, edits):
    """The module with its edits, and those above it, by name: all as they import each other, none where others see it."""
    made = {}
    with pytest.MonkeyPatch.context() as meanwhile:
        for each in MODULES[MODULES.index(name) :]:
            made[each] = mutated(each, *((function, edits) if each == name else ("", ())))
            meanwhile.setitem(sys.modules, f"gpurnn.kernels.{each}", made[each])
            meanwhile.setattr(gpurnn.kernels, each, made[each])
    return made


def stand(mutants):
    """Raises AssertionError where a row's text does not stand exactly once where it says."""
    for _case, where, _error, *edits in mutants.values():
        edited(*where.split("."), edits)


def catch(monkeypatch, cases, mutant):
    """mutant: case, where, what shows, (old, new) of each edit."""
    case, where, error, *edits = mutant
    plant(monkeypatch, cases[case], where, edits)
    with pytest.raises(error):
        check(cases[case])
