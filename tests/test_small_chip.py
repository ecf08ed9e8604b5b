"""A slice of a GPU, or a small one: what the plan chose does not run there, so the next choice is taken, at last `step`."""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend, executors
from gpurnn.cells import LSTM_CELL
from gpurnn.executors import device, on_chip, passes, tuning
from gpurnn.executors.on_chip import PERSISTENT
from gpurnn.kernels.launch import DoesNotFit
from tests.interpreted import Interpreted, interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="written for the stand-in")

H, N = 96, 4
FLOAT32 = np.dtype("float32")


@pytest.fixture
def small(monkeypatch):
    """`small(fits)`: of the kernels, only those of which `fits(source)` groups run at once run at all; yields the tried."""
    tried = []

    def chip(fits):
        def launcher(recipe, number):
            made = Interpreted(recipe)
            made.resident_blocks = fits(made.source)
            tried.append((made.source.function.__name__, made.source.cluster, made.source.cooperative))
            if not made.resident_blocks:
                raise DoesNotFit("no block fits")
            return made

        monkeypatch.setattr(device, "_launcher", launcher)
        return tried

    with interpreted():
        for cached in (on_chip._choice, on_chip._load, passes.fitted):
            cached.cache_clear()
        monkeypatch.setattr(tuning, "_ruled_out", set())
        yield chip
    for cached in (on_chip._choice, on_chip._load, passes.fitted):
        cached.cache_clear()


def trained(executor=None):
    """y and dx of a layer, with the exchanges of its two kernels."""
    layer = gpurnn.LSTM(3, H, rng=1, executor=executor)
    x = backend.xp.asarray(np.random.default_rng(0).standard_normal((2, N, 3)).astype("float32"))
    y, _, backward = layer(x)
    return backend.to_numpy(y), backend.to_numpy(backward(y)[0])


def exchanges():
    found = [PERSISTENT.choice(LSTM_CELL, H, N, "float32", transposed) for transposed in (False, True)]
    return [choice and choice.exchange for choice in found]


@pytest.fixture(scope="module")
def expected():
    with interpreted("step"):
        return trained()


def same(found, expected):
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_without_clusters_blocks_exchange_through_memory(small, expected):
    assert exchanges() == ["clustered"] * 2, "what the plan would take on a whole GPU"
    tried = small(lambda source: 0 if source.cluster > 1 else 132)
    same(trained("persistent"), expected)
    assert exchanges() == ["flagged"] * 2
    assert {cluster for _, cluster, _ in tried} > {1}
    tried.clear()
    same(trained("persistent"), expected)
    assert all(cluster == 1 for _, cluster, _ in tried), "what did not fit is not tried again"


def test_forward_and_back_choose_apart(small, expected):
    small(lambda source: 0 if source.cluster > 1 and "back" in source.function.__name__ else 132)
    same(trained("persistent"), expected)
    assert exchanges() == ["clustered", "flagged"]


def test_groups_of_which_not_one_runs_at_once(small, expected):
    """A cooperative launch of them would be refused."""
    few = 3
    small(lambda source: 0 if source.cluster > 1 else few if source.cooperative else 132)
    same(trained("persistent"), expected)
    left = [PERSISTENT.choice(LSTM_CELL, H, N, "float32", transposed) for transposed in (False, True)]
    assert all(choice.blocks <= few for choice in left)


def test_at_last_there_is_step(small, expected, monkeypatch):
    tried = small(lambda source: 0 if source.cluster > 1 or source.cooperative or source.shared else 132)
    monkeypatch.setattr(on_chip.plan, "step_cycles", lambda *_: 1e9)
    cheap = [choice for alone in (False, True) for choice in _cheapest(alone)]
    monkeypatch.setattr(tuning.plan, "choices", lambda *given: [c for c in cheap if (c.exchange == "alone") == given[-1]])
    same(trained(), expected)
    assert executors.choose(None, LSTM_CELL, H, N, FLOAT32, "float32") is executors.executor("step")
    assert {name for name, *_ in tried} > {"forward_step", "backward_step"}, "others were tried before"
    with pytest.raises(ValueError, match=f"lstm with {H} units does not fit this GPU in float32; 'step' runs every size"):
        trained("persistent")


def _cheapest(alone):
    question = tuning.Question(LSTM_CELL, H, N, "float32", False, alone)
    return [choice for choice in tuning.choices(question, device.chip()) if choice.tile.rows][:2]


def test_a_choice_that_somebody_insists_on_is_an_error(small, monkeypatch):
    choice = PERSISTENT.choice(LSTM_CELL, H, N, "float32", False)
    small(lambda source: 0 if source.cluster > 1 else 132)
    monkeypatch.setattr(on_chip.OnChip, "choice", lambda *_: choice)
    with pytest.raises(DoesNotFit, match="no block fits"):
        trained("persistent")


def test_tuning_measures_what_runs(small, monkeypatch):
    small(lambda source: 0 if source.cluster > 1 else 132)
    question, chip = tuning.Question(LSTM_CELL, H, N, "float32", False, False), device.chip()

    def microseconds(question, choice):
        if choice.exchange == "clustered":
            raise DoesNotFit("no cluster fits")
        return 1.0

    monkeypatch.setattr(tuning, "microseconds", microseconds)
    monkeypatch.setattr(tuning, "_write", lambda key, found: None)
    assert {choice.exchange for choice, _ in tuning.tune(question, chip)} == {"flagged", "counted"}
    monkeypatch.setattr(tuning, "microseconds", lambda *_: (_ for _ in ()).throw(DoesNotFit("nothing fits")))
    with pytest.raises(ValueError, match="lstm with 96 units does not fit this GPU"):
        tuning.tune(question, chip)
