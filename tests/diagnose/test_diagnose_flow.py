"""The laboratory's gradient flow, BPTT term by term, and influence, against the definitions and against backward."""

import math
from functools import partial

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose
from tests import fake_cupy
from tests.fake_cupy.backend import as_backend
from tests.fake_cupy.compare import assert_same, on_numpy
from tests.interpreted import interpreted

T, N, I, H, C = 7, 3, 4, 5, 2


@pytest.fixture(autouse=True)
def numpy_executor(monkeypatch):
    """The instruments' own steps are the NumPy executor's; with it as the layers' executor nothing has to compile."""
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def make(cell, **options) -> gpurnn.SequenceModel:
    recurrent = gpurnn.Recurrent(cell, I, H, **{"dtype": "float64", "rng": 1, **options})
    for view in recurrent.params.values():
        view += gpurnn.backend.xp.asarray(0.2 * values(*view.shape, seed=view.size))
    width = recurrent.directions * H
    return gpurnn.SequenceModel(None, recurrent, gpurnn.Linear(width, C, dtype="float64", rng=2))


def scalar(w: float) -> gpurnn.RNN:
    """h_t = x_t + w h_{t-1}."""
    layer = gpurnn.RNN(1, 1, nonlinearity="identity", dtype="float64", bias=False, rng=0)
    layer.params["weight_ih_l0"][...], layer.params["weight_hh_l0"][...] = 1, w
    return layer


squared = partial(gpurnn.mean_squared_error, reduction="sum")


# Flow


@pytest.mark.parametrize("lengths", [None, [7, 2, 0]])
def test_flow_is_what_backward_gives(any_cell, lengths):
    model, x, targets = make(any_cell, num_layers=2, bidirectional=True), values(T, N, I), values(T, N, C, seed=1)
    if lengths is not None:
        x[np.arange(T)[:, None] >= lengths] = np.nan
    flow = diagnose.gradient_flow(model, x, targets, squared, lengths=lengths)
    expected = np.zeros((4, any_cell.states, T))
    out, _, backward = model(x, lengths=lengths)
    backward(squared(out, targets)[1], flow=expected)
    np.testing.assert_array_equal(flow.norms, expected)
    assert flow.layers == ("l0", "l0_reverse", "l1", "l1_reverse") and flow.states == any_cell.state_names
    np.testing.assert_allclose(flow.total, np.sqrt((expected**2).sum(1)), rtol=1e-14)


def test_rows_of_a_flow_add_up():
    model, x, targets = make(gpurnn.LSTM(1, 1).cell, num_layers=2), values(T, N, I), values(T, N, C, seed=1)
    whole = diagnose.gradient_flow(model, x, targets, squared, step=-2)
    rows = diagnose.gradient_flow(model, x, targets, squared, step=-2, rows=True)
    assert rows.norms.shape == (2, 2, T, N) and rows.step == T - 2
    np.testing.assert_allclose(np.sqrt((rows.norms**2).sum(-1)), whole.norms, rtol=1e-13)
    for n in range(N):
        one = diagnose.gradient_flow(model, x[:, n : n + 1], targets[:, n : n + 1], squared, step=-2)
        np.testing.assert_allclose(rows.norms[..., n], one.norms, rtol=1e-13)
    assert math.isclose(rows.rate("l1"), whole.rate("l1"))


def test_flow_of_one_step_by_lag():
    """A linear scalar network: the norm at lag k is |w|^k, so the factor per step is |w|, in either direction."""
    x = values(6, 1, 1)
    flow = diagnose.gradient_flow(scalar(-0.5), x, step=4)
    np.testing.assert_allclose(flow.by_lag("l0"), [0.5 ** np.arange(5)], rtol=1e-14)
    assert math.isclose(flow.rate("l0"), 0.5) and flow.norms[0, 0, 5] == 0
    both = gpurnn.RNN(1, 1, nonlinearity="identity", bidirectional=True, dtype="float64", rng=0)
    both.params["weight_hh_l0"][...], both.params["weight_hh_l0_reverse"][...] = 2, 0.25
    flow = diagnose.gradient_flow(both, x, step=2)
    np.testing.assert_allclose(flow.by_lag("l0"), [2.0 ** np.arange(3)], rtol=1e-14)
    np.testing.assert_allclose(flow.by_lag("l0_reverse"), [0.25 ** np.arange(4)], rtol=1e-14)
    assert math.isclose(flow.rate("l0_reverse"), 0.25)
    with pytest.raises(ValueError, match=r"^step: expected the flow of one step's loss"):
        diagnose.gradient_flow(both, x).by_lag("l0")
    with pytest.raises(ValueError, match=r"^layer: expected one of l0, l0_reverse, got 'l1'"):
        flow.rate("l1")


