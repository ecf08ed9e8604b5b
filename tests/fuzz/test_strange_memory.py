"""Valid calls on arrays in strange memory: the layer's own executor against the NumPy executor in float64."""

from typing import Any

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from tests.fuzz.cases import each_case, seeds
from tests.fuzz.values import Subclass

KINDS = {
    "lstm": (gpurnn.LSTM, {}),
    "gru": (gpurnn.GRU, {}),
    **{name: (gpurnn.RNN, {"nonlinearity": name}) for name in ("tanh", "sigmoid", "relu", "identity")},
}
WORK = 2e7  # multiplications of a case, about
TOLERANCES = {"float32": 2e-4, "float64": 1e-9}  # of a result's largest value; ten times that without a bound


@pytest.mark.parametrize("seeds", seeds(6))
def test_strange_memory(seeds, tmp_path):
    each_case(case, seeds, tmp_path)


def elsewhere(rng: np.random.Generator, values: np.ndarray) -> Any:
    """The same values in other memory."""
    dtype, shape = values.dtype, values.shape
    odd = np.zeros(values.nbytes + 64, np.uint8)
    spread = np.zeros(tuple(3 * size for size in shape), dtype)[tuple(slice(None, None, 3) for _ in shape)]
    spread[...] = values
    shifted = np.ndarray(shape, dtype, odd.data, int(rng.integers(1, 64)))
    shifted[...] = values
    locked = values.copy()
    locked.flags.writeable = False
    others = [
        lambda: values,
        lambda: np.asfortranarray(values),
        lambda: values[::-1].copy()[::-1],
        lambda: values[..., ::-1].copy()[..., ::-1],
        lambda: np.ascontiguousarray(values.T).T,
        lambda: values.astype(dtype.newbyteorder(">")),
        lambda: values.astype(np.float64),
        lambda: values.tolist() if values.size else values,
        lambda: values.view(Subclass),
        lambda: spread,
        lambda: shifted,
        lambda: locked,
    ]
    return others[rng.integers(len(others))]()


