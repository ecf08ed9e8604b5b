"""No finite gradient, setting or accepted state brings NaN or inf into a parameter, and no update ends half done."""

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.layers import Linear
from gpurnn.optim import SGD, Adam, AdamW, RMSprop
from gpurnn.optim.clipping import clip_grad_norm

pytestmark = pytest.mark.skipif(
    backend.name != "numpy", reason="written for NumPy arrays, the backend is " + backend.name
)

MAKERS = {
    "sgd": lambda m, **o: SGD(m, **({"lr": 0.1} | o)),
    "momentum": lambda m, **o: SGD(m, **({"lr": 0.1, "momentum": 0.9} | o)),
    "nesterov": lambda m, **o: SGD(m, **({"lr": 0.1, "momentum": 0.9, "nesterov": True} | o)),
    "rmsprop": RMSprop,
    "centered": lambda m, **o: RMSprop(m, centered=True, **o),
    "centered, momentum": lambda m, **o: RMSprop(m, centered=True, momentum=0.9, **o),
    "adam": Adam,
    "adam without a mean": lambda m, **o: Adam(m, betas=(0.0, 0.9), **o),
    "adamw": AdamW,
}
GRADIENTS = (0.0, 1e-45, 1e-30, 1.0, 1e10, 2e19, 1e22, 1e30, 3.4e38)
SETTINGS = ({}, {"lr": 1e30}, {"lr": 1e39}, {"lr": 1e300}, {"weight_decay": 1e39}, {"lr": 1e30, "weight_decay": 1e30})


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_parameters_stay_finite_or_keep_their_value_and_say_so(make, settings):
    for peak in GRADIENTS:
        layer = Linear(3, 5, rng=0)
        optimizer = make(layer, **settings)
        for sign in (1, -1, 1, 1):
            layer.grads["weight"][...] = sign * peak
            try:
                optimizer.step()
            except FloatingPointError as error:
                assert str(error).startswith(("the update of weight", "the update of bias")), error
            assert np.isfinite(layer.params.flat).all(), (peak, sign)


def test_an_update_that_is_not_finite_is_told_by_its_place():
    layer = Linear(3, 5, rng=0)
    layer.grads["weight"][2, 1] = 1e30
    before = layer.params.flat.copy()
    with pytest.raises(FloatingPointError, match=r"the update of weight at \(2, 1\) is not finite"):
        SGD(layer, lr=1e30).step()
    np.testing.assert_array_equal(layer.params.flat, before)


@pytest.mark.parametrize("make", [RMSprop, MAKERS["centered"], Adam, AdamW])
@pytest.mark.parametrize("eps", [1e-38, 1e-44, 1e-46, 1e-300])
def test_an_eps_that_the_type_cannot_hold_does_not_vanish(make, eps):
    layer = Linear(3, 5, rng=0)
    before = layer.params.flat.copy()
    make(layer, eps=eps).step()
    np.testing.assert_allclose(layer.params.flat, before, rtol=2e-5)


@pytest.mark.parametrize(
    ("make", "decay"), [(lambda m: RMSprop(m, alpha=0.5), 0.5), (lambda m: Adam(m, betas=(0.5, 0.5)), 0.5)]
)
@pytest.mark.parametrize(("dtype", "peak"), [("float32", 2e19), ("float32", 3e38), ("float64", 1e300)])
def test_a_weight_moves_again_after_one_gradient_whose_square_overflows(make, decay, dtype, peak):
    layer = Linear(1, 1, bias=False, dtype=dtype, rng=0)
    optimizer = make(layer)
    layer.grads.flat[0] = peak
    optimizer.step()
    assert all(np.isfinite(moment.flat).all() for moment in optimizer.moments.values())
    layer.grads.flat[0] = 1
    for _ in range(150 if dtype == "float32" else 1200):
        optimizer.step()
    before = float(layer.params["weight"][0, 0])
    optimizer.step()
    assert before - float(layer.params["weight"][0, 0]) == pytest.approx(optimizer.lr, rel=1e-3)


def test_a_gradient_under_the_limit_counts_as_it_is():
    """Adam's first step is lr whatever the gradient's size."""
    for peak in (1e-3, 1.0, 1e15, 9e18, 1e19, 1e25, 3e38):
        layer = Linear(1, 1, bias=False, rng=0)
        layer.params["weight"][...] = 1
        layer.grads["weight"][...] = peak
        Adam(layer, lr=0.25).step()
        assert layer.params["weight"][0, 0] == pytest.approx(0.75, abs=1e-5)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_update_is_the_same_whatever_numpy_is_told_to_raise(make):
    """An underflow ends neither an update nor a clipping half done."""
    results = []
    for raised in ("ignore", "raise"):
        layer = Linear(3, 5, rng=0)
        optimizer = make(layer, weight_decay=1e-3)
        for scale in (1.0, 1e-30, 1e-38, 1e-44):
            layer.grads["weight"] = np.linspace(-1, 1, 15, dtype="float32").reshape(5, 3) * np.float32(scale)
            with np.errstate(all=raised):
                clip_grad_norm(layer, 1e-38)
                optimizer.step()
        results.append([layer.params.flat, *(moment.flat for moment in optimizer.moments.values())])
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (Adam, "exp_avg_sq.weight", -1.0),
        (Adam, "exp_avg_sq.weight", np.inf),
        (Adam, "exp_avg.bias", -np.inf),
        (Adam, "exp_avg.bias", 1e39),
        (AdamW, "exp_avg_sq.bias", -1e-40),
        (RMSprop, "square_avg.weight", -1e-3),
        (MAKERS["centered"], "grad_avg.weight", np.nan),
        (MAKERS["momentum"], "momentum_buffer.weight", np.inf),
        (Adam, "step", 2**62 + 1),
    ],
)
def test_a_state_that_no_update_leaves_is_refused(make, name, value):
    optimizer = make(Linear(3, 5, rng=0))
    state = optimizer.state_dict()
    wrong = state | {name: np.full(state[name].shape, value, np.int64 if name == "step" else np.float64)}
    with pytest.raises(ValueError, match=rf"^{name}: expected"):
        optimizer.load_state_dict(wrong)
    for key, array in optimizer.state_dict().items():
        np.testing.assert_array_equal(array, state[key])


def test_parameters_can_be_assigned():
    layer = Linear(3, 5, rng=0)
    weight = layer.params["weight"]
    before = weight.copy()
    layer.params["weight"] += 1
    np.testing.assert_array_equal(layer.params["weight"], before + 1)
    layer.params["weight"] = np.zeros((5, 3))
    assert layer.params["weight"] is weight and not weight.any()
    with pytest.raises(ValueError, match=r"weight: expected \(5, 3\), got \(3,\)"):
        layer.params["weight"] = np.zeros(3)
    with pytest.raises(KeyError):
        layer.params["other"] = np.zeros(3)


def test_initial_values_are_finite_in_the_layers_type():
    for make, name in ((gpurnn.LSTM, "forget_bias"), (gpurnn.GRU, "update_bias")):
        with pytest.raises(ValueError, match=f"{name}: expected a number that float32 can hold"):
            make(2, 3, **{name: 1e308})
        assert np.isfinite(make(2, 3, dtype="float64", **{name: 1e308}).params.flat).all()
    with pytest.raises(ValueError, match="weight_hh_l0: expected an initial value that is finite in float32"):
        gpurnn.RNN(2, 3, init={"weight_hh": lambda rng, rows, columns: np.full((rows, columns), 1e39)})
