"""Full and truncated backpropagation through time: what a window's gradient is, and what it is not."""

import functools

import numpy as np
import pytest

import gpurnn
from gpurnn import TruncatedBPTT, full_bptt, softmax_cross_entropy
from gpurnn.recurrent import Recurrent

V, H, N = 7, 6, 3
LOSS = functools.partial(softmax_cross_entropy, reduction="sum")
LAYERS = {"rnn": gpurnn.RNN, "lstm": gpurnn.LSTM, "gru": gpurnn.GRU}


def make(kind: str = "lstm", executor: str = "numpy", **options) -> gpurnn.SequenceModel:
    common = {"dtype": "float64", "rng": 0}
    recurrent = LAYERS[kind](4, H, executor=executor, **common, **options)
    return gpurnn.SequenceModel(gpurnn.Embedding(V, 4, **common), recurrent, gpurnn.Linear(H, V, **common))


def text(T: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(1).integers(0, V, (T + 1, N))
    return tokens[:-1], tokens[1:]


def grads_of(model) -> dict[str, np.ndarray]:
    return {name: np.array(value) for name, value in model.grads.items()}


def assert_same(got, expected, tolerance):
    for name, value in expected.items():
        scale = np.abs(value).max() or 1.0
        assert np.abs(got[name] - value).max() <= tolerance * scale, name


def windows(T, k1):
    return [slice(t, min(T, t + k1)) for t in range(0, T, k1)]


def test_full_bptt_is_the_gradient_of_the_sum_over_steps():
    model, (x, targets) = make(trainable_h0=True), text(5)
    value, _ = full_bptt(model, x, targets, LOSS)
    gradients = grads_of(model)
    per_step = [LOSS(model(x, training=False)[0][t], targets[t])[0] for t in range(5)]
    assert value == pytest.approx(sum(per_step), rel=1e-14)
    rng = np.random.default_rng(2)
    for name, param in model.params.items():
        direction = rng.standard_normal(param.shape)
        sides = []
        for sign in (1, -1):
            param += sign * 1e-5 * direction
            sides.append(LOSS(model(x, training=False)[0], targets)[0])
            param -= sign * 1e-5 * direction
        numeric = (sides[0] - sides[1]) / 2e-5
        assert (gradients[name] * direction).sum() == pytest.approx(numeric, rel=1e-6, abs=1e-8), name


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("k1", "k2"), [(1, 11), (3, 11), (4, 12), (5, 40), (11, 11)])
def test_windows_that_reach_the_start_sum_to_full_bptt(kind, executor, k1, k2):
    T = 11
    model, (x, targets) = make(kind, executor, trainable_h0=True), text(T)
    full_bptt(model, x, targets, LOSS)
    expected = grads_of(model)
    model.zero_grad()
    bptt = TruncatedBPTT(model, LOSS, k1, k2)
    total = sum(bptt.step(x[w], targets[w]) for w in windows(T, k1))
    assert_same(grads_of(model), expected, 1e-12)
    assert total == pytest.approx(LOSS(model(x, training=False)[0], targets)[0], rel=1e-13)


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 5), (3, 6), (2, 7)])
def test_a_window_is_the_gradient_of_its_own_losses_over_k2_steps(k1, k2):
    """Held against one plain pass over the stretch, from the state that was carried into it, as a constant."""
    T = 13
    model, (x, targets) = make(), text(T)
    bptt = TruncatedBPTT(model, LOSS, k1, k2)
    for w in windows(T, k1):
        model.zero_grad()
        bptt.step(x[w], targets[w])
        got = grads_of(model)
        start = max(0, w.stop - k2)
        _, carried, _ = model(x[:start], training=False)
        model.zero_grad()
        out, _, backward = model(x[start : w.stop], carried)
        dout = np.zeros_like(out)
        _, dout[w.start - start :] = LOSS(out[w.start - start :], targets[w])
        backward(dout)
        assert_same(got, grads_of(model), 1e-12)


@pytest.mark.parametrize(("k1", "k2", "reach"), [(2, 2, 2), (2, 5, 5), (3, 4, 4)])
def test_beyond_the_window_the_gradient_is_exactly_zero(k1, k2, reach):
    """Every step has a token of its own, so the rows of the embedding's gradient tell how far back the gradient went."""
    T = 12
    common = {"dtype": "float64", "rng": 0}
    model = gpurnn.SequenceModel(
        gpurnn.Embedding(T, 4, **common), gpurnn.LSTM(4, H, **common), gpurnn.Linear(H, T, **common)
    )
    x = np.arange(T)[:, None]
    bptt = TruncatedBPTT(model, LOSS, k1, k2)
    for w in windows(T, k1):
        model.zero_grad()
        bptt.step(x[w], x[w])
        touched = np.flatnonzero(np.abs(model.grads["embedding.weight"]).sum(1))
        first = max(0, w.stop - reach)
        assert touched.tolist() == list(range(first, w.stop))


