"""Sums over many rows in float32 are good to 1e-6: of biases, of cells' own parameters, of tokens, of initial states."""

import numpy as np
import pytest

import gpurnn
from gpurnn import Cell, backend, tanh

TOLERANCE = 1e-6


def close(got, expected):
    """Relative to the largest of the sums of magnitudes, all gradients here being of one sign."""
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 100_003, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_linear(rows):
    layer = gpurnn.Linear(1, 3, rng=0)
    dy = np.float32(0.1) + np.random.default_rng(0).random((rows, 3), dtype=np.float32) / 100
    _, backward = layer(np.ones((rows, 1), np.float32))
    backward(dy)
    close(layer.grads["bias"], dy.sum(0, dtype=np.float64))


@pytest.mark.parametrize("rows", [5, 1000, 100_003, pytest.param(10_000_000, marks=pytest.mark.slow)])
def test_an_embeddings_rows(rows):
    rng = np.random.default_rng(0)
    tokens, values = (
        rng.choice(4, rows, p=[0.9, 0.0999, 0.0001, 0]),
        np.float32(0.1) + rng.random((rows, 2), np.float32),
    )
    target, expected = np.ones((4, 2), np.float32), np.ones((4, 2))
    backend.ops.add_rows(target, tokens, values)
    for token in range(4):
        expected[token] += values[tokens == token].sum(0, dtype=np.float64)
    close(target, expected)


def linear(x, r, state, params):
    return (x[0] + 0 * r[0] + params[0],), ()


def linear_backward(dnext, saved, state, next_state, params):
    return (dnext[0],), (dnext[0] * 0.5,), (0,), (dnext[0],)


LINEAR = Cell("adds its parameter", 1, 1, linear, linear_backward, params=("shift",))  # its gates are split


@pytest.mark.parametrize("executor", ["compiled", "numpy"])
@pytest.mark.parametrize(
    ("T", "N"), [(7, 3), (1001, 101), (2, 50_001), pytest.param(1000, 10_000, marks=pytest.mark.slow)]
)
def test_recurrent_layers(executor, T, N):
    layer = gpurnn.Recurrent(LINEAR, 1, 5, executor=executor, trainable_h0=True, rng=0)
    layer.params["weight_hh_l0"][...] = 0
    x, dy = np.zeros((T, N, 1), np.float32), np.random.default_rng(0).random((T, N, 5), np.float32) + np.float32(0.1)
    _, _, backward = layer(x)
    _, dh_0 = backward(dy)
    total = dy.sum((0, 1), dtype=np.float64)
    close(layer.grads["bias_ih_l0"], total)
    close(layer.grads["bias_hh_l0"], total / 2)
    close(layer.grads["shift_l0"], total)
    close(layer.grads["h_0"][0], dh_0[0].sum(0, dtype=np.float64))


@pytest.mark.parametrize("executor", ["compiled", "numpy"])
@pytest.mark.parametrize("kind", [gpurnn.RNN, gpurnn.LSTM, gpurnn.GRU])
def test_biases_of_the_shipped_cells(executor, kind):
    """Against the same layer in float64, over 10^5 rows."""
    T, N = 20, 5001
    found = {}
    for dtype in ("float32", "float64"):
        layer = kind(2, 3, executor=executor if dtype == "float32" else "compiled", dtype=dtype, rng=0)
        x = np.zeros((T, N, 2), dtype)
        y, _, backward = layer(x)
        backward(np.full_like(y, 0.1))
        found[dtype] = {name: grad.copy() for name, grad in layer.grads.items() if name.startswith("bias")}
    for name, expected in found["float64"].items():
        scale = np.abs(expected).max()
        assert np.abs(found["float32"][name] - expected).max() <= 2e-6 * scale, name


def test_wide_sums_reach_every_unit_of_any_width():
    """The float64 places of sums, at widths around those of vectors, one and two threads."""
    for H in (1, 3, 8, 15, 16, 17, 33):
        for N in (1, 64):
            layer, oracle = (gpurnn.Recurrent(PEEPHOLES, 2, H, executor=e, rng=0) for e in ("compiled", "numpy"))
            x = np.random.default_rng(0).standard_normal((9, N, 2), dtype=np.float32)
            for one in (layer, oracle):
                one.params.flat[...] = layer.params.flat
                y, _, backward = one(x)
                backward(np.sin(np.arange(y.size, dtype=np.float32)).reshape(y.shape))
            for name, expected in oracle.grads.items():
                np.testing.assert_allclose(
                    layer.grads[name], expected, rtol=1e-4, atol=1e-4, err_msg=f"{name}, {H}, {N}"
                )


def peepholes(x, r, state, params):
    return (tanh(x[0] + r[0] + params[0] * state[0] + params[1]),), ()


def peepholes_backward(dnext, saved, state, next_state, params):
    d = dnext[0] * (1 - next_state[0] * next_state[0])
    return (d,), (d,), (d * params[0],), (d * state[0], d)


PEEPHOLES = Cell("two of its own", 1, 1, peepholes, peepholes_backward, params=("peep", "shift"))


# On a device, whose kernels run in the interpreter: few rows must do, so one of 2^24 stands before ones, of which
# float32 would keep none.

LOST = np.array([2**24, *[1] * 8], np.float32)


@pytest.fixture
def on_a_device():
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    if gpurnn.backend.name == "cuda":
        yield
        return
    from tests.interpreted import interpreted

    with interpreted():
        yield


@pytest.mark.parametrize("executor", ["step", pytest.param("persistent", marks=pytest.mark.slow)])
def test_a_cells_own_parameters_on_a_device(on_a_device, executor):
    layer = gpurnn.Recurrent(LINEAR, 1, 5, executor=executor, rng=0)
    layer.params["weight_hh_l0"][...] = 0
    dy = np.zeros((len(LOST), 2, 5), np.float32)
    dy[::-1, 1] = LOST[:, None]  # the last step is the first to be added
    _, _, backward = layer(np.zeros((len(LOST), 2, 1), np.float32))
    backward(dy)
    assert gpurnn.backend.to_numpy(layer.grads["shift_l0"]).tolist() == [2**24 + 8] * 5


def test_an_embeddings_rows_on_a_device(on_a_device):
    xp = gpurnn.backend.xp
    target = xp.zeros((2, 3), "float32")
    backend.ops.add_rows(target, xp.asarray(np.ones(len(LOST), int)), xp.asarray(np.repeat(LOST[:, None], 3, 1)))
    assert gpurnn.backend.to_numpy(target).tolist() == [[0] * 3, [2**24 + 8] * 3]
