"""Jacobians, their products and exponents: against finite differences, closed forms and plain NumPy."""

import math

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose
from tests.fake_cupy.compare import assert_same

T, N, I, H = 6, 2, 3, 4


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def make(cell, **options) -> gpurnn.Recurrent:
    layer = gpurnn.Recurrent(cell, I, H, **{"dtype": "float64", "rng": 1, "executor": "numpy", **options})
    for view in layer.params.values():
        view += gpurnn.backend.xp.asarray(0.3 * values(*view.shape, seed=view.size))
    return layer


def scalar(w: float, nonlinearity: str = "identity", dtype: str = "float64") -> gpurnn.RNN:
    """h_t = f(x_t + w h_{t-1})."""
    layer = gpurnn.RNN(1, 1, nonlinearity=nonlinearity, dtype=dtype, bias=False, rng=0, executor="numpy")
    layer.params["weight_ih_l0"][...], layer.params["weight_hh_l0"][...] = 1, w
    return layer


def states_after(layer, x: np.ndarray, states: tuple) -> np.ndarray:
    """(N, S*H)"""
    _, final, _ = layer(x, states if len(states) > 1 else states[0], training=False)
    return np.concatenate([part[0] for part in (final if isinstance(final, tuple) else (final,))], axis=1)


def differences(layer, x: np.ndarray, states: tuple, epsilon: float = 1e-6) -> np.ndarray:
    """d(final states)/d(initial states) by central differences, (N, S*H, S*H); rows of a batch know nothing of each other."""
    columns = []
    for s, h in np.ndindex(len(states), H):
        ends = []
        for sign in (1, -1):
            moved = tuple(part.copy() for part in states)
            moved[s][0, :, h] += sign * epsilon
            ends.append(states_after(layer, x, moved))
        columns.append((ends[0] - ends[1]) / (2 * epsilon))
    return np.stack(columns, axis=2)


# Jacobians and their products