def test_a_model_is_left_as_it_was():
    embedding = gpurnn.Embedding(6, I, rng=0)
    recurrent = gpurnn.LSTM(I, H, 2, dropout=0.5, rng=1)
    model = gpurnn.SequenceModel(embedding, recurrent, gpurnn.Linear(H, 6, rng=2), dropout=gpurnn.Dropout(0.4, rng=3))
    model.grads.flat[...] = 3
    tokens = np.random.default_rng(0).integers(0, 6, (T, N))
    recurrent.masks.calls, model.dropout.masks.calls, before = 3, 5, model.params.flat.copy()
    arguments = (model, tokens, tokens, gpurnn.softmax_cross_entropy)
    first = diagnose.gradient_flow(*arguments)
    diagnose.decompose(*arguments, steps=[-1])
    diagnose.influence(model, tokens)
    diagnose.verdicts(*arguments)
    diagnose.truncation_bias(*arguments, 2)
    diagnose.clipping_bias(*arguments, norm=1.0, in_time=0.1)
    with pytest.raises(ValueError, match="step: "):
        diagnose.gradient_flow(*arguments, step=T)
    assert (model.grads.flat[: model.grads["embedding.weight"].size] == 3).all() and model.grads["head.bias"][0] == 3
    assert (recurrent.masks.calls, model.dropout.masks.calls) == (3, 5)
    np.testing.assert_array_equal(model.params.flat, before)
    assert (recurrent.dropout, model.dropout.p, recurrent.clip_in_time) == (0.5, 0.4, None)
    np.testing.assert_array_equal(diagnose.gradient_flow(*arguments).norms, first.norms, "dropout has no part in it")


# Term by term


@pytest.mark.parametrize("bidirectional", [False, True])
def test_terms_sum_to_the_gradient(any_cell, bidirectional):
    model = make(any_cell, num_layers=2, bidirectional=bidirectional)
    x, targets = values(T, N, I), values(T, N, C, seed=1)
    found = diagnose.decompose(model, x, targets, squared)
    gpurnn.full_bptt(model, x, targets, squared)
    assert found.gradients.keys() == model.grads.keys()
    for name, expected in model.grads.items():
        np.testing.assert_allclose(
            found.gradients[name], expected, rtol=0, atol=1e-10 * abs(expected).max(), err_msg=name
        )
    assert found.norms.keys() == {name for name in model.grads if name.startswith("recurrent.")}


def test_single_terms():
    """Each is the gradient of one step's loss by a copy of the weights that is used in one step only."""
    model, x, targets = make(gpurnn.GRU(1, 1).cell, num_layers=2), values(T, N, I), values(T, N, C, seed=1)
    found = diagnose.decompose(model, x, targets, squared, steps=[4, -6])
    assert found.steps.tolist() == [1, 4]
    total = {name: 0.0 for name in found.norms}
    for k in range(T):
        term = found.term(4, k)
        for name, value in term.items():
            assert math.isclose(found.norms[name][1, k], np.linalg.norm(value), rel_tol=1e-12, abs_tol=1e-300), (
                name,
                k,
            )
            total[name] = total[name] + value
    assert not any(value.any() for value in found.term(4, 5).values()), "the future has no part in it"
    assert not found.norms["recurrent.weight_hh_l0"][:, 5:].any()
    out, _, backward = model(x)
    dout = squared(out, targets)[1]
    dout[np.arange(T) != 4] = 0
    backward(dout)
    for name, value in total.items():
        np.testing.assert_allclose(value, model.grads[name], rtol=0, atol=1e-12 * abs(model.grads[name]).max())
    y = model.recurrent(x, training=False)[0]
    for r, t in enumerate(found.steps):
        expected = np.linalg.norm(2 * (out[t] - targets[t]).T @ y[t])
        assert math.isclose(found.outputs["head.weight"][r], expected, rel_tol=1e-12)


