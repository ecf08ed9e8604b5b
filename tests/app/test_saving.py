"""Models in files: every layer and option there and back, what is refused; and everything pickles and deep-copies."""

import copy
import inspect
import json
import pickle

import numpy as np
import pytest
import safetensors.numpy

import gpurnn
from gpurnn import backend, initializers
from gpurnn.app import checkpoint
from gpurnn.app.checkpoint import Checkpoint
from gpurnn.cells import CELLS
from gpurnn.saving.models import NOT_KEPT, Recurrent

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="files are written and read on the host")

TOKENS = np.random.default_rng(0).integers(0, 7, (6, 3))
FLOATS = np.random.default_rng(0).standard_normal((6, 3, 4))


def own_forward(x, r, state, params):
    return (gpurnn.tanh(x[0] + r[0] + params[0] * state[0]),)


def own_cell(name="leaky"):
    return gpurnn.Cell(name, 1, 1, own_forward, params=("leak",), init={"leak": initializers.uniform(0.5)})


class Tagger(gpurnn.Model):
    def __init__(self):
        super().__init__(lstm=gpurnn.LSTM(4, 5), head=gpurnn.Linear(5, 2))

    def __call__(self, x):
        return self.head(self.lstm(x, training=False)[0], training=False)[0]


def words():
    model = gpurnn.SequenceModel(
        gpurnn.Embedding(7, 5, rng=1), gpurnn.GRU(5, 5, 2, dropout=0.3, rng=2), gpurnn.Linear(5, 7, rng=3),
        dropout=gpurnn.Dropout(0.4, rng=4),
    )  # fmt: skip
    model.tie("head.weight", "embedding.weight")
    model.freeze("recurrent.*bias*")
    model(TOKENS)  # its dropout has gone on by one call
    return model


def deep():
    options = {"bidirectional": True, "trainable_h0": True, "clip_in_time": 0.5, "dtype": "float64", "bias": False}
    return gpurnn.LSTM(4, 3, 2, **options, rng=1)


MODELS = {
    "linear": (lambda: gpurnn.Linear(4, 2, bias=False, dtype="float64", rng=1), FLOATS),
    "rnn": (lambda: gpurnn.RNN(4, 3, nonlinearity="relu", rng=1), FLOATS),
    "deep": (deep, FLOATS),
    "shipped": (lambda: gpurnn.Recurrent("mingru", 4, 3, rng=1), FLOATS),
    "noisy": (lambda: gpurnn.LSTM(4, 3, zoneout=(0.1, 0.5), recurrent_dropout=0.25, noise=0.5, rng=1), FLOATS),
    "zoned": (lambda: gpurnn.Recurrent("gru", 4, 3, zoneout={"h": np.float32(0.5)}, rng=1), FLOATS),
    "heads": (lambda: gpurnn.Recurrent("slstm", 4, 6, heads=3, rng=1), FLOATS),
    "words": (words, TOKENS),
    "nested": (lambda: gpurnn.Model(a=words(), b=gpurnn.Linear(2, 2)), None),
}


def same(one, other):
    assert type(one) is type(other) and list(one.params) == list(other.params) and one.dtype == other.dtype
    assert (one.params.flat == other.params.flat).all() and one.params.frozen == other.params.frozen
    assert one.params.tied.keys() == other.params.tied.keys()


