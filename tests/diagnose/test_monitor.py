"""The monitor: it changes nothing, sees what the laboratory sees, warns, and says where the first bad value stands."""

import copy
import warnings

import numpy as np
import pytest

import gpurnn
from gpurnn import GradientWarning, Monitor, diagnose
from gpurnn.app.metrics import MetricsLog, read_metrics
from gpurnn.diagnose.monitor import look_at as look_at_flows
from gpurnn.initializers import orthogonal, scaled
from gpurnn.lab.tasks import squared_error, with_head
from tests import fake_cupy


def model_of(layer, outputs=2):
    return with_head(layer, outputs, np.random.default_rng(1))


def lstm(**options):
    return model_of(gpurnn.LSTM(3, 5, num_layers=2, rng=0, **options))


def batch(seed=0, T=11, N=4, outputs=2, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, N, 3)).astype(dtype), rng.standard_normal((T, N, outputs)).astype(dtype)


def train(model, updates=4, bptt=None):
    optimizer = gpurnn.Adam(model, lr=0.01)
    for update in range(updates):
        model.zero_grad()
        step = bptt.step if bptt else lambda x, t: gpurnn.full_bptt(model, x, t, gpurnn.mean_squared_error)
        step(*batch(update, T=6))
        gpurnn.clip_grad_norm(model, 1.0)
        optimizer.step()
    return model.params.flat.copy()


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"bidirectional": True}, {"trainable_h0": True}])
def test_it_changes_nothing(options):
    watched = Monitor(lstm(**options), every=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GradientWarning)
        np.testing.assert_array_equal(train(watched), train(lstm(**options)))
    assert [look.update for look in watched.looks] == [1, 2, 3, 4]


def test_truncated_bptt_is_watched_once_an_update():
    plain, watched = lstm(), Monitor(lstm(), every=2)

    def truncated(model):
        return gpurnn.TruncatedBPTT(model, gpurnn.mean_squared_error, k1=6, k2=15)

    np.testing.assert_array_equal(train(watched, 5, truncated(watched)), train(plain, 5, truncated(plain)))
    assert [look.update for look in watched.looks] == [1, 2, 4]


def test_it_sees_what_the_laboratory_sees():
    watched = Monitor(lstm(dtype="float64"))
    x, targets = batch(dtype=np.float64)
    watched.zero_grad()
    gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error)
    (look,) = watched.looks
    flow = diagnose.gradient_flow(watched.model, x, targets, gpurnn.mean_squared_error, step=-1)
    assert look.layers == flow.layers == ("l0", "l1")
    for at, norms in enumerate(look.norms):
        np.testing.assert_allclose(norms, flow.total[at, ::-1], rtol=1e-12)
        assert look.rates[at] == pytest.approx(flow.rate(look.layers[at]))


def test_each_direction_is_followed_from_its_own_end():
    watched = Monitor(lstm(bidirectional=True, dtype="float64"), reach=1)
    x, targets = batch(dtype=np.float64)
    for loss, layers in (
        (gpurnn.mean_squared_error, ("l0", "l0_reverse", "l1", "l1_reverse")),
        (squared_error, ("l0", "l1")),  # of the last step: a reverse direction begins there and has no way back
    ):
        watched.update = 0
        watched.zero_grad()
        gpurnn.full_bptt(watched, x, targets if loss is gpurnn.mean_squared_error else targets[-1:], loss)
        assert watched.looks[-1].layers == layers
    flow = diagnose.gradient_flow(watched.model, x, targets, gpurnn.mean_squared_error, step=0)
    np.testing.assert_allclose(watched.looks[0].norms[3], flow.total[3], rtol=1e-12)


def test_nothing_is_seen_where_there_is_nothing():
    watched = Monitor(lstm(), every=1)
    for T, scale in ((3, 1.0), (11, 0.0)):
        watched.zero_grad()
        out, _, backward = watched(batch(T=T)[0])
        backward(scale * np.ones_like(out))
    assert watched.looks == []
    assert watched(batch()[0], training=False)[2] is None


def look_at(watched, updates=1):
    for _ in range(updates):
        watched.zero_grad()
        x, targets = batch(T=40)
        gpurnn.full_bptt(watched, x, targets[-1:], squared_error)


def test_vanishing_is_warned_of_once_and_again_after_it_held():
    layer = gpurnn.RNN(3, 5, init={"weight_hh": scaled(orthogonal, 0.3)}, rng=0)
    watched = Monitor(model_of(layer), every=1, reach=10)
    begin = r"update 1: the gradient of l0 vanishes, x 0\.\d+ per step back, under 1% after \d steps; an LSTM"
    with pytest.warns(GradientWarning, match=begin) as caught:
        look_at(watched, 3)
    assert len(caught) == 1 and watched.looks[-1].kinds == ("vanishes",) and watched.looks[-1].horizons[0] < 10
    layer.params["weight_hh_l0"][...] /= 0.3
    look_at(watched)
    assert watched.looks[-1].kinds == ("holds",)
    layer.params["weight_hh_l0"][...] *= 0.3
    with pytest.warns(GradientWarning, match="update 5"):
        look_at(watched)


