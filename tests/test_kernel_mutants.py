"""Bugs planted in the CUDA kernels, each of which has to show: that is what says the other tests of the kernels can fail.

A mutant is an edit of a kernel's source.  Its kernel takes the place of the library's in the executor that launches it,
and a small training step goes through the PTX interpreter, which must refuse it or come out with wrong numbers.  The
source as it is goes the same way and passes, so it is the edit that was caught.
"""

import functools
import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn.kernels
from gpurnn.cells import Cell, sigmoid, tanh
from gpurnn.executors import device, numpy_loop, resident, step
from gpurnn.executors.numpy_loop import Backward, Weights
from gpurnn.kernels.products import Ffma, Mma
from tests import fake_cupy
from tests.interpreted import interpreted, reference
from tests.ptx.errors import Misaligned, OutOfBounds, Race, Uninitialised

T, I, H = 4, 3, 35
CLIP = 0.5  # less than many of the gradients
FOLDER = Path(gpurnn.kernels.__path__[0])


class Wrong(Exception):
    """Nothing was refused, but a result is further from NumPy's than the case allows."""


class Case(NamedTuple):
    """lengths: of several blocks' rows, the last block not full, and of different lengths within a block.

    tolerance: of every result, as a fraction of its largest value.  training: if not, in pieces of two steps.
    """

    executor: str
    precision: str
    reverse: bool
    lengths: tuple[int, ...]
    tolerance: float
    training: bool = True


FEW, MANY = (4, 3, 3, 1, 1), (4, 4, 4, 3, 3, 2, 2, 2, 2, 1)
CASES = {
    "ffma": Case("resident", "float32", False, FEW, 2e-6),
    "ffma reverse": Case("resident", "float32", True, FEW, 2e-6),
    "pieces": Case("resident", "float32", False, FEW, 2e-6, training=False),
    "pieces reverse": Case("resident", "float32", True, FEW, 2e-6, training=False),
    "mma": Case("resident", "bfloat16", False, MANY, 4e-2),
    "mma reverse": Case("resident", "bfloat16", True, MANY, 4e-2),
    "step": Case("step", "float32", False, MANY, 2e-6),
    "step reverse": Case("step", "float32", True, MANY, 2e-6),
}

# By precision and `transposed`: several warps, sums over lanes with and without halves to keep, weights in registers and
# in shared memory, and, forward, two tiles of tensor cores' products.
TILES = {
    ("float32", False): Ffma(units=2, lanes=8, rows=2, kept=1),
    ("float32", True): Ffma(units=1, lanes=4, rows=2, kept=3),
    ("bfloat16", False): Mma(groups=2, kept=1),
    ("bfloat16", True): Mma(groups=2, kept=1),
}


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


class Problem(NamedTuple):
    """float32 arrays.  x is 0 and dy NaN behind each row's end; dy stands in rows of H + 3."""

    x: np.ndarray
    dy: np.ndarray
    state: tuple[np.ndarray, ...]
    dstate: tuple[np.ndarray, ...]
    weights: Weights
    rows: np.ndarray


def problem(lengths) -> Problem:
    rng, N = np.random.default_rng(7), len(lengths)

    def draw(*shape):
        return rng.standard_normal(shape).astype("f4")

    padding = np.arange(T)[:, None] >= np.array(lengths)
    x, dy = draw(T, N, I), draw(T, N, H + 3)
    x[padding], dy[padding] = 0, np.nan
    weights = Weights(draw(2 * H, I), draw(2 * H, H) / np.float32(H**0.5), draw(2 * H), draw(2 * H), tuple(draw(2, H)))
    return Problem(x, dy, tuple(draw(3, N, H)), tuple(draw(3, N, H)), weights, (~padding).sum(1))


