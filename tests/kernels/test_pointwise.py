"""A cell's mathematics in a kernel: the logistic function by itself, in units in the last place.

The interpreter rounds what a chip approximates, so what shows here is the formula's own error; hardware's 2^x and
reciprocal are good to 2^-22 and 1 unit more.
"""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn import backend
from gpurnn.cells import CELLS, Cell, sigmoid, tanh
from gpurnn.kernels import build, pointwise
from gpurnn.kernels.build import Source
from gpurnn.kernels.numba_cuda import cuda, types
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

THREADS = 128


def on_device(cell, accuracy=pointwise.EXACT):
    """Its next state for an array of x, with r and the state 0; and the PTX."""
    step, size = pointwise.forward(cell.trace, types.float32, accuracy), len(cell.trace.outputs)

    def kernel(x, y, count):
        k = types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x
        if k < count:
            given, result = cuda.local.array(2, types.float32), cuda.local.array(size, types.float32)
            given[0], given[1] = x[k], types.float32(0)
            step(given, result, pointwise.NOWHERE)
            y[k] = result[0]

    pointer = types.CPointer(types.float32)
    text = build.ptx(Source(kernel, (pointer, pointer, types.int64), THREADS), "kernel", (9, 0))

    def values(x):
        memory, y = Memory(), np.empty_like(x)
        places = memory.put(x, name="x"), memory.put(y, name="y")
        run(parse(text), -(-len(x) // THREADS), THREADS, [*places, len(x)], memory, 0, None, 1)
        return memory.get(places[1], y)

    return values, text


def units(found, exact):
    """How far off, in units in the last place of the exact value's float32."""
    return np.abs(found.astype(float) - exact) / np.spacing(np.abs(exact).astype(np.float32)).astype(float)


def test_the_logistic_function_in_units_in_the_last_place():
    """2 at most for positive x and 65 at -87; by tanh 1 for positive x, 700 at -8 and all of them at -18."""
    values, text = on_device(CELLS["rnn_sigmoid"])
    assert text.count("ex2.approx.ftz.f32") == text.count("rcp.approx.ftz.f32") == 1 and "tanh" not in text
    x = np.concatenate([np.linspace(-87, 20, 40_001), np.geomspace(1e-30, 80, 2000), -np.geomspace(1e-30, 87, 2000)])
    x = x.astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(float)))
    found = values(x)
    off = units(found, exact)
    assert (off <= 2.5 + 1.25 * np.maximum(0, -x)).all(), "x log2 e is rounded, which is felt the more the larger it is"
    assert off[x > 0].max() < 2 and np.abs(found - exact).max() < 1e-7
    before = (np.float32(0.5) * (1 + np.tanh(np.float32(0.5) * x))).astype(np.float32)
    before = units(before, exact)
    assert before[x > 0].max() <= 1 and before[(x > -8) & (x < -4)].max() > 500 > 50 * off[(x > -8) & (x < 20)].max()


def test_the_logistic_function_at_the_ends():
    values, _ = on_device(CELLS["rnn_sigmoid"])
    x = np.array([-np.inf, -3e38, -104, -89, -0.0, 0.0, 1e-40, 17.5, 89, 3e38, np.inf, np.nan], np.float32)
    expected = [0, 0, 0, 0, 0.5, 0.5, 0.5, 1, 1, 1, 1, np.nan]
    np.testing.assert_allclose(values(x), expected, rtol=3e-8, atol=1e-38)


def squashed(value):
    def forward(x, r, state, params):
        return (value(x[0] + r[0]),), ()

    def backward(dnext, saved, state, next_state, params):
        return (dnext[0],), (dnext[0],), (0,), ()

    return Cell("squashed", 1, 1, forward, backward)


@pytest.mark.parametrize(
    "value, is_one",
    [
        (sigmoid, True),
        (lambda x: (tanh(x * 0.5) + 1) * 0.5, True),
        (lambda x: 0.5 * (1 + tanh(0.25 * x)), False),
        (lambda x: 0.5 * (1 - tanh(0.5 * x)), False),
        (lambda x: 0.25 * (1 + tanh(0.5 * x)), False),
        (lambda x: 0.5 * (2 + tanh(0.5 * x)), False),
        (lambda x: 0.5 * (1 + abs(0.5 * x)), False),
    ],
)
def test_what_is_the_logistic_function_and_what_is_not(value, is_one):
    cell = squashed(value)
    nodes = pointwise.with_sigmoids(cell.trace.forward.nodes)
    assert sum(node.op == "sigmoid" for node in nodes) == is_one
    x = np.linspace(-4, 4, 99).astype(np.float32)
    values, _ = on_device(cell)
    np.testing.assert_allclose(values(x), value(x.astype(float)), rtol=1e-6, atol=1e-7)


def test_approximate_kernels_keep_the_chip_s_tanh():
    _, text = on_device(CELLS["rnn_sigmoid"], pointwise.APPROXIMATE)
    assert text.count("tanh.approx.f32") == 1 and "ex2" not in text


def test_tanh_itself_beside_a_logistic_function_is_still_there():
    """Both of one value: the node of tanh has another user."""
    cell = squashed(lambda x: 0.5 * (1 + tanh(0.5 * x)) + tanh(0.5 * x))
    x = np.linspace(-4, 4, 99).astype(np.float32)
    wide = x.astype(float)
    np.testing.assert_allclose(on_device(cell)[0](x), 1 / (1 + np.exp(-wide)) + np.tanh(wide / 2), rtol=1e-5, atol=1e-6)
