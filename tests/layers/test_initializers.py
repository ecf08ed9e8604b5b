"""How parameters begin: distributions per gate, overrides, and seeds."""

import math

import numpy as np
import pytest

from gpurnn.backend import to_numpy
from gpurnn.cells import LSTM_CELL
from gpurnn.initializers import INITIALIZERS, glorot_uniform, identity, normal, orthogonal, uniform, zeros
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

LAYERS = {RNN: 1, GRU: 3, LSTM: 4}


@pytest.mark.parametrize(("rows", "columns"), [(33, 33), (5, 2), (2, 5), (1, 1)])
def test_orthogonal(rows, columns):
    q = orthogonal(np.random.default_rng(0), rows, columns)
    assert q.shape == (rows, columns)
    product = q.T @ q if rows >= columns else q @ q.T
    np.testing.assert_allclose(product, np.eye(min(rows, columns)), atol=1e-14)


def test_orthogonal_is_uniform():
    """Without a correction of signs, LAPACK's Q has a biased diagonal; a uniform one has mean 0 and E[q^2] = 1/n."""
    rng = np.random.default_rng(0)
    first = np.array([orthogonal(rng, 3, 3)[0, 0] for _ in range(2000)])
    assert abs(first.mean()) < 4 * math.sqrt(1 / 3 / 2000)
    assert abs((first**2).mean() - 1 / 3) < 0.03


def test_glorot_uniform():
    values = glorot_uniform(np.random.default_rng(0), 300, 100)
    limit = math.sqrt(6 / 400)
    assert 0.99 * limit < np.abs(values).max() <= limit
    assert values.var() == pytest.approx(2 / 400, rel=0.03)


def test_the_others():
    rng = np.random.default_rng(0)
    assert (identity(rng, 2, 3) == [[1, 0, 0], [0, 1, 0]]).all()
    assert not zeros(rng, 2, 3).any()
    assert np.abs(uniform(0.5)(rng, 40, 40)).max() == pytest.approx(0.5, rel=0.01)
    assert normal(3.0)(rng, 100, 100).std() == pytest.approx(3, rel=0.03)


@pytest.mark.parametrize(("kind", "gates"), LAYERS.items())
@pytest.mark.parametrize("bidirectional", [False, True])
def test_defaults_are_per_gate(kind, gates, bidirectional):
    I, H = 50, 33
    layer = kind(I, H, 2, bidirectional=bidirectional, trainable_h0=True, dtype="float64", rng=0)
    drawn = set()
    for name, value in layer.state_dict().items():
        if name.startswith("weight_hh"):
            for gate in value.reshape(gates, H, H):
                np.testing.assert_allclose(gate @ gate.T, np.eye(H), atol=1e-13)
                drawn.add(gate.tobytes())
        elif name.startswith("weight_ih"):
            limit = math.sqrt(6 / (H + value.shape[1]))  # of one gate, not of all of them stacked
            assert 0.97 * limit < np.abs(value).max() <= limit
        elif kind is LSTM and name.startswith("bias_ih"):
            assert value.tolist() == [0] * H + [1] * H + [0] * 2 * H
        else:
            assert not value.any(), name
    assert len(drawn) == gates * 2 * (1 + bidirectional)  # no two gates are alike


@pytest.mark.parametrize("wanted", [0.0, 1.0, -2.5])
def test_forget_bias_is_the_total(wanted):
    layer = LSTM(3, 4, forget_bias=wanted, rng=0)
    total = to_numpy(layer.params["bias_ih_l0"]) + to_numpy(layer.params["bias_hh_l0"])
    assert total.tolist() == [0] * 4 + [wanted] * 4 + [0] * 8


def test_forget_bias_without_biases_is_left_out():
    with_bias, without = LSTM(3, 4, rng=0), LSTM(3, 4, bias=False, rng=0)
    assert list(without.params) == ["weight_ih_l0", "weight_hh_l0"]
    assert (without.params["weight_hh_l0"] == with_bias.params["weight_hh_l0"]).all()


def test_overrides():
    init = {
        "weight_hh": "identity",
        "bias_ih": lambda rng, rows, columns: np.full((rows, columns), 2.0),
        "h_0": normal(1),
    }
    layer = RNN(3, 4, 2, init=init, nonlinearity="relu", bidirectional=True, trainable_h0=True, rng=0)
    for name, value in layer.state_dict().items():
        if name.startswith("weight_hh"):
            assert (value == np.eye(4)).all()
        elif name.startswith("bias_ih"):
            assert (value == 2).all()
    assert layer.params["h_0"].shape == (4, 4)
    assert (to_numpy(layer.params["h_0"]) != 0).all()
    assert not to_numpy(layer.params["bias_hh_l1_reverse"]).any()


@pytest.mark.parametrize("name", INITIALIZERS)
def test_every_name_works_for_every_parameter(name):
    init = dict.fromkeys(("weight_ih", "weight_hh", "bias_ih", "bias_hh", "h_0", "c_0"), name)
    LSTM(3, 5, 2, init=init, trainable_h0=True, bidirectional=True)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        ({"weight_h": "zeros"}, "init: expected names among weight_ih, weight_hh, bias_ih, bias_hh, got 'weight_h'"),
        ({"weight_hh_l0": "zeros"}, "got 'weight_hh_l0'"),
        ({"h_0": "zeros"}, "got 'h_0'"),  # not a parameter without trainable_h0
        ({"weight_hh": "orthonormal"}, r"init\['weight_hh'\]: expected one of glorot_uniform, .* got 'orthonormal'"),
        ({"weight_hh": 0.5}, r"init\['weight_hh'\]: expected one of .* or a function \(rng, rows, columns\), got 0.5"),
        (
            {"weight_hh": lambda *_: np.eye(3)},
            r"init\['weight_hh'\]: expected \(rows, columns\) = \(4, 4\), got \(3, 3\)",
        ),
        ("identity", "init: expected a mapping from parameter names, got 'identity'"),
    ],
)
def test_bad_overrides(init, message):
    with pytest.raises(ValueError, match=message):
        Recurrent(LSTM_CELL, 3, 4, init=init)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_seed_gives_one_model_in_both_dtypes(kind):
    single, double = (kind(3, 5, 2, dtype=dtype, rng=11).state_dict() for dtype in ("float32", "float64"))
    again, other = kind(3, 5, 2, rng=11).state_dict(), kind(3, 5, 2, rng=12).state_dict()
    for name, value in single.items():
        assert (value == double[name].astype("float32")).all()
        assert (value == again[name]).all()
    assert (single["weight_ih_l0"] != other["weight_ih_l0"]).all()
