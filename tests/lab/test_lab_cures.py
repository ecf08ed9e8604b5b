"""Each cure against a case that fails without it."""

import functools

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose
from gpurnn.initializers import glorot_uniform, orthogonal, scaled
from gpurnn.lab import beginnings, cliff, lags, letters, memory, weight


def test_influence_of_one_weight():
    assert weight.influence(0.1, "identity", 4) == pytest.approx(0.0001, rel=1e-12)
    assert weight.influence(2.0, "identity", 4) == pytest.approx(16, rel=1e-12)
    assert weight.influence(2.0, "tanh", 20) < 1e-20


@pytest.mark.parametrize(("dtype", "executor", "T"), [("float64", "numpy", 500), ("float32", "compiled", 10_000)])
def test_the_carousel_keeps_the_error_exactly(dtype, executor, T):
    """dc_t/dc_k = 1 over any number of steps; of an LSTM that half forgets nothing is left after 200."""
    options = {"dtype": dtype, "executor": executor, "init": {"weight_hh": "zeros"}, "rng": 0}
    x = np.random.default_rng(0).standard_normal((T, 2, 3))
    kept = errors(gpurnn.LSTM(3, 4, forget_bias=lags.CAROUSEL, **options), x)
    assert (kept == kept[-1]).all() and kept[-1] == np.sqrt(8)
    assert errors(gpurnn.LSTM(3, 4, forget_bias=0.0, **options), x[:200])[0] < 1e-20


def errors(layer, x):
    """(T,) norms of dc_T/dc_t, for all 8 units of a batch of 2 at once."""
    _, (h, c), backward = layer(x)
    flow = np.zeros((1, 2, len(x)))
    backward(None, (np.zeros_like(h), np.ones_like(c)), flow=flow)
    return flow[0, 1]


def test_the_labs_carousel_is_one():
    layer = lags.carousel(3, 4, seed=0)
    assert (errors(layer, np.random.default_rng(0).standard_normal((50, 2, 3))) == np.sqrt(8)).all()


def test_the_carousel_is_never_trained_away():
    layer = gpurnn.LSTM(3, 4, forget_bias=lags.CAROUSEL, dtype="float64", executor="numpy", rng=0)
    y, _, backward = layer(np.random.default_rng(0).standard_normal((20, 2, 3)))
    backward(np.ones_like(y))
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0"):
        assert not layer.grads[name][4:8].any() and layer.grads[name][:4].any(), name


def left(lag, T=120, **options):
    """What is left of a tanh RNN's gradient at `lag`, relative to lag 0."""
    layer = gpurnn.RNN(4, 32, dtype="float64", rng=0, executor="numpy", **options)
    norms = lags.by_lag(layer, 0.3 * np.random.default_rng(0).standard_normal((T, 8, 4)))
    return norms[lag] / norms[0]


def test_initialisers():
    assert left(50, init={"weight_hh": scaled(glorot_uniform, 0.5)}) < 1e-10
    assert left(50, init={"weight_hh": glorot_uniform}) > 1e-3
    assert left(50, init={"weight_hh": orthogonal}) > 1e-3
    assert left(50, init={"weight_hh": "identity"}, nonlinearity="relu") > 0.1
    assert left(50, init={"weight_hh": scaled(glorot_uniform, 3.0)}) > 1e3


def test_scaled():
    ours = scaled(orthogonal, 1.5)(np.random.default_rng(0), 6, 6)
    np.testing.assert_allclose(np.linalg.svd(ours)[1], 1.5)


def test_update_bias():
    plain, biased = gpurnn.GRU(3, 5, num_layers=2, rng=0), gpurnn.GRU(3, 5, num_layers=2, update_bias=2.5, rng=0)
    for name, value in biased.params.items():
        expected = plain.params[name].copy()
        if name.startswith("bias_ih"):
            expected[5:10] += 2.5
        np.testing.assert_array_equal(value, expected)
    assert "bias_ih_l0" not in gpurnn.GRU(3, 5, bias=False, update_bias=1.0).params
    with pytest.raises(ValueError, match="update_bias: expected a finite number"):
        gpurnn.GRU(3, 5, update_bias=float("nan"))


@pytest.mark.parametrize("make", [gpurnn.GRU, gpurnn.LSTM])
def test_gate_biases(make):
    bias = {gpurnn.GRU: "update_bias", gpurnn.LSTM: "forget_bias"}[make]
    x = 0.3 * np.random.default_rng(0).standard_normal((60, 8, 4))
    kept = []
    for value in (0.0, 3.0):
        norms = lags.by_lag(make(4, 32, dtype="float64", rng=0, executor="numpy", **{bias: value}), x)
        kept.append(norms[-1] / norms[0])
    assert kept[0] < 1e-5 and kept[1] > 0.1


