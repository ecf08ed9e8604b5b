"""The library on device arrays: everything public runs on a strict stand-in for CuPy and gives what NumPy gives.

The stand-in refuses what CuPy refuses, so these tests find code that would only fail on a machine with a GPU.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import cli, optim, plot
from gpurnn.app import checkpoint, train_command
from gpurnn.app.metrics import read_metrics
from tests import fake_cupy
from tests.fake_cupy.backend import as_backend
from tests.fake_cupy.compare import assert_same, on_numpy, same_error
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(
    gpurnn.backend.name != "numpy", reason="compares with NumPy, the backend is " + gpurnn.backend.name
)

T, N, I, H, V = 6, 4, 5, 7, 11
DTYPES = ("float32", "float64")
LENGTHS = [0, 3, 6, 1]


def values(*shape: int, dtype: str = "float64", seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def tokens(*shape: int, dtype: Any = np.int64) -> np.ndarray:
    """With many of each kind."""
    return np.random.default_rng(0).integers(0, V - 1, shape).astype(dtype)


def gradients_of(layer: Any) -> dict[str, Any]:
    return dict(layer.grads)


# Layers

RECURRENT = {
    "rnn": partial(gpurnn.RNN, I, H),
    "relu, no bias": partial(gpurnn.RNN, I, H, nonlinearity="relu", bias=False),
    "lstm, stacked, both directions, dropout": partial(gpurnn.LSTM, I, H, 2, bidirectional=True, dropout=0.3),
    "gru, trained h_0, clipped": partial(gpurnn.GRU, I, H, trainable_h0=True, clip_in_time=0.05),
    "lstm, trained h_0": partial(gpurnn.LSTM, I, H, 2, trainable_h0=True),
}


def there_and_back(layer: Any, dtype: str, lengths: list[int] | None, given_state: bool = True) -> dict[str, Any]:
    xp, D = gpurnn.backend.xp, layer.directions
    x, dy = values(T, N, I, dtype=dtype), values(T, N, D * H, dtype=dtype, seed=1)
    if lengths is not None:
        x[np.arange(T)[:, None] >= lengths] = dy[np.arange(T)[:, None] >= lengths] = np.nan
    shape = (layer.num_layers * D, N, H)
    state = tuple(values(*shape, dtype=dtype, seed=2 + s) for s in range(layer.cell.states))
    state = state if len(state) > 1 else state[0]
    flow = xp.full((shape[0], layer.cell.states, T), np.nan)
    y, final, backward = layer(x, state if given_state else None, lengths=lengths)
    first = backward(dy, state, keep=True, flow=flow)
    once = {name: value.copy() for name, value in layer.grads.items()}
    second = backward(dy, state)
    quiet, _, none = layer(x, lengths=lengths, training=False)
    assert none is None
    return {
        "y": y, "final": final, "first": first, "once": once, "second": second, "twice": gradients_of(layer),
        "flow": flow, "inference": quiet,
    }  # fmt: skip


@pytest.mark.parametrize("lengths", [None, LENGTHS, [0] * N], ids=["full", "ragged", "empty"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", RECURRENT.values(), ids=RECURRENT.keys())
def test_recurrent_layers(make, dtype, lengths):
    assert_same(lambda: there_and_back(make(dtype=dtype, rng=1), dtype, lengths), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cell(any_cell, dtype):
    def work():
        layer = gpurnn.Recurrent(any_cell, I, H, bidirectional=True, dtype=dtype, rng=1)
        layer.params.flat[...] += gpurnn.backend.xp.asarray(values(layer.params.flat.size, dtype=dtype)) / 4
        return there_and_back(layer, dtype, LENGTHS, given_state=False)

    assert_same(work, dtype)


@pytest.mark.parametrize(("steps", "rows"), [(0, 3), (3, 0), (1, 1)])
def test_sequences_without_steps_or_rows(steps, rows):
    def work():
        layer = gpurnn.LSTM(I, H, dtype="float64", rng=1)
        y, state, backward = layer(values(steps, rows, I))
        return y, state, backward(None, state), backward and gradients_of(layer)

    assert_same(work)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_type", [np.uint8, np.int32, np.int64, list])
def test_layers_without_memory(dtype, token_type):
    given = tokens(T, N).tolist() if token_type is list else tokens(T, N, dtype=token_type)

    def work():
        linear, embedding = gpurnn.Linear(I, V, dtype=dtype, rng=1), gpurnn.Embedding(V, I, dtype=dtype, rng=2)
        dropout = gpurnn.Dropout(0.4, dtype=dtype, rng=3)
        y, back = embedding(given)
        dropped, drop_back = dropout(y)
        out, linear_back = linear(dropped)
        dx = drop_back(linear_back(values(T, N, V, dtype=dtype)))
        assert back(dx) is None
        return y, dropped, out, dx, gradients_of(linear), gradients_of(embedding), dropout(y, training=False)[0]

    assert_same(work, dtype)


@pytest.mark.parametrize("shape", [(), (0, N), (T, 0)])
def test_empty_layers_without_memory(shape):
    def work():
        embedding, linear = gpurnn.Embedding(V, I, rng=1), gpurnn.Linear(I, V, rng=2)
        y, back = embedding(tokens(*shape))
        out, linear_back = linear(y)
        back(linear_back(out))
        return out, gradients_of(embedding), gradients_of(linear)

    assert_same(work, "float32")


def test_gradients_of_an_embedding_are_the_same_every_time():
    """Atomic additions would come in another order each time."""
    dy = values(400, 8, I, dtype="float32")
    with interpreted("numpy"):
        found = []
        for _ in range(3):
            layer = gpurnn.Embedding(V, I, rng=1)
            layer(tokens(400, 8))[1](dy)
            found.append(gpurnn.backend.to_numpy(layer.grads["weight"]))
    expected = np.stack([dy[tokens(400, 8) == row].sum(0, dtype=float) for row in range(V)])
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-4)
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["full", "ragged"])
@pytest.mark.parametrize("parts", ["all", "recurrent only", "no head"])
def test_sequence_model(parts, lengths):
    def work():
        common = {"dtype": "float64", "rng": np.random.default_rng(1)}
        embedding = None if parts == "recurrent only" else gpurnn.Embedding(V, I, **common)
        head = gpurnn.Linear(H, V, **common) if parts == "all" else None
        model = gpurnn.SequenceModel(embedding, gpurnn.GRU(I, H, **common), head, dropout=gpurnn.Dropout(0.2, **common))
        x = values(T, N, I) if embedding is None else tokens(T, N)
        if lengths:
            x[np.arange(T)[:, None] >= lengths] = np.nan if embedding is None else V + 5
        out, state, backward = model(x, lengths=lengths)
        return out, state, backward(values(*out.shape)), gradients_of(model), model.zero_grad(), gradients_of(model)

    assert_same(work)


def test_a_cell_and_a_layer_hold_against_central_differences(any_cell):
    assert_same(lambda: sorted(gpurnn.check_gradients(any_cell, T=3, N=2)))


def test_a_wrong_cell_is_found():
    forward, right = gpurnn.cells.LSTM_CELL.functions()

    def backward(*arguments):
        dx, dr, (dh, dc), dparams = right(*arguments)
        return dx, dr, (dh, 1.01 * dc), dparams

    bad = gpurnn.Cell("bad", 4, 2, forward, backward)
    assert "c_0" in str(same_error(lambda: gpurnn.check_gradients(bad, T=2, N=2)))


# Losses


@pytest.mark.parametrize("ignore_index", [None, 3, -1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float16", *DTYPES])
def test_cross_entropy(dtype, reduction, ignore_index):
    logits, targets = 50 * values(T, N, V, dtype=dtype), tokens(T, N)
    if ignore_index is not None:
        targets[2] = ignore_index
        logits[targets == ignore_index] = np.nan
    logits[0, 0] = np.inf

    def work():
        return gpurnn.softmax_cross_entropy(logits, targets, reduction=reduction, ignore_index=ignore_index)

    assert_same(work, dtype)


def test_losses_of_nothing():
    empty = np.zeros((0, N, V))
    assert_same(lambda: gpurnn.softmax_cross_entropy(empty, tokens(0, N)))
    assert_same(lambda: gpurnn.softmax_cross_entropy(values(2, V), np.array([-1, -1]), ignore_index=-1))
    assert_same(lambda: gpurnn.mean_squared_error(empty, empty))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("output", ["linear", "softmax"])
@pytest.mark.parametrize("dtype", ["float16", *DTYPES])
def test_squared_error_and_softmax(dtype, output, reduction):
    pred, target = values(T, N, V, dtype=dtype), values(T, N, V, seed=1)
    assert_same(lambda: gpurnn.mean_squared_error(pred, target, output=output, reduction=reduction), dtype)
    assert_same(lambda: gpurnn.softmax(pred, axis=1), dtype)


def test_adding_losses_up_does_not_wait():
    with interpreted("numpy"):
        logits, targets = (fake_cupy.asarray(a) for a in (values(T, N, V), tokens(T, N)))
        before = fake_cupy.counters.synchronisations
        total = sum(gpurnn.softmax_cross_entropy(logits, targets)[0] for _ in range(3))
        assert isinstance(total, fake_cupy.ndarray)
        assert fake_cupy.counters.synchronisations == before


# Optimisers and clipping

OPTIMIZERS = [
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    (optim.RMSprop, {"momentum": 0.5, "centered": True, "weight_decay": 0.1}),
    (optim.RMSprop, {}),
    (optim.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (optim.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
]


def layer_with_gradients(dtype: str = "float64", scale: float = 1.0) -> gpurnn.Linear:
    layer = gpurnn.Linear(I, V, dtype=dtype, rng=1)
    for seed, gradient in enumerate(layer.grads.values()):
        gradient[...] = gpurnn.backend.xp.asarray(scale * values(*gradient.shape, dtype=dtype, seed=seed))
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS)
def test_optimisers(kind, options, dtype):
    def work():
        layer = layer_with_gradients(dtype)
        first = kind(layer, **options)
        for _ in range(3):
            first.step()
        saved = first.state_dict()
        assert all(type(value) is np.ndarray for value in saved.values())
        second = kind(layer, **options)
        second.load_state_dict(saved)
        second.step()
        return dict(layer.params), second.steps, [dict(moment) for moment in second.moments.values()]

    assert_same(work, dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200, 0.0])
def test_clipping(scale):
    def by_norm():
        layer = layer_with_gradients(scale=scale)
        return gpurnn.grad_norm(layer), gpurnn.clip_grad_norm(layer, 0.5), gradients_of(layer)

    def by_value():
        layer = layer_with_gradients(scale=scale)
        gpurnn.clip_grad_value(layer, 0.3)
        return gradients_of(layer)

    assert_same(by_norm)
    assert_same(by_value)


# Backpropagation through time


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 5), (2, 20)])
def test_truncated_bptt(k1, k2):
    stream = tokens(12, N)

    def work():
        common = {"dtype": "float64", "rng": np.random.default_rng(1)}
        recurrent = gpurnn.LSTM(I, H, 2, trainable_h0=True, **common)
        model = gpurnn.SequenceModel(gpurnn.Embedding(V, I, **common), recurrent, gpurnn.Linear(H, V, **common))
        loss = partial(gpurnn.softmax_cross_entropy, reduction="sum")
        first, second = (gpurnn.TruncatedBPTT(model, loss, k1, k2) for _ in range(2))
        flow, losses = gpurnn.backend.xp.zeros((2, 2, k1)), []
        for t in range(0, 4 * k1, k1):
            first.load_state_dict(second.state_dict())  # a stream can be put away and taken up at any window
            first, second = second, first
            part = slice(t, min(t + k1, 11))
            if part.start < part.stop:
                part_flow = flow[..., : part.stop - part.start]
                losses.append(second.step(stream[part], stream[1:][part], flow=part_flow))
        saved = second.state_dict()
        assert all(type(value) is np.ndarray for value in saved.values())
        return losses, flow, gradients_of(model), {name: gpurnn.backend.xp.asarray(v) for name, v in saved.items()}

    assert_same(work)


def test_full_bptt():
    def work():
        model = gpurnn.GRU(I, H, dtype="float64", rng=1)
        flow = gpurnn.backend.xp.zeros((1, 1, T))
        value, state = gpurnn.full_bptt(model, values(T, N, I), values(T, N, H), gpurnn.mean_squared_error, flow=flow)
        return value, state, flow, gradients_of(model)

    assert_same(work)


# Parameters in and out


def test_parameters_come_from_anywhere_and_leave_as_numpy_arrays():
    with on_numpy():
        expected = gpurnn.LSTM(I, H, rng=1).state_dict()
    with as_backend():
        for convert in (np.asarray, fake_cupy.asarray, np.ndarray.tolist, lambda a: a.astype("float64"), OnlyDlpack):
            layer = gpurnn.LSTM(I, H, rng=2)
            layer.load_state_dict({name: convert(value) for name, value in expected.items()})
            got = layer.state_dict()
            assert all(type(value) is np.ndarray and (value == expected[name]).all() for name, value in got.items())
            got["weight_hh_l0"][...] = 0
            assert layer.params["weight_hh_l0"].all(), "a copy"


BAD = {
    "missing": lambda layer: layer.load_state_dict({"weight": np.zeros((V, I))}),
    "shape": lambda layer: layer.load_state_dict({"weight": np.zeros((V, I)), "bias": np.zeros(V + 1)}),
    "not finite": lambda layer: layer.load_state_dict({"weight": np.zeros((V, I)), "bias": [np.nan] * V}),
    "overflow": lambda layer: layer.load_state_dict({"weight": np.zeros((V, I)), "bias": [1e300] * V}),
    "x shape": lambda layer: layer(values(T, I + 1)),
    "x text": lambda layer: layer([["a"] * I]),
    "dy shape": lambda layer: layer(values(T, I))[1](values(T, I)),
    "tokens type": lambda layer: gpurnn.Embedding(3, 2)([0.5]),
    "targets type": lambda layer: gpurnn.softmax_cross_entropy(values(N, 3), values(N)),
    "targets shape": lambda layer: gpurnn.softmax_cross_entropy(values(T, N, 3), tokens(T)),
    "lengths range": lambda layer: gpurnn.RNN(I, H)(values(T, N, I), lengths=[0, 1, 2, T + 1]),
    "lengths type": lambda layer: gpurnn.RNN(I, H)(values(T, N, I), lengths=[0.5] * N),
    "state shape": lambda layer: gpurnn.LSTM(I, H)(values(T, N, I), (values(1, N, H), values(1, N, I))),
    "backward twice": lambda layer: [back(None) for back in [gpurnn.GRU(I, H)(values(T, N, I))[2]] * 2],
    "optimiser state": lambda layer: gpurnn.Adam(layer).load_state_dict({"step": 1}),
}


@pytest.mark.parametrize("work", BAD.values(), ids=BAD.keys())
def test_mistakes_are_told_alike(work):
    same_error(lambda: work(gpurnn.Linear(I, V, rng=1)))


def test_flow_has_to_lie_on_the_device():
    with as_backend():
        layer = gpurnn.RNN(I, H, rng=1)
        _, _, backward = layer(values(T, N, I))
        with pytest.raises(ValueError, match=r"flow: .* \(1, 1, 6\), got float64 \(1, 1, 6\) of numpy"):
            backward(None, flow=np.zeros((1, 1, T)))
        assert not layer.grads.flat.any(), "nothing was added"
        bptt = gpurnn.TruncatedBPTT(layer, gpurnn.mean_squared_error, T)
        with pytest.raises(ValueError, match=r"flow: expected a float64 array of .*, got float64 \(1, 1, 6\) of numpy"):
            bptt.step(values(T, N, I), values(T, N, H), flow=np.zeros((1, 1, T)))
        assert not layer.grads.flat.any()


class OnlyDlpack:
    """Another library's tensor on the device, which speaks DLPack alone."""

    def __init__(self, host):
        self._array = fake_cupy.asarray(host)

    def __dlpack_device__(self):
        return self._array.__dlpack_device__()

    def __dlpack__(self, **options):
        return self._array.__dlpack__(**options)