def test_jacobians_against_finite_differences(any_cell):
    layer, x = make(any_cell), values(T, N, I)
    states = tuple(values(1, N, H, seed=s + 1) for s in range(any_cell.states))
    given = states if len(states) > 1 else states[0]
    found = diagnose.jacobians(layer, x, state=given)
    product = np.broadcast_to(np.eye(found.shape[-1]), found.shape[1:])
    for t in range(T):
        np.testing.assert_allclose(found[t], differences(layer, x[t : t + 1], states), rtol=1e-6, atol=1e-8)
        end = states_after(layer, x[t : t + 1], states)
        states = tuple(part[None] for part in np.split(end, any_cell.states, axis=1))
        product = found[t] @ product
    whole = diagnose.jacobian_product(layer, x, lag=T, state=given)
    np.testing.assert_allclose(whole, product, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(diagnose.jacobian_product(layer, x, step=3, lag=2, state=given), found[3] @ found[2])
    np.testing.assert_array_equal(diagnose.jacobians(layer, x, state=given, steps=[-1, 2]), found[[T - 1, 2]])


def test_layers_and_directions():
    """Each has its own Jacobians, with its input held still; a reverse direction runs from the last step."""
    layer, x = make(gpurnn.LSTM(1, 1).cell, num_layers=2, bidirectional=True), values(T, N, I)
    alone = gpurnn.LSTM(2 * H, H, dtype="float64", rng=0, executor="numpy")
    for name in alone.params:
        alone.params[name][...] = layer.params[name.replace("l0", "l1_reverse")]
    below = make(gpurnn.LSTM(1, 1).cell, bidirectional=True)
    for name in below.params:
        below.params[name][...] = layer.params[name]
    between = below(x, training=False)[0]
    expected = diagnose.jacobians(alone, between[::-1].copy())
    np.testing.assert_allclose(diagnose.jacobians(layer, x, layer="l1_reverse"), expected[::-1], rtol=1e-12)
    spans = diagnose.singular_values(layer, x, layer="l1_reverse", lags=[T])
    np.testing.assert_allclose(spans.values, diagnose.singular_values(alone, between[::-1].copy(), lags=[T]).values)
    product = diagnose.jacobian_product(layer, x, layer="l1_reverse", step=2, lag=4)
    np.testing.assert_allclose(product, expected[3] @ expected[2] @ expected[1] @ expected[0], rtol=1e-10, atol=1e-15)


def test_singular_values():
    layer, x = make(gpurnn.GRU(1, 1).cell), values(T, N, I)
    spans = diagnose.singular_values(layer, x, step=4)
    assert spans.lags.tolist() == [1, 2, 4, 5]
    for lag, found in zip(spans.lags, spans.values, strict=True):
        product = diagnose.jacobian_product(layer, x, step=4, lag=int(lag))
        np.testing.assert_allclose(found, np.linalg.svd(product, compute_uv=False), rtol=1e-10, atol=1e-15)
        at = list(spans.lags).index(lag)
        np.testing.assert_allclose(spans.spectral[at], np.linalg.norm(product, 2, axis=(1, 2)), rtol=1e-12)
        np.testing.assert_allclose(spans.frobenius[at], np.linalg.norm(product, axis=(1, 2)), rtol=1e-12)


@pytest.mark.parametrize(("w", "expected"), [(0.1, 0.0001), (2.0, 16.0)])
def test_four_linear_steps(w, expected):
    found = diagnose.jacobian_product(scalar(w), values(5, 1, 1), lag=4)
    assert abs(found.item() - expected) < 1e-12 * expected


def test_long_spans_in_float32():
    """What float32 could not hold on the way shows in the result: 0.1^200 is 1e-200."""
    layer = gpurnn.RNN(1, 2, nonlinearity="identity", rng=0, executor="numpy")
    layer.params["weight_hh_l0"][...] = np.diag([0.125, 4.0])
    spans = diagnose.singular_values(layer, np.zeros((300, 1, 1)), lags=[200, 300])
    np.testing.assert_allclose(spans.spectral[:, 0], [4.0**200, 4.0**300], rtol=1e-12)
    shrinking = scalar(0.125, dtype="float32")
    spans = diagnose.singular_values(shrinking, np.zeros((300, 1, 1)), lags=[200, 300])
    np.testing.assert_allclose(spans.spectral[:, 0], [0.125**200, 0.125**300], rtol=1e-12)


def test_jacobians_are_not_built_unasked():
    layer = gpurnn.LSTM(1, 1024, rng=0, executor="numpy", init={"weight_hh": "zeros"})
    with pytest.raises(ValueError, match=r"^steps: expected so few that \(100, 1, 2048, 2048\) float64 stay below"):
        diagnose.jacobians(layer, np.zeros((100, 1, 1)))


# Exponents


@pytest.mark.parametrize("w", [0.1, -2.0, 1e30, 1e-30])
def test_exponent_of_a_linear_map(w):
    found = diagnose.lyapunov_exponents(scalar(w), np.zeros((50, 3, 1)))
    np.testing.assert_allclose(found, np.full((3, 1), math.log(abs(w))), rtol=1e-12)


def test_exponent_of_a_scalar_tanh_map():
    """The average of log|w f'| along the orbit."""
    layer, x = scalar(1.7, "tanh"), values(400, 2, 1)
    h = layer(x, training=False)[0][..., 0]
    slopes = np.log(np.abs(1.7 * (1 - h**2)))
    np.testing.assert_allclose(diagnose.lyapunov_exponents(layer, x)[:, 0], slopes.mean(axis=0), rtol=1e-12)
    found = diagnose.lyapunov_exponents(layer, x, warmup=100)
    np.testing.assert_allclose(found[:, 0], slopes[:300].mean(axis=0), rtol=1e-12)


def test_exponents_of_a_random_network():
    """Against QR of diag(1 - h^2) W in plain NumPy, from the first step to the last, which is the other way round."""
    T, H = 2000, 24
    layer = gpurnn.RNN(1, H, dtype="float64", rng=0, executor="numpy")
    layer.params["weight_hh_l0"][...] = weight = 3 / math.sqrt(H) * values(H, H, seed=3)
    x = 0.1 * values(T, 1, 1)
    h = layer(x, training=False)[0][:, 0]
    q, logs = np.eye(H), np.zeros((T, H))
    log_determinant = 0.0
    for t in range(T):
        jacobian = np.diag(1 - h[t] ** 2) @ weight
        log_determinant += np.linalg.slogdet(jacobian)[1]
        q, r = np.linalg.qr(jacobian @ q)
        logs[t] = np.log(np.abs(np.diag(r)))
    expected = np.sort(logs[100:].mean(axis=0))[::-1]
    found = diagnose.lyapunov_exponents(layer, x, warmup=100)[0]
    assert expected[0] > 0.1, "a network that is chaotic"
    np.testing.assert_allclose(found, expected, rtol=0.005, atol=0.005)
    every = diagnose.lyapunov_exponents(layer, x)[0]
    assert math.isclose(every.sum(), log_determinant / T, rel_tol=1e-10)
    np.testing.assert_allclose(diagnose.lyapunov_exponents(layer, x, leading=3)[0], every[:3], rtol=1e-9)


def test_the_leading_exponent_is_found_wherever_it_points():
    layer = gpurnn.RNN(1, 5, nonlinearity="identity", dtype="float64", rng=0, executor="numpy")
    layer.params["weight_hh_l0"][...] = np.diag([0.5, 0.25, 0.5, 0.25, 2.0])
    found = diagnose.lyapunov_exponents(layer, np.zeros((200, 1, 1)), leading=1, warmup=50)
    np.testing.assert_allclose(found, [[math.log(2)]], rtol=1e-10)


def test_a_step_that_leads_nowhere():
    found = diagnose.lyapunov_exponents(scalar(1.0, "relu"), -np.ones((5, 1, 1)))
    assert found.tolist() == [[-math.inf]]


def test_carousel_over_10000_steps():
    """A forget gate fixed at 1 keeps dc_t/dc_k at exactly 1, over any number of steps."""
    layer = gpurnn.LSTM(1, 2, forget_bias=100.0, dtype="float64", rng=0, executor="numpy", init={"weight_hh": "zeros"})
    x = 0.01 * values(10_000, 1, 1)
    product = diagnose.jacobian_product(layer, x, lag=10_000)[0]
    np.testing.assert_array_equal(product[2:, 2:], np.eye(2))
    (verdict,) = diagnose.verdicts(
        gpurnn.LSTM(1, 2, forget_bias=100.0, dtype="float64", rng=0, executor="numpy"), x[:500]
    )
    assert verdict.evidence.carry == {"h": 0.0, "c": 1.0} and verdict.evidence.kept["c"] == 1.0
    assert verdict.evidence.gates["f"] == diagnose.GateValues(1.0, 0.0, 1.0)


# The recurrent matrix


def test_spectrum():
    layer = gpurnn.RNN(I, 2, nonlinearity="sigmoid", bidirectional=True, rng=0, executor="numpy")
    layer.params["weight_hh_l0_reverse"][...] = [[0, -2], [2, 0]]
    found = diagnose.recurrent_spectrum(layer, "l0_reverse")
    np.testing.assert_allclose(sorted(found.eigenvalues[0], key=np.imag), [-2j, 2j], atol=1e-12)
    np.testing.assert_allclose([found.radius, found.sigma_max], [[2], [2]])
    assert math.isclose(found.bound, 0.5)
    layer.params["weight_hh_l0"][...] = [[0.5, 3], [0, 0.25]]
    found = diagnose.recurrent_spectrum(layer)
    np.testing.assert_allclose([found.radius[0], found.sigma_max[0]], [0.5, np.linalg.norm([[0.5, 3], [0, 0.25]], 2)])
    gru = diagnose.recurrent_spectrum(gpurnn.GRU(I, H, rng=0))
    np.testing.assert_allclose([gru.radius, gru.sigma_max], 1, rtol=1e-6)
    assert gru.eigenvalues.shape == (3, H) and gru.bound is None


def test_no_product_exceeds_the_bound():
    layer, x = gpurnn.RNN(I, H, dtype="float64", rng=0, executor="numpy"), values(T, N, I)
    layer.params["weight_hh_l0"][...] = values(H, H)
    bound = diagnose.recurrent_spectrum(layer).bound
    spans = diagnose.singular_values(layer, x)
    assert (spans.spectral <= bound ** spans.lags[:, None]).all()


# Bad input, and devices


def test_bad_input():
    layer, x = make(gpurnn.GRU(1, 1).cell), values(T, N, I)
    with pytest.raises(ValueError, match=r"^layer: expected one of l0, got 'l1'"):
        diagnose.jacobians(layer, x, layer="l1")
    with pytest.raises(ValueError, match=r"^lag: expected at most 3, the steps that were run until there, got 4"):
        diagnose.jacobian_product(layer, x, step=2, lag=4)
    with pytest.raises(ValueError, match=r"^lag: expected a whole number from 1, got 0"):
        diagnose.singular_values(layer, x, lags=[0])
    with pytest.raises(ValueError, match=r"^lags: expected at least one"):
        diagnose.singular_values(layer, x, lags=[])
    with pytest.raises(ValueError, match=r"^expected leading <= S\*H = 4 and warmup < T = 6, got 5 and 0"):
        diagnose.lyapunov_exponents(layer, x, leading=5)
    with pytest.raises(ValueError, match=r"^state h: expected \(L\*D, N, H\) = \(1, 2, 4\), got \(2, 4\)"):
        diagnose.jacobians(layer, x, state=np.zeros((2, 4)))


def test_a_jacobian_that_is_not_finite():
    layer = scalar(1e30, dtype="float32")
    layer.params["weight_ih_l0"][...] = 0
    assert diagnose.jacobian_product(layer, np.zeros((5, 1, 1)), lag=5).item() == pytest.approx(1e150, rel=1e-6)
    wide = gpurnn.Recurrent(
        gpurnn.Cell(
            "steep", 1, 1,
            lambda x, r, state, params: ((0.0 * r[0],), ()),
            lambda dnext, saved, state, next_state, params: ((0,), (dnext[0] * 1e30,), (0,), ()),
        ), 1, 2, rng=0, executor="numpy",
    )  # fmt: skip
    wide.params["weight_hh_l0"][...] = 1e20
    with pytest.raises(FloatingPointError, match=r"^dstate_t/dstate_\(t-1\): expected finite values, got inf"):
        diagnose.singular_values(wide, np.zeros((5, 1, 1)))


def test_on_device_arrays():
    def work():
        layer, x = make(gpurnn.LSTM(1, 1).cell, bidirectional=True), values(T, N, I)
        spans = diagnose.singular_values(layer, x, layer="l0_reverse")
        return [
            diagnose.jacobians(layer, x).tolist(), spans.values.tolist(), diagnose.lyapunov_exponents(layer, x).tolist(),
            diagnose.recurrent_spectrum(layer).radius.tolist(), str(diagnose.verdicts(layer, x)[1]),
        ]  # fmt: skip

    assert_same(work)
