"""Recurrent layers with options drawn at random, together with what they are called with."""

from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import CELLS
from gpurnn.recurrent import Recurrent


class Case(NamedTuple):
    """cell: its name.  given: x, dy, state, dstate, lengths and resets, time first, floats in float64."""

    cell: str
    sizes: tuple[int, int, int, int]  # T, N, I, H
    options: dict[str, Any]
    all_states: bool
    given: dict[str, Any]
    seed: int

    def layer(self, dtype: str = "float64", executor: str = "numpy", **changed: Any) -> Recurrent:
        """With parameters that are nowhere 0, the same for all of these."""
        options = {**self.options, **changed}
        layer = Recurrent(self.cell, *self.sizes[2:], dtype=dtype, executor=executor, rng=self.seed, **options)
        noise = np.random.default_rng(self.seed)
        for value in layer.params.values():
            value += backend.xp.asarray(0.15 * noise.standard_normal(value.shape), dtype)
        return layer

    def call(self, layer: Recurrent, **how: Any) -> tuple[Any, Any, Any]:
        x, state, resets = (self.given[name] for name in ("x", "state", "resets"))
        resets = None if resets is None else turned(layer, resets)
        how = {"lengths": self.given["lengths"], "resets": resets, "all_states": self.all_states, **how}
        return layer(turned(layer, x).astype(layer.dtype), _as(state, layer.dtype), **how)

    def dy(self, layer: Recurrent) -> Any:
        dy = self.given["dy"]
        if isinstance(dy, tuple):
            return tuple(None if part is None else turned(layer, part).astype(layer.dtype) for part in dy)
        return None if dy is None else turned(layer, dy).astype(layer.dtype)

    def results(self, layer: Recurrent) -> dict[str, np.ndarray]:
        """All that a call gives, of two backward passes along the same tape, in float64 and time first."""
        S, T = layer.cell.states, self.sizes[0]
        y, final, back = self.call(layer)
        flows = [backend.xp.zeros((layer.num_layers * layer.directions, S, T)) for _ in range(2)]
        dstate = _as(self.given["dstate"], layer.dtype)
        passes = [back(self.dy(layer), dstate, keep=again == 0, flow=flow) for again, flow in enumerate(flows)]
        found = {"y": tuple(turned(layer, part) for part in _parts(y)), "state": _parts(final)}
        for again, ((dx, dinitial), flow) in enumerate(zip(passes, flows, strict=True)):
            found |= {
                f"dx {again}": (turned(layer, dx),),
                f"dstate {again}": _parts(dinitial),
                f"flow {again}": (flow,),
            }
        found |= {f"gradient of {name}": (value,) for name, value in layer.grads.items()}
        return numbers(found)


def turned(layer: Recurrent, value: Any) -> Any:
    """Time first for the batch first, and the other way round, where the layer is `batch_first`."""
    return value.swapaxes(0, 1) if layer.batch_first else value


def numbers(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Arrays or tuples of arrays by name, each as one of float64."""
    return {
        f"{name}[{k}]": backend.to_numpy(part).astype(np.float64)
        for name, value in found.items()
        for k, part in enumerate(_parts(value))
    }


def random_case(seed: int, most: int = 1 << 30, smooth: bool = False) -> Case:
    """most: of any size.  smooth: differences have a say: no corners, no clipping, and no padding that is NaN."""
    rng = np.random.default_rng(seed)
    names = [name for name in CELLS if not (smooth and "relu" in name)]
    name = str(rng.choice(names))
    cell = CELLS[name]
    T, N = (min(most, int(rng.choice(sizes))) for sizes in ([1, 2, 3, 5, 9], [1, 2, 3, 5, 8, 17]))
    I, H = (min(most, int(rng.choice(sizes))) for sizes in ([1, 2, 5, 17], [2, 4, 6, 12, 16, 24, 36, 64]))
    L, D, S = int(rng.choice([1, 1, 2, 3])), int(rng.integers(1, 3)), cell.states

    def often(value: Any, otherwise: Any, of: float = 0.4) -> Any:
        return value if rng.random() < of else otherwise

    heads = int(rng.choice([K for K in range(2, H + 1) if H % K == 0]))
    marked = bool(cell.trace.forward.candidates)
    options = {
        "num_layers": L,
        "bias": often(False, True, 0.2),
        "bidirectional": D == 2,
        "batch_first": often(True, False),
        "dropout": often(0.3, 0.0) if L > 1 else 0.0,
        "weight_dropout": often(0.3, 0.0) if cell.recurrent else 0.0,
        "residual": often(True, False),
        "zoneout": often(0.25 if S == 1 else tuple(0.25 * (s + 1) / S for s in range(S)), 0.0, 0.3),
        "recurrent_dropout": often(0.25, 0.0, 0.3) if marked else 0.0,
        "noise": often(0.5, 0.0, 0.3),
        "trainable_h0": often(True, False),
        "heads": often(heads, 1) if cell.recurrent else 1,
        "clip_in_time": None if smooth else often(0.3, None, 0.3),
    }
    lengths = often(rng.integers(0, T + 1, N), None, 0.5)
    padding = np.zeros((T, N), bool) if lengths is None else np.arange(T)[:, None] >= lengths
    all_states = often(True, False)
    resets = often(rng.random((T, N)) < rng.choice([0.1, 0.5, 1.0]), None, 0.5)

    def drawn(*shape: int, padded: bool = False) -> np.ndarray:
        values = rng.standard_normal(shape)
        if padded and not smooth:
            values[padding] = np.nan  # it is not read
        return values

    def states(missing: float) -> Any:
        """One for each state; some are None, where the cell has several."""
        parts = tuple(often(None, drawn(L * D, N, H), missing) for _ in range(S))
        return parts[0] if S == 1 else often(None, parts, missing / 2)

    above = S if all_states else 1
    dys = tuple(often(None, drawn(T, N, D * H, padded=True), 0.2) for _ in range(above))
    given = {
        "x": drawn(T, N, I, padded=True),
        "dy": dys[0] if above == 1 else dys,
        "state": states(0.3),
        "dstate": often(None, states(0.0), 0.2),
        "lengths": lengths,
        "resets": resets,
    }
    return Case(name, (T, N, I, H), options, all_states, given, seed)


def _parts(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _as(value: Any, dtype: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_as(part, dtype) for part in value)
    return None if value is None else value.astype(dtype)


def told(case: Case) -> str:
    """What is drawn, in a line."""
    unusual = {
        name: value for name, value in case.options.items() if value not in (False, None, 0, 1) or name == "bias"
    }
    given = {name: case.given[name] is not None for name in ("dy", "state", "dstate", "resets")}
    return (
        f"{case.cell}, T, N, I, H = {case.sizes}, {unusual}, lengths {case.given['lengths']}, all_states "
        f"{case.all_states}, given {given}"
    )


def worst(got: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference, as a fraction of its array's largest value, and of which array; infinite where what is not
    finite differs.
    """
    found = [(0.0, "nothing")]
    for name, value in expected.items():
        finite = np.isfinite(value)
        if got[name].shape != value.shape or not np.array_equal(np.isfinite(got[name]), finite):
            found.append((np.inf, name))
        elif finite.any():
            size = max(1e-2, abs(value[finite]).max())
            found.append((float(abs(got[name][finite] - value[finite]).max() / size), name))
    return max(found)
