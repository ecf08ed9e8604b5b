"""Errors of a device come late, but they come: the first one, named, with its step, and nothing is spoilt meanwhile."""

import itertools

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.cuda import faults
from tests import fake_cupy
from tests.fake_cupy.backend import no_waiting
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

OPTIMIZERS = [(gpurnn.SGD, {"lr": 0.1, "momentum": 0.9}), (gpurnn.RMSprop, {}), (gpurnn.Adam, {})]


@pytest.fixture(autouse=True)
def device():
    with interpreted("numpy"):
        yield


def put(array):
    return fake_cupy.asarray(np.asarray(array))


def raised() -> str:
    """What `synchronize` raises, as "type: message"; it does so once."""
    with pytest.raises((ValueError, FloatingPointError, RuntimeError)) as caught:
        gpurnn.synchronize()
    gpurnn.synchronize()
    return f"{caught.type.__name__}: {caught.value}"


def linear(dtype="float32"):
    """A layer whose gradients are all 1."""
    layer = gpurnn.Linear(3, 2, dtype=dtype, rng=1)
    layer.grads["weight"][...] = layer.grads["bias"][...] = 1
    return layer


def test_nothing_happened():
    gpurnn.synchronize()
    assert faults.take() is None


@pytest.mark.parametrize("C", [3, 1100])
def test_a_target_out_of_range(C):
    """The first of them in the batch, whatever the order of threads; only its own rows are spoilt."""
    targets = np.array([[0, 1], [2, -4], [C, 2], [0, 0]])
    with no_waiting():
        losses, dlogits = gpurnn.softmax_cross_entropy(
            put(np.zeros((4, 2, C), np.float32)), put(targets), reduction="none"
        )
    assert raised() == f"ValueError: step 1: targets: expected values in [0, C) = [0, {C}), got -4 at (t, n) = (1, 1)"
    wrong = [[False, False], [False, True], [True, False], [False, False]]
    assert (np.isnan(losses.get()) == wrong).all()
    assert (np.isnan(dlogits.get()).all(-1) == wrong).all() and (np.isnan(dlogits.get()).any(-1) == wrong).all()


def test_ignored_targets_are_no_faults():
    targets = put(np.array([0, -100, 2]))
    gpurnn.softmax_cross_entropy(put(np.zeros((3, 4))), targets, ignore_index=-100)
    gpurnn.synchronize()
    gpurnn.softmax_cross_entropy(put(np.zeros((3, 4))), targets, ignore_index=-1)
    assert raised().endswith("[0, 4), got -100 at position (1,)")


def test_a_token_out_of_range():
    layer = gpurnn.Embedding(5, 3, rng=1)
    with no_waiting():
        y, backward = layer(put([[0, 1, 7], [4, -2, 9]]))
        backward(y)
    assert raised() == "ValueError: step 1: tokens: expected values from 0 to 4, got 7 at (t, n) = (0, 2)"
    assert np.argwhere(np.isnan(y.get()).any(-1)).tolist() == [[0, 2], [1, 1], [1, 2]]
    assert not np.isnan(layer.grads["weight"].get()).any()


@pytest.mark.parametrize(
    ("kind", "options", "dtype", "value"),
    [
        # each value is found by the same code for all optimisers, which leave their own state alone in each type
        pytest.param(*each, dtype, value, marks=[pytest.mark.slow] * (k > 0 and not np.isnan(value)))
        for k, (dtype, each) in enumerate(itertools.product(("float32", "float64"), OPTIMIZERS))
        for value in (np.nan, np.inf, -np.inf)
    ],
)
def test_a_gradient_that_is_not_finite_changes_nothing(kind, options, dtype, value):
    layer = linear(dtype)
    optimizer = kind(layer, **options)
    optimizer.step()
    before = [layer.params.flat.get(), *(moment.flat.get() for moment in optimizer.moments.values())]
    layer.grads["weight"][1, 2] = value
    layer.grads["bias"][0] = np.nan
    with no_waiting():
        for _ in range(3):
            optimizer.step()
    after = [layer.params.flat.get(), *(moment.flat.get() for moment in optimizer.moments.values())]
    assert all((a == b).all() for a, b in zip(before, after, strict=True))
    assert optimizer.steps == 1
    assert (
        raised()
        == f"FloatingPointError: step 2: gradient of weight at (1, 2): expected finite values, got {float(value)}"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_clipping_tells_and_scales_nothing(value):
    layer = linear()
    layer.grads["bias"][1] = value
    with no_waiting():
        norm = gpurnn.clip_grad_norm(layer, 0.1)
    assert not np.isfinite(float(norm)) and (layer.grads["weight"].get() == 1).all()
    assert "gradient of bias at (1,)" in raised()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("kind", "step"), [(gpurnn.SGD, 1), (gpurnn.RMSprop, 10)])
