"""Options that mean nothing are refused by name, and what is kept from one process to another pickles."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest

import gpurnn
from gpurnn import arguments, backend, diagnose, initializers
from gpurnn.app import character_model
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.optim import schedules

LOSS = gpurnn.softmax_cross_entropy
GENERATOR = np.random.default_rng(0)
LOGITS, TARGETS = backend.xp.zeros((2, 3, 4), np.float32), backend.xp.zeros((2, 3), np.int32)


def lstm(**options):
    return gpurnn.LSTM(4, 6, rng=0, executor="numpy", **options)


def truncated():
    return gpurnn.TruncatedBPTT(lstm(), LOSS, 2)


def back(keep):
    y, _, backward = lstm()(LOGITS)
    backward(y, keep=keep)


REFUSED = {
    "k1: expected a whole number from 0, got nan": lambda: gpurnn.TruncatedBPTT(lstm(), LOSS, float("nan")),
    "k2: expected a whole number from 0, got 'all'": lambda: gpurnn.TruncatedBPTT(lstm(), LOSS, 2, "all"),
    "loss: expected a function, got str": lambda: gpurnn.TruncatedBPTT(lstm(), "mse", 2),
    "model: expected a function, got int": lambda: gpurnn.full_bptt(3, LOGITS, TARGETS, LOSS),
    "nesterov: expected True or False, got 'no'": lambda: gpurnn.SGD(lstm(), 0.1, 0.9, "no"),
    "centered: expected True or False, got 'no'": lambda: gpurnn.RMSprop(lstm(), centered="no"),
    "lr: expected a finite number from 0, got np.complex64": lambda: gpurnn.SGD(lstm(), np.complex64(1)),
    "lr: expected a finite number from 0, got a whole number of": lambda: gpurnn.Adam(lstm(), 10**400),
    "betas: expected two numbers, got 0.9": lambda: gpurnn.Adam(lstm(), betas=0.9),
    "model: expected a layer or a model with params and grads, got str": lambda: gpurnn.Adam("lstm"),
    "model: expected a layer or a model with params and grads, got list": lambda: gpurnn.clip_grad_norm([], 1.0),
    "expected a mapping from names to arrays, got int": lambda: gpurnn.Adam(lstm()).load_state_dict(3),
    "training: expected True or False, got 'no'": lambda: lstm()(LOGITS, training="no"),
    "training: expected True or False, got None": lambda: gpurnn.Linear(4, 2)(LOGITS, training=None),
    "keep: expected True or False, got 'yes'": lambda: back("yes"),
    "ignore_index: expected a whole number of 64 bits, got '-100'": lambda: LOSS(LOGITS, TARGETS, ignore_index="-100"),
    "reduction: expected one of mean, sum, none, got array": lambda: LOSS(LOGITS, TARGETS, reduction=np.zeros(3)),
    "axis: expected a whole number, got '1'": lambda: gpurnn.softmax(LOGITS, "1"),
    "hidden_size: expected a whole number of 64 bits, got 18446744073709551616": lambda: gpurnn.GRU(4, 2**64),
    "num_layers: expected a whole number from 1, got np.timedelta64": lambda: gpurnn.GRU(4, 2, np.timedelta64(1, "s")),
    "dtype: expected float32 or float64, got 'f4,,'": lambda: lstm(dtype="f4,,"),
    "rng: expected a seed": lambda: gpurnn.LSTM(4, 6, rng={"seed": 1}),
    "function: expected a function, got Array": lambda: gpurnn.captured(type("Array", (), {})()),
    "cell: expected a gpurnn.Cell or one of rnn_tanh, ": lambda: gpurnn.check_gradients(gpurnn.Linear(2, 2)),
    "tolerance: expected a finite number from 0, got nan": lambda: gpurnn.check_gradients(
        gpurnn.cells.LSTM_CELL, tolerance=float("nan")
    ),
    "limit: expected a finite number from 0, got -1": lambda: initializers.uniform(-1),
    "every: expected a whole number from 1, got 2.5": lambda: schedules.step_decay(2.5, 0.5),
    "grad_norms: expected an array of numbers|grad_norms: expected real numbers": lambda: diagnose.clip_threshold("no"),
    "steps: expected numbers of steps or None, got float": lambda: diagnose.decompose(lstm(), LOGITS, steps=1.5),
    "log: expected a function, got float": lambda: gpurnn.Monitor(lstm(), log=1.5),
    "name: expected a str, got list": lambda: gpurnn.Cell([], 1, 1, print, print),
    "forward: expected a function, got NoneType": lambda: gpurnn.Cell("c", 1, 1, None, print),
    "rng: expected a numpy.random.Generator, got int": lambda: initializers.orthogonal(0, 2, 3),
    "rows: expected a whole number from 0, got -2": lambda: initializers.zeros(GENERATOR, -2, 3),
    "columns: expected a whole number from 0, got None": lambda: initializers.uniform(0.5)(GENERATOR, 2, None),
    "gain: expected a finite number, got 'much'": lambda: initializers.scaled(initializers.identity, "much"),
    "model: expected one that is called with (x, state, lengths=...), got Embedding": lambda: gpurnn.full_bptt(
        gpurnn.Embedding(5, 4), TARGETS, TARGETS, LOSS
    ),
    "loss: expected one that is called with (out, targets), got Dropout": lambda: gpurnn.TruncatedBPTT(
        lstm(), gpurnn.Dropout(), 2
    ),
    "executor: expected one of .*, got array": lambda: gpurnn.GRU(4, 6, executor=np.zeros(0)),
    "model: expected one that is made, got the class LSTM": lambda: gpurnn.TruncatedBPTT(
        gpurnn.LSTM, LOSS, 2
    ),
    "model: expected it to return out, state, backward, got NoneType": lambda: gpurnn.full_bptt(
        lambda x, state, lengths: None, TARGETS, TARGETS, LOSS
    ),
    "loss: expected it to return its value, dout, got 3 values": lambda: gpurnn.full_bptt(
        lstm(), LOGITS, TARGETS, lambda out, targets: (0, out, out)
    ),
    "dout: expected real numbers": lambda: gpurnn.full_bptt(lstm(), LOGITS, TARGETS, lambda *_: (0, object)),
    "loss: expected a gradient of the shape of out, (2, 3, 6), got ()": lambda: gpurnn.full_bptt(
        lstm(), LOGITS, TARGETS, lambda *_: (0, 1.5)
    ),
    "x: expected an array, time first, got slice": lambda: truncated().step(slice(2), TARGETS),
    "targets: expected an array, time first, got NoneType": lambda: truncated().step(LOGITS, None),
    "flow: expected a float64 array of": lambda: truncated().step(LOGITS, TARGETS, flow=backend.xp.zeros((1, 2, 3))),
    "state: expected real numbers": lambda: truncated().reset(object()),
    "outputs: expected numbers of outputs or None, got int": lambda: diagnose.influence(lstm(), LOGITS, outputs=1),
    "outputs: expected a whole number from 0, got 'h'": lambda: diagnose.influence(lstm(), LOGITS, outputs="h"),
    "lags: expected numbers of steps or None, got int": lambda: diagnose.singular_values(lstm(), LOGITS, lags=1),
    "targets: expected (T, N, ...), got (2,)": lambda: diagnose.clipping_bias(lstm(), LOGITS, [1, 2], LOSS, norm=1.0),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_means_nothing_is_refused_by_name(message):
    with pytest.raises((ValueError, TypeError), match=f"^(?:{message.replace('(', '[(]').replace(')', '[)]')})"):
        REFUSED[message]()


def test_seeds():
    """A matrix's rows are matrices, so NumPy never comes to the end of one, nor of a list in itself: it crashes."""
    endless = [1]
    endless.append(endless)
    for seed in (endless, "12", 1.5, [1.5], [[1], [2]], np.ones(2), {1}, object()):
        with pytest.raises(ValueError, match=r"rng: expected a seed, a numpy\.random.Generator or None, got"):
            arguments.generator(seed)
    for seed in (3, np.uint8(3), 2**100, [1, 2**100], (1, 2), np.array([1, 2]), np.random.SeedSequence(3)):
        expected = np.random.default_rng(seed).random()
        assert arguments.generator(seed).random() == expected
    assert arguments.generator(np.array([[1, 2]]).view(np.matrix)).random() == np.random.default_rng([1, 2]).random()
    assert arguments.generator(GENERATOR) is GENERATOR and arguments.generator(None)