def case(seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    layer, reference = _layers(rng, seed)
    x, state, lengths, dy, dstate = _given(rng, layer)
    T, N, flows = len(x), x.shape[1], rng.random() < 0.3
    parts = (layer.num_layers * layer.directions, layer.cell.states, T)
    flow, expected_flow = (backend.xp.zeros(parts) if flows else None for _ in range(2))

    given, its_state = elsewhere(rng, x), _each(state, lambda part: elsewhere(rng, part))
    before = np.array(given, np.float64)
    y, final, back = layer(given, its_state, lengths=lengths)
    quiet, final_quiet, _ = layer(given, its_state, lengths=lengths, training=False)
    y_expected, final_expected, back_expected = reference(x, state, lengths=lengths)
    given_dy = None if dy is None else elsewhere(rng, dy)
    if rng.random() < 0.5:  # the tape stays whole
        begin = layer.grads.flat.copy()
        back(given_dy, dstate, keep=True)
        layer.grads.flat[...] = begin
    dx, dinitial = back(given_dy, _each(dstate, lambda part: elsewhere(rng, part)), flow=flow)
    dx_expected, dinitial_expected = back_expected(dy, dstate, flow=expected_flow)

    pairs = {"y": (y, y_expected), "y without training": (quiet, y_expected), "dx": (dx, dx_expected)}
    for what, got, expected in (
        ("state", final, final_expected),
        ("state without training", final_quiet, final_expected),
        ("dstate", dinitial, dinitial_expected),
    ):
        pairs |= {f"{what} {s}": pair for s, pair in enumerate(zip(_parts(got), _parts(expected), strict=True))}
    pairs |= {f"gradient of {name}": (layer.grads[name], reference.grads[name]) for name in layer.params}
    pairs |= {"flow": (flow, expected_flow)} if flows else {}
    bound = TOLERANCES[layer.dtype.name] * (10 if layer.cell.name.endswith(("relu", "identity")) else 1)
    wrong = {what: error for what, pair in pairs.items() if not (error := _error(*pair)) <= bound}
    if not np.array_equal(before, np.array(given, np.float64), equal_nan=True):
        wrong["x has changed"] = np.nan
    try:
        back(given_dy)
        wrong["backward again was not refused"] = np.nan
    except RuntimeError:
        pass
    return f"{layer.cell.name} {layer.dtype}, T, N = {T, N}, lengths {lengths}: {wrong}" if wrong else None


def _layers(rng: np.random.Generator, seed: int) -> tuple[Any, Any]:
    """Of the same parameters and gradients, and none of them 0."""
    make, options = KINDS[rng.choice(list(KINDS))]
    sizes = int(rng.choice([1, 2, 5, 16, 33, 100])), int(rng.choice([1, 2, 7, 8, 15, 17, 32, 33, 65, 130]))
    options = options | {
        "num_layers": int(rng.choice([1, 1, 1, 2, 3])),
        "bidirectional": bool(rng.integers(2)),
        "bias": bool(rng.integers(4)),
        "trainable_h0": bool(rng.integers(3) == 0),
        "clip_in_time": None if rng.integers(4) else float(rng.choice([0.01, 0.5, 10.0])),
    }
    dtype = str(rng.choice(["float32", "float64"]))
    layer = make(*sizes, dtype=dtype, rng=seed, **options)
    reference = make(*sizes, dtype="float64", executor="numpy", rng=seed, **options)
    for name, shape in layer.params.shapes.items():
        for ours, theirs, size in ((layer.params, reference.params, 0.1), (layer.grads, reference.grads, 1.0)):
            ours[name][...] += backend.xp.asarray(size * rng.standard_normal(shape), dtype)
            theirs[name][...] = ours[name] * 0.5 if size == 0.1 else ours[name]
        layer.params[name][...] = reference.params[name].astype(dtype)
        reference.params[name][...] = layer.params[name]
    return layer, reference


def _given(rng: np.random.Generator, layer: Any) -> tuple[Any, ...]:
    """x, state, lengths, dy, dstate; where lengths are given, often with NaN behind them."""
    I, H, L, D, S = layer.input_size, layer.hidden_size, layer.num_layers, layer.directions, layer.cell.states
    T, N = int(rng.choice([0, 1, 1, 2, 3, 7, 20, 150])), int(rng.choice([0, 1, 1, 2, 3, 5, 8, 9, 33, 130]))
    if T * N * (I + H) * H * layer.cell.gates * L * D > WORK:
        T, N = min(T, 4), min(N, 9)

    def drawn(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(layer.dtype)

    def states() -> Any:
        parts = tuple(drawn(L * D, N, H) for _ in range(S))
        kind = rng.integers(3)
        return None if kind == 0 else parts[0] if S == 1 else (None, *parts[1:]) if kind == 1 else parts

    x, dy = drawn(T, N, I), drawn(T, N, D * H)
    lengths = rng.integers(0, T + 1, N) if rng.integers(2) else None
    if lengths is not None and rng.integers(2):
        behind = np.arange(T)[:, None] >= lengths
        x[behind] = dy[behind] = np.nan
    if lengths is not None:
        lengths = [lengths.tolist(), lengths.astype("u8"), lengths.astype(">i4"), np.repeat(lengths, 2)[::2]][
            rng.integers(4)
        ]
    return x, states(), lengths, dy if rng.integers(5) else None, states()


def _parts(state: Any) -> tuple:
    return state if isinstance(state, tuple) else (state,)


def _each(state: Any, change: Any) -> Any:
    changed = tuple(None if part is None else change(part) for part in _parts(state))
    return changed if isinstance(state, tuple) else changed[0]


def _error(got: Any, expected: Any) -> float:
    """The largest difference, as a fraction of the largest value; NaN where something is not finite."""
    got, expected = backend.to_numpy(got).astype(np.float64), backend.to_numpy(expected).astype(np.float64)
    if got.shape != expected.shape:
        return np.inf
    return float(abs(got - expected).max() / max(1e-3, abs(expected).max())) if got.size else 0.0
