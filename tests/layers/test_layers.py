"""Linear, Embedding, Dropout and SequenceModel."""

import copy

import numpy as np
import pytest

from gpurnn.backend import to_numpy
from gpurnn.layers import Dropout, Embedding, Linear
from gpurnn.losses import softmax_cross_entropy
from gpurnn.model import SequenceModel
from gpurnn.recurrent import GRU, LSTM

T, N, I, H, C = 5, 3, 4, 6, 7
CENTRAL = 1e-5


def _numeric(loss, value):
    """Central differences of loss() for every entry of `value`, changed in place."""
    gradient = np.empty(value.shape)
    for index in np.ndindex(*value.shape):
        keep = float(value[index])
        value[index] = keep + CENTRAL
        up = float(loss())
        value[index] = keep - CENTRAL
        gradient[index] = (up - float(loss())) / (2 * CENTRAL)
        value[index] = keep
    return gradient


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(I,), (3, I), (T, N, I), (0, N, I), (T, 0, I)])
def test_linear(shape, bias):
    rng = np.random.default_rng(0)
    layer = Linear(I, C, bias=bias, dtype="float64", rng=1)
    layer.params.flat[...] += 0.1
    x, dy = rng.standard_normal(shape), rng.standard_normal((*shape[:-1], C))
    y, backward = layer(x)
    assert y.shape == dy.shape
    dx = backward(dy)
    gradients = {"x": dx, **layer.grads}
    for name, value in {"x": x, **layer.params}.items():
        expected = _numeric(lambda: (to_numpy(layer(x, training=False)[0]) * dy).sum(), value)
        np.testing.assert_allclose(to_numpy(gradients[name]), expected, atol=1e-9, err_msg=name)
    backward(dy)
    np.testing.assert_allclose(to_numpy(layer.grads["weight"]), 2 * dy.reshape(-1, C).T @ x.reshape(-1, I), atol=1e-12)


def test_embedding():
    rng = np.random.default_rng(0)
    layer = Embedding(C, I, dtype="float64", rng=1)
    tokens, dy = rng.integers(0, C - 1, (T, N)), rng.standard_normal((T, N, I))  # the last row is never used
    y, backward = layer(tokens)
    assert (to_numpy(y) == to_numpy(layer.params["weight"])[tokens]).all()
    assert backward(dy) is None
    expected = np.zeros((C, I))
    np.add.at(expected, tokens, dy)
    np.testing.assert_allclose(to_numpy(layer.grads["weight"]), expected, atol=1e-13)
    backward(dy)
    np.testing.assert_allclose(to_numpy(layer.grads["weight"]), 2 * expected, atol=1e-13)


@pytest.mark.parametrize("shape", [(), (0, N), (T, 0), (2, 3, 4)])
def test_embedding_of_any_shape(shape):
    layer = Embedding(3, 2)
    y, backward = layer(np.ones(shape, np.uint8))
    assert y.shape == (*shape, 2)
    backward(y)


