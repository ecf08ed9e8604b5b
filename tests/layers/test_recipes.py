"""What the literature's recipes ask for: chrono initialisation, ranges of biases, a pass's output beside its loss."""

import pickle

import numpy as np
import pytest

import gpurnn
from gpurnn import initializers
from gpurnn.backend import to_numpy

H = 400


def gates(layer, name="bias_ih_l0"):
    return to_numpy(layer.params[name]).reshape(-1, H)


@pytest.mark.parametrize("name", ["bias_ih_l0", "bias_ih_l1_reverse"])
def test_chrono_of_an_lstm(name):
    """b_f = log u with u uniform in [1, T - 1] and b_i = -b_f (Tallec and Ollivier 2018, section 3)."""
    options = {"num_layers": 2, "bidirectional": True, "rng": 1, "dtype": "float64"}
    layer = gpurnn.LSTM(3, H, forget_bias=initializers.chrono(785), **options)
    bias = gates(layer, name)
    u = np.exp(bias[1])
    assert u.min() >= 1 and u.max() <= 784 and abs(u.mean() - 392.5) < 40 and len(set(u)) == H
    np.testing.assert_array_equal(bias[0], -bias[1])
    assert not bias[2:].any() and not to_numpy(layer.params["bias_hh_l0"]).any()
    assert (gates(layer) != gates(layer, "bias_ih_l1")).any()


def test_chrono_of_a_gru_and_ranges():
    bias = gates(gpurnn.GRU(3, H, update_bias=initializers.chrono(20), rng=1))
    assert 0 <= bias[1].min() < 0.7 and 2.7 < bias[1].max() <= np.log(19) + 1e-6 and not bias[[0, 2]].any()
    bias = gates(gpurnn.GRU(3, H, update_bias=(-2, 1), rng=1))
    assert -2 <= bias[1].min() < -1.9 and 0.9 < bias[1].max() <= 1
    bias = gates(gpurnn.LSTM(3, H, forget_bias=(1.0, 3.0), rng=1))
    assert 1 <= bias[1].min() < 1.1 and 2.9 < bias[1].max() <= 3 and not bias[[0, 2, 3]].any()
    assert (gates(gpurnn.LSTM(3, H, forget_bias=(2, 2), rng=1))[1] == 2).all()
    assert not gpurnn.LSTM(3, 4, forget_bias=(1, 2), bias=False, rng=1).params.keys() & {"bias_ih_l0"}


def test_a_number_draws_nothing():
    """The other parameters are those of any other forget bias."""
    one, other = (gpurnn.LSTM(3, 4, forget_bias=bias, rng=1) for bias in (0.5, (0, 1)))
    assert all(
        (to_numpy(one.params[name]) == to_numpy(other.params[name])).all()
        for name in one.params
        if name != "bias_ih_l0"
    )


@pytest.mark.parametrize("wrong", [None, "1", (1,), (2, 1), (1, 2, 3), (1, np.nan), (0, 1e39), np.inf])
def test_biases_are_checked(wrong):
    with pytest.raises(ValueError, match="forget_bias: expected"):
        gpurnn.LSTM(3, 4, forget_bias=wrong)
    with pytest.raises(ValueError, match="update_bias: expected"):
        gpurnn.GRU(3, 4, update_bias=wrong)


def test_chrono_needs_two_steps_and_biases_are_finite():
    with pytest.raises(ValueError, match="longest: expected a finite number from 2, got 1"):
        initializers.chrono(1)
    with pytest.raises(ValueError, match="bias_ih_l0: expected an initial value that is finite"):
        gpurnn.LSTM(3, 4, forget_bias=lambda rng, rows, columns: np.full((rows, columns), np.nan))


@pytest.mark.parametrize("options", [{}, {"lengths": [5, 2]}])
def test_full_bptt_gives_the_output_as_well(options):
    model = gpurnn.SequenceModel(None, gpurnn.LSTM(3, 4, rng=1), gpurnn.Linear(4, 3, rng=2))
    x = np.random.default_rng(0).standard_normal((5, 2, 3)).astype("float32")
    passed = gpurnn.full_bptt(model, x, x, gpurnn.mean_squared_error, **options)
    loss, (h, c) = passed
    out, state, _ = model(x, training=False, **options)
    np.testing.assert_array_equal(to_numpy(passed.out), to_numpy(out))
    assert passed.loss is loss and passed.state[0] is h and len(passed) == 2
    np.testing.assert_array_equal(to_numpy(c), to_numpy(state[1]))
    assert (pickle.loads(pickle.dumps(passed)).out == passed.out).all()
    expected, _ = gpurnn.mean_squared_error(passed.out, x, **options)
    assert float(loss) == float(expected)
