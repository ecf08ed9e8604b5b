"""Cells drawn at random, in shapes drawn at random: the compiled executor against NumPy, backward against differences."""

from typing import Any

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from tests.fuzz.cases import each_case, seeds
from tests.fuzz.random_cells import random_cell

SHAPES = 4  # of each cell


@pytest.mark.parametrize("seeds", seeds(1, one_in=20))
def test_random_cells(seeds, tmp_path):
    each_case(case, seeds, tmp_path)


def case(seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    cell = random_cell(rng)
    if seed % 10 == 0:  # where a function has a corner, differences across it have no say
        errors = gpurnn.check_gradients(cell, T=2, N=2, executor="numpy", tolerance=1e9)
        if np.median(list(errors.values())) > 1e-4:
            return f"backward: {errors}"
    for shape in range(SHAPES):
        wrong = _compared(cell, rng, seed)
        if wrong:
            return f"shape {shape}: {wrong}"
    return None


def _compared(cell: gpurnn.Cell, rng: np.random.Generator, seed: int) -> str | None:
    T, N = int(rng.choice([1, 2, 3, 5, 12])), int(rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 16, 33]))
    I, H = int(rng.choice([1, 2, 3, 8, 17, 40])), int(rng.choice([1, 2, 5, 15, 16, 17, 31, 33, 64, 129]))
    L, D, S = int(rng.choice([1, 1, 2])), int(rng.integers(1, 3)), cell.states
    options = {
        "num_layers": L,
        "bidirectional": D == 2,
        "clip_in_time": None if rng.integers(3) else 0.3,
        "bias": bool(rng.integers(5)),
        "trainable_h0": bool(rng.integers(3) == 0),
        "rng": seed,
    }
    lengths = None if rng.integers(2) else rng.integers(0, T + 1, N)
    shapes = {"x": (T, N, I), "dy": (T, N, D * H)} | {
        f"{what}{s}": (L * D, N, H) for what in ("s", "d") for s in range(S)
    }
    drawn = {name: rng.standard_normal(shape) for name, shape in shapes.items()}

    def results(dtype: str, executor: str) -> dict[str, Any]:
        layer = gpurnn.Recurrent(cell, I, H, dtype=dtype, executor=executor, **options)
        noise = np.random.default_rng(seed)
        for value in layer.params.values():
            value += backend.xp.asarray(0.2 * noise.standard_normal(value.shape), dtype)
        given = {name: value.astype(dtype) for name, value in drawn.items()}
        state, dstate = (tuple(given[f"{what}{s}"] for s in range(S)) for what in ("s", "d"))
        if S == 1:
            state, dstate = state[0], dstate[0]
        state = None if options["trainable_h0"] else state
        flow = backend.xp.zeros((L * D, S, T))
        y, final, back = layer(given["x"], state, lengths=lengths)
        dx, dinitial = back(given["dy"], dstate, flow=flow)
        found = {"y": y, "dx": dx, "flow": flow, **{f"gradient of {n}": g for n, g in layer.grads.items()}}
        for what, parts in (("state", final), ("dstate", dinitial)):
            found |= {f"{what} {s}": part for s, part in enumerate(parts if S > 1 else (parts,))}
        return {name: backend.to_numpy(value).astype(np.float64) for name, value in found.items()}

    right = results("float64", "numpy")
    other = "compiled" if backend.name == "numpy" else "step"
    wide, narrow, plain = (
        _worst(results(*of), right) for of in (("float64", other), ("float32", other), ("float32", "numpy"))
    )
    close = wide <= 1e-8 and (narrow <= 2e-3 or narrow <= 20 * plain)
    sizes = f"T, N, I, H = {T, N, I, H}, lengths {lengths}, {options}"
    return None if close else f"errors {wide:.2g} in float64, {narrow:.2g} in float32, NumPy's {plain:.2g}; {sizes}"


def _worst(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """The largest difference, each as a fraction of the largest value; infinite where other values are not finite."""
    worst = 0.0
    for name, value in expected.items():
        finite = np.isfinite(value)
        if not np.array_equal(np.isfinite(got[name]), finite):
            return np.inf
        if finite.any():
            size = max(1e-2, abs(value[finite]).max())
            worst = max(worst, float(abs(got[name][finite] - value[finite]).max() / size))
    return worst