def test_clipping_stays_in_the_valley():
    without = cliff.descend()
    assert without[-1, 2] > 0.05 and np.abs(without[-1, :2] - cliff.START).max() > 0.3
    for cure in ({"norm": 0.5}, {"value": 0.5}, {"time": 0.005}):
        path = cliff.descend(**cure)
        assert path[-1, 2] < 0.01 and path[:, 2].min() < 1e-4, cure


def test_the_cliff_is_the_layers_loss():
    place = np.array([4.8, -2.4])
    found = cliff.Cliff()
    assert found.backward(*place) == pytest.approx(float(found.losses(*place)), rel=1e-12)
    numeric = [(found.losses(*(place + step)) - found.losses(*(place - step))) / 2e-7 for step in 1e-7 * np.eye(2)]
    np.testing.assert_allclose(found.gradient(), numeric, rtol=1e-4)


def test_a_trained_initial_state():
    zero, trained = beginnings.trained(False, 0), beginnings.trained(True, 0)
    assert zero[0] > 1 and trained[0] < 1e-3 and trained.mean() < 0.01 * zero.mean()


def test_the_words_letters():
    known, x, targets = letters.one_hot("neuron")
    assert known == "neuro" and x.shape == (5, 1, 5)
    assert (
        "".join(known[i] for i in x.argmax(2)[:, 0]) == "neuro" and "".join(known[i] for i in targets[:, 0]) == "euron"
    )


def horizon(trained, T):
    x, targets = tasks_of(T)
    (verdict,) = diagnose.verdicts(trained.model, x, targets, memory.squared_error)
    return verdict


@functools.cache
def tasks_of(T):
    return memory.adding_problem(np.random.default_rng(1), T, 32)


def test_a_gru_solves_what_an_rnn_cannot_and_the_horizon_says_why():
    T = 60
    gru, rnn = memory.add("GRU", T, 0, 600), memory.add("RNN", T, 0, 600)
    assert gru.error < memory.ADDING_SOLVED and horizon(gru, T).kind == "holds"
    assert rnn.error > 0.1, "no better than always answering 1"
    verdict = horizon(rnn, T)
    assert verdict.kind == "vanishes" and verdict.horizon < T // 2, "the first mark is out of reach"
    assert "under 1% after" in str(verdict)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("cell", ["GRU", "LSTM"])
def test_the_adding_problem_over_200_steps(cell, seed):
    assert memory.add(cell, 200, seed, 2000).error < memory.ADDING_SOLVED


@pytest.mark.slow
def test_an_rnn_fails_at_200_steps_and_its_horizon_says_why():
    rnn = memory.add("RNN", 200, 0, 2000)
    assert rnn.error > 0.1
    verdict = horizon(rnn, 200)
    assert verdict.kind == "vanishes" and verdict.horizon < 100


@pytest.mark.slow
def test_forget_bias_opens_the_copy_task():
    assert memory.copy("LSTM", 40, 0, 1500).error > 0.5
    assert memory.copy("LSTM, forget bias 3", 40, 0, 1500).error < memory.COPY_SOLVED


@pytest.fixture
def small(monkeypatch):
    """A few updates of small networks: what the interpreter of kernels can do."""
    for module, values in (
        (cliff, {"UPDATES": 2, "T": 4}),
        (beginnings, {"UPDATES": 1, "T": 4, "ROWS": 2}),
        (memory, {"HIDDEN": 4, "BATCH": 2}),
    ):
        for name, value in values.items():
            monkeypatch.setattr(module, name, value)


def on_a_device(run):
    """run() on the stand-in's arrays and interpreted kernels."""
    pytest.importorskip("numba_cuda", reason="kernels are built by Numba-CUDA")
    from tests.interpreted import interpreted

    with interpreted("numpy"):
        return run()


@pytest.mark.parametrize(
    "run", [lambda: cliff.descend(norm=0.5), lambda: beginnings.trained(True, 0)], ids=["cliff", "h0"]
)
def test_experiments_on_a_device(small, run):
    np.testing.assert_allclose(on_a_device(run), run(), rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_training_on_a_device(small, cell):
    theirs, ours = on_a_device(lambda: memory.add(cell, 6, 0, 1, watch=True)), memory.add(cell, 6, 0, 1, watch=True)
    assert theirs.error == pytest.approx(ours.error, rel=1e-4) and theirs.looks == [0, 1]
    np.testing.assert_allclose(theirs.flows[1], ours.flows[1], rtol=1e-3)