def test_numbers():
    assert arguments.whole("n", np.uint8(3)) == 3 and arguments.whole("n", 2**63 - 1) == 2**63 - 1
    assert arguments.number("n", np.float32(0.5)) == 0.5 and arguments.number("n", 2**64) == 2.0**64
    for value in (
        True,
        np.True_,
        1j,
        float("nan"),
        float("inf"),
        np.timedelta64(1, "s"),
        "1",
        None,
        np.ones(1),
        10**5000,
    ):
        with pytest.raises(ValueError, match=r"^n: expected a finite number, got"):
            arguments.number("n", value)


def test_dropout_of_one_layer_warns_as_torch_does(monkeypatch):
    with pytest.warns(UserWarning, match="dropout: it acts between layers, and of one layer 0.5 means nothing") as told:
        lstm(dropout=0.5)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lstm(dropout=0.5, num_layers=2)
        model = character_model.build(TrainConfig(dropout=0.5, hidden_size=4), 9, np.random.default_rng(0))
    assert model.dropout.p == 0.5, "behind the last layer it acts"


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "data" / "deep").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data" / "a.txt").write_text("aaaa")
    (tmp_path / "elsewhere" / "b.txt").write_text("bbbb")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "twice").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "deep" / "round").symlink_to(tmp_path / "data")
    corpus = load_corpus(tmp_path / "data")
    assert corpus.alphabet.symbols == "ab" and len(corpus.tokens) == 8
    (tmp_path / "link").symlink_to(Path("data"))
    assert len(load_corpus(tmp_path / "link").tokens) == 8


@pytest.mark.parametrize(
    "make",
    [
        *[lambda kind=kind: gpurnn.RNN(3, 4, nonlinearity=kind, rng=0) for kind in gpurnn.cells.RNN_CELLS],
        lambda: gpurnn.LSTM(3, 4, rng=0),
        lambda: gpurnn.GRU(3, 4, num_layers=2, bidirectional=True, rng=0),
    ],
)
def test_layers_and_their_optimisers_pickle(make):
    model = make()
    optimizer = gpurnn.Adam(model)
    again, its = pickle.loads(pickle.dumps((model, optimizer)))
    assert again.cell is model.cell and its.model is again
    x = backend.xp.ones((5, 2, 3), np.float32)
    for each, stepper in ((model, optimizer), (again, its)):
        y, _, backward = each(x)
        backward(backend.xp.ones_like(y))
        stepper.step()
    assert backend.to_numpy(model.params.flat).tobytes() == backend.to_numpy(again.params.flat).tobytes()


@pytest.mark.parametrize("name", schedules.SCHEDULES)
def test_schedules_pickle(name):
    options = {"constant": (), "step_decay": (3, 0.5), "exponential_decay": (0.9,)}.get(name, (20, 4, 0.1))
    schedule = schedules.SCHEDULES[name](*options)
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule and [again(step) for step in range(25)] == [schedule(step) for step in range(25)]