def test_a_term_against_finite_differences():
    """w is another number in step k alone: the derivative of h_t by it is w^(t-k) h_{k-1}."""
    layer, x = scalar(0.7), values(6, 1, 1)
    h = layer(x, training=False)[0][:, 0, 0]
    found = diagnose.decompose(layer, x)
    for t in range(6):
        for k in range(6):
            expected = 0.7 ** (t - k) * h[k - 1] if 1 <= k <= t else 0.0
            assert math.isclose(found.term(t, k)["weight_hh_l0"].item(), expected, abs_tol=1e-14), (t, k)
            assert math.isclose(found.norms["weight_hh_l0"][t, k], abs(expected), abs_tol=1e-14), (t, k)


def test_terms_in_blocks(monkeypatch):
    model, x, targets = make(gpurnn.LSTM(1, 1).cell), values(T, N, I), values(T, N, C, seed=1)
    at_once, influence = diagnose.decompose(model, x, targets, squared), diagnose.influence(model, x)
    monkeypatch.setattr("gpurnn.diagnose.subject.BLOCK_BYTES", 4000)
    in_parts = diagnose.decompose(model, x, targets, squared)
    for name, value in at_once.norms.items():
        np.testing.assert_allclose(in_parts.norms[name], value, rtol=1e-12)
    np.testing.assert_allclose(diagnose.influence(model, x), influence, rtol=1e-12)


# Influence


@pytest.mark.parametrize(("w", "expected"), [(0.1, 0.0001), (2.0, 16.0)])
def test_influence_over_four_steps(w, expected):
    """The textbook's examples: w = 0.1 leaves 0.0001 of an input after four steps, w = 2 makes 16 of it."""
    found = diagnose.influence(scalar(w), values(5, 1, 1))
    assert abs(found[0, 0] - expected) < 1e-12 * expected
    np.testing.assert_allclose(found[:, 0], w ** np.arange(4.0, -1, -1), rtol=1e-12)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_influence_against_finite_differences(bidirectional):
    model = make(gpurnn.LSTM(1, 1).cell, num_layers=2, bidirectional=bidirectional)
    x, step, epsilon = values(T, N, I), 3, 1e-6
    jacobian = np.zeros((C, T, N, I))
    for k, n, i in np.ndindex(T, N, I):
        up, down = x.copy(), x.copy()
        up[k, n, i], down[k, n, i] = x[k, n, i] + epsilon, x[k, n, i] - epsilon
        change = model(up, training=False)[0][step, n] - model(down, training=False)[0][step, n]
        jacobian[:, k, n, i] = change / (2 * epsilon)
    found = diagnose.influence(model, x, step=step)
    np.testing.assert_allclose(found, np.sqrt((jacobian**2).sum(axis=(0, 3))), rtol=1e-6, atol=1e-10)
    one = diagnose.influence(model, x, step=step, outputs=[1])
    np.testing.assert_allclose(one, np.sqrt((jacobian[1] ** 2).sum(axis=2)), rtol=1e-6, atol=1e-10)
    assert bidirectional or not found[step + 1 :].any()


# Bad input, and devices


