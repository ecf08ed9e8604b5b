"""Verdicts on networks whose gradients are known to vanish, hold or explode, and the bias of truncation and clipping."""

import dataclasses
import json
import math

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose
from gpurnn.diagnose.subject import run_steps
from gpurnn.diagnose.verdict import judge
from gpurnn.initializers import normal
from tests.fake_cupy.compare import assert_same

T, N, I, H = 40, 3, 4, 8


@pytest.fixture(autouse=True)
def numpy_executor(monkeypatch):
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")


def values(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def linear(w: float, **options) -> gpurnn.RNN:
    layer = gpurnn.RNN(1, 1, nonlinearity="identity", bias=False, dtype="float64", rng=0, **options)
    layer.params["weight_hh_l0"][...] = w
    return layer


def verdict(layer, x=None, **options) -> diagnose.Verdict:
    (found,) = diagnose.verdicts(layer, values(T, N, layer.input_size) if x is None else x, **options)
    return found


# Kind, rate and horizon


@pytest.mark.parametrize(
    ("w", "kind", "horizon"),
    [(0.5, "vanishes", 7), (2.0, "explodes", 7), (1.0, "holds", math.inf), (-0.5, "vanishes", 7)],
)
def test_a_linear_network(w, kind, horizon):
    """|w|^k falls under 1%, or exceeds 100, at k = 7 for a half and for two."""
    found = verdict(linear(w))
    assert (found.kind, found.horizon, found.reach) == (kind, horizon, T - 1)
    assert math.isclose(found.rate, abs(w), rel_tol=1e-9)
    assert math.isclose(found.lyapunov, math.log(abs(w)), abs_tol=1e-12)
    assert (found.radius, found.sigma_max, found.bound) == (abs(w),) * 3


def test_reach_decides():
    """0.9^k is under 1% from k = 44 on, which the sequence of 40 steps does not show: it is extrapolated."""
    found = verdict(linear(0.9), reach=43)
    assert found.kind == "holds" and math.isclose(found.horizon, math.log(0.01) / math.log(0.9))
    assert "beyond the 43 that count" in str(found) and found.advice == ("nothing over these 43 steps",)
    assert verdict(linear(0.9), reach=44).kind == "vanishes"
    assert verdict(linear(1.1), reach=100).kind == "explodes"


@pytest.mark.parametrize(
    ("ratios", "reach", "kind", "horizon"),
    [
        ([1, 0.1, 0.001, 0.001], 2, "vanishes", 2),
        ([1, 0.1, 0.001, 0.001], 1, "holds", 2),
        ([1, 10, 1000, 1000], 2, "explodes", 2),
        ([1, 10, 1000, 1000], 1, "holds", 2),
        ([1, 0.1, 0.01, 0.001, 0.001], 9, "vanishes", 3),  # 1% is not under 1%
        ([1, 10, 100, 1000, 1000], 9, "explodes", 3),  # nor 100 times above 100 times
    ],
)
def test_at_the_reach_and_at_1_percent_and_100_times_themselves(ratios, reach, kind, horizon):
    norms = np.array(ratios)[None, None, ::-1]
    found = judge(diagnose.Flow(norms, ("l0",), ("h",), len(ratios) - 1), "l0", reach)
    assert (found[0], found[2]) == (kind, horizon)


def test_what_is_kept_is_of_the_last_steps():
    layer, x = gpurnn.LSTM(I, H, rng=0), 3 * values(T, N, I)
    (tape,), _ = run_steps(layer, x)
    forget = np.stack([gpurnn.backend.to_numpy(saved[1]) for _, _, saved, _, _ in tape.steps])
    found = verdict(layer, x, reach=4).evidence
    assert found.span == 4 and found.kept["c"] == pytest.approx(forget[-4:].prod(0).mean(), rel=1e-5)


def test_known_cures():
    x = values(100, N, I)
    sigmoid = verdict(gpurnn.RNN(I, H, nonlinearity="sigmoid", rng=0), x)
    assert sigmoid.kind == "vanishes" and sigmoid.rate < 0.25 and sigmoid.bound == pytest.approx(0.25)
    assert any("tanh in place of sigmoid" in sentence for sentence in sigmoid.advice)
    small = verdict(gpurnn.RNN(I, H, init={"weight_hh": normal(0.1)}, rng=0), x)
    assert small.kind == "vanishes" and any("orthogonal" in sentence for sentence in small.advice)
    forgetful = verdict(gpurnn.LSTM(I, H, forget_bias=-2.0, rng=0), x)
    assert forgetful.kind == "vanishes" and "LSTM(forget_bias=3.0)" in forgetful.advice[0]
    cured = verdict(gpurnn.LSTM(I, H, forget_bias=4.6, rng=0), x)
    assert cured.kind == "holds" and cured.horizon > 99 > forgetful.horizon
    gru = gpurnn.GRU(I, H, rng=0)
    before = verdict(gru, x)
    assert before.kind == "vanishes" and "GRU(update_bias=3.0)" in before.advice[0]
    gru.params["bias_ih_l0"][H : 2 * H] = 4.6
    assert verdict(gru, x).kind == "holds"
    wild = verdict(gpurnn.RNN(I, H, nonlinearity="relu", init={"weight_hh": normal(0.5)}, rng=0), x)
    assert wild.kind == "explodes" and any("clip the gradient's norm" in sentence for sentence in wild.advice)


def test_a_passing_dip_is_no_horizon():
    """What counts is from where on the gradient stays under 1%: a step that passes on little may be followed by others."""
    factors = np.array([1, 1e-3, 1e3, 0.5, 1e-3, 1, 1])
    cell = gpurnn.Cell(
        "given_factors", 1, 1,
        lambda x, r, state, params: ((x[0] * state[0],), (x[0],)),
        lambda dnext, saved, state, next_state, params: ((dnext[0] * state[0],), (0,), (dnext[0] * saved[0],), ()),
    )  # fmt: skip
    layer = gpurnn.Recurrent(cell, 1, 1, dtype="float64", rng=0, init={"weight_ih": "identity"})
    x = factors[::-1, None, None].copy()
    found = verdict(layer, x, state=np.ones((1, 1, 1)), loss=lambda out, targets: (0.0, np.ones_like(out)))
    assert (found.kind, found.horizon) == ("vanishes", 5.0)


def test_each_layer_and_direction():
    layer = gpurnn.RNN(1, 1, 2, nonlinearity="identity", bidirectional=True, dtype="float64", rng=0)
    rates = {"l0": 0.5, "l0_reverse": 0.25, "l1": 2.0, "l1_reverse": 1.0}
    for name, rate in rates.items():
        layer.params[f"weight_hh_{name}"][...] = rate
    layer.params["weight_ih_l1"][...] = layer.params["weight_ih_l1_reverse"][...] = 1e-9
    found = diagnose.verdicts(layer, values(T, N, 1))
    assert [part.layer for part in found] == list(rates)
    assert [part.lyapunov for part in found] == pytest.approx(list(np.log(list(rates.values()))), abs=1e-12)
    assert [part.kind for part in found[2:]] == ["explodes", "holds"]


def test_evidence():
    layer = gpurnn.RNN(1, 2, dtype="float64", rng=0, init={"weight_hh": "zeros", "weight_ih": "zeros"})
    layer.params["bias_ih_l0"][...] = [0.0, 3.0]  # f' = 1 and 0.00987
    seen = verdict(layer).evidence
    assert seen.saturated == 0.5 and math.isclose(seen.slope, (1 + 1 - math.tanh(3) ** 2) / 2) and not seen.gates
    lstm = gpurnn.LSTM(1, 2, dtype="float64", rng=0, forget_bias=0.0, init={"weight_hh": "zeros", "weight_ih": "zeros"})
    lstm.params["bias_ih_l0"][...] = [-9, -9, math.log(3), 9, 5, 5, 0, 0]  # i, f, g, o
    seen = verdict(lstm, reach=2).evidence
    assert seen.gates["i"].closed == 1.0 and seen.gates["o"] == diagnose.GateValues(0.5, 0.0, 0.0)
    assert seen.gates["f"].open == 0.5 and seen.saturated == 1.0 and seen.slope is None
    f = 0.75, 1 / (1 + math.exp(-9))
    assert math.isclose(seen.carry["c"], sum(f) / 2) and math.isclose(seen.kept["c"], (f[0] ** 2 + f[1] ** 2) / 2)
    assert seen.span == 2


def test_evidence_of_any_cell(any_cell):
    found = verdict(gpurnn.Recurrent(any_cell, I, H, rng=0))
    assert found.cell == any_cell.name and set(found.evidence.carry) == set(any_cell.state_names)
    assert all(math.isfinite(part) for part in found.evidence.carry.values())
    if any_cell.name == "minimal_gated_unit":
        assert 0.3 < found.evidence.carry["h"] < 0.7
        assert any("let a state keep more of itself" in sentence for sentence in found.advice)


def test_clip_threshold():
    found = verdict(linear(2.0), grad_norms=[*range(1, 11), math.inf, math.nan])
    assert math.isclose(found.clip_threshold, 9.1) and "clip the gradient's norm at 9.1" in found.advice[0]
    assert verdict(linear(2.0)).clip_threshold is None
    with pytest.raises(ValueError, match=r"^grad_norms: expected at least one finite norm, got 1 of which none is"):
        diagnose.clip_threshold([math.nan])


def test_as_text_and_as_numbers():
    found = verdict(linear(0.5), grad_norms=[1.0])
    text = str(found)
    assert text.startswith(
        "l0 (rnn_identity): the gradient vanishes, x 0.5 per step back: under 1% after 7 steps, 39 count"
    )
    assert "\n  why  - " in text and "\n  do   - " in text and max(map(len, text.splitlines())) <= 110
    assert json.loads(json.dumps(found.to_mapping()))["evidence"]["carry"] == {"h": 0.0}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.kind = "holds"


def test_at_the_limits():
    dead = verdict(gpurnn.RNN(1, 2, nonlinearity="relu", rng=0), x=np.zeros((T, N, 1)))
    assert (dead.kind, dead.rate, dead.horizon, dead.lyapunov) == ("vanishes", 0.0, 1.0, -math.inf)
    silent = verdict(linear(0.5), None, loss=lambda out, targets: (0.0, np.zeros_like(out)))
    assert (silent.kind, silent.horizon) == ("vanishes", 0.0) and "nothing leaves the step of the loss" in str(silent)
    overflowing = gpurnn.RNN(1, 1, nonlinearity="identity", rng=0)
    overflowing.params["weight_hh_l0"][...] = 1e5
    found = verdict(overflowing, x=np.zeros((T, N, 1)))
    assert (found.kind, found.horizon) == ("explodes", 1.0) and found.rate == pytest.approx(1e5, rel=1e-3)
    with pytest.raises(ValueError, match=r"^x: expected at least 4 steps to see a gradient change, got 3"):
        verdict(linear(0.5), values(3, 1, 1))
    with pytest.raises(FloatingPointError, match=r"^dL/dh of l0: expected finite norms, got nan at step 39"):
        verdict(linear(0.5), loss=lambda out, targets: (0.0, np.full_like(out, np.nan)))


# Bias


def model_and_data():
    model = gpurnn.SequenceModel(
        None, gpurnn.GRU(I, H, dtype="float64", rng=1), gpurnn.Linear(H, 2, dtype="float64", rng=2)
    )
    return model, values(12, N, I), values(12, N, 2, seed=1), gpurnn.mean_squared_error


def gradient(model, x, targets, loss, state=None) -> np.ndarray:
    model.zero_grad()
    gpurnn.full_bptt(model, x, targets, loss, state)
    found = np.concatenate([value.ravel() for value in model.grads.values()])
    model.zero_grad()
    return found


@pytest.mark.parametrize(("k1", "k2"), [(3, None), (5, 7), (1, 4)])
def test_truncation_by_its_definition(k1, k2):
    """The gradient of each window's losses, through at most k2 steps and the state held fixed before them."""
    model, x, targets, loss = model_and_data()
    h_0 = values(1, N, H, seed=2)
    full = gradient(model, x, targets, loss, h_0)
    dout = loss(model(x, h_0, training=False)[0], targets)[1]
    for start in range(0, 12, k1):
        end = min(start + k1, 12)
        begin = max(0, end - (k2 or k1))
        state = model(x[:begin], h_0, training=False)[1] if begin else h_0
        _, _, backward = model(x[begin:end], state)
        part = dout[begin:end].copy()
        part[: start - begin] = 0
        backward(part)
    truncated = np.concatenate([value.ravel() for value in model.grads.values()])
    found = diagnose.truncation_bias(model, x, targets, loss, k1, k2, state=h_0)
    cosine = truncated @ full / np.linalg.norm(truncated) / np.linalg.norm(full)
    assert math.isclose(found.cosine, cosine, rel_tol=1e-10)
    assert math.isclose(found.degrees, math.degrees(math.acos(cosine)), rel_tol=1e-6)
    assert math.isclose(found.ratio, np.linalg.norm(truncated) / np.linalg.norm(full), rel_tol=1e-10)
    assert found.degrees > 0.1 and set(found.by_name) == set(model.grads)


def test_no_truncation_no_bias():
    model, x, targets, loss = model_and_data()
    for k1, k2 in ((12, None), (4, 12), (20, 20)):
        found = diagnose.truncation_bias(model, x, targets, loss, k1, k2)
        assert found.degrees < 1e-10 and math.isclose(found.ratio, 1, rel_tol=1e-12)
    # the head's gradient has one term for each step: truncation does not touch it
    cosine, ratio = diagnose.truncation_bias(model, x, targets, loss, 2).by_name["head.weight"]
    assert math.isclose(cosine, 1, rel_tol=1e-12) and math.isclose(ratio, 1, rel_tol=1e-12)


def test_clipping_by_norm_keeps_the_direction_of_one_batch_only():
    model, x, targets, loss = model_and_data()
    norm = float(np.linalg.norm(gradient(model, x, targets, loss)))
    found = diagnose.clipping_bias(model, x, targets, loss, norm=norm / 4)
    assert found.degrees < 1e-6 and math.isclose(found.ratio, 0.25, rel_tol=1e-9)
    h_0 = values(1, N, H, seed=2)
    parts = [gradient(model, x[:, [n]], targets[:, [n]], loss, h_0[:, [n]]) for n in range(N)]
    limit = min(map(np.linalg.norm, parts))
    clipped, full = sum(part * limit / np.linalg.norm(part) for part in parts), sum(parts)
    found = diagnose.clipping_bias(model, x, targets, loss, norm=float(limit), parts=N, state=h_0)
    assert math.isclose(found.cosine, clipped @ full / np.linalg.norm(clipped) / np.linalg.norm(full), rel_tol=1e-9)
    assert (
        math.isclose(found.ratio, np.linalg.norm(clipped) / np.linalg.norm(full), rel_tol=1e-9) and found.degrees > 0.01
    )


def test_clipping_by_value_and_in_time():
    model, x, targets, loss = model_and_data()
    full = gradient(model, x, targets, loss)
    limit = float(np.quantile(abs(full), 0.8))
    clipped = np.clip(full, -limit, limit)
    found = diagnose.clipping_bias(model, x, targets, loss, value=limit)
    assert math.isclose(found.ratio, np.linalg.norm(clipped) / np.linalg.norm(full), rel_tol=1e-12)
    norm = 0.5 * float(np.linalg.norm(clipped))  # values first: behind the norm none would be left to clip
    found = diagnose.clipping_bias(model, x, targets, loss, value=limit, norm=norm)
    assert math.isclose(found.ratio, norm / np.linalg.norm(full), rel_tol=1e-12)
    assert math.isclose(found.cosine, clipped @ full / np.linalg.norm(clipped) / np.linalg.norm(full), rel_tol=1e-12)
    none = diagnose.clipping_bias(model, x, targets, loss, in_time=1e9)
    assert none.degrees == 0 and none.ratio == 1
    some = diagnose.clipping_bias(model, x, targets, loss, in_time=1e-3)
    assert some.degrees > 1 and some.ratio < 1 and model.recurrent.clip_in_time is None


def test_bad_input():
    model, x, targets, loss = model_and_data()
    with pytest.raises(ValueError, match=r"^the full gradient is 0: there is nothing to compare with"):
        diagnose.truncation_bias(model, x, None, lambda out, targets: (0.0, np.zeros_like(out)), 3)
    with pytest.raises(ValueError, match=r"^expected 1 <= k1 <= k2, got k1 = 3 and k2 = 2"):
        diagnose.truncation_bias(model, x, targets, loss, 3, 2)
    with pytest.raises(ValueError, match=r"^model: expected one direction"):
        diagnose.truncation_bias(gpurnn.GRU(I, H, bidirectional=True), x, None, None, 3)
    with pytest.raises(ValueError, match=r"^parts: expected at most one for each of 3 rows, got 4"):
        diagnose.clipping_bias(model, x, targets, loss, norm=1.0, parts=4)
    with pytest.raises(ValueError, match=r"^max_norm: expected a finite number above 0, got -1"):
        diagnose.clipping_bias(model, x, targets, loss, norm=-1)
    with pytest.raises(ValueError, match=r"^in_time: expected a finite number above 0, got 0"):
        diagnose.clipping_bias(model, x, targets, loss, in_time=0)
    with pytest.raises(ValueError, match=r"^expected at least one of norm, value and in_time"):
        diagnose.clipping_bias(model, x, targets, loss)
    with pytest.raises(
        FloatingPointError, match=r"^gradient of recurrent\.weight_ih_l0: expected finite values, got nan"
    ):
        diagnose.clipping_bias(model, x, None, lambda out, targets: (0.0, np.full_like(out, np.nan)), norm=1.0)


def test_on_device_arrays():
    def work():
        model, x, targets, loss = model_and_data()
        return [
            dataclasses.astuple(diagnose.truncation_bias(model, x, targets, loss, 3, 5)),
            dataclasses.astuple(
                diagnose.clipping_bias(model, x, targets, loss, norm=0.1, value=0.01, in_time=0.01, parts=2)
            ),
            [part.to_mapping() for part in diagnose.verdicts(model, x, targets, loss)],
        ]

    assert_same(work)