def training_step(engine, case, put):
    """Every result of a pass forward and a pass back, by name, in float64.  put: host array -> the engine's."""
    given = problem(case.lengths)
    *matrices, params = given.weights
    weights = Weights(*map(put, matrices), tuple(map(put, params)))
    grads = Weights(*(put(0 * part) for part in matrices), tuple(put(0 * part) for part in params))
    state, dstate, dy = tuple(map(put, given.state)), tuple(map(put, given.dstate)), put(given.dy)[:, :, :H]
    arguments = CELL, put(given.x), weights, state, given.rows, case.reverse, case.training, case.precision
    states, tape = engine.forward(*arguments)
    found = {"y": (states.h[:T] if case.reverse else states.h[1:],), "final states": states.final}
    if case.training:
        dx, dinitial = engine.backward(tape, dy, dstate, grads, Backward(clip=CLIP))
        found |= {"dx": (dx,), "dinitial states": dinitial, "dparams": grads.params}
        found |= {f"d{name}": (getattr(grads, name),) for name in Weights._fields[:-1]}
    return {name: np.stack([reference(part) for part in parts]) for name, parts in found.items()}


@functools.cache
def expected(case):
    return training_step(numpy_loop, case._replace(precision="float32"), lambda array: array.astype("f8"))


def check(case, seed):
    """seed: None, or that of a random order of warps.  Raises PtxError or Wrong."""
    engine = {"resident": resident, "step": step}[case.executor]
    with interpreted(case.executor, seed):
        found = training_step(engine, case, fake_cupy.asarray)
    for name, want in expected(case).items():
        error = np.abs(found[name] - want).max() / np.abs(want).max()
        if not error <= case.tolerance:  # nor is NaN
            raise Wrong(f"{name}: off by {error:.1e}")


def mutated(name, function, edits):
    """kernels/`name`.py as a module of its own, edited within one top-level function."""
    path = FOLDER / f"{name}.py"
    before, start, rest = path.read_text().partition(f"\ndef {function}(")
    body, end, after = rest.partition("\ndef ")
    for old, new in edits:
        assert body.count(old) == 1, f"{name}.{function} has {body.count(old)} times {old!r}"
        body = body.replace(old, new)
    spec = importlib.util.spec_from_loader(f"gpurnn.kernels.{name}", None, origin=str(path))
    module = importlib.util.module_from_spec(spec)
    exec(compile(before + start + body + end + after, path, "exec"), vars(module))
    return module


def plant(patch, where, edits):
    """Lets the executors launch the kernel that has the edits; the others stay, and need not be compiled again."""
    name, function = where.split(".")
    module = mutated(name, function, edits)
    if name == "products":
        module.Ffma, module.Mma = Ffma, Mma  # the classes of the tiles that the executor hands in
        if function in ("_element", "_pack_ffma", "_pack_mma"):
            patch.setattr(resident, "products", module)
            return
        patch.setitem(sys.modules, "gpurnn.kernels.products", module)  # where the kernel takes it from
        name, function, module = "resident", "forward", mutated("resident", "forward", ())
    executor = {"resident": resident, "step": step}[name]
    kernels = SimpleNamespace(**vars(getattr(executor, name)))
    setattr(kernels, function, getattr(module, function))
    patch.setattr(executor, name, kernels)


@pytest.fixture(autouse=True)
def layout(monkeypatch):
    """The tiles, and the pieces, that the cases are about."""
    monkeypatch.setattr(resident, "tile", lambda cell, H, N, precision, transposed: TILES[precision, transposed])
    monkeypatch.setattr(device, "INFERENCE_BYTES", 2 * len(FEW) * CELL.trace.slots * H * 4)
    resident._fitted.cache_clear()  # it remembers tiles
    yield
    resident._fitted.cache_clear()


@pytest.mark.parametrize("seed", (None, 0, pytest.param(1, marks=pytest.mark.slow)))
@pytest.mark.parametrize("case", CASES)
def test_the_kernels_as_they_are(case, seed):
    check(CASES[case], seed)


UNCHANGED = {"resident.backward": "ffma", "products.ffma": "ffma", "products._pack_mma": "mma", "step.forward": "step"}


