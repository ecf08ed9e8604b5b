"""Binary cross-entropy, Huber, weights of classes, label smoothing, scores; pooling: against central differences and PyTorch."""

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.backend import to_numpy

pytestmark = pytest.mark.skipif(
    backend.name == "cuda", reason="written for NumPy arrays; test_parts_captured has the device"
)

T, N, C = 6, 3, 5
LENGTHS = [6, 2, 0]
VALID = np.arange(T)[:, None] < np.array(LENGTHS)
RNG = np.random.default_rng(0)
LOGITS, TOKENS = 3 * RNG.standard_normal((T, N, C)), RNG.integers(0, C, (T, N))
CHANCES, VALUES, WEIGHT = RNG.random((T, N, C)), RNG.standard_normal((T, N, C)), np.array([1.0, 0.2, 0.0, 3.0, 1.5])
TOKENS[0, 0] = 2  # whose weight is 0
IGNORED = np.where(RNG.random((T, N)) < 0.3, -100, TOKENS)

LOSSES = {
    "binary": (gpurnn.binary_cross_entropy, CHANCES, {}),
    "huber": (gpurnn.huber, VALUES, {}),
    "huber, wide": (gpurnn.huber, VALUES, {"delta": 2.5}),
    "weight": (gpurnn.softmax_cross_entropy, TOKENS, {"weight": WEIGHT}),
    "smoothing": (gpurnn.softmax_cross_entropy, TOKENS, {"label_smoothing": 0.2}),
    "both": (gpurnn.softmax_cross_entropy, IGNORED, {"weight": WEIGHT, "label_smoothing": 0.1, "ignore_index": -100}),
}


def slopes(function, x, step=1e-5):
    found = np.zeros_like(x)
    for place in np.ndindex(x.shape):
        ends = []
        for sign in (1, -1):
            moved = x.copy()
            moved[place] += sign * step
            ends.append(float(function(moved)))
        found[place] = (ends[0] - ends[1]) / (2 * step)
    return found


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name, reduction, lengths):
    loss, targets, options = LOSSES[name]
    options = options | {"reduction": reduction, "lengths": lengths}
    value, gradient = loss(LOGITS, targets, **options)
    assert value.dtype == np.float64 and gradient.dtype == LOGITS.dtype and gradient.shape == LOGITS.shape
    expected = slopes(lambda x: loss(x, targets, **options)[0].sum(), LOGITS)
    np.testing.assert_allclose(gradient, expected, atol=1e-8)
    if lengths is not None:
        assert not gradient[~VALID].any()


@pytest.mark.parametrize("name", LOSSES)
def test_lengths_are_the_valid_steps_alone(name):
    loss, targets, options = LOSSES[name]
    spoilt = np.where(VALID[..., None], LOGITS, np.nan)
    value, gradient = loss(spoilt, targets, lengths=LENGTHS, **options)
    expected, chosen = loss(LOGITS[VALID], targets[VALID], **options)
    assert value == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(gradient[VALID], chosen, rtol=1e-13)


