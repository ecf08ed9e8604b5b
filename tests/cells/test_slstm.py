"""sLSTM against its equations without the stabiliser, which float64 allows for small gates."""

import numpy as np
import pytest

from gpurnn import Recurrent, backend, check_gradients

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the CPU's executors")
EXECUTORS = ("numpy", "compiled")


def as_published(layer, x):
    """y of one layer in heads from zero states: exponential and sigmoid gates as they are."""
    H, K = layer.hidden_size, layer.heads
    p = {name.removesuffix("_l0"): value for name, value in layer.params.items()}
    blocks = p["weight_hh"].reshape(4, K, H // K, H // K)
    h, c, n = np.zeros((3, x.shape[1], H))
    outputs = []
    for x_t in x:
        r = np.einsum("nkj,gkij->gnki", h.reshape(len(h), K, -1), blocks).reshape(4, len(h), H)
        a = np.stack(np.split(x_t @ p["weight_ih"].T + p["bias_ih"] + p["bias_hh"], 4, axis=1)) + r
        i, f, z, o = np.exp(a[0]), 1 / (1 + np.exp(-a[1])), np.tanh(a[2]), 1 / (1 + np.exp(-a[3]))
        c, n = f * c + i * z, f * n + i
        h = o * c / n
        outputs.append(h)
    return np.stack(outputs)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("heads", [1, 3])
def test_the_stabiliser_changes_nothing(heads, executor):
    rng = np.random.default_rng(0)
    layer = Recurrent("slstm", 4, 12, heads=heads, dtype="float64", executor=executor, rng=1)
    for value in layer.params.values():
        value += rng.normal(0, 0.5, value.shape)
    x = 2 * rng.standard_normal((20, 3, 4))
    np.testing.assert_allclose(layer(x)[0], as_published(layer, x), atol=1e-12)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gates_beyond_what_an_exponential_holds(executor):
    layer = Recurrent("slstm", 2, 8, heads=2, executor=executor, rng=0)
    x = np.random.default_rng(0).choice([-1e4, 1e4, 300, -300, 0], (30, 4, 2)).astype(np.float32)
    y, state, backward = layer(x)
    dx, _ = backward(np.ones_like(y))
    assert np.isfinite(y).all() and abs(y).max() <= 1 and np.isfinite(dx).all()
    assert all(np.isfinite(part).all() for part in state)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients(executor):
    layer = Recurrent("slstm", 2, 6, heads=3, bidirectional=True, dtype="float64", executor=executor, rng=0)
    check_gradients(layer, T=3, N=2, lengths=[3, 1])
    check_gradients(
        Recurrent("slstm", 2, 4, heads=2, trainable_h0=True, dtype="float64", executor=executor, rng=0), N=2
    )
