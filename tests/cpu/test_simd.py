"""The vector functions that cells are made of, against NumPy; the width of vectors; where arrays lie."""

import os
import subprocess
import sys

import numpy as np
import pytest
from numba import njit, types
from numba.extending import intrinsic

from gpurnn import backend
from gpurnn.cpu import simd
from gpurnn.cpu.simd import Emitter, address, vector_loop
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

DTYPES = ("float32", "float64")


def vector_function(operation, dtype):
    """`operation(emit, vector)`, emitted and compiled, as a function on arrays."""

    @intrinsic
    def apply(typing, count, source, target):
        def codegen(context, builder, signature, args):
            n, read, write = args

            def body(emit, offset, mask):
                value = operation(emit, emit.load(builder.add(read, offset), mask))
                emit.store(value, builder.add(write, offset), mask)

            vector_loop(builder, np.dtype(dtype), n, body)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.intp), codegen

    @njit
    def on_arrays(x, y):
        apply(x.size, x.ctypes.data, y.ctypes.data)

    def function(x):
        x = np.ascontiguousarray(x, dtype)
        y = np.full_like(x, np.nan)
        on_arrays(x, y)
        return y

    return function


def spread(low, high, dtype):
    """Evenly spaced values, and both signs of all magnitudes, within [low, high]."""
    magnitudes = np.logspace(-30, 3, 100_001)
    values = np.concatenate([np.linspace(low, high, 500_001), magnitudes, -magnitudes])
    values = values[(values >= low) & (values <= high)].astype(dtype)
    return values[(values >= dtype.type(low)) & (values <= dtype.type(high))]


FINEST = np.longdouble  # 64 bits of mantissa on x86; where it is float64, its own rounding is within the limits below


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 3.5e-7), ("float64", 3e-16)])
def test_tanh(dtype, limit):
    tanh = vector_function(Emitter.tanh, dtype)
    x = spread(-30, 30, np.dtype(dtype))
    y, exact = tanh(x), np.tanh(x.astype(FINEST))
    assert np.abs(y - exact).max() <= limit
    assert (np.abs(y - exact) <= limit * np.abs(exact)).all()
    assert np.abs(y).max() <= 1
    np.testing.assert_array_equal(tanh(-x), -y)
    ends = tanh([np.nan, np.inf, -np.inf, 20, -20, 0])
    np.testing.assert_array_equal(ends, [np.nan, 1, -1, 1, -1, 0])  # exactly 1, so that 1 - tanh**2 is 0


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("float32", -87.3365, 88.7228), ("float64", -708.3964, 709.782712893)]
)
def test_exp(dtype, low, high):
    exp = vector_function(Emitter.exp, dtype)
    x = spread(low, high, np.dtype(dtype))
    exact = np.exp(x.astype(FINEST))
    assert (np.abs(exp(x) - exact) <= 1.5 * np.finfo(dtype).eps * exact).all()
    ends = exp([high + 0.001, 1e30, np.inf, low - 0.001, -1e30, -np.inf, np.nan, 0, -0.0])
    np.testing.assert_array_equal(ends, [np.inf] * 3 + [0] * 3 + [np.nan, 1, 1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_log_and_sqrt(dtype):
    around_one = 1 + np.concatenate([np.linspace(-0.6, 2, 200_000), np.logspace(-16, -1), -np.logspace(-16, -1)])
    x = np.concatenate([np.logspace(-37, 37, 200_001), around_one]).astype(dtype)
    for operation, exact in ((Emitter.log, np.log(x.astype(FINEST))), (Emitter.sqrt, np.sqrt(x.astype(FINEST)))):
        function = vector_function(operation, dtype)
        assert (np.abs(function(x) - exact) <= np.finfo(dtype).eps * np.abs(exact)).all()
        assert np.isnan(function([np.nan, -1.0])).all()
        assert function([np.inf])[0] == np.inf
    np.testing.assert_array_equal(vector_function(Emitter.log, dtype)([0.0, -0.0]), [-np.inf, -np.inf])


@pytest.mark.parametrize("dtype", DTYPES)
def test_maximum_minimum_and_clamp_let_nan_through_from_either_side(dtype):
    x = np.array([-2, -0.5, 0.5, 2, np.inf, -np.inf, np.nan], dtype)
    for left, right in ((0.5, None), (None, 0.5), (np.nan, None), (None, np.nan)):
        for name in ("maximum", "minimum"):

            def apply(emit, value, name=name, left=left, right=right):
                operands = [value if side is None else emit.constant(side) for side in (left, right)]
                return getattr(emit, name)(*operands)

            operands = [x if side is None else np.dtype(dtype).type(side) for side in (left, right)]
            np.testing.assert_array_equal(vector_function(apply, dtype)(x), getattr(np, name)(*operands))
    clamp = vector_function(lambda emit, value: emit.clamp(value, emit.constant(0.75)), dtype)
    np.testing.assert_array_equal(clamp(x), np.clip(x, -0.75, 0.75))


def test_the_width_asked_for_is_checked():
    code = "from gpurnn.cpu.simd import host; host()"
    env = os.environ | {"GPURNN_VECTOR_BYTES": "24"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert "GPURNN_VECTOR_BYTES: expected 16, 32 or 64, got '24'" in done.stderr


@pytest.mark.parametrize("known", [True, False])
def test_the_address_of_an_array(monkeypatch, known):
    """As NumPy says it, from the array's own memory or, were that laid out differently one day, by asking for it."""
    assert simd._DATA > 0
    if not known:
        monkeypatch.setattr(simd, "_DATA", 0)
    array = np.arange(60.0).reshape(3, 4, 5)
    for view in (array, array[1:, 2:, 3], array.T, array[::-1], array[3:], np.float32(1)[None], np.empty(0)):
        assert address(view) == view.ctypes.data