def test_dropout():
    layer = Dropout(0.25, rng=3)
    x = np.ones((200, 100), "float32")
    y, backward = layer(x)
    y = to_numpy(y)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert (y == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (to_numpy(backward(x)) == y).all()
    assert (to_numpy(Dropout(0.25, rng=3)(x)[0]) == y).all()
    assert (to_numpy(layer(x)[0]) != y).any()  # every call draws anew
    same, backward = layer(x, training=False)
    assert (to_numpy(same) == 1).all()
    assert backward is None
    same, backward = Dropout(0.0)(x)
    assert (to_numpy(backward(2 * x)) == 2).all()


@pytest.mark.parametrize("build", [lambda d: Linear(2, 3, dtype=d), lambda d: Embedding(2, 3, dtype=d)])
@pytest.mark.parametrize("dtype", ["float32", "float64", np.float64, np.dtype(">f4")])
def test_dtypes(build, dtype):
    assert build(dtype).params["weight"].dtype == np.dtype(dtype).newbyteorder("=")


@pytest.mark.parametrize("dtype", ["float16", "int32", None, "single precision", object()])
def test_bad_dtypes(dtype):
    with pytest.raises(ValueError, match="dtype: expected float32 or float64, got"):
        Linear(2, 3, dtype=dtype)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Linear(0, 3), "in_features: expected a whole number from 1, got 0"),
        (lambda: Linear(2.0, 3), "in_features: expected a whole number from 1, got 2.0"),
        (lambda: Linear(2, True), "out_features: expected a whole number from 1, got True"),
        (lambda: Linear(2, 3, bias="no"), "bias: expected True or False, got 'no'"),
        (lambda: Linear(2, 3, rng="seed"), "rng: expected a seed, a numpy.random.Generator or None, got 'seed'"),
        (lambda: Embedding(-1, 3), "num_embeddings: expected a whole number from 1, got -1"),
        (lambda: Embedding(2, "3"), "embedding_dim: expected a whole number from 1, got '3'"),
        (lambda: Dropout(1.0), r"p: expected a finite number in \[0, 1\), got 1.0"),
        (lambda: Dropout(-0.1), "p: expected a finite number in"),
        (lambda: Dropout(float("nan")), "p: expected a finite number in"),
        (lambda: Dropout("0.5"), "p: expected a finite number in"),
        (lambda: Linear(2, 3)(np.zeros((4, 3))), r"x: expected \(\.\.\., in_features\) = \(\.\.\., 2\), got \(4, 3\)"),
        (lambda: Linear(2, 3)(1.0), r"x: expected \(\.\.\., in_features\) = \(\.\.\., 2\), got \(\)"),
        (lambda: Linear(2, 3)(np.zeros((4, 2)))[1](np.zeros((3, 4))), r"dy: expected \(4, 3\), got \(3, 4\)"),
        (lambda: Embedding(2, 3)([0.0]), "tokens: expected integers, got float64"),
        (lambda: Embedding(2, 3)([True]), "tokens: expected integers, got bool"),
        (lambda: Embedding(2, 3)([0, 2]), "tokens: expected values from 0 to 1, got 0 to 2"),
        (lambda: Embedding(2, 3)([-1, 1]), "tokens: expected values from 0 to 1, got -1 to 1"),
        (lambda: Embedding(2, 3)([0])[1](np.zeros(3)), r"dy: expected \(1, 3\), got \(3,\)"),
        (lambda: Dropout()(np.zeros(3))[1](np.zeros(2)), r"dy: expected \(3,\), got \(2,\)"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_gradients_add_up_until_zero_grad():
    layer = Linear(2, 1, rng=0)
    for _ in range(3):
        layer(np.ones((1, 2)))[1](np.ones((1, 1)))
    assert (to_numpy(layer.grads["weight"]) == 3).all()
    layer.zero_grad()
    assert not layer.grads.flat.any()


def test_state_dict_is_a_copy_and_comes_back():
    layer = Linear(2, 3, rng=0)
    values = layer.state_dict()
    assert all(type(value) is np.ndarray for value in values.values())
    layer.params.flat[...] = 0
    assert values["weight"].any()
    layer.load_state_dict(values)
    assert (layer.state_dict()["weight"] == values["weight"]).all()
    with pytest.raises(ValueError, match=r"weight: expected \(out_features, in_features\) = \(3, 2\), got \(2, 3\)"):
        layer.load_state_dict(values | {"weight": values["weight"].T})


def _model(dropout=None, embedding=True, head=True, **options):
    options = {"dtype": "float64", "rng": 0} | options
    return SequenceModel(
        Embedding(C, I, dtype="float64", rng=1) if embedding else None,
        LSTM(I, H, **options),
        Linear(H, C, dtype="float64", rng=2) if head else None,
        dropout=dropout,
    )


def test_model_names_and_one_buffer():
    model = _model()
    recurrent = [f"recurrent.{name}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")]
    assert list(model.params) == ["embedding.weight", *recurrent, "head.weight", "head.bias"]
    model.params.flat[...] = 3
    assert (model.head.params["bias"] == 3).all()
    assert (model.recurrent.params["bias_hh_l0"] == 3).all()
    model.recurrent.grads.flat[...] = 2
    model.zero_grad()
    assert not model.recurrent.grads.flat.any()
    with pytest.raises(ValueError, match=r"recurrent.weight_hh_l0: expected \(4\*H, H\) = \(24, 6\), got \(6, 24\)"):
        model.load_state_dict({n: v.T if n.endswith("hh_l0") else v for n, v in model.state_dict().items()})


@pytest.mark.parametrize("lengths", [None, [2, 0, 5]])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_model_gradients(dropout, lengths):
    rng = np.random.default_rng(4)
    drop = Dropout(dropout, dtype="float64") if dropout else None
    model = _model(drop, trainable_h0=True)
    tokens, targets = rng.integers(0, C, (2, T, N))

    def forward():
        if drop is not None:
            drop.masks.calls = 9
        out, _, backward = model(tokens, lengths=lengths)
        return *softmax_cross_entropy(out, targets), backward

    _, dout, backward = forward()
    dx, _ = backward(dout)
    assert dx is None
    for name in ("embedding.weight", "recurrent.weight_hh_l0", "recurrent.c_0", "head.weight", "head.bias"):
        expected = _numeric(lambda: forward()[0], model.params[name])
        np.testing.assert_allclose(to_numpy(model.grads[name]), expected, atol=1e-9, err_msg=name)


