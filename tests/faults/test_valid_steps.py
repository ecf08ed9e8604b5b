"""Losses with lengths: a mean is over valid steps only, whatever stands behind a row's end."""

import functools

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose, lab
from gpurnn.losses import mean_squared_error, softmax_cross_entropy

T, N, I, H, C = 9, 4, 3, 5, 6
LENGTHS = [9, 4, 0, 7]
VALID = np.arange(T)[:, None] < np.array(LENGTHS)


def make(dtype="float64", **options):
    common = {"dtype": dtype, "rng": 0}
    return gpurnn.SequenceModel(None, gpurnn.LSTM(I, H, **common, **options), gpurnn.Linear(H, C, **common))


def drawn(seed=0):
    """x, class numbers and values; behind each row's end nothing that a loss could bear."""
    rng = np.random.default_rng(seed)
    x, tokens, values = rng.standard_normal((T, N, I)), rng.integers(0, C, (T, N)), rng.standard_normal((T, N, C))
    x[~VALID], tokens[~VALID], values[~VALID] = np.nan, -7, np.nan
    return x, tokens, values


def own_mean(out, targets):
    """A user's loss, which knows nothing of lengths."""
    return np.mean(np.abs(out - targets)), np.sign(out - targets) / out.size


LOSSES = {
    "cross entropy": (softmax_cross_entropy, 1),
    "its sum": (functools.partial(softmax_cross_entropy, reduction="sum"), 1),
    "squared error": (mean_squared_error, 2),
    "of a softmax": (functools.partial(mean_squared_error, output="softmax"), 2),
    "a user's own": (own_mean, 2),
}


@pytest.mark.parametrize(("loss", "which"), LOSSES.values(), ids=LOSSES)
def test_full_bptt_is_that_of_the_valid_steps_alone(loss, which):
    data = drawn()
    model = make()
    value, _ = gpurnn.full_bptt(model, data[0], data[which], loss, lengths=LENGTHS)
    out, _, backward = (other := make())(data[0], lengths=LENGTHS)
    expected, dvalid = loss(out[VALID], data[which][VALID])
    dout = np.zeros_like(out)
    dout[VALID] = dvalid
    backward(dout)
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(model.grads.flat, other.grads.flat, rtol=1e-13)