def test_a_fall_beyond_what_the_task_needs_is_none_and_growth_always_is_one():
    look_at(Monitor(model_of(gpurnn.RNN(3, 5, nonlinearity="sigmoid", rng=0)), reach=1))
    relu = gpurnn.RNN(3, 5, nonlinearity="identity", init={"weight_hh": scaled(orthogonal, 1.2)}, rng=0)
    with pytest.warns(
        GradientWarning, match=r"l0 explodes, x 1\.2 per step back, above 100 times after 26 steps; clip"
    ):
        look_at(Monitor(model_of(relu), reach=1))


def test_a_fall_at_the_reach_itself_is_warned_of():
    flow = diagnose.Flow(np.array([[[0.001, 0.001, 0.1, 1.0]]]), ("l0",), ("h",), 3)  # under 1% after 2 steps
    assert [look_at_flows([flow], 1, reach).kinds for reach in (1, 2)] == [("holds",), ("vanishes",)]


def poisoned_parameter(model, x, targets):
    model.params["recurrent.weight_hh_l0"][2, 1] = np.nan


def poisoned_input(model, x, targets):
    x[3, 1, 0] = np.inf


def overflow_forward(model, x, targets):
    model.params["recurrent.weight_hh_l0"][...] = 1e12 * np.eye(5)


def overflow_head(model, x, targets):
    model.params["head.weight"][...] = 3e38


def poisoned_target(model, x, targets):
    targets[7, 2, 1] = np.nan


def overflow_backward(model, x, targets):
    x[...] = 0
    targets[:-1] = 0
    model.params["recurrent.weight_hh_l0"][...] = 1e12 * np.eye(5)


@pytest.mark.parametrize(
    ("poison", "message"),
    [
        (poisoned_parameter, r"update 3: parameter recurrent.weight_hh_l0: expected finite values"),
        (poisoned_input, r"update 3: x: expected finite values, got inf at step 3, row 1, unit 0"),
        (overflow_forward, r"update 3: h of l0: expected finite values, got -?inf at step 4, "),
        (overflow_head, r"update 3: output: expected finite values, got -?(inf|nan) at step 0"),
        (poisoned_target, r"update 3: dL/d\(output\): expected finite values, got nan at step 7, row 2, unit 1"),
        (overflow_backward, r"update 3: dL/dh of l0: expected finite norms, got inf at step 6, "),
    ],
)
@pytest.mark.parametrize("every", [1, 100])
def test_the_first_value_that_is_not_finite_is_named(poison, message, every):
    model = model_of(gpurnn.RNN(3, 5, nonlinearity="identity", rng=0))
    watched = Monitor(model, every=every, reach=1)
    for update in (1, 2, 3):
        x, targets = batch()
        if update == 3:
            poison(model, x, targets)
        watched.zero_grad()
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", GradientWarning)
            if update < 3:
                gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error)
                continue
            with pytest.raises(FloatingPointError, match=message):
                gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error)


def test_nan_in_padding_is_not_blamed():
    model = model_of(gpurnn.RNN(3, 5, rng=0))
    watched, (x, targets) = Monitor(model, reach=1), batch()
    x[5:, 1] = np.nan
    targets[2, 0] = np.nan
    watched.zero_grad()
    with pytest.raises(FloatingPointError, match=r"dL/d\(output\): .* at step 2, row 0"):
        gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error, lengths=[11, 5, 11, 11])


def test_looks_are_logged(tmp_path):
    with MetricsLog(tmp_path / "flow.jsonl") as log:
        watched = Monitor(lstm(), every=2, reach=1, log=lambda look: log.write(look.update, **look.to_mapping()))
        train(watched, 4)
    lines = read_metrics(tmp_path / "flow.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 4]
    seen = lines[-1]["flow"]["l1"]
    assert seen["kind"] in ("holds", "vanishes") and seen["rate"] == pytest.approx(watched.looks[-1].rates[1])
    np.testing.assert_allclose(seen["norms"], watched.looks[-1].norms[1])
    assert str(watched.looks[-1]).startswith("update 4: the gradient of l0 ")


def test_it_is_the_model_in_all_else():
    watched = Monitor(lstm())
    assert watched.params is watched.model.params and watched.recurrent.num_layers == 2
    watched.load_state_dict(lstm().state_dict())
    twin = copy.deepcopy(watched)
    assert twin.every == 100 and twin.params is not watched.params
    with pytest.raises(AttributeError, match="no_such"):
        _ = watched.no_such


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("a model",), "expected a SequenceModel or a recurrent layer, got str"),
        ((lstm(), 0), "every"),
        ((lstm(), 1.5), "every"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Monitor(*arguments)


def test_on_device_arrays():
    pytest.importorskip("numba_cuda", reason="kernels are built by Numba-CUDA")
    from tests.interpreted import interpreted

    with interpreted("numpy"):
        watched = Monitor(lstm(), every=2, reach=1)
        for _ in range(3):
            x, targets = (fake_cupy.asarray(value) for value in batch())
            watched.zero_grad()
            gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error)
        assert [look.update for look in watched.looks] == [1, 2]
        assert all(isinstance(norms, np.ndarray) for norms in watched.looks[0].norms)
        watched.zero_grad()
        watched.params["recurrent.weight_hh_l1"][0, 0] = np.nan
        with pytest.raises(FloatingPointError, match=r"update 4: parameter recurrent.weight_hh_l1"):
            gpurnn.full_bptt(watched, x, targets, gpurnn.mean_squared_error)