def test_model_reads_nothing_behind_a_rows_end():
    rng = np.random.default_rng(4)
    model, lengths = _model(), np.array([2, 0, 5])
    model.params["head.bias"][...] = 1
    tokens, dout = rng.integers(0, C, (T, N)), rng.standard_normal((T, N, C))
    padding = np.arange(T)[:, None] >= lengths

    def gradients():
        model.zero_grad()
        out, _, backward = model(tokens, lengths=lengths)
        assert not to_numpy(out)[padding].any()
        backward(dout)
        return to_numpy(model.grads.flat).copy()

    clean = gradients()
    tokens[padding], dout[padding] = -100, np.nan  # no token, and no gradient
    assert (gradients() == clean).all()
    assert (tokens[padding] == -100).all()


def test_model_without_embedding_and_head():
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((T, N, I)), rng.standard_normal((T, N, H))
    model = _model(embedding=False, head=False)
    y, (h, c), backward = model(x)
    assert y.shape == (T, N, H)
    assert h.shape == c.shape == (1, N, H)
    dx, _ = backward(dy)
    twin = LSTM(I, H, dtype="float64", rng=0)
    assert (to_numpy(twin(x)[2](dy)[0]) == to_numpy(dx)).all()
    assert model(x, training=False)[2] is None


def test_a_refused_backward_leaves_no_gradient():
    model = _model()
    _, _, backward = model(np.zeros((T, N), int))
    dout = np.ones((T, N, C))
    for arguments, message in [
        ((np.ones((T, N, 1)),), r"dout: expected \(5, 3, 7\), got \(5, 3, 1\)"),
        ((dout, np.ones((1, N, H))), "dstate: expected a tuple of 2 arrays"),
        ((dout, None, False, np.zeros(T)), "flow: expected a float64 array"),
    ]:
        with pytest.raises(ValueError, match=message):
            backward(*arguments)
    assert not model.grads.flat.any()
    backward(dout, keep=True)
    once = to_numpy(model.grads.flat).copy()
    backward(dout)
    np.testing.assert_allclose(to_numpy(model.grads.flat), 2 * once, rtol=1e-12)
    twice = to_numpy(model.grads.flat).copy()
    with pytest.raises(RuntimeError, match="backward was called before and its tape is gone"):
        backward(dout)
    assert (to_numpy(model.grads.flat) == twice).all()


def test_model_of_the_final_state_alone():
    model = _model()
    _, (h, _), backward = model(np.zeros((T, N), int))
    backward(None, (np.ones(h.shape), None))
    assert model.grads["embedding.weight"].any()
    assert not model.head.grads.flat.any()


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ((None, GRU(I, H), Linear(I, C)), ValueError, r"head: expected in_features = D\*H of recurrent = 6, got 4"),
        (
            (Embedding(C, H), GRU(I, H), None),
            ValueError,
            r"embedding: expected embedding_dim = .*input_size = 4, got 6",
        ),
        ((None, None, Linear(I, C)), TypeError, "recurrent: expected a layer, got NoneType"),
        ((None, Linear(I, C), None), TypeError, "recurrent: expected a recurrent layer, got Linear"),
        ((None, GRU(I, H), "softmax"), TypeError, "head: expected a layer, got str"),
        (
            (None, GRU(I, H), Linear(H, C, dtype="float64")),
            ValueError,
            "parts of one dtype, got recurrent: float32, head",
        ),
    ],
)
def test_parts_that_do_not_fit(parts, error, message):
    with pytest.raises(error, match=message):
        SequenceModel(*parts)


def test_dropout_of_a_model_is_a_layer():
    with pytest.raises(TypeError, match=r"dropout: expected a Dropout layer or None, got 0\.5"):
        _model(0.5)


def test_a_part_belongs_to_one_model():
    """Or to several of the same memory; not to one whose other parts lie elsewhere."""
    part = GRU(I, H)
    one, other = SequenceModel(None, part, None), SequenceModel(None, part, None)
    one.params.flat[...] = 3
    assert (other.params["recurrent.bias_hh_l0"] == 3).all()
    with pytest.raises(ValueError, match="recurrent: belongs to another model already"):
        SequenceModel(None, part, Linear(H, 2))


def test_a_copied_model_is_whole():
    model = _model()
    twin = copy.deepcopy(model)
    twin.params.flat[...] = 0
    out, _, _ = twin(np.zeros((T, N), int), training=False)
    assert not out.any()
    assert model.params["head.weight"].any()