def test_a_mean_over_a_padded_batch_is_the_mean_over_its_rows_one_by_one():
    x, tokens, _ = drawn()
    model, alone = make(), make()
    value, _ = gpurnn.full_bptt(model, x, tokens, softmax_cross_entropy, lengths=LENGTHS)
    total = 0.0
    for n, steps in enumerate(LENGTHS):
        row = slice(n, n + 1)
        loss = functools.partial(softmax_cross_entropy, reduction="sum")
        total += gpurnn.full_bptt(alone, x[:steps, row], tokens[:steps, row], loss)[0]
    assert value == pytest.approx(total / sum(LENGTHS), rel=1e-13)
    np.testing.assert_allclose(model.grads.flat, alone.grads.flat / sum(LENGTHS), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_losses_take_lengths_themselves(reduction):
    _, tokens, values = drawn()
    out = np.random.default_rng(3).standard_normal((T, N, C))
    out[~VALID] = np.nan
    for loss, targets in ((softmax_cross_entropy, tokens), (mean_squared_error, values)):
        value, dout = loss(out, targets, lengths=LENGTHS, reduction=reduction)
        expected, dvalid = loss(out[VALID], targets[VALID], reduction=reduction)
        if reduction == "none":
            assert not value[~VALID].any()
            value = value[VALID]
        np.testing.assert_array_equal(value, expected)
        np.testing.assert_array_equal(dout[VALID], dvalid)
        assert dout.shape == out.shape and not dout[~VALID].any()


def test_ignored_positions_do_not_count_either():
    _, tokens, _ = drawn()
    out = np.random.default_rng(3).standard_normal((T, N, C))
    tokens[1, 0] = tokens[3, 3] = -100
    value, _ = softmax_cross_entropy(out, tokens, lengths=LENGTHS, ignore_index=-100)
    each, _ = softmax_cross_entropy(out, tokens, lengths=LENGTHS, ignore_index=-100, reduction="none")
    assert value == pytest.approx(each.sum() / (sum(LENGTHS) - 2), rel=1e-14)


def test_nothing_valid_is_a_loss_of_0():
    _, tokens, values = drawn()
    for loss, targets in ((softmax_cross_entropy, tokens), (mean_squared_error, values)):
        value, dout = loss(np.ones((T, N, C)), targets, lengths=[0] * N)
        assert value == 0 and not dout.any()


def test_at_the_end_counts_the_valid_ones_of_the_last_steps():
    x, _, values = drawn()
    model, out = make(), make()(x, lengths=LENGTHS)[0]
    loss = lab.at_the_end(mean_squared_error)
    value, _ = gpurnn.full_bptt(model, x, values[-3:], loss, lengths=LENGTHS)
    last = VALID[-3:]
    assert value == pytest.approx(np.mean((out[-3:][last] - values[-3:][last]) ** 2), rel=1e-14)


def test_gradient_flow_is_that_of_the_same_loss():
    x, tokens, _ = drawn()
    norms = np.zeros((1, 2, T))
    gpurnn.full_bptt(make(), x, tokens, softmax_cross_entropy, lengths=LENGTHS, flow=norms)
    flow = diagnose.gradient_flow(make(), x, tokens, softmax_cross_entropy, lengths=LENGTHS)
    np.testing.assert_allclose(flow.norms, norms, rtol=1e-12)


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 9), (4, 5), (4, 9)])
def test_truncated_windows_are_means_over_their_valid_steps(k1, k2):
    """With parameters held still and k2 >= T, each window's sum is what it adds to full BPTT's."""
    x, tokens, _ = drawn()
    model = make()
    bptt = gpurnn.TruncatedBPTT(model, softmax_cross_entropy, k1, k2)
    out = make()(x, lengths=LENGTHS)[0]
    weighted = np.zeros_like(model.grads.flat)
    for start in range(0, T, k1):
        stop = min(T, start + k1)
        own = np.clip(np.array(LENGTHS) - start, 0, stop - start)
        model.zero_grad()
        value = bptt.step(x[start:stop], tokens[start:stop], lengths=own)
        valid = VALID[start:stop]
        expected, _ = softmax_cross_entropy(out[start:stop][valid], tokens[start:stop][valid])
        assert value == pytest.approx(expected, rel=1e-13)
        weighted += model.grads.flat * own.sum()
        other = gpurnn.TruncatedBPTT(model, softmax_cross_entropy, k1, k2)
        other.load_state_dict(bptt.state_dict())
        bptt = other
    if k2 >= T:
        full = make()
        gpurnn.full_bptt(full, x, tokens, functools.partial(softmax_cross_entropy, reduction="sum"), lengths=LENGTHS)
        np.testing.assert_allclose(weighted, full.grads.flat, rtol=1e-10, atol=1e-14)


def test_what_cannot_be_meant_is_refused():
    x, tokens, values = drawn()
    x = np.nan_to_num(x)
    model = make()
    with pytest.raises(
        ValueError, match=r"targets: expected \(T, N, ...\) = \(9, 4, ...\) beside lengths, got \(1, 4, 6\)"
    ):
        gpurnn.full_bptt(model, x, values[:1], own_mean, lengths=LENGTHS)
    with pytest.raises(ValueError, match=r"gradient of the shape of out, \(20, 6\), got \(9, 4, 6\)"):
        gpurnn.full_bptt(model, x, values, lambda out, _: (0.0, np.ones((T, N, C))), lengths=LENGTHS)
    with pytest.raises(ValueError, match="lengths: expected values from 0 to T = 9"):
        softmax_cross_entropy(np.ones((T, N, C)), tokens, lengths=[10, 0, 0, 0])
    bptt = gpurnn.TruncatedBPTT(model, softmax_cross_entropy, 3, 6)
    tokens[tokens < 0] = 0
    bptt.step(x[:3], tokens[:3], lengths=[3, 2, 3, 3])
    with pytest.raises(ValueError, match="row 1 has ended within the last k2 steps, expected 0 for it, got 3"):
        bptt.step(x[3:6], tokens[3:6])
    assert bptt.step(x[3:6], tokens[3:6], lengths=[3, 0, 3, 3]) > 0
