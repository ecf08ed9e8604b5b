"""Residual connections between layers, and dropped entries of weight_hh."""

import numpy as np
import pytest

import gpurnn
from gpurnn import backend, diagnose

ON_CPU = pytest.mark.skipif(backend.name == "cuda", reason="float64, and the executors of a CPU")
T, N, I, H = 7, 4, 3, 5


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def layer_of(cell="lstm", executor="numpy", **options):
    layer = gpurnn.Recurrent(cell, I, H, executor=executor, dtype="float64", rng=0, **options)
    rng = np.random.default_rng(2)
    for value in layer.params.values():
        value += rng.normal(0, 0.4, value.shape)
    return layer


@ON_CPU
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize(
    "options",
    [
        {"residual": True},
        {"residual": True, "dropout": 0.4, "bidirectional": True},
        {"weight_dropout": 0.5},
        {"weight_dropout": 0.5, "residual": True, "dropout": 0.4, "trainable_h0": True},
    ],
    ids=str,
)
def test_gradients(options, executor):
    layer = layer_of(executor=executor, num_layers=3, **options)
    gpurnn.check_gradients(
        layer, lengths=[4, 2, 0], resets=[[False] * 3, [True, False, False], [False] * 3, [True] * 3]
    )


@ON_CPU
def test_residual_layers_by_hand():
    layer, x = layer_of(num_layers=3, residual=True), drawn(T, N, I)
    expected = x
    for k in range(3):
        one = gpurnn.Recurrent("lstm", expected.shape[2], H, executor="numpy", dtype="float64")
        for name in one.params:
            one.params[name][...] = layer.params[name.replace("_l0", f"_l{k}")]
        expected = one(expected)[0] + (expected if k else 0)
    np.testing.assert_allclose(layer(x)[0], expected, rtol=1e-13)
    (y, c), _, _ = layer(x, all_states=True, training=False)
    assert (y == layer(x)[0]).all() and c.shape == y.shape


@ON_CPU
def test_dropout_leaves_what_goes_past_a_layer():
    """Weights of 0: each layer gives 0, and what is left is what went past."""
    layer = layer_of("rnn_identity", num_layers=2, residual=True, dropout=0.5)
    for name, value in layer.params.items():
        if name.endswith("_l1"):
            value[...] = 0
    alone = gpurnn.Recurrent("rnn_identity", I, H, executor="numpy", dtype="float64")
    for name in alone.params:
        alone.params[name][...] = layer.params[name]
    x = drawn(T, N, I)
    assert (layer(x)[0] == alone(x)[0]).all()


@ON_CPU
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
def test_dropped_weights_are_zeros_and_the_others_larger(executor):
    layer, x, dy = layer_of(executor=executor, weight_dropout=0.5), drawn(T, N, I), drawn(T, N, H)
    whole = layer.params["weight_hh_l0"].copy()
    layer.zero_grad()
    y, _, backward = layer(x)
    backward(dy)
    gradient = layer.grads["weight_hh_l0"].copy()
    kept = gradient != 0
    assert 0.2 < kept.mean() < 0.8 and (layer.params["weight_hh_l0"] == whole).all()
    plain = layer_of(executor=executor)
    plain.params["weight_hh_l0"][...] = np.where(kept, 2 * whole, 0)
    again, _, back = plain(x)
    assert (again == y).all()
    plain.zero_grad()
    back(dy)
    np.testing.assert_allclose(gradient, np.where(kept, 2 * plain.grads["weight_hh_l0"], 0), rtol=1e-12)
    other = layer(x)[0]
    assert (other != y).any(), "another call has another mask"
    layer.masks.calls = 0
    assert (layer(x)[0] == y).all(), "from the same count on the same masks come again"
    plain.params["weight_hh_l0"][...] = whole
    assert (layer(x, training=False)[0] == plain(x, training=False)[0]).all()


@ON_CPU
def test_masks_of_layers_and_directions_differ():
    layer = layer_of(num_layers=2, bidirectional=True, weight_dropout=0.5)
    layer.zero_grad()
    layer(drawn(T, N, I))[2](drawn(T, N, 2 * H))
    masks = [value != 0 for name, value in layer.grads.items() if name.startswith("weight_hh")]
    assert len(masks) == 4 and all((a != b).any() for k, a in enumerate(masks) for b in masks[:k])


def test_gradients_are_added_also_of_dropped_weights():
    layer = gpurnn.LSTM(I, H, weight_dropout=0.3, rng=0)
    x = backend.asarray(drawn(T, N, I), "float32", "x")
    layer.grads.flat[...] = 1
    y, _, backward = layer(x)
    backward(y, keep=True)
    once = backend.to_numpy(layer.grads["weight_hh_l0"]).copy()
    backward(y)
    twice = backend.to_numpy(layer.grads["weight_hh_l0"])
    np.testing.assert_allclose(twice - once, once - 1, rtol=1e-4, atol=1e-5)
    assert (once == 1).any()


def test_what_cannot_be():
    with pytest.raises(ValueError, match="weight_dropout: it drops entries of weight_hh, and mingru has none"):
        gpurnn.Recurrent("mingru", 3, 4, weight_dropout=0.1)
    with pytest.raises(ValueError, match=r"weight_dropout: expected a finite number in \[0, 1\), got 1"):
        gpurnn.LSTM(3, 4, weight_dropout=1)
    with pytest.raises(ValueError, match="residual: expected"):
        gpurnn.LSTM(3, 4, residual="yes")


@ON_CPU
def test_instruments_know_of_residual_layers():
    layer, x = layer_of(num_layers=2, residual=True), drawn(T, N, I)
    flow = np.zeros((2, 2, T))
    y, _, backward = layer(x)
    backward(np.ones_like(y), flow=flow)
    from gpurnn.diagnose import subject

    tapes, top = subject.run_steps(layer, x)
    np.testing.assert_allclose(top, y, rtol=1e-12)
    dx = subject.back_through(layer, tapes, np.ones((1, T, N, H)))
    layer.zero_grad()
    np.testing.assert_allclose(dx[0], layer(x)[2](np.ones_like(y))[0], rtol=1e-11, atol=1e-14)
    assert diagnose.verdicts(layer, x)


@ON_CPU
def test_instruments_look_at_whole_weights():
    layers, x = [layer_of(weight_dropout=p) for p in (0, 0.5)], drawn(T, N, I)
    plain, dropped = (diagnose.gradient_flow(layer, x) for layer in layers)
    np.testing.assert_allclose(plain.norms, dropped.norms, rtol=1e-12)
    assert layers[1].weight_dropout == 0.5


def test_on_the_device():
    """Weights are dropped by the device's kernel, the same ones."""
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    if backend.name == "cuda":
        pytest.skip("written for the stand-in")
    from tests.interpreted import interpreted

    def found(executor):
        layer = gpurnn.GRU(I, H, 2, weight_dropout=0.5, residual=True, rng=0, executor=executor)
        layer.zero_grad()
        y, _, backward = layer(backend.asarray(drawn(T, N, I), "float32", "x"))
        dx, _ = backward(y)
        return [backend.to_numpy(part).copy() for part in (y, dx, *layer.grads.values())]

    expected = found("numpy")
    with interpreted():
        got = found("step")
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
