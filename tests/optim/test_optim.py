"""Optimisers against PyTorch (committed numbers, and live where it is installed), resuming, clipping, schedules."""

import math

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cpu import costs
from gpurnn.layers import Linear
from gpurnn.optim import SGD, Adam, AdamW, RMSprop
from gpurnn.optim.clipping import clip_grad_norm, clip_grad_value, grad_norm
from gpurnn.optim.schedules import SCHEDULES, constant, exponential_decay, linear_decay, step_decay, warmup_cosine
from gpurnn.parameters import Parameters

pytestmark = pytest.mark.skipif(
    backend.name != "numpy", reason="written for NumPy arrays, the backend is " + backend.name
)

SHAPES = {"weight": (5, 7), "bias": (3,), "scale": ()}


class Model:
    def __init__(self, dtype="float64", shapes=SHAPES, seed=0):
        self.params, self.grads = Parameters(shapes, dtype), Parameters(shapes, dtype)
        self.rng = np.random.default_rng(seed)
        self.fill(self.params)

    def fill(self, parameters):
        for view in parameters.values():
            view[...] = self.rng.standard_normal(view.shape)


# torch.optim of torch 2.13, float64: the parameter START after a step for each row of GRADS.
START = [1.0, -2.0, 0.5]
GRADS = [[0.1, -0.2, 3.0], [-0.3, 0.4, 2.0], [0.05, 0.0, -1.0], [2.0, -0.5, 1e-3]]
ALL_RMSPROP = {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True, "weight_decay": 0.1}
ALL_ADAM = {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "weight_decay": 0.1}
REFERENCES = [
    (SGD, {"lr": 0.1}, [0.815, -1.97, 0.0999]),
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, [0.74810662, -1.81167124, -0.894857545]),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, [0.668669, -1.960658, -1.14552]),
    (RMSprop, {}, [0.880445800939359, -1.91463199751683, 0.371247639965646]),
    (RMSprop, {"momentum": 0.9}, [0.784720413288585, -1.8238323117125, 0.0564078308842829]),
    (RMSprop, ALL_RMSPROP, [0.846197369526251, -1.82973834995524, 0.331304257401916]),
    (Adam, {}, [0.999233744021159, -1.99937019261211, 0.497025524230243]),
    (Adam, ALL_ADAM, [0.826280760060291, -1.77933243368377, 0.2671208484709]),
    (AdamW, {}, [0.999193761962124, -1.99929021365978, 0.497005579455805]),
    (AdamW, {"lr": 0.1, "weight_decay": 0.3}, [0.813646754922325, -1.71332491176874, 0.161321984732262]),
]
OPTIONS = [(kind, options) for kind, options, _ in REFERENCES]


@pytest.mark.parametrize(("kind", "options", "expected"), REFERENCES)
def test_reference_vectors(kind, options, expected):
    model = Model(shapes={"w": (3,)})
    model.params["w"][...] = START
    opt = kind(model, **options)
    for grad in GRADS:
        model.grads["w"][...] = grad
        opt.step()
    np.testing.assert_allclose(model.params["w"], expected, rtol=2e-14)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_blocks_gradients_and_padding(kind, options, monkeypatch):
    """Blocks of 11 cut across tensors; gradients stay as they are; the padding between tensors stays zero."""
    whole = Model("float32")
    whole_opt = kind(whole, **options)
    monkeypatch.setattr(costs, "UPDATE_VALUES", 11)
    cut = Model("float32")
    cut_opt = kind(cut, **options)
    for _ in range(3):
        for model, opt in ((whole, whole_opt), (cut, cut_opt)):
            model.fill(model.grads)
            before = model.grads.flat.copy()
            opt.step()
            np.testing.assert_array_equal(model.grads.flat, before)
    np.testing.assert_array_equal(cut.params.flat, whole.params.flat)
    for parameters in (whole.params, *whole_opt.moments.values()):
        assert np.count_nonzero(parameters.flat) <= parameters.count < parameters.flat.size


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_against_torch(kind, options, dtype):
    torch = pytest.importorskip("torch")
    model = Model(dtype)
    theirs = {name: torch.nn.Parameter(torch.tensor(view)) for name, view in model.params.items()}
    options = {"lr": 0.01, **options}
    opt, torch_opt = kind(model, **options), getattr(torch.optim, kind.__name__)(theirs.values(), **options)
    tolerance = 40 * np.finfo(dtype).eps  # 20 steps, a rounding or two each
    for step in range(20):
        opt.lr = torch_opt.param_groups[0]["lr"] = options["lr"] * 0.9**step
        model.fill(model.grads)
        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(model.grads[name])
        opt.step()
        torch_opt.step()
    for name, parameter in theirs.items():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(model.params[name], expected, rtol=tolerance, atol=tolerance, err_msg=name)