def test_bad_input():
    layer = gpurnn.LSTM(I, H, rng=0)
    x = values(T, N, I)
    with pytest.raises(ValueError, match=r"^x: expected \(T, N, I\) = \(T, N, 4\), got \(7, 3, 5\)"):
        diagnose.gradient_flow(layer, values(T, N, 5))
    with pytest.raises(ValueError, match=r"^x: expected at least one step and one row, got \(0, 3, 4\)"):
        diagnose.influence(layer, x[:0])
    x[2, 1, 3] = np.nan
    for instrument in (diagnose.gradient_flow, diagnose.decompose, diagnose.influence, diagnose.jacobians):
        with pytest.raises(
            ValueError, match=r"^x: expected finite values, got nan at step 2, row 1, unit 3 \(1 of 84\)"
        ):
            instrument(layer, x)
    x[2, 1, 3] = 0
    with pytest.raises(ValueError, match=r"^step: expected a whole number from -7 to 6, got 7"):
        diagnose.gradient_flow(layer, x, step=7)
    with pytest.raises(ValueError, match=r"^loss: expected a function"):
        diagnose.gradient_flow(layer, x, targets=values(T, N, H))
    with pytest.raises(ValueError, match=r"^loss: expected a gradient of the shape of out, \(7, 3, 5\), got \(7, 3\)"):
        diagnose.gradient_flow(layer, x, None, lambda out, targets: (0, out[..., 0]))
    with pytest.raises(ValueError, match=r"^outputs: expected numbers from 0 to 4, got 5"):
        diagnose.influence(layer, x, outputs=[5])
    with pytest.raises(TypeError, match=r"^model: expected a SequenceModel or a recurrent layer, got Linear"):
        diagnose.gradient_flow(gpurnn.Linear(I, H), x)
    with pytest.raises(ValueError, match=r"^clip_in_time: a clipped gradient is no sum of terms"):
        diagnose.decompose(gpurnn.LSTM(I, H, clip_in_time=0.5, rng=0), x)
    tokens = gpurnn.SequenceModel(gpurnn.Embedding(9, I, rng=0), layer, None)
    with pytest.raises(ValueError, match=r"^x: expected tokens \(T, N\), got \(7, 3, 4\)"):
        diagnose.gradient_flow(tokens, np.zeros((T, N, I), np.int64))


def test_what_is_not_finite_is_named():
    layer = gpurnn.RNN(1, 1, 2, nonlinearity="identity", bias=False, rng=0)
    for name, value in {"weight_ih_l0": 1e-30, "weight_hh_l0": 1e5, "weight_ih_l1": 1e-20, "weight_hh_l1": 0}.items():
        layer.params[name][...] = value
    x = np.zeros((20, 1, 1))
    with pytest.raises(FloatingPointError) as caught:
        diagnose.gradient_flow(layer, x, None, lambda out, targets: (0.0, np.full_like(out, 1e20)), step=-1)
    assert str(caught.value) == "dL/dh of l0: expected finite norms, got inf at step 11, and at 11 of the 19 others"
    x[3] = 1
    with pytest.raises(
        FloatingPointError, match=r"^h of l0: expected finite values, got inf at step 17, row 0, unit 0"
    ):
        diagnose.decompose(layer, x)


def test_on_device_arrays():
    def work():
        model = make(gpurnn.LSTM(1, 1).cell, num_layers=2, bidirectional=True)
        x, targets = values(T, N, I), values(T, N, C, seed=1)
        flow = diagnose.gradient_flow(model, x, targets, squared, rows=True, step=2)
        found = diagnose.decompose(model, x, targets, squared)
        return {
            "flow": flow.norms.tolist(), "norms": {name: value.tolist() for name, value in found.norms.items()},
            "sums": {name: value.tolist() for name, value in found.gradients.items()},
            "term": found.term(3, 1)["recurrent.weight_hh_l0"].tolist(), "influence": diagnose.influence(model, x).tolist(),
        }  # fmt: skip

    assert_same(work)


def test_on_interpreted_kernels():
    x = values(3, 2, I).astype(np.float32)

    def flow():
        return diagnose.gradient_flow(gpurnn.LSTM(I, H, rng=0), x, step=-1).norms

    with on_numpy():
        expected = flow()
    with interpreted("step"):
        np.testing.assert_allclose(flow(), expected, rtol=1e-4)


def test_arrays_come_back_on_the_host():
    with as_backend():
        x = fake_cupy.asarray(values(T, N, I))
        found = diagnose.gradient_flow(gpurnn.GRU(I, H, dtype="float64", rng=0), x)
    assert isinstance(found.norms, np.ndarray) and found.norms.dtype == np.float64
