"""A checkpoint is taken up whole or refused: every part that a run carries must be there, of one moment and sound."""

import os

import numpy as np
import pytest

import gpurnn
from gpurnn import files
from gpurnn.app import checkpoint
from gpurnn.app.checkpoint import Checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.app.training import Training


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What makes a training of this text, and its file after 6 steps."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "t.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    options = {
        "data": str(folder / "t.txt"),
        "hidden_size": 4,
        "embedding_size": 3,
        "k1": 5,
        "k2": 8,
        "batch": 2,
        "steps": 50,
    }
    config = TrainConfig(**options)
    corpus = load_corpus(config.data)
    training = Training(config, corpus)
    for _ in range(6):
        training.step()
    checkpoint.save(folder / "model", training.checkpoint())
    return (lambda **other: Training(TrainConfig(**(options | other)), corpus)), folder / "model"


def dropped(name):
    return lambda c: c.state.pop(name)


def state(name, change):
    return lambda c: c.state.update({name: change(c.state[name])})


DAMAGES = {
    "no states": (lambda c: c.state.clear(), "expected begin, carried, stretch at step 6, got none"),
    "no stretch": (dropped("stretch"), "expected begin, carried, stretch at step 6"),
    "half a state": (dropped("carried0"), "expected begin0"),
    "no carried": (lambda c: [c.state.pop(f"carried{s}") for s in (0, 1)], "expected begin, carried, stretch"),
    "another batch": (state("carried1", lambda a: a.repeat(2, 1)), r"carried c: expected \(L\*D, N, H\) = \(1, 2, 4\)"),
    "a state of NaN": (state("begin0", lambda a: a * np.nan), "begin: expected finite states"),
    "a state too many": (lambda c: c.state.update(carried2=c.state["carried0"]), "carried: expected a tuple of 2|got"),
    "another name": (lambda c: c.state.update(h=np.ones(1)), "state: expected begin, carried, stretch"),
    "a scalar stretch": (state("stretch", lambda a: a[0, 0]), r"\(steps, batch\) = \(8, 2\), got int32 \(\)"),
    "a shorter stretch": (state("stretch", lambda a: a[1:]), r"\(8, 2\), got int32 \(7, 2\)"),
    "a stretch of floats": (state("stretch", lambda a: a + 0.5), "stretch: expected whole numbers"),
    "a stretch of no symbols": (state("stretch", lambda a: a + 1000), "stretch: expected symbols of the alphabet"),
    "step 0": (lambda c: c.meta.update(step=0), "step: expected one number in all parts, got 0, window 6, update 6"),
    "a step beyond all": (lambda c: c.meta.update(step=10**30), "step: expected one number in all parts"),
    "another window": (lambda c: c.meta["data"].update(window=5), "step: expected one number in all parts"),
    "another update": (lambda c: c.optimizer.update(step=np.array(7)), "step: expected one number in all parts"),
    "a negative second moment": (
        lambda c: c.optimizer["exp_avg_sq.head.bias"].fill(-1),
        "exp_avg_sq.head.bias: expected",
    ),
    "an infinite moment": (lambda c: c.optimizer["exp_avg.head.bias"].fill(np.inf), "exp_avg.head.bias: expected"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_whose_parts_do_not_fit_is_refused(run, damage, message):
    make, path = run
    parts = checkpoint.load(path)
    copies = ({name: np.array(array) for name, array in group.items()} for group in parts[:3])
    changed = Checkpoint(*copies, parts.meta)
    damage(changed)
    training = make()
    with pytest.raises(ValueError, match=message):
        training.restore(changed)


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (5, 8), (5, 10), (5, 30), (200, 200), (260, 300)])
def test_every_moment_of_a_run_can_be_taken_up(run, k1, k2):
    make, _ = run
    training, other = make(k1=k1, k2=k2), make(k1=k1, k2=k2)
    for _ in range(8):
        other.restore(training.checkpoint())
        training.step()
        other.step()
        np.testing.assert_array_equal(other.model.params.flat, training.model.params.flat)


def test_a_flipped_bit_anywhere_is_seen(run, tmp_path):
    _, path = run
    good = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, 8 * len(good), 300):
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        (tmp_path / "m").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"can be loaded|expected a gpurnn checkpoint"):
            checkpoint.load(tmp_path / "m")


def test_a_checkpoint_without_a_digest_is_refused(run, tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    _, path = run
    with safe_open(path, "numpy") as file:
        metadata = file.metadata()
    for kept in (("gpurnn", "sha256"), ("gpurnn",)):
        save_file(load_file(path), tmp_path / "m", {name: metadata[name] for name in kept})
        if "sha256" in kept:
            assert checkpoint.load(tmp_path / "m").meta["step"] == 6
        else:
            with pytest.raises(ValueError, match="its digest is not that of its contents"):
                checkpoint.load(tmp_path / "m")


def test_a_run_in_the_making_is_left_to_its_process(run, tmp_path):
    others, left = (tmp_path / f"{files.TEMPORARY}{name}" for name in ("making", "killed"))
    others.mkdir()
    left.mkdir()
    os.utime(left, (0, 0))
    checkpoint.create_run(tmp_path / "mine", {}, checkpoint.load(run[1]))
    assert others.is_dir() and not left.exists()


def test_carried_states_that_do_not_fit_a_model_of_ones_own_are_refused():
    model = gpurnn.LSTM(3, 4, rng=0)
    bptt = gpurnn.TruncatedBPTT(model, gpurnn.mean_squared_error, 2, 3)
    for _ in range(3):
        bptt.step(np.ones((2, 5, 3)), np.ones((2, 5, 4)))
    saved = bptt.state_dict()
    for name, value in {
        "begin0": saved["begin0"][:, :4],
        "stretch": np.ones((4, 5, 3)),
        "carried1": saved["carried1"] * np.inf,
    }.items():
        with pytest.raises(ValueError, match=name.rstrip("01")):
            bptt.load_state_dict(saved | {name: value})
    np.testing.assert_array_equal(bptt.state_dict()["begin0"], saved["begin0"])


def test_a_bidirectional_model_has_no_truncated_bptt():
    layer = gpurnn.GRU(3, 4, bidirectional=True, rng=0)
    for model in (layer, gpurnn.Monitor(gpurnn.SequenceModel(None, layer, None))):
        with pytest.raises(ValueError, match="model: expected one direction"):
            gpurnn.TruncatedBPTT(model, gpurnn.mean_squared_error, 2)


@pytest.mark.parametrize("place", ["embedding", "head"])
def test_a_layer_with_memory_is_no_embedding_and_no_head(place):
    for part in (gpurnn.GRU(4, 4, rng=0), gpurnn.SequenceModel(None, gpurnn.RNN(4, 4, rng=0), None)):
        parts = {"embedding": None, "recurrent": gpurnn.RNN(4, 4, rng=1), "head": None} | {place: part}
        with pytest.raises(TypeError, match=f"{place}: expected a layer without memory"):
            gpurnn.SequenceModel(**parts)
