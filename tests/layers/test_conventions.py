"""What users of other libraries look for: repr, counts, batch_first, padding_idx, weights by prefix."""

import subprocess
import sys

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.backend import to_numpy

LENGTHS = [5, 2, 4]


def model(batch_first=False, **options):
    common = {"dtype": "float64", "rng": 1}
    recurrent = gpurnn.GRU(4, 3, 2, bidirectional=True, batch_first=batch_first, **options, **common)
    return gpurnn.SequenceModel(gpurnn.Embedding(7, 4, **common), recurrent, gpurnn.Linear(6, 7, **common))


# Shown


def test_layers_models_and_optimisers_show_sizes_and_counts():
    assert repr(gpurnn.Linear(3, 4, bias=False)) == "Linear(3, 4, bias=False): 12 parameters"
    assert repr(gpurnn.RNN(3, 40, nonlinearity="relu", dtype="float64")) == (
        "RNN(3, 40, nonlinearity='relu', dtype='float64'): 1,800 parameters"
    )
    assert repr(gpurnn.Recurrent("mingru", 3, 4, num_layers=2, bias=False)).startswith(
        "Recurrent('mingru', 3, 4, num_layers=2, bias=False): "
    )
    shown = gpurnn.SequenceModel(
        gpurnn.Embedding(9, 4), gpurnn.LSTM(4, 4), gpurnn.Linear(4, 9), dropout=gpurnn.Dropout(0.2)
    )
    shown.tie("head.weight", "embedding.weight")
    shown.freeze("recurrent.bias*")
    assert repr(shown) == (
        "SequenceModel: 205 parameters, 32 of them frozen\n"
        "  embedding: Embedding(9, 4): 36 parameters\n"
        "  recurrent: LSTM(4, 4): 160 parameters, 32 of them frozen\n"
        "  head: Linear(4, 9): 9 parameters\n"
        "  dropout: Dropout(p=0.2): 0 parameters\n"
        "  head.weight: that is embedding.weight"
    )
    assert shown.num_params == 205 and shown.recurrent.num_params == 160
    nested = repr(gpurnn.Model(inner=shown, extra=gpurnn.Linear(2, 2)))
    assert "\n    recurrent: LSTM(4, 4)" in nested and nested.count("that is") == 1
    optimizer = gpurnn.AdamW(shown, groups={"*bias*": {"weight_decay": 0.0}})
    assert repr(optimizer) == (
        "AdamW(lr=0.001, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-08, 3 parameters with settings of their own) "
        "of 205 parameters"
    )


def test_an_own_layer_shows_what_it_has():
    class Own(gpurnn.Model):
        def __init__(self, width, lost=3):
            self.width = width
            super().__init__(a=gpurnn.Linear(width, 1))

    assert repr(Own(2)) == "Own: 3 parameters\n  a: Linear(2, 1): 3 parameters"


# The batch first


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("embedded", [True, False])
def test_the_batch_first_is_the_same_turned(embedded, lengths):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 7, (5, 3)) if embedded else rng.standard_normal((5, 3, 4))
    one, other = (model(first) if embedded else model(first).recurrent for first in (False, True))
    y, state, backward = one(x, lengths=lengths)
    turned, same, turned_backward = other(x.swapaxes(0, 1), lengths=lengths)
    np.testing.assert_array_equal(to_numpy(turned), to_numpy(y).swapaxes(0, 1))
    np.testing.assert_array_equal(to_numpy(same), to_numpy(state))
    dy, flow = rng.standard_normal(y.shape), [backend.xp.zeros((4, 1, 5)) for _ in range(2)]
    dx, dstate = backward(dy, flow=flow[0])
    turned_dx, same = turned_backward(dy.swapaxes(0, 1), flow=flow[1])
    np.testing.assert_array_equal(to_numpy(same), to_numpy(dstate))
    np.testing.assert_array_equal(to_numpy(flow[0]), to_numpy(flow[1]))
    if not embedded:
        np.testing.assert_array_equal(to_numpy(turned_dx), to_numpy(dx).swapaxes(0, 1))
    for name in one.grads:
        ours, theirs = to_numpy(one.grads[name]), to_numpy(other.grads[name])  # added up in another order
        np.testing.assert_allclose(theirs, ours, rtol=1e-13, atol=1e-15, err_msg=name)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_full_bptt_of_the_batch_first(lengths):
    tokens = np.random.default_rng(0).integers(0, 7, (5, 3))
    one, other = model(), model(True)
    loss, _ = gpurnn.full_bptt(one, tokens, tokens, gpurnn.softmax_cross_entropy, lengths=lengths)
    same, _ = gpurnn.full_bptt(other, tokens.T, tokens.T, gpurnn.softmax_cross_entropy, lengths=lengths)
    assert float(loss) == pytest.approx(float(same), rel=1e-14)
    np.testing.assert_allclose(to_numpy(other.grads.flat), to_numpy(one.grads.flat), rtol=1e-12, atol=1e-15)


def test_what_the_batch_first_cannot_be():
    layer = gpurnn.LSTM(4, 3, batch_first=True)
    with pytest.raises(ValueError, match=r"x: expected \(N, T, I\) = \(N, T, 4\), got \(3, 5, 7\)"):
        layer(np.zeros((3, 5, 7), "float32"))
    _, _, backward = layer(np.zeros((3, 5, 4), "float32"))
    with pytest.raises(ValueError, match=r"dy: expected \(N, T, D\*H\) = \(3, 5, 3\), got \(5, 3, 3\)"):
        backward(np.zeros((5, 3, 3), "float32"))
    with pytest.raises(ValueError, match=r"model: expected one that takes \(T, N, ...\), got one with batch_first"):
        gpurnn.TruncatedBPTT(layer, gpurnn.mean_squared_error, 3)
    with pytest.raises(ValueError, match="got one with batch_first"):
        gpurnn.diagnose.gradient_flow(layer, np.zeros((3, 5, 4), "float32"))


