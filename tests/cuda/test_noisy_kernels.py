"""Random numbers in the CUDA kernels: the bits that NumPy has, on every executor."""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.cells import CELLS, abs, bernoulli, minimum, normal
from tests.cells.test_noisy import ALL, EVERYTHING, LENGTHS, raw
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

CALL = (3 << 32) + 5


def results(cell, executor, dtype="float32", H=9, **options):
    """Every tensor of a step of two layers in both directions."""
    layer = gpurnn.Recurrent(cell, 3, H, 2, dtype=dtype, executor=executor, rng=0, bidirectional=True, **options)
    layer.masks.calls = CALL
    x = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(dtype)
    y, _, backward = layer(backend.asarray(x, dtype, "x"), lengths=LENGTHS)
    layer.zero_grad()
    dx, _ = backward(backend.xp.ones_like(y))
    assert layer.masks.calls == CALL + 1
    return [backend.to_numpy(part) for part in (y, dx, *layer.grads.values())]


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
@pytest.mark.parametrize("per", ["step", "sequence"])
@pytest.mark.parametrize(("executor", "dtype"), [("step", "float32"), ("step", "float64")])
def test_the_bits_of_the_unitwise_kernel(kind, per, executor, dtype):
    cell = raw(kind, per, which=5)
    want = results(cell, "numpy", dtype)[0]
    with interpreted(executor):
        np.testing.assert_array_equal(results(cell, executor, dtype)[0], want)


def recurrent_raw(x, r, state, params):
    """The cell's own numbers, exactly: what is added is 0."""
    return (normal() * (1 + bernoulli(0.5, per="sequence")) + minimum(abs(r[0]), 0),)


@pytest.mark.parametrize("executor", ["step", "resident", "persistent"])
def test_the_bits_of_kernels_with_a_matrix(executor):
    cell = gpurnn.Cell("recurrent_raw", 1, 1, recurrent_raw)
    assert cell.recurrent
    want = results(cell, "numpy")[0]
    with interpreted(executor):
        np.testing.assert_array_equal(results(cell, executor)[0], want)


@pytest.mark.parametrize(
    ("executor", "name"),
    [
        ("step", "lstm"),
        ("step", "mingru"),
        ("step", "everything"),
        ("resident", "lstm"),
        pytest.param("persistent", "everything", marks=pytest.mark.slow),
        pytest.param("persistent", "lstm", marks=pytest.mark.slow),
    ],
)
def test_training_steps_agree_with_numpy(executor, name):
    cell, options = (EVERYTHING, {}) if name == "everything" else (CELLS[name], ALL)
    want = results(cell, "numpy", **options)
    with interpreted(executor):
        found = results(cell, executor, **options)
    for a, b in zip(found, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1, np.abs(b).max()))