def test_recomputed_steps_use_todays_parameters():
    model, (x, targets) = make(), text(8)
    bptt = TruncatedBPTT(model, LOSS, 4, 6)
    optimizer = gpurnn.SGD(model, lr=0.05)
    bptt.step(x[:4], targets[:4])
    carried = tuple(np.array(part) for part in bptt.carried)
    optimizer.step()
    model.zero_grad()
    bptt.step(x[4:], targets[4:])
    got = grads_of(model)
    model.zero_grad()
    out, _, backward = model(x[2:], carried)
    dout = np.zeros_like(out)
    _, dout[2:] = LOSS(out[2:], targets[4:])
    backward(dout)
    assert_same(got, grads_of(model), 1e-12)


def test_flow_is_that_of_one_undivided_pass():
    model, (x, targets) = make(), text(10)
    bptt = TruncatedBPTT(model, LOSS, 4, 7)
    for w in windows(8, 4):
        flow = np.full((1, 2, 4), np.nan)
        bptt.step(x[w], targets[w], flow=flow)
    _, carried, _ = model(x[:1], training=False)
    out, _, backward = model(x[1:8], carried)
    dout = np.zeros_like(out)
    _, dout[3:] = LOSS(out[3:], targets[4:8])
    whole = np.zeros((1, 2, 7))
    backward(dout, flow=whole)
    np.testing.assert_allclose(flow, whole[..., 3:], rtol=1e-12)


@pytest.mark.parametrize("last", [2, 4])
@pytest.mark.parametrize("k2", [4, 9])
def test_a_restored_stream_goes_on_as_if_never_left(k2, last):
    model, (x, targets) = make("gru"), text(8 + last)
    first, second = TruncatedBPTT(model, LOSS, 4, k2), TruncatedBPTT(model, LOSS, 4, k2)
    for w in windows(8, 4):
        first.step(x[w], targets[w])
    second.load_state_dict(first.state_dict())
    results = []
    for bptt in (first, second):
        model.zero_grad()
        results.append((bptt.step(x[8:], targets[8:]), model.grads.flat.tobytes()))
    assert results[0] == results[1]


def test_reset_forgets():
    model, (x, targets) = make(), text(4)
    bptt = TruncatedBPTT(model, LOSS, 4, 8)
    value = bptt.step(x, targets)
    assert bptt.step(x, targets) != value
    bptt.reset()
    assert bptt.state_dict() == {}
    assert bptt.step(x, targets) == value


def test_it_takes_any_model_and_any_loss():
    """A bare layer with a real-valued series and the squared error."""
    layer = Recurrent(gpurnn.Cell("leaky", 1, 1, leaky_forward, leaky_backward), 2, 2, dtype="float64", rng=0)
    series = np.random.default_rng(3).standard_normal((9, N, 2))
    loss = functools.partial(gpurnn.mean_squared_error, reduction="sum")
    full_bptt(layer, series[:-1], series[1:], loss)
    expected = grads_of(layer)
    layer.zero_grad()
    bptt = TruncatedBPTT(layer, loss, 3, 8)
    for w in windows(8, 3):
        bptt.step(series[:-1][w], series[1:][w])
    assert_same(grads_of(layer), expected, 1e-12)


def leaky_forward(x, r, state, params):
    return (0.9 * state[0] + 0.1 * gpurnn.tanh(x[0] + r[0]),), (gpurnn.tanh(x[0] + r[0]),)


def leaky_backward(dnext, saved, state, next_state, params):
    da = 0.1 * dnext[0] * (1 - saved[0] * saved[0])
    return (da,), (da,), (0.9 * dnext[0],), ()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: TruncatedBPTT(m, LOSS, 0), "1 <= k1 <= k2, got k1 = 0"),
        (lambda m: TruncatedBPTT(m, LOSS, 4, 3), "k1 = 4 and k2 = 3"),
        (lambda m: TruncatedBPTT(m, LOSS, 2).step(*text(3)), "1 to k1 = 2 steps of x and of targets, got 3 and 3"),
        (lambda m: TruncatedBPTT(m, LOSS, 4).step(text(3)[0], text(2)[1]), "got 3 and 2"),
        (lambda m: TruncatedBPTT(m, LOSS, 4).load_state_dict({"h": np.zeros(1)}), "expected begin0"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(make())