# Padding tokens


def test_a_padding_token_is_0_and_learns_nothing():
    layer = gpurnn.Embedding(5, 3, padding_idx=-2, dtype="float64", rng=1)
    assert layer.padding_idx == 3 and not to_numpy(layer.params["weight"][3]).any()
    layer.grads["weight"][3] = 7  # of a head that is tied to it
    tokens = np.array([[0, 3, 1], [3, 3, 0]])
    y, backward = layer(tokens)
    backward(np.ones(y.shape))
    assert (to_numpy(layer.grads["weight"]) == np.array([2, 1, 0, 7, 0])[:, None]).all()
    for wrong in (5, -6, 1.5, True):
        with pytest.raises(ValueError, match="padding_idx: expected a whole number from -5 to 4, got"):
            gpurnn.Embedding(5, 3, padding_idx=wrong)


@pytest.mark.oracle
def test_a_padding_token_against_torch():
    torch = pytest.importorskip("torch")
    theirs = torch.nn.Embedding(5, 3, padding_idx=2, dtype=torch.float64)
    ours = gpurnn.Embedding(5, 3, padding_idx=2, dtype="float64")
    ours.load_state_dict(theirs.state_dict())
    tokens = np.random.default_rng(0).integers(0, 5, (7, 4))
    dy = np.random.default_rng(1).standard_normal((7, 4, 3))
    theirs(torch.tensor(tokens)).backward(torch.tensor(dy))
    ours(tokens)[1](dy)
    np.testing.assert_allclose(to_numpy(ours.grads["weight"]), theirs.weight.grad.numpy(), rtol=1e-13)


# Weights of a whole module


def test_weights_by_prefix():
    lstm, head = gpurnn.LSTM(3, 4, rng=1), gpurnn.Linear(4, 2, rng=2)
    whole = {f"encoder.rnn.{name}": value for name, value in lstm.state_dict().items()}
    whole |= {f"fc.{name}": value for name, value in head.state_dict().items()} | {"step": np.ones(3)}
    for prefix in ("encoder.rnn", "encoder.rnn."):
        twin = gpurnn.LSTM(3, 4)
        twin.load_state_dict(whole, prefix=prefix)
        assert (to_numpy(twin.params.flat) == to_numpy(lstm.params.flat)).all()
    both = gpurnn.SequenceModel(None, gpurnn.LSTM(3, 4), gpurnn.Linear(4, 2))
    both.load_state_dict(whole, prefix={"recurrent": "encoder.rnn", "head": "fc"})
    assert (to_numpy(both.head.params.flat) == to_numpy(head.params.flat)).all()
    assert (to_numpy(both.recurrent.params.flat) == to_numpy(lstm.params.flat)).all()
    with pytest.raises(KeyError, match=r"prefix: no name begins with 'decoder.'; there are encoder.rnn.weight_ih_l0"):
        lstm.load_state_dict(whole, prefix="decoder")
    with pytest.raises(KeyError, match=r"missing .'head.weight', 'head.bias'."):
        both.load_state_dict(whole, prefix={"recurrent": "encoder.rnn"})
    for wrong in (3, {"head": 3}, ["fc"]):
        with pytest.raises(TypeError, match=r"prefix: expected a text, or texts by part"):
            lstm.load_state_dict(whole, prefix=wrong)


def test_the_package_is_the_command():
    done = subprocess.run([sys.executable, "-m", "gpurnn", "--version"], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == f"gpurnn {gpurnn.__version__}", done.stderr


@pytest.mark.parametrize("lengths", [None, [5, 2, 0]])
def test_batch_first_with_resets_and_all_states(lengths):
    rng = np.random.default_rng(0)
    x, resets = rng.standard_normal((5, 3, 4)), rng.random((5, 3)) < 0.3
    dy = tuple(rng.standard_normal((5, 3, 6)) for _ in range(2))
    options = {"bidirectional": True, "trainable_h0": True, "dtype": "float64", "rng": 1}
    first, last = gpurnn.LSTM(4, 3, batch_first=True, **options), gpurnn.LSTM(4, 3, **options)
    y, state, back = last(x, lengths=lengths, resets=resets, all_states=True)
    turned, same_state, turned_back = first(x.swapaxes(0, 1), lengths=lengths, resets=resets.T, all_states=True)
    for one, other in zip((*y, *state), (*[part.swapaxes(0, 1) for part in turned], *same_state), strict=True):
        np.testing.assert_array_equal(one, other)
    dx, _ = back(dy)
    turned_dx, _ = turned_back(tuple(part.swapaxes(0, 1) for part in dy))
    np.testing.assert_array_equal(dx, turned_dx.swapaxes(0, 1))
    np.testing.assert_array_equal(first.grads.flat, last.grads.flat)
    with pytest.raises(
        ValueError, match=r"resets: expected bool of shape \(N, T\) = \(3, 5\), got bool of shape \(5, 3\)"
    ):
        first(x.swapaxes(0, 1), resets=resets)


def test_a_layer_with_noise_shows_the_cell_that_it_was_given():
    layer = gpurnn.Recurrent("slstm", 3, 4, heads=2, zoneout=0.125, noise=0.5)
    assert repr(layer).startswith("Recurrent('slstm', 3, 4, zoneout=0.125, noise=0.5, heads=2): ")