@pytest.mark.parametrize("name", MODELS)
def test_there_and_back(name, tmp_path):
    make, x = MODELS[name]
    model = make()
    gpurnn.save(model, tmp_path / "model.safetensors")
    for twin in (gpurnn.load(tmp_path / "model.safetensors"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(model, twin)
        if x is not None:  # dropout goes on with the masks that come next
            ours, theirs = copy.deepcopy(model)(x)[0], twin(x)[0]
            assert (ours == theirs).all()


def test_every_option_of_a_layer_is_kept(tmp_path):
    """Whoever adds an option adds it here, so that no model loses it in a file."""
    given = {
        "num_layers": 2, "bias": False, "bidirectional": True, "batch_first": True, "dropout": 0.25, "weight_dropout": 0.5,
        "residual": True, "zoneout": 0.125, "recurrent_dropout": 0.25, "noise": 0.5, "trainable_h0": True, "heads": 3, "clip_in_time": 0.5,
        "dtype": "float32", "precision": "tf32", "executor": "numpy",
    }  # fmt: skip
    names = [name for name in inspect.signature(Recurrent.__init__).parameters if name not in NOT_KEPT]
    assert names == ["input_size", "hidden_size", *given]
    gpurnn.save(gpurnn.GRU(4, 3, **given), tmp_path / "m")
    twin = gpurnn.load(tmp_path / "m")
    assert {name: getattr(twin, name) for name in given} == given


def test_cells_of_one_s_own(tmp_path):
    model = gpurnn.Recurrent(own_cell(), 4, 3, rng=1)
    gpurnn.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: it has the cell 'leaky', which does not ship: give it, cells=\{'leaky'"):
        gpurnn.load(tmp_path / "m")
    same(model, gpurnn.load(tmp_path / "m", cells={"leaky": own_cell()}))
    other = gpurnn.Cell("leaky", 1, 1, lambda x, r, s, p: (x[0] + r[0] + p[0] * s[0],), params=("leak",))
    with pytest.warns(UserWarning, match="the equations of cell 'leaky' are not those that the model was saved with"):
        gpurnn.load(tmp_path / "m", cells={"leaky": other})
    with pytest.raises(ValueError, match="m: expected the names"), pytest.warns(UserWarning, match="equations"):
        gpurnn.load(tmp_path / "m", cells={"leaky": CELLS["gru"]})


def test_model_classes_of_one_s_own(tmp_path):
    model = Tagger()
    model.freeze("lstm")
    gpurnn.save(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"m: it has a Tagger, a class of somebody's own: give it, classes=\{'Tagger'"):
        gpurnn.load(tmp_path / "m")
    twin = gpurnn.load(tmp_path / "m", classes={"Tagger": Tagger})
    same(model, twin)
    assert (model(FLOATS) == twin(FLOATS)).all()


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(TypeError, match="model: expected a layer or a model, got dict"):
        gpurnn.save({}, tmp_path / "m")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"expected a file, got a folder; gpurnn.load_run reads a run's folder"):
        gpurnn.load(tmp_path)
    path = tmp_path / "m"
    path.write_bytes(safetensors.numpy.save({"w": np.ones(3)}))
    with pytest.raises(ValueError, match=r"m: expected a model that gpurnn.save wrote, got other tensors"):
        gpurnn.load(path)
    checkpoint.save(path, Checkpoint({}, {}, {}, {}))
    with pytest.raises(ValueError, match=r"got a run's checkpoint: gpurnn.load_run reads its folder"):
        gpurnn.load(path)
    gpurnn.save(gpurnn.Linear(2, 2), path)
    with pytest.raises(ValueError, match=r"expected a gpurnn checkpoint, got a model: gpurnn.load reads it"):
        checkpoint.load(path)
    assert set(checkpoint.load_weights(path)) == {"weight", "bias"}
    path.write_bytes(pickle.dumps(gpurnn.Linear(2, 2)))
    with pytest.raises(ValueError, match="m: not a file that can be loaded"):
        gpurnn.load(path)
    with pytest.raises(FileNotFoundError):
        gpurnn.load(tmp_path / "none")


def test_a_flipped_bit_anywhere_is_seen(tmp_path):
    path = tmp_path / "m"
    gpurnn.save(gpurnn.GRU(2, 3, rng=1), path)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
        with pytest.raises((ValueError, MemoryError)):
            gpurnn.load(path)


@pytest.mark.parametrize(
    "change",
    [
        {"model": None}, {"model": {"class": "os.system"}}, {"model": {"class": "Linear"}}, {"tied": 3}, {"frozen": [3]},
        {"model": {"class": "Linear", "arguments": {"in_features": "2", "out_features": 2}}},
        {"model": {"class": "Linear", "arguments": {"in_features": 2, "out_features": 2, "evil": 2}}},
        {"model": {"class": "GRU", "arguments": {"input_size": 2, "hidden_size": 2}}}, {"frozen": ["tail"]},
        {"model": {"class": "Model", "parts": [1]}}, {"tied": {"bias": "weight"}},
    ],
)  # fmt: skip
def test_descriptions_that_make_no_sense(change, tmp_path):
    from gpurnn.saving.tensors import tensor_bytes

    path, linear = tmp_path / "m", gpurnn.Linear(2, 2)
    arguments = {"in_features": 2, "out_features": 2, "bias": True, "dtype": "float32"}
    meta = {"format": 1, "model": {"class": "Linear", "arguments": arguments}, "frozen": [], "tied": {}}
    for entries, fits in ((meta, True), (meta | change, False)):
        path.write_bytes(tensor_bytes(linear.state_dict(), "gpurnn-model", json.dumps(entries)))
        if fits:
            same(linear, gpurnn.load(path))
            continue
        with pytest.raises(ValueError, match="m: "):
            gpurnn.load(path)


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path, model = tmp_path / "m", gpurnn.Linear(2, 2, rng=1)
    gpurnn.save(model, path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        gpurnn.save(gpurnn.Linear(3, 3), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_everything_pickles_and_copies(clone):
    model = words()
    things = {
        "cell": own_cell(), "layer": gpurnn.Recurrent(own_cell(), 4, 3, rng=1), "model": model, "own": Tagger(),
        "dropout": gpurnn.Dropout(0.3, rng=1), "schedule": gpurnn.schedules.warmup_cosine(10, 2),
        "uniform": initializers.uniform(0.5), "normal": initializers.normal(1.0),
        "scaled": initializers.scaled(initializers.orthogonal, 0.9),
        "bptt": gpurnn.TruncatedBPTT(model, gpurnn.softmax_cross_entropy, 3),
        **{f"cell {name}": cell for name, cell in CELLS.items()},
        **{kind.__name__: kind(model, 0.1) for kind in (gpurnn.SGD, gpurnn.RMSprop, gpurnn.Adam, gpurnn.AdamW)},
    }  # fmt: skip
    twins = clone(things)
    assert twins["cell"] == things["cell"] and twins["schedule"] == things["schedule"]
    assert all(twins[name] == things[name] for name in ("uniform", "normal", "scaled"))
    rng = np.random.default_rng
    assert (twins["scaled"](rng(1), 4, 3) == things["scaled"](rng(1), 4, 3)).all()
    assert twins["cell gru"] is CELLS["gru"]
    assert twins["bptt"].model is twins["model"] is twins["Adam"].model
    assert twins["bptt"].step(TOKENS[:3], TOKENS[:3]) == things["bptt"].step(TOKENS[:3], TOKENS[:3])
    for name in ("SGD", "Adam"):
        twins[name].step()
        things[name].step()
    same(things["model"], twins["model"])


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path, monkeypatch):
    """Of validations that fall, rise and fall less, though the run is cut in two."""
    from gpurnn.app.config import TrainConfig
    from gpurnn.app.data import load_corpus
    from gpurnn.app.training import Training, train

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog; " * 12)
    corpus, run = load_corpus(tmp_path / "text"), tmp_path / "run"
    config = TrainConfig(hidden_size=5, embedding_size=4, batch=2, k1=5, steps=8, validation=0.2, validate_every=2)
    seen = iter([3.0, 2.0, 1.5, 2.5, 1.75])  # at steps 1, 2, 4, 6, 8
    monkeypatch.setattr(Training, "validate", lambda self, limit=None: next(seen))
    parameters = {}

    for stop in (4, 8):
        training = Training(config, corpus)

        def look(line, training=training):
            parameters[line["step"]] = training.model.params.flat.copy()

        if run.exists():
            training.restore(checkpoint.load(run / checkpoint.MODEL))
        else:
            checkpoint.create_run(run, config.to_mapping(), training.checkpoint())
        train(training, run, stop=lambda stop=stop, training=training: training.steps_done >= stop, report=look)
    for best, step in ((False, 8), (True, 4)):
        model, alphabet, found = gpurnn.load_run(run, best=best)
        assert (model.params.flat == parameters[step]).all() and found == config
        assert alphabet.decode(alphabet.encode("quick")) == "quick"
    (run / checkpoint.BEST).unlink()
    with pytest.raises(FileNotFoundError, match=r"run: there is no best.safetensors: the run had no validation yet"):
        gpurnn.load_run(run, best=True)
    damaged = training.checkpoint()
    damaged.meta["best"] = -1.0
    with pytest.raises(ValueError, match="best: expected a number from 0, got -1"):
        Training(config, corpus).restore(damaged)