class OnlyInterface:
    """Another library's array on the device, such as Numba's."""

    def __init__(self, host):
        self._array = fake_cupy.asarray(host)
        self.__cuda_array_interface__ = self._array.T.__cuda_array_interface__


@pytest.mark.parametrize("dtype", DTYPES)
def test_arrays_of_other_libraries(dtype):
    x = values(T, N, I, dtype=dtype)
    with as_backend():
        layer = gpurnn.GRU(I, H, rng=1)
        expected = layer(x)[0]
        transposed = np.ascontiguousarray(x.T)
        for given in (fake_cupy.asarray(x), OnlyDlpack(x), OnlyInterface(transposed), x.tolist(), x.astype(">f8")):
            assert (layer(given)[0] == expected).all()
        own = fake_cupy.asarray(x)
        assert gpurnn.backend.asarray(OnlyDlpack(x), None, "x").dtype == dtype
        assert gpurnn.backend.asarray(own, dtype, "x") is own
        with pytest.raises(TypeError, match="x: expected whole numbers"):
            gpurnn.backend.asarray(OnlyDlpack(x), np.int32, "x")
    assert np.array_equal(gpurnn.backend.asarray(own, None, "x"), x), "NumPy's backend takes it over to the host"


# The command line

SMALL = [
    "--hidden-size", "9", "--embedding-size", "5", "--batch", "3", "--k1", "6", "--k2", "9", "--validation", "0.2",
    "--log-every", "2", "--validate-every", "4", "--save-every", "3", "--dropout", "0.2", "--clip-norm", "0.2",
]  # fmt: skip