@pytest.mark.oracle
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", LOSSES)
def test_against_torch(name, dtype, reduction):
    torch = pytest.importorskip("torch")
    loss, targets, options = LOSSES[name]
    z = torch.tensor(LOGITS.astype(dtype), requires_grad=True)
    functional, y = torch.nn.functional, torch.tensor(targets if targets.dtype.kind == "i" else targets.astype(dtype))
    if loss is gpurnn.binary_cross_entropy:
        theirs = functional.binary_cross_entropy_with_logits(z, y, reduction=reduction)
    elif loss is gpurnn.huber:
        theirs = functional.huber_loss(z, y, reduction=reduction, **options)
    else:
        given = {key: torch.tensor(value.astype(dtype)) if key == "weight" else value for key, value in options.items()}
        theirs = functional.cross_entropy(z.reshape(-1, C), y.reshape(-1), reduction=reduction, **given)
    theirs.sum().backward()
    value, gradient = loss(LOGITS.astype(dtype), targets, reduction=reduction, **options)
    tolerance = 20 * np.finfo(dtype).eps
    np.testing.assert_allclose(value.ravel(), theirs.detach().numpy().ravel(), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(gradient, z.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_large_logits_neither_overflow_nor_vanish():
    value, gradient = gpurnn.binary_cross_entropy(
        np.array([1e4, -1e4, 1e4, -1e4]), np.array([1, 0, 0, 1]), reduction="none"
    )
    assert value.tolist() == [0, 0, 1e4, 1e4] and gradient.tolist() == [0, 0, 1, -1]
    value, gradient = gpurnn.huber(np.float32([3e38]), np.float32([-3e38]), reduction="sum")
    assert np.isfinite(value) and gradient == 1


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_ignored_and_weightless_positions_hide_what_stands_there(smoothing):
    logits, options = LOGITS[:1].copy(), {"weight": WEIGHT, "ignore_index": 1, "label_smoothing": smoothing}
    logits[0, 0] = np.nan
    value, gradient = gpurnn.softmax_cross_entropy(logits, [[1, 3, 0]], **options)
    assert np.isfinite(value) and not gradient[0, 0].any() and np.isfinite(gradient).all()
    value, gradient = gpurnn.softmax_cross_entropy(logits, [[1, 1, 1]], **options)
    assert value == 0 and not gradient.any()


def test_what_losses_refuse():
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, 1\], got 0.0 to 2.0"):
        gpurnn.binary_cross_entropy(LOGITS[0, 0], [0, 1, 2, 0, 1])
    with pytest.raises(ValueError, match="expected logits and targets of one shape"):
        gpurnn.binary_cross_entropy(LOGITS, TOKENS)
    with pytest.raises(ValueError, match="delta: expected a finite number above 0, got 0"):
        gpurnn.huber(LOGITS, VALUES, delta=0)
    with pytest.raises(TypeError, match="pred: expected floating point, got int64"):
        gpurnn.huber(TOKENS, TOKENS)
    for options, message in (
        ({"weight": WEIGHT[:4]}, r"weight: expected \(C,\) = \(5,\), got \(4,\)"),
        ({"weight": -WEIGHT}, "weight: expected finite numbers from 0, got -3.0"),
        ({"label_smoothing": 1.0}, r"label_smoothing: expected a finite number in \[0, 1\)"),
    ):
        with pytest.raises(ValueError, match=message):
            gpurnn.softmax_cross_entropy(LOGITS, TOKENS, **options)
    with pytest.raises(ValueError, match=r"targets: expected values in \[0, C\) = \[0, 5\), got 5"):
        gpurnn.softmax_cross_entropy(LOGITS, TOKENS + 5 * (TOKENS == 0), label_smoothing=0.1)


# Scores


def test_accuracy_and_perplexity():
    hits = LOGITS.argmax(-1) == TOKENS
    assert gpurnn.accuracy(LOGITS, TOKENS) == pytest.approx(hits.mean())
    assert gpurnn.accuracy(LOGITS, TOKENS, lengths=LENGTHS) == pytest.approx(hits[VALID].mean())
    counted = IGNORED != -100
    assert gpurnn.accuracy(LOGITS, IGNORED, ignore_index=-100) == pytest.approx(hits[counted].mean())
    assert gpurnn.accuracy(LOGITS, TOKENS, lengths=[0, 0, 0]) == 0
    assert gpurnn.perplexity(np.zeros((T, N, C)), TOKENS) == pytest.approx(C)
    loss, _ = gpurnn.softmax_cross_entropy(LOGITS, TOKENS, lengths=LENGTHS)
    assert gpurnn.perplexity(LOGITS, TOKENS, lengths=LENGTHS) == pytest.approx(np.exp(loss))
    with pytest.raises(ValueError, match=r"expected logits \(..., C\) and targets"):
        gpurnn.accuracy(LOGITS, TOKENS[0])
    with pytest.raises(ValueError, match=r"targets: expected \(T, N, ...\) beside lengths, got \(6,\)"):
        gpurnn.accuracy(LOGITS[:, 0], TOKENS[:, 0], lengths=LENGTHS)


# A row's steps as one


@pytest.mark.parametrize("lengths", [None, LENGTHS])
@pytest.mark.parametrize("how", ["last", "mean", "max"])
@pytest.mark.parametrize(("directions", "first"), [(1, False), (2, False), (2, True)])
def test_pooling(how, directions, first, lengths):
    y = RNG.standard_normal((T, N, 4))
    spoilt = y if lengths is None else np.where(VALID[..., None], y, np.nan)
    pool = gpurnn.Pool(how, directions=directions, batch_first=first, dtype="float64")
    turn = (lambda a: a.swapaxes(0, 1)) if first else (lambda a: a)
    pooled, backward = pool(turn(spoilt), lengths=lengths)
    for n, length in enumerate(lengths or [T] * N):
        row = y[:length, n]
        expected = {
            "mean": lambda row=row: row.mean(0), "max": lambda row=row: row.max(0),
            "last": lambda row=row: row[-1] if directions == 1 else np.concatenate([row[-1, :2], row[0, 2:]]),
        }[how]() if length else np.zeros(4)  # fmt: skip
        np.testing.assert_allclose(pooled[n], expected, rtol=1e-14, atol=1e-15)
    weights = RNG.standard_normal(pooled.shape)
    dy = backward(weights)
    expected = slopes(lambda x: (pool(turn(x), lengths=lengths)[0] * weights).sum(), y)
    np.testing.assert_allclose(turn(dy), expected, atol=1e-8)


@pytest.mark.parametrize("lengths", [None, [5, 0, 3]])
@pytest.mark.parametrize("first", [False, True])
def test_a_model_of_the_last_state_is_one_of_the_final_state(first, lengths):
    """Of both directions side by side, as Keras and PyTorch's h_n have it; gradients by central differences."""
    common = {"dtype": "float64", "rng": 1}
    layer = gpurnn.GRU(3, 2, 2, bidirectional=True, batch_first=first, **common)
    model = gpurnn.SequenceModel(None, layer, gpurnn.Linear(4, 3, **common), pooling="last")
    x, labels = RNG.standard_normal((3, 5, 3) if first else (5, 3, 3)), np.array([0, 2, 1])
    out, state, _ = model(x, lengths=lengths)
    np.testing.assert_allclose(out, model.head(np.concatenate([state[2], state[3]], axis=1))[0], rtol=1e-13)

    def loss():
        return gpurnn.full_bptt(model, x, labels, gpurnn.softmax_cross_entropy, lengths=lengths)[0]

    loss()
    gradients = {name: grad.copy() for name, grad in model.grads.items()}
    for name in ("recurrent.weight_hh_l0", "recurrent.weight_ih_l1_reverse", "head.weight"):
        found, view = gradients[name], model.params[name]

        def at(value, view=view):
            before = view.copy()
            view[...] = value
            try:
                return loss()
            finally:
                view[...] = before

        np.testing.assert_allclose(found, slopes(at, view.copy()), atol=1e-8, err_msg=name)


def test_pooling_in_files_and_what_it_refuses(tmp_path):
    model = gpurnn.SequenceModel(None, gpurnn.LSTM(3, 2, rng=1), gpurnn.Linear(2, 2, rng=1), pooling="mean")
    gpurnn.save(model, tmp_path / "m")
    x = np.ones((4, 2, 3), "float32")
    assert (gpurnn.load(tmp_path / "m")(x)[0] == model(x)[0]).all() and model(x)[0].shape == (2, 2)
    with pytest.raises(ValueError, match="model: expected an answer at every step, got one with pooling 'mean'"):
        gpurnn.TruncatedBPTT(model, gpurnn.softmax_cross_entropy, 3)
    with pytest.raises(ValueError, match="how: expected one of last, mean, max, got 'first'"):
        gpurnn.SequenceModel(None, gpurnn.LSTM(3, 2), None, pooling="first")
    pool = gpurnn.Pool(directions=2)
    for shape, message in (
        ((4, 2), "y: expected three axes"),
        ((4, 2, 3), "2 directions"),
        ((0, 2, 4), "at least one step"),
    ):
        with pytest.raises(ValueError, match=message):
            pool(np.ones(shape, "float32"))
    assert to_numpy(pool(np.ones((4, 2, 4), "float32"))[0]).shape == (2, 4)