def test_a_parameter_that_would_not_be_finite_keeps_its_value(kind, step, dtype):
    layer, largest = linear(dtype), float(np.finfo(dtype).max)
    layer.params["weight"][0, 1] = layer.params["weight"][1, 2] = -largest / 2
    optimizer = kind(layer, lr=0.6 * largest / step)
    with no_waiting():
        optimizer.update()
    weight = layer.params["weight"].get().astype(float) / largest
    np.testing.assert_allclose(weight, [[-0.6, -0.5, -0.6], [-0.6, -0.6, -0.5]], rtol=1e-5)
    assert optimizer.steps == 0
    assert raised() == "FloatingPointError: step 1: the update of weight at (0, 1) is not finite"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_not_finite(value):
    layer = linear()
    optimizer = gpurnn.SGD(layer, 0.1)
    optimizer.update(put(1.5))
    before = layer.params.flat.get()
    optimizer.update(put(value))
    optimizer.update(put(1.5))
    assert (layer.params.flat.get() == before).all(), "after any fault no update changes anything"
    assert raised() == f"FloatingPointError: step 2: the loss is {float(value)}"


def test_a_kernel_that_gave_up():
    """It stores one word of 32 bits, whatever else is in the record."""
    layer = linear()
    gpurnn.SGD(layer, 0.1).step()
    before = layer.params.flat.get()
    faults.record().view(np.uint32)[0] = 1
    gpurnn.SGD(layer, 0.1).step()
    assert (layer.params.flat.get() == before).all()
    assert raised().startswith("RuntimeError: step 2: a kernel gave up waiting for a block that did not run")


def test_the_first_fault_is_told_with_its_step_and_the_next_ones_come_anew():
    layer = linear()
    optimizer = gpurnn.SGD(layer, 0.1)
    for _ in range(4):
        optimizer.step()
    logits = put(np.zeros((2, 3)))
    gpurnn.softmax_cross_entropy(logits, put([0, 5]))
    optimizer.step()
    gpurnn.softmax_cross_entropy(logits, put([6, 5]))
    assert raised().startswith("ValueError: step 5: targets") and optimizer.steps == 4
    optimizer.step()
    gpurnn.softmax_cross_entropy(logits, put([6, 5]))
    assert "step 6: targets: expected values in [0, C) = [0, 3), got 6 at position (0,)" in raised()
    faults.restart(100)
    gpurnn.softmax_cross_entropy(logits, put([6, 5]))
    assert "step 101: " in raised()


@pytest.mark.parametrize("read", [lambda layer, opt: layer.state_dict(), lambda layer, opt: opt.state_dict()])
def test_what_is_read_for_good_is_checked(read):
    layer = linear()
    optimizer = gpurnn.Adam(layer)
    gpurnn.softmax_cross_entropy(put(np.zeros((2, 3))), put([0, 3]))
    with pytest.raises(ValueError, match="step 1: targets"):
        read(layer, optimizer)
    read(layer, optimizer)


def test_numpy_has_nothing_to_wait_for(monkeypatch):
    monkeypatch.setattr(backend, "name", "numpy")
    monkeypatch.setattr(backend, "xp", np)
    backend.ops.restart(3)
    gpurnn.synchronize()
    assert faults.take() is None