def tensors(run: Any) -> dict[str, bytes]:
    saved = checkpoint.load(run / checkpoint.MODEL)
    return {
        f"{number} {name}": value.tobytes()
        for number, group in enumerate((saved.tensors, saved.optimizer, saved.state))
        for name, value in group.items()
    }


@pytest.mark.parametrize("cell", ["lstm", pytest.param("gru", marks=pytest.mark.slow)])
def test_train_resume_and_sample(cell, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_command, "SAMPLE_LENGTH", 5)
    for figure in ("loss_curve", "gradient_flow"):  # they would take most of the time
        monkeypatch.setattr(plot, figure, lambda *_, **__: None)
    text, whole, pieces, host = (tmp_path / name for name in ("text.txt", "whole", "pieces", "host"))
    text.write_text("the quick brown fox, die schnelle Füchsin.\n" * 12, "utf-8")
    command = ["train", "--data", str(text), "--cell", cell, "--schedule", "constant", *SMALL]
    with interpreted("numpy"):
        assert cli.main([*command, "--steps", "5", "--run", str(whole)]) == 0
        assert "backend   cuda: the tests' stand-in" in capsys.readouterr().out
        assert cli.main([*command, "--steps", "3", "--run", str(pieces)]) == 0
        assert cli.main(["train", "--resume", str(pieces), "--steps", "5"]) == 0
        assert tensors(pieces) == tensors(whole), "resumed bit for bit"
        capsys.readouterr()
        assert cli.main(["sample", str(whole), "--length", "9", "--seed", "0", "--prompt", "the "]) == 0
        sampled = capsys.readouterr().out
    with on_numpy():
        assert cli.main([*command, "--steps", "5", "--run", str(host)]) == 0
        capsys.readouterr()
        assert cli.main(["sample", str(whole), "--length", "9", "--seed", "0", "--prompt", "the "]) == 0
        assert capsys.readouterr().out == sampled
    losses = [
        [line["loss"] for line in read_metrics(run / checkpoint.METRICS) if "loss" in line] for run in (whole, host)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4)