@pytest.mark.parametrize("where", UNCHANGED)
def test_a_copy_without_an_edit(monkeypatch, where):
    plant(monkeypatch, where, ())
    check(CASES[UNCHANGED[where]], seed=None)


# What is wrong: case, where, what shows, (old, new) of each edit.  The second table is for `-m slow`.
# fmt: off
MUTANTS = {
    "forward: no barrier after zeroing": ("ffma", "resident.forward", Race,
        ("* SLOT_STEP)\n        cuda.syncthreads()\n", "* SLOT_STEP)\n")),
    "forward: no barrier before the first product": ("ffma", "resident.forward", Race,
        ("values[p * S])\n        cuda.syncthreads()\n", "values[p * S])\n")),
    "forward: no barrier in a step": ("ffma", "resident.forward", Race,
        ("result[S + k]\n            cuda.syncthreads()\n", "result[S + k]\n")),
    "forward, mma: no barrier in a step": ("mma", "resident.forward", Race,
        ("result[S + k]\n            cuda.syncthreads()\n", "result[S + k]\n")),
    "forward: one buffer": ("ffma", "resident.forward", Race, ("vector, i & 1, sums", "vector, 0, sums"), ("i & 1 ^ 1", "0")),
    "forward: padding not zeroed": ("ffma", "resident.forward", Uninitialised, ("vector[k] = 0", "pass")),
    "forward: x of the wrong step": ("ffma", "resident.forward", Race,
        ("following = advance(slots, (t - 1 if reverse else t + 1)", "following = advance(slots, t")),
    "forward: rows run on behind their end": ("ffma", "resident.forward", Wrong, ("if t < length[p]", "if length[p] > 0")),
    "forward: bias of the wrong slot": ("ffma", "resident.forward", Wrong, ("p * GIVEN + G + k]", "p * GIVEN + k]")),
    "forward: a step too late in reverse": ("ffma reverse", "resident.forward", Wrong, ("t = steps - 1 - i", "t = steps - i")),
    "forward: a piece forgets where it starts": ("pieces", "resident.forward", Wrong, ("lengths[n] - start", "lengths[n]")),
    "backward: no barrier in a step": ("ffma", "resident.backward", Race,
        ("result[WRITTEN + S + k]\n            cuda.syncthreads()\n", "result[WRITTEN + S + k]\n")),
    "backward: loads of the wrong step": ("ffma reverse", "resident.backward", Race,
        ("following = t + 1 if reverse else t - 1", "following = t")),
    "backward: rows begin behind their end": ("ffma", "resident.backward", Wrong,
        ("if t < length[p]:\n                    for k", "if length[p] > 0:\n                    for k")),
    "backward: ended rows go on changing": ("ffma reverse", "resident.backward", Wrong,
        ("if t < length[p]:\n                    values", "if length[p] > 0:\n                    values")),
    "backward: dy's row stride ignored": ("ffma", "resident.backward", Wrong, ("n * dy_row + u", "n * H + u")),
    "backward: clipped before the step, not behind it": ("ffma", "resident.backward", Wrong,
        ("if clip:", "if not clip:"), ("given[DNEXT + s] = values[p * S + s]", "given[DNEXT + s] = clipped(values[p * S + s], limit)")),
    "backward: dparams of one step": ("ffma", "resident.backward", Wrong, ("gradients[p * P + k] +=", "gradients[p * P + k] =")),
    "ffma: chunks in shared memory begin one late": ("ffma", "products.ffma", OutOfBounds,
        ("((c - KEPT) * J", "((c - KEPT + 1) * J")),
    "ffma: adds the wrong lane": ("ffma", "products._reduction", Wrong,
        ("exchange(partial[k], u32(mask))", "exchange(partial[k], u32(2 * mask))")),
    "ffma: keeps the wrong half": ("ffma", "products._reduction", Wrong,
        ("(high if upper else low) +", "(low if upper else high) +")),
    "ffma: weights of the wrong lane": ("ffma", "products._pack_ffma", Wrong,
        ("4 * (tid % LANES + LANES * c)", "4 * (tid % LANES * 2 + c)")),
    "ffma: packs a thread too many": ("ffma", "products._pack_ffma", OutOfBounds, ("word < WORDS", "word <= WORDS")),
    "ffma: weights of the row behind": ("ffma", "products._element", OutOfBounds, ("unit >= H", "unit > H")),
    "mma: halves of a chunk swapped": ("mma", "products.mma", Wrong,
        ("values[2 * second : 2 * second + 2]", "values[2 - 2 * second : 4 - 2 * second]")),
    "mma: weights of the wrong lane": ("mma", "products._pack_mma", Wrong,
        ("8 * (lane % 4) + 4 * second", "4 * (lane % 4) + 16 * second")),
    "step forward: a thread too many": ("step", "step.forward", Race, ("k >= rows * H", "k > rows * H")),
    "step forward: blocks on top of each other": ("step", "step.forward", Race,
        ("types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x", "types.int64(cuda.threadIdx.x)")),
    "step forward: before and after swapped": ("step", "step.forward", Wrong, ("before, after =", "after, before =")),
    "step forward: a bias slot too far": ("step", "step.forward", OutOfBounds, ("bias[s * H + u]", "bias[(s + 1) * H + u]")),
    "step forward: other states of the step behind": ("step", "step.forward", Wrong,
        ("before * rest_step + k", "after * rest_step + k")),
    "step backward: a thread too many": ("step", "step.backward", OutOfBounds, ("k >= rows * H", "k > rows * H")),
    "step backward: before and after swapped": ("step reverse", "step.backward", Wrong, ("before, after =", "after, before =")),
    "step backward: dL/d(final state) clipped": ("step", "step.backward", Wrong, ("if clip and n < seen", "if clip")),
    "step backward: a row too many clipped": ("step", "step.backward", Wrong, ("n < seen", "n <= seen")),
    "step backward: dy's row stride ignored": ("step", "step.backward", Wrong, ("n * dy_row", "n * H")),
    "step backward: dy not added": ("step", "step.backward", Wrong, ("given[DNEXT] += dy", "given[DNEXT] = dy")),
    "step backward: dparams of one step": ("step reverse", "step.backward", Wrong,
        ("+= result[WRITTEN + S + p]", "= result[WRITTEN + S + p]")),
}
MORE_MUTANTS = {
    "forward: x of step T": ("ffma", "resident.forward", OutOfBounds, ("if i + 1 < steps", "if i < steps")),
    "forward: first x of step T in reverse": ("ffma reverse", "resident.forward", OutOfBounds,
        ("(steps - 1 if reverse and", "(steps if reverse and")),
    "forward: last row not run": ("ffma", "resident.forward", Wrong, ("first + row < N", "first + row < N - 1")),
    "forward: a row beyond the batch runs": ("ffma", "resident.forward", Race, ("first + row < N", "first + row <= N")),
    "forward: a row beyond the batch loaded": ("ffma", "resident.forward", OutOfBounds, ("row, N - 1)", "row, N)")),
    "forward: unit H runs": ("ffma", "resident.forward", Race, ("unit < H", "unit <= H")),
    "forward: unit H loaded": ("ffma", "resident.forward", OutOfBounds, ("min(unit, H - 1)", "min(unit, H)")),
    "forward: all rows stop with the shortest": ("ffma", "resident.forward", Wrong,
        ("min(T, lengths[first] - start)\n", "min(T, lengths[min(first + ROWS, N) - 1] - start)\n")),
    "forward: unused pairs write final states": ("ffma", "resident.forward", Race, ("if length[p] > 0", "if length[p] >= 0")),
    "forward: x of the wrong gate later": ("ffma", "resident.forward", Wrong,
        ("following[slot_at[p] + (START + g) * H]", "following[slot_at[p] + g * H]")),
    "forward: a bias slot too far": ("ffma", "resident.forward", OutOfBounds, ("bias[k * H + u]", "bias[(k + 1) * H + u]")),
    "forward: states written a step early": ("ffma", "resident.forward", Wrong, ("(t + 1 - reverse)", "(t + reverse)")),
    "forward: other states over each other": ("ffma", "resident.forward", Wrong,
        ("rest_after[s * rest_state", "rest_after[s * N * H")),
    "backward: no barrier after zeroing": ("ffma", "resident.backward", Race,
        ("arrays, strides, t)\n        cuda.syncthreads()\n", "arrays, strides, t)\n")),
    "backward: one buffer": ("ffma", "resident.backward", Race,
        ("vector, i & 1, sums", "vector, 0, sums"), ("spot[p], i & 1, g", "spot[p], 0, g")),
    "backward: padding not zeroed": ("ffma", "resident.backward", Uninitialised, ("vector[k] = 0", "pass")),
    "backward: first loads of step T": ("ffma", "resident.backward", OutOfBounds,
        ("t = 0 if reverse else steps - 1", "t = 0 if reverse else steps")),
    "backward: gates in the wrong order": ("ffma", "resident.backward", Wrong,
        ("g * H, result[g]", "g * H, result[G - 1 - g]")),
    "backward: dy's step stride ignored": ("ffma", "resident.backward", Wrong, ("t * dy_step", "t * N * H")),
    "backward: not clipped": ("ffma", "resident.backward", Wrong, ("if clip:", "if not clip:")),
    "backward: only positive values clipped": ("mma", "resident.backward", Wrong,
        ("return -limit if value < -limit else value", "return value")),
    "backward: the product's share lost": ("ffma", "resident.backward", Wrong, ("values[p * S] += sums[p]", "pass")),
    "backward: before and after swapped": ("ffma", "resident.backward", Wrong, ("before, after =", "after, before =")),
    "ffma: chunks copied from one early": ("ffma", "products.ffma", Wrong, ("packed[KEPT * J", "packed[(KEPT - 1) * J")),
    "ffma: pairs placed elsewhere": ("ffma", "products.ffma", Race, ("(PAIRS >> (bit + 1))", "(PAIRS >> bit)")),
    "ffma: several lanes own a pair": ("ffma", "products.ffma", Race, ("lane < DOUBLE and unit < H", "unit < H")),
    "ffma: a wrong lane's halves": ("ffma", "products._reduction", Wrong,
        ("low if upper else high, u32(mask)", "low if upper else high, u32(mask ^ 3)")),
    "mma: the lane's k at half its place": ("mma", "products.mma", Misaligned, ("lane % 4 * 8", "lane % 4 * 4")),
    "mma: batch rows permuted": ("mma", "products.mma", Wrong, ("2 * (tid % 4) + pair % 2", "tid % 4 + 4 * (pair % 2)")),
    "mma: chunks copied from one early": ("mma", "products.mma", Wrong, ("tile * CHUNKS + KEPT)", "tile * CHUNKS + KEPT - 1)")),
    "mma: a tile's registers from another chunk": ("mma", "products.mma", Wrong, ("tile * CHUNKS * 2 + k", "tile * KEPT * 2 + k")),
    "mma: results of rows and units swapped": ("mma", "products.mma", Wrong, ("[half % 2 * 2 + row]", "[row * 2 + half % 2]")),
    "mma: pairs of weights swapped": ("mma", "products._pack_mma", Wrong, ("pack_bf16(high, low)", "pack_bf16(low, high)")),
    "mma: fragment words swapped": ("mma", "products._pack_mma", Wrong,
        ("half = 2 * block + part % 2", "half = 2 * block + part // 2"), ("2 * (part // 2)", "2 * (part % 2)")),
}
# fmt: on


@pytest.mark.parametrize("name", [*MUTANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MUTANTS)])
def test_planted_bugs_are_caught(monkeypatch, name):
    case, where, error, *edits = (MUTANTS | MORE_MUTANTS)[name]
    plant(monkeypatch, where, edits)
    with pytest.raises(error):
        check(CASES[case], seed=None)
