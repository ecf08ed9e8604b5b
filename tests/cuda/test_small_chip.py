"""A slice of a GPU, or a small one: what the plan chose does not run there, so the next choice is taken, at last `step`."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend, executors
from gpurnn.cells import CELLS
from gpurnn.cuda import device, on_chip, passes, tuning
from gpurnn.cuda.on_chip import PERSISTENT
from gpurnn.kernels.launch import DoesNotFit
from tests.interpreted import Interpreted, interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="written for the stand-in")

RNN, H, N, WHOLE = CELLS["rnn_tanh"], 64, 4, 132


@pytest.fixture
def small(monkeypatch):
    """`small(fits)`: a kernel runs with `fits(source)` blocks at once.  Gives the list of those that were loaded."""
    loaded = []

    def chip(fits, built=True):
        def launcher(recipe, number):
            source = recipe.factory(recipe.trace, **dict(recipe.constants))
            loaded.append(source)
            if not fits(source):
                raise DoesNotFit("no block fits")
            if not built:  # nobody will launch it
                return SimpleNamespace(kernel=SimpleNamespace(spilled=0, cooperative=False))
            made = Interpreted(recipe)
            made.resident_blocks = fits(source)
            return made

        monkeypatch.setattr(device, "_launcher", launcher)
        return loaded

    def forget():
        for cached in (on_chip._choice, on_chip._load, passes.fitted):
            cached.cache_clear()

    with interpreted():
        forget()
        monkeypatch.setattr(tuning, "_too_many", {})
        yield chip
    forget()


def trained(executor=None):
    """y and dx."""
    layer = gpurnn.RNN(3, H, rng=1, executor=executor)
    x = backend.xp.asarray(np.random.default_rng(0).standard_normal((2, N, 3)).astype("float32"))
    y, _, backward = layer(x)
    return backend.to_numpy(y), backend.to_numpy(backward(y)[0])


@pytest.fixture(scope="module")
def expected():
    with interpreted("step"):
        return trained()


def same(found, expected):
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def chosen():
    return [PERSISTENT.choice(RNN, H, N, "float32", transposed) for transposed in (False, True)]


def test_what_is_too_large_for_the_chip_is_not_built_again(small):
    question, chip = tuning.Question(RNN, H, N, "float32", True, False), device.chip()
    every = tuning.choices(question, chip)
    four = next(choice for choice in every if choice.exchange == "clustered" and choice.blocks == 4)
    tuning.rule_out(question, chip, four, DoesNotFit("no cluster fits"))
    left = tuning.choices(question, chip)
    assert left == [choice for choice in every if choice.exchange != "clustered" or choice.blocks < 4]
    assert {choice.blocks for choice in left if choice.exchange == "clustered"} == {2, 3}
    assert max(choice.blocks for choice in left if choice.exchange == "flagged") > 4
    other = tuning.Question(CELLS["gru"], 100, N, "float32", False, False)
    assert all(choice.exchange != "clustered" or choice.blocks < 4 for choice in tuning.choices(other, chip))
    assert tuning.choices(question, chip._replace(device=1)) != left, "another GPU"


def test_without_clusters_blocks_exchange_through_memory(small, expected):
    loaded = small(lambda source: 0 if source.cluster > 1 else WHOLE)
    same(trained("persistent"), expected)
    assert {choice.exchange for choice in chosen()} <= {"flagged", "counted"}
    assert sum(source.cluster > 1 for source in loaded) <= 8, "each costs seconds to build"


def test_groups_of_which_not_one_runs_at_once(small, expected):
    """A cooperative launch of them would be refused."""
    small(lambda source: 0 if source.cluster > 1 else 2 if source.cooperative else WHOLE)
    same(trained("persistent"), expected)
    assert max(choice.blocks for choice in chosen()) <= 2


@pytest.mark.parametrize("training", [True, False])
def test_at_last_there_is_step(small, expected, training, monkeypatch):
    monkeypatch.setattr(on_chip.plan, "step_cycles", lambda *_: 1e9)
    loaded = small(lambda source: 0 if source.function.__name__.startswith("persistent") else WHOLE)
    if training:
        same(trained(), expected)
    else:
        gpurnn.RNN(3, H, rng=1)(backend.xp.zeros((2, N, 3), np.float32), training=False)
    names = {source.function.__name__ for source in loaded}
    assert {"persistent_forward", "step_forward"} <= names and "persistent_backward" not in names
    chosen = executors.choose(None, RNN, H, N, np.dtype("float32"), "float32")
    assert chosen is executors.executor("step")
    with pytest.raises(
        ValueError, match=f"rnn_tanh with {H} units does not fit this GPU in float32; 'step' runs every"
    ):
        trained("persistent")


def test_both_ways_are_seen_to_run_before_one_is_gone(small, monkeypatch):
    """So that a run which is resumed takes what it took before."""
    monkeypatch.setattr(on_chip.plan, "step_cycles", lambda *_: 1e9)
    small(lambda source: 0 if source.function.__name__ == "persistent_backward" else WHOLE, built=False)
    chosen = executors.choose(None, RNN, H, N, np.dtype("float32"), "float32", training=True)
    assert chosen is executors.executor("step")


def test_a_choice_that_somebody_insists_on_is_an_error(small, monkeypatch):
    choice = chosen()[0]
    small(lambda source: 0 if source.cluster > 1 else WHOLE)
    monkeypatch.setattr(on_chip.OnChip, "choice", lambda *_: choice)
    with pytest.raises(DoesNotFit, match="no block fits"):
        trained("persistent")


def test_tuning_measures_what_runs(small, monkeypatch):
    question, chip, runs = tuning.Question(RNN, H, N, "float32", False, False), device.chip(), ["flagged", "counted"]

    def microseconds(question, choice):
        if choice.exchange not in runs:
            raise DoesNotFit("no cluster fits")
        return 1.0

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    monkeypatch.setattr(tuning, "_write", lambda key, found: None)
    assert {choice.exchange for choice, _ in tuning.tune(question, chip)} == {"flagged", "counted"}
    runs.clear()
    with pytest.raises(ValueError, match=f"rnn_tanh with {H} units does not fit this GPU"):
        tuning.tune(question, chip)
    monkeypatch.setattr(tuning, "_too_many", {})
    monkeypatch.setenv("GPURNN_TUNE", "1")
    monkeypatch.setattr(tuning, "_read", dict)
    assert tuning.choice(question, chip) is None, "so that another executor is taken"
