"""Losses against central differences, against PyTorch, and at the edges: huge logits, NaN, nothing to average."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurnn import backend
from gpurnn.losses import mean_squared_error, softmax, softmax_cross_entropy

pytestmark = pytest.mark.skipif(
    backend.name != "numpy", reason="written for NumPy arrays, the backend is " + backend.name
)

T, N, C = 5, 3, 7
FAR = 40.0  # beyond what is exponentiated without a shift


def example(rng, dtype=np.float64, scale=2.0):
    return (scale * rng.standard_normal((T, N, C))).astype(dtype), rng.integers(0, C, (T, N))


def central_differences(function, x, step=1e-5):
    gradient = np.empty_like(x)
    for index in np.ndindex(x.shape):
        value, sides = x[index], []
        for side in (step, -step):
            x[index] = value + side
            sides.append(float(np.sum(function(x))))
        x[index] = value
        gradient[index] = (sides[0] - sides[1]) / (2 * step)
    return gradient


@pytest.fixture
def rng():
    return np.random.default_rng(1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [None, 2, -100])
@pytest.mark.parametrize("offset", [0.0, FAR])
def test_cross_entropy_gradient(rng, reduction, ignore_index, offset):
    logits, targets = example(rng)
    logits[1, 2] += offset
    if ignore_index == -100:
        targets[0, 1] = targets[4, 2] = -100

    def loss(x):
        return softmax_cross_entropy(x, targets, reduction=reduction, ignore_index=ignore_index)[0]

    _, dlogits = softmax_cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)
    np.testing.assert_allclose(dlogits, central_differences(loss, logits), atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("output", ["linear", "softmax"])
def test_squared_error_gradient(rng, output, reduction):
    pred, target = example(rng)[0], example(rng)[0]
    _, dpred = mean_squared_error(pred, target, output=output, reduction=reduction)
    expected = central_differences(lambda x: mean_squared_error(x, target, output=output, reduction=reduction)[0], pred)
    np.testing.assert_allclose(dpred, expected, atol=1e-7, rtol=1e-7)


def test_cross_entropy_by_hand():
    """Two classes of odds 3 to 1: -log 3/4 and -log 1/4."""
    logits = np.log(np.array([[[3.0, 1.0]], [[3.0, 1.0]]]))
    losses, dlogits = softmax_cross_entropy(logits, [[0], [1]], reduction="none")
    np.testing.assert_allclose(losses, [[np.log(4 / 3)], [np.log(4)]], rtol=1e-15)
    np.testing.assert_allclose(dlogits, [[[-0.25, 0.25]], [[0.75, -0.75]]], rtol=1e-15)


@given(
    shape=st.sampled_from([(1, 1, 1), (4, 3, 2), (1, 5, 9), (6, 4), (3,), (2, 0, 4), (0, 3)]),
    size=st.floats(0, 1e3),
    seed=st.integers(0, 99),
    ignore=st.booleans(),
)
def test_reductions_agree(shape, size, seed, ignore):
    rng = np.random.default_rng(seed)
    logits, targets = size * rng.standard_normal(shape), rng.integers(0, shape[-1], shape[:-1])
    ignore_index = 0 if ignore else None
    count = max(int(np.sum(targets != 0)) if ignore else targets.size, 1)
    losses, dnone = softmax_cross_entropy(logits, targets, reduction="none", ignore_index=ignore_index)
    total, dsum = softmax_cross_entropy(logits, targets, reduction="sum", ignore_index=ignore_index)
    mean, dmean = softmax_cross_entropy(logits, targets, reduction="mean", ignore_index=ignore_index)
    assert losses.shape == shape[:-1] and dmean.shape == shape and np.shape(total) == np.shape(mean) == ()
    np.testing.assert_allclose([total, mean * count], [losses.sum()] * 2, rtol=1e-12)
    np.testing.assert_array_equal(dsum, dnone)
    np.testing.assert_allclose(dmean * count, dsum, atol=1e-14)
    np.testing.assert_allclose(dsum.sum(-1), 0, atol=1e-13)  # softmax is blind to a shift of its logits

    target = rng.standard_normal(shape)
    for output in ("linear", "softmax"):
        losses, dnone = mean_squared_error(logits, target, output=output, reduction="none")
        total, dsum = mean_squared_error(logits, target, output=output, reduction="sum")
        mean, dmean = mean_squared_error(logits, target, output=output)
        assert losses.shape == shape and dmean.shape == shape
        np.testing.assert_allclose([total, mean * max(losses.size, 1)], [losses.sum()] * 2, rtol=1e-12)
        np.testing.assert_array_equal(dsum, dnone)
        np.testing.assert_allclose(dmean * max(losses.size, 1), dsum, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_dtypes(rng, dtype):
    logits, targets = example(rng, dtype)
    exact, dexact = softmax_cross_entropy(logits.astype("float64"), targets)
    loss, dlogits = softmax_cross_entropy(logits, targets.astype("uint8"), ignore_index=-100)
    assert dlogits.dtype == dtype and loss.dtype == "float64"
    np.testing.assert_allclose(loss, exact, rtol=1e-6)
    np.testing.assert_allclose(dlogits, dexact, atol=2 * np.finfo(dtype).eps)
    squared, dpred = mean_squared_error(logits, np.zeros_like(logits), output="softmax")
    assert dpred.dtype == softmax(logits).dtype == dtype and squared.dtype == "float64"


def test_many_small_losses_add_up_in_float64():
    """A float32 sum of 2^24 and 1 stops growing."""
    logits = np.zeros((1, 3, 2), np.float32)
    logits[0, 0, 1] = 2.0**24
    total, _ = softmax_cross_entropy(logits, np.zeros((1, 3), int), reduction="sum")
    assert total == pytest.approx(2**24 + 2 * np.log(2), abs=1e-6)


def test_ignored_positions_hide_nan(rng):
    logits, targets = example(rng, np.float32)
    kept = np.ones((T, N), bool)
    kept[2, 1] = kept[4, 0] = False
    expected, dexpected = softmax_cross_entropy(logits[kept], targets[kept])
    logits[2, 1], logits[4, 0, 3] = np.nan, np.inf
    targets[~kept] = -1
    loss, dlogits = softmax_cross_entropy(logits, targets, ignore_index=-1)
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert np.array_equal(dlogits[~kept], np.zeros((2, C)))
    np.testing.assert_allclose(dlogits[kept], dexpected, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_to_count(reduction):
    loss, dlogits = softmax_cross_entropy(
        np.full((2, 1, 3), np.nan), np.full((2, 1), -1), reduction=reduction, ignore_index=-1
    )
    assert loss == 0 and not dlogits.any()


def test_nan_that_counts_is_not_hidden(rng):
    logits, targets = example(rng)
    logits[1, 1, 1] = np.nan
    losses, dlogits = softmax_cross_entropy(logits, targets, reduction="none")
    assert np.argwhere(np.isnan(losses)).tolist() == [[1, 1]]
    assert np.isnan(dlogits[1, 1]).all() and np.isnan(dlogits).sum() == C


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_logits(dtype):
    inf = np.inf
    rows = np.array(
        [[1e4, -1e4, 9999.0], [-1e4, -1e4, -1e4], [0.5, -inf, 0.5], [0.0, -inf, -inf], [0.0, 0.0, -inf]], dtype
    )
    losses, dlogits = softmax_cross_entropy(rows, [2, 0, 0, 0, 2], reduction="none")
    tail = np.log1p(np.exp(-1.0))
    np.testing.assert_allclose(losses, [1 + tail, np.log(3), np.log(2), 0, inf], rtol=1e-7)
    small = np.exp(-1 - tail)
    expected = [[1 - small, 0, small - 1], [-2 / 3, 1 / 3, 1 / 3], [-0.5, 0, 0.5], [0, 0, 0], [0.5, 0.5, -1]]
    np.testing.assert_allclose(dlogits, expected, atol=1e-7)
    np.testing.assert_allclose(softmax(rows)[2:4], [[0.5, 0, 0.5], [1, 0, 0]], atol=1e-7)


def test_softmax_axis_and_input_untouched(rng):
    x = rng.standard_normal((3, 4, 5)) + 100
    before = x.copy()
    y = softmax(x, axis=1)
    np.testing.assert_allclose(y, np.exp(x - 100) / np.exp(x - 100).sum(1, keepdims=True), rtol=1e-12)
    softmax_cross_entropy(x, np.zeros((3, 4), int))
    mean_squared_error(x, y)
    assert np.array_equal(x, before)


def test_strided_logits(rng):
    logits, targets = example(rng)
    swapped = np.ascontiguousarray(logits.transpose(1, 0, 2)).transpose(1, 0, 2)
    for got, expected in zip(
        softmax_cross_entropy(swapped, targets), softmax_cross_entropy(logits, targets), strict=True
    ):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("logits", "targets", "options", "error", "message"),
    [
        ((2, 3, 4), [[0, 1, 2], [3, 7, -5]], {}, ValueError, r"\[0, 4\), got 7 at \(t, n\) = \(1, 1\)"),
        ((2, 4), [0, -1], {}, ValueError, r"got -1 at position \(1,\)"),
        ((2, 4), [3, 4], {}, ValueError, r"\[0, 4\), got 4 at position \(1,\)"),
        ((2, 4), [-100, -1], {"ignore_index": -100}, ValueError, r"got -1 at position \(1,\)"),
        ((2, 4), [0.0, 1.0], {}, TypeError, "targets: expected integers, got float64"),
        ((2, 4), [True, False], {}, TypeError, "targets: expected integers, got bool"),
        ((2, 3, 4), [[0, 0], [0, 0], [0, 0]], {}, ValueError, r"got \(2, 3, 4\) and \(3, 2\)"),
        ((), 0, {}, ValueError, r"got \(\) and \(\)"),
        ((2, 0), [0, 0], {}, ValueError, r"at least 1 class .* \(2, 0\)"),
        ((2, 4), [0, 0], {"reduction": "avg"}, ValueError, "expected one of mean, sum, none, got 'avg'"),
    ],
)
def test_cross_entropy_refuses(logits, targets, options, error, message):
    with pytest.raises(error, match=message):
        softmax_cross_entropy(np.zeros(logits), targets, **options)


def test_others_refuse():
    with pytest.raises(TypeError, match="logits: expected floating point, got int64"):
        softmax_cross_entropy(np.zeros((2, 3), np.int64), [0, 0])
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(3,\)"):
        mean_squared_error(np.zeros((2, 3)), np.zeros(3))
    with pytest.raises(TypeError, match="pred: expected floating point"):
        mean_squared_error([1, 2], [1.0, 2.0])
    with pytest.raises(ValueError, match="output: expected one of linear, softmax"):
        mean_squared_error(np.zeros(2), np.zeros(2), output="tanh")
    with pytest.raises(ValueError, match="along axis 2"):
        softmax(np.zeros((2, 3)), axis=2)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_against_torch(rng, reduction, dtype):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    tolerance = 30 * np.finfo(dtype).eps
    logits, targets = example(rng, dtype)
    targets[1, 1] = targets[3, 0] = -100
    other = rng.standard_normal(logits.shape).astype(dtype)

    def torch_cross_entropy(x):
        loss = functional.cross_entropy(x.flatten(0, 1), torch.tensor(targets).flatten(), reduction=reduction)
        return loss.reshape(T, N) if reduction == "none" else loss

    cases = {
        "cross-entropy": (
            torch_cross_entropy,
            lambda x: softmax_cross_entropy(x, targets, reduction=reduction, ignore_index=-100),
        ),
        "linear": (
            lambda x: functional.mse_loss(x, torch.tensor(other), reduction=reduction),
            lambda x: mean_squared_error(x, other, reduction=reduction),
        ),
        "softmax": (
            lambda x: functional.mse_loss(x.softmax(-1), torch.tensor(other), reduction=reduction),
            lambda x: mean_squared_error(x, other, output="softmax", reduction=reduction),
        ),
    }
    for name, (theirs, ours) in cases.items():
        x = torch.tensor(logits, requires_grad=True)
        expected = theirs(x)
        expected.sum().backward()
        loss, gradient = ours(logits)
        np.testing.assert_allclose(loss, expected.detach(), rtol=tolerance, atol=tolerance, err_msg=name)
        np.testing.assert_allclose(gradient, x.grad, rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("index", [np.int32(-1), np.int64(-1), np.int8(-1)])
def test_ignore_index_is_any_whole_number(index):
    logits, targets = np.arange(12.0).reshape(4, 3), np.array([0, -1, 2, -1])
    expected, found = (softmax_cross_entropy(logits, targets, ignore_index=given) for given in (-1, index))
    assert found[0] == expected[0] and (found[1] == expected[1]).all()


@pytest.mark.parametrize("index", [True, 1.0, "-100", 1 << 63, -(1 << 63) - 1, np.bool_(False)])
def test_ignore_index_that_is_none(index):
    with pytest.raises(ValueError, match="ignore_index: expected a whole number of 64 bits, got "):
        softmax_cross_entropy(np.zeros((2, 3)), np.array([0, 1]), ignore_index=index)