def test_follows_a_layer_into_a_model():
    model, twin = Model(), Model()
    opt, twin_opt = Adam(model), Adam(twin)
    joined = Parameters.join({"head": model.params}), Parameters.join({"head": model.grads})
    for m, o in ((model, opt), (twin, twin_opt)):
        m.fill(m.grads)
        o.step()
    np.testing.assert_array_equal(joined[0]["head.weight"], twin.params["weight"])


def test_centered_rmsprop_with_a_steady_gradient():
    """square_avg - grad_avg^2 is then 0 but for rounding, which may leave it negative."""
    model = Model("float32", {"w": (1000,)})
    opt = RMSprop(model, lr=1e-12, centered=True, alpha=0.5)
    model.fill(model.grads)
    for _ in range(60):
        opt.step()
    difference = opt.moments["square_avg"].flat - opt.moments["grad_avg"].flat ** 2
    assert difference.min() < 0
    assert np.isfinite(model.params.flat).all()


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_state_resumes_bit_for_bit(kind, options):
    model = Model("float32")
    opt = kind(model, **options)
    for _ in range(3):
        model.fill(model.grads)
        opt.step()
    state = opt.state_dict()
    assert state["step"].dtype == np.int64 and state["step"].shape == () and state["step"] == 3
    assert set(state) == {"step", "lr", *opt.settings} | {f"{m}.{name}" for m in opt.moments for name in SHAPES}

    resumed = Model("float32")
    resumed.params.flat[...] = model.params.flat
    resumed_opt = kind(resumed, **options)
    resumed_opt.load_state_dict(state)
    model.fill(model.grads)
    resumed.grads.flat[...] = model.grads.flat
    opt.step()
    resumed_opt.step()
    np.testing.assert_array_equal(resumed.params.flat, model.params.flat)
    assert state["step"] == 3 and resumed_opt.steps == 4  # the state was a copy


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"exp_avg.weight": np.zeros((7, 5))}, ValueError, r"exp_avg.weight: expected \(5, 7\), got \(7, 5\)"),
        ({"exp_avg_sq.bias": np.full(3, np.nan)}, ValueError, "exp_avg_sq.bias: expected finite float64 values"),
        ({"exp_avg.other": np.zeros(3)}, KeyError, r"unknown \['exp_avg.other'\]"),
        ({"exp_avg.bias": None}, KeyError, r"missing \['exp_avg.bias'\]"),
        ({"step": np.array(-1)}, ValueError, "step: expected one integer >= 0, got -1"),
        ({"step": np.array([1])}, ValueError, r"step: expected one integer >= 0, got \[1\]"),
        ({"step": np.array(1.5)}, TypeError, "step: expected whole numbers"),
        ({"lr": np.array(-1.0)}, ValueError, "lr: expected a finite number from 0, got -1"),
        ({"betas": np.array([0.9, 1.0])}, ValueError, r"betas\[1\]: expected a finite number in"),
        ({"eps": np.zeros(2)}, ValueError, "eps: expected a finite number above 0"),
        ({"eps": None}, KeyError, r"missing \['eps'\]"),
        ({"step.bias": np.array(2)}, ValueError, "step.bias: expected one integer >= 0 and at most 1, got 2"),
        ({"rate.bias": np.array(-1.0)}, ValueError, "rate.bias: expected a finite number from 0"),
        ({"rate.other": np.array(1.0)}, KeyError, r"unknown \['rate.other'\]"),
    ],
)
def test_bad_state_changes_nothing(change, error, message):
    model = Model()
    opt = Adam(model)
    model.fill(model.grads)
    opt.step()
    before = opt.state_dict()
    moments = {name: np.ones_like(value) for name, value in before.items() if "." in name}
    bad = before | moments | change
    with pytest.raises(error, match=message):
        opt.load_state_dict({name: value for name, value in bad.items() if value is not None})
    after = opt.state_dict()
    assert all(np.array_equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_bad_gradient_changes_nothing(kind, options, bad):
    model = Model("float32")
    opt = kind(model, **options)
    model.fill(model.grads)
    opt.step()
    model.grads["bias"][2] = bad
    before, params = opt.state_dict(), model.params.flat.copy()
    with pytest.raises(FloatingPointError, match=rf"gradient of bias: expected finite values, got {bad} \(1 of 3\)"):
        opt.step()
    np.testing.assert_array_equal(model.params.flat, params)
    after = opt.state_dict()
    assert all(np.array_equal(after[name], before[name]) for name in before)


def test_huge_finite_gradient_is_no_error():
    model = Model("float32")
    model.fill(model.grads)
    model.grads["bias"][0] = 3e38
    SGD(model, lr=1e-38).step()
    assert np.isfinite(model.params.flat).all()


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (SGD, {"lr": -1}, "lr: expected a finite number from 0, got -1"),
        (SGD, {"lr": np.nan}, "lr: expected a finite number from 0, got nan"),
        (SGD, {"lr": 1, "momentum": -0.1}, "momentum: expected a finite number from 0"),
        (SGD, {"lr": 1, "nesterov": True}, "nesterov: expected momentum > 0"),
        (RMSprop, {"alpha": 1}, r"alpha: expected a finite number in \[0, 1\)"),
        (RMSprop, {"weight_decay": -1}, "weight_decay: expected a finite number from 0"),
        (Adam, {"betas": (0.9, 1.0)}, r"betas\[1\]: expected a finite number in \[0, 1\)"),
        (Adam, {"betas": (0.9,)}, "betas: expected two numbers"),
        (AdamW, {"eps": 0}, "eps: expected a finite number above 0"),
    ],
)
def test_settings_are_checked(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(Model(), **options)


def test_bad_lr_changes_nothing():
    opt = SGD(Model(), lr=0.1)
    for lr in (math.nan, -0.1, "fast"):
        with pytest.raises(ValueError, match="lr: expected"):
            opt.lr = lr
    assert opt.lr == 0.1


@pytest.mark.parametrize("size", [1.0, 1e35, 1e-35])
@pytest.mark.parametrize("count", [1, 20_000])  # 20 000 is more than one block of the sum
def test_clip_grad_norm(size, count):
    model = Model("float32", {"w": (count,), "b": (3,)})
    model.fill(model.grads)
    model.grads.flat[...] *= np.float32(size)
    before = model.grads.flat.copy()
    expected = float(np.linalg.norm(before.astype(np.float64)))
    assert grad_norm(model) == pytest.approx(expected, rel=1e-12)
    assert clip_grad_norm(model, 2 * expected) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_array_equal(model.grads.flat, before)
    assert clip_grad_norm(model, expected / 4) == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(model.grads.flat, before / 4, rtol=1e-6)


@pytest.mark.parametrize("size", [1e200, 1e-200])
def test_grad_norm_beyond_the_squares_of_float64(size):
    model = Model()
    model.grads["weight"][0, :2] = 3 * size, -4 * size
    assert clip_grad_norm(model, size) == pytest.approx(5 * size, rel=1e-14)
    np.testing.assert_allclose(model.grads["weight"][0, :2] / size, [0.6, -0.8], rtol=1e-14)


def test_grad_norm_of_nothing():
    assert grad_norm(Model()) == 0
    empty = Model(shapes={})
    assert clip_grad_norm(empty, 1.0) == 0
    clip_grad_value(empty, 1.0)
    Adam(empty).step()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_clip_grad_norm_refuses(bad):
    model = Model("float32")
    model.fill(model.grads)
    model.grads["weight"][1, 1] = model.grads["scale"][...] = bad
    before = model.grads.flat.copy()
    with pytest.raises(FloatingPointError, match=rf"gradient of weight: expected finite values, got {bad} \(1 of 35\)"):
        clip_grad_norm(model, 1.0)
    np.testing.assert_array_equal(model.grads.flat, before)
    for limit in (0, -1, np.nan, np.inf):
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            clip_grad_norm(model, limit)
        with pytest.raises(ValueError, match="expected a finite number above 0"):
            clip_grad_value(model, limit)


def test_clip_grad_value():
    model = Model("float32")
    model.grads["bias"][...] = [-np.inf, 0.1, 3]
    clip_grad_value(model, 0.5)
    np.testing.assert_array_equal(model.grads["bias"], np.float32([-0.5, 0.1, 0.5]))
    model.grads["bias"][...] = [9, np.nan, np.inf]
    with pytest.raises(FloatingPointError, match=r"gradient of bias: expected finite values, got nan \(1 of 3\)"):
        clip_grad_value(model, 0.5)
    np.testing.assert_array_equal(model.grads["bias"], [9, np.nan, np.inf])


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (constant(), {0: 1, 7: 1}),
        (warmup_cosine(10), {0: 1, 5: 0.5, 10: 0, 99: 0}),
        (warmup_cosine(12, warmup=4, floor=0.2), {0: 0.2, 3: 0.8, 4: 1, 8: 0.6, 12: 0.2, 99: 0.2}),
        (linear_decay(10, warmup=2, floor=0.5), {0: 1 / 3, 1: 2 / 3, 2: 1, 4: 0.875, 10: 0.5, 11: 0.5}),
        (step_decay(3, 0.5), {0: 1, 2: 1, 3: 0.5, 6: 0.25}),
        (exponential_decay(0.9), {0: 1, 1: 0.9, 2: 0.81, 10**6: 0}),
    ],
)
def test_schedules(schedule, expected):
    assert {step: schedule(step) for step in expected} == pytest.approx(expected, abs=1e-15)
    with pytest.raises(ValueError, match="step: expected a whole number from 0, got -1"):
        schedule(-1)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("warmup_cosine", {"total": 5, "warmup": 5}, "total: expected a whole number from 6, got 5"),
        ("warmup_cosine", {"total": 5, "warmup": -1}, "warmup: expected a whole number from 0"),
        ("linear_decay", {"total": 5, "floor": 1.5}, r"floor: expected a finite number in \[0, 1\], got 1.5"),
        ("linear_decay", {"total": 5.0}, "total: expected a whole number"),
        ("step_decay", {"every": 0, "factor": 0.5}, "every: expected a whole number from 1"),
        ("step_decay", {"every": 1, "factor": 0}, r"factor: expected a finite number in \(0, 1\]"),
        ("exponential_decay", {"rate": 1.1}, "rate: expected a finite number"),
    ],
)
def test_schedules_refuse(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        SCHEDULES[name](**arguments)


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_lets_nothing_change(loss):
    layer = Linear(3, 2, rng=1)
    optimizer, before = Adam(layer), layer.state_dict()
    with pytest.raises(FloatingPointError, match=f"the loss is {loss}"):
        optimizer.update(np.float64(loss))
    assert optimizer.steps == 0 and all((layer.params[name] == value).all() for name, value in before.items())
