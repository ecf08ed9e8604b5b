"""The compiled executor against the NumPy oracle: every cell, every result, odd sizes, special values, vector widths."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import njit, types
from numba.extending import intrinsic

from gpurnn import backend
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL, RNN_CELLS
from gpurnn.executors import choose, compiled, crew, memory, numpy_loop, products, simd
from gpurnn.executors.dot import dot
from gpurnn.executors.gemm import make_gemm, may_lie, reduction, reduction_size
from gpurnn.executors.numpy_loop import Backward, Weights
from gpurnn.executors.packing import make_pack_gates, make_pack_rows, packed_size, panel_columns
from gpurnn.executors.simd import Emitter, address, host, vector_loop
from gpurnn.sequence import prepare_lengths, run

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

ROOT = Path(__file__).parents[1]
# The largest difference, relative to a tensor's largest entry, between the compiled executor and the float64 oracle.
TOLERANCES = {"float64": 1e-12, "float32": 2e-5}
# A gradient that is added to ones may nearly cancel them: it is measured by the larger of its terms.
ACCUMULATED = ("dweight", "dbias")
ODD_SIZES = (  # T, N, I, H
    (1, 1, 1, 1),
    (3, 1, 3, 2),
    (4, 3, 1, 5),
    (5, 7, 40, 15),
    (2, 3, 3, 16),
    (7, 1, 3, 17),
    (3, 7, 3, 33),
    (2, 3, 40, 65),
    (2, 7, 3, 130),
)


@pytest.fixture(autouse=True)
def unwritten_memory_shows(monkeypatch):
    """np.empty gives NaN in the executor's modules, so that a value which nobody wrote cannot pass for a zero."""

    def empty(shape, dtype):
        return np.full(shape, 255 if dtype == np.uint8 else np.nan, dtype)  # bytes of which all floats are NaN

    monkeypatch.setattr(memory, "empty", empty)


def problem(cell, T, N, I, H, *, bias=True, seed=0, dtype="float64"):
    """Inputs, parameters and gradients at the outputs; the same numbers for both dtypes."""
    rng = np.random.default_rng(seed)
    G = cell.gates

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype("float32").astype(dtype)

    weights = Weights(
        draw(G * H, I, scale=I**-0.5),
        draw(G * H, H, scale=0.7 * H**-0.5),
        draw(G * H, scale=0.3) if bias else None,
        draw(G * H, scale=0.3) if bias else None,
        tuple(draw(H, scale=0.5) for _ in cell.params),
    )
    state = tuple(draw(N, H, scale=0.5) for _ in range(cell.states))
    dstate = tuple(draw(N, H) for _ in range(cell.states))
    return SimpleNamespace(
        cell=cell, x=draw(T, N, I), weights=weights, state=state, dy=draw(T, N, H), dstate=dstate, shape=(T, N, I, H)
    )


def results(p, executor, *, lengths=None, reverse=False, clip=None, keep=False, dy=None):
    """Every tensor that comes out of a training and an inference pass, by name; gradients are added to ones."""
    T, N, _, _ = p.shape
    prepared = prepare_lengths(lengths, T, N)
    options = {"lengths": prepared, "reverse": reverse, "executor": executor}
    y, final, backward = run(p.cell, p.x, p.weights, p.state, **options)
    y_inference, final_inference, nothing = run(p.cell, p.x, p.weights, p.state, training=False, **options)
    assert nothing is None
    out = {"y": y.copy(), "y in inference": y_inference}
    for s in range(p.cell.states):
        out |= {f"final state {s}": final[s], f"final state {s} in inference": final_inference[s]}
    for call in range(2 if keep else 1):
        flow = np.zeros((p.cell.states, T))
        grads = Weights(*(None if w is None else np.ones_like(w) for w in p.weights[:4]), ())
        grads = grads._replace(params=tuple(np.ones_like(w) for w in p.weights.params))
        dx, dinitial = backward(p.dy if dy is None else dy, p.dstate, grads, Backward(clip, flow, keep and call == 0))
        call_out = {"dx": dx, "flow": flow}
        call_out |= {f"d{field}": g for field, g in zip(Weights._fields[:4], grads, strict=False) if g is not None}
        call_out |= {f"d{name}": g for name, g in zip(p.cell.params, grads.params, strict=True)}
        call_out |= {f"dstate {s}": part for s, part in enumerate(dinitial)}
        out |= {f"{name}, call {call}" if call else name: value for name, value in call_out.items()}
    return out


def assert_agree(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, reference in expected.items():
        value = got[name]
        assert value.shape == reference.shape, name
        if reference.size:
            # A single dx is a sum of terms of order 1 that may cancel: then it has their rounding errors and not their size.
            addend = 1 if name.startswith(ACCUMULATED) else 0.5 if name.startswith("dx") else 1e-300
            error = np.abs(value - reference).max() / max(np.abs(reference).max(), addend)
            assert error <= tolerance, f"{name}: off by {error:.1e} of its largest entry"


def compare(cell, shape, dtype="float64", *, bias=True, seed=0, **options):
    """The compiled executor in `dtype`, with weights packed and as they lie, against the oracle in float64."""
    expected = results(problem(cell, *shape, bias=bias, seed=seed), "numpy", **options)
    for never_worth_it in (0, 10**9):
        with mock.patch.object(products, "PACKING", never_worth_it):
            got = results(problem(cell, *shape, bias=bias, seed=seed, dtype=dtype), "compiled", **options)
        assert all(value.dtype == dtype for name, value in got.items() if not name.startswith("flow"))
        assert_agree(got, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_every_cell_agrees(any_cell, dtype):
    compare(any_cell, (5, 3, 4, 33), dtype)
    compare(any_cell, (5, 3, 4, 7), dtype, reverse=True, lengths=[2, 5, 0], clip=0.1)


@pytest.mark.parametrize("shape", ODD_SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_odd_sizes(shape, dtype):
    T, N = shape[:2]
    for cell in (LSTM_CELL, GRU_CELL):
        compare(cell, shape, dtype)
        compare(cell, shape, dtype, reverse=True, bias=False)
        compare(cell, shape, dtype, lengths=np.arange(N) * T // max(1, N - 1), keep=True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("H", [1, 2, 5, 15, 16, 17, 33, 65, 130])
def test_the_wide_grid(any_cell, H, dtype):
    for T in (1, 6):
        for N in (1, 3, 7):
            for I in (1, 3, 40):
                for reverse in (False, True):
                    lengths = np.arange(N) * T // max(1, N - 1) if N > 1 else None
                    compare(any_cell, (T, N, I, H), dtype, reverse=reverse, lengths=lengths, bias=I != 3)


@given(
    name=st.sampled_from(["lstm", "gru", "rnn_relu", "peephole_lstm", "three_states", "every_function", "hoarder"]),
    shape=st.tuples(st.integers(0, 6), st.integers(0, 9), st.integers(1, 9), st.integers(1, 40)),
    lengths=st.one_of(st.none(), st.lists(st.integers(0, 6), min_size=9, max_size=9)),
    reverse=st.booleans(),
    bias=st.booleans(),
    clip=st.sampled_from([None, 0.01, 0.3]),
    seed=st.integers(0, 99),
)
@settings(max_examples=100, derandomize=True, deadline=None, database=None)
def test_drawn_shapes_and_options(request_cells, name, shape, lengths, reverse, bias, clip, seed):
    T, N = shape[:2]
    lengths = None if lengths is None else np.minimum(lengths[:N], T)
    compare(request_cells[name], shape, bias=bias, seed=seed, reverse=reverse, lengths=lengths, clip=clip)


@pytest.fixture(scope="module")
def request_cells(pytestconfig):
    return CELLS | pytestconfig.user_cells


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (3, 0, 3, 4), (0, 0, 3, 4)])
def test_nothing_to_do(shape, executor):
    p = problem(LSTM_CELL, *shape)
    out = results(p, executor)
    np.testing.assert_array_equal(out["final state 1"], p.state[1])
    np.testing.assert_array_equal(out["dstate 1"], p.dstate[1])
    assert (out["dweight_hh"] == 1).all()


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_without_steps_pass_their_state_through(executor, reverse):
    p = problem(LSTM_CELL, 3, 4, 2, 5)
    p.x[:, 2] = np.nan
    p.dy[:, 2] = np.nan
    out = results(p, executor, lengths=[3, 1, 0, 2], reverse=reverse)
    for s in (0, 1):
        np.testing.assert_array_equal(out[f"final state {s}"][2], p.state[s][2])
        np.testing.assert_array_equal(out[f"dstate {s}"][2], p.dstate[s][2])
    assert not out["y"][:, 2].any()
    assert not out["dx"][:, 2].any()
    assert all(np.isfinite(value).all() for value in out.values())


def test_dy_of_any_strides():
    p = problem(GRU_CELL, 4, 3, 2, 6)
    wide = np.random.default_rng(1).standard_normal((4, 3, 12))
    raw = np.zeros(p.dy.nbytes + 1, np.uint8)
    unaligned = raw[1:].view(p.dy.dtype).reshape(p.dy.shape)
    unaligned[...] = p.dy
    by_units = np.asfortranarray(p.dy)
    steps_shared = np.broadcast_to(p.dy[0], p.dy.shape)
    all_shared = np.broadcast_to(np.float64(0.5), p.dy.shape)
    for dy in (wide[..., :6], wide[..., ::2], wide[::-1, ::-1, :6], unaligned, by_units, steps_shared, all_shared):
        assert_agree(results(p, "compiled", dy=dy), results(p, "compiled", dy=np.array(dy)), 0)
        assert_agree(results(p, "compiled", dy=dy), results(p, "numpy", dy=dy), 1e-12)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_chunks_of_time(monkeypatch, dtype):
    """Several chunks of steps, both ways, rows that end in each of the chunks."""
    monkeypatch.setattr(compiled, "PROJECTED_ROWS", 20)
    for reverse in (False, True):
        compare(LSTM_CELL, (11, 5, 3, 7), dtype, reverse=reverse)
        compare(GRU_CELL, (11, 5, 3, 7), dtype, reverse=reverse, lengths=[11, 2, 0, 7, 5])


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 16, 17, 40, 512, 513, 1100])
def test_weight_gradients_in_blocks_of_rows_and_columns(rows, dtype):
    """Around the edges of a vector, a block of time and batch, a block of a gate's units.

    Slots as a cell of three gates has them whose gate 2 is split: r of it, 0 and 1 joint, x of it; and one slot more.
    """
    rng = np.random.default_rng(rows)
    H, I, orders = 200, 70, np.array([[2, 0, 1], [0, 1, 2]])
    slots, h, x = (rng.standard_normal((rows, n)).astype(dtype) for n in (5 * H, H, I))
    sums, weight_hh, weight_ih = (np.ones(shape, dtype) for shape in (4 * H, (3 * H, H), (3 * H, I)))
    for first, last in ((0, 17), (17, 433), (433, 4 * H)):
        work = np.full(reduction_size(rows, H, I, np.dtype(dtype)), np.nan, dtype)
        places = map(address, (slots, orders, h, x, sums, weight_hh, weight_ih))
        crew.run(reduction(np.dtype(dtype)), (rows, H, I, 5, 3, 1, *places), [(first, last, address(work))])
    limit = 1e-5 if dtype == "float32" else 1e-13
    wide = slots.astype("float64").reshape(rows, 5, H)
    for found, b, gates, order in ((weight_hh, h, wide[:, :3], orders[0]), (weight_ih, x, wide[:, 1:4], orders[1])):
        expected = np.empty((3, H, b.shape[1]))
        expected[order] = np.einsum("kgj,kn->gjn", gates, b)
        np.testing.assert_allclose(
            found, 1 + expected.reshape(found.shape), atol=limit * np.abs(expected).max(), rtol=0
        )
    np.testing.assert_allclose(sums, 1 + wide[:, :4].sum(0).ravel(), atol=limit * rows, rtol=0)


def panels(matrix):
    """The packed form of a matrix: wide panels, then panels of one vector, each row-major, the last filled up with zeros."""
    wide, width, parts = panel_columns(matrix.dtype), host().width(matrix.dtype), []
    while matrix.shape[1]:
        columns = wide if matrix.shape[1] >= wide else width
        panel, matrix = matrix[:, :columns], matrix[:, columns:]
        parts.append(np.pad(panel, ((0, 0), (0, columns - panel.shape[1]))).ravel())
    return np.concatenate(parts)


SHAPES_TO_PACK = [(1, 1), (3, 2), (17, 33), (64, 64), (15, 130), (130, 15), (40, 200)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("order", [(0,), (2, 0, 1), (1, 2)])
@pytest.mark.parametrize("shape", SHAPES_TO_PACK)
@pytest.mark.parametrize("parts", [1, 3])
def test_packing_rows(dtype, shape, order, parts):
    """Some columns of a matrix, the gates of its rows in an order of one's own, or as they lie."""
    dtype = np.dtype(dtype)
    H, n = shape
    matrix = np.arange(3 * H * (n + 7), dtype=dtype).reshape(3 * H, n + 7) + 1
    first = matrix[:, 5:].ctypes.data, matrix.strides[0]
    out = np.full(packed_size(len(order) * H, n, dtype) + 5, np.nan, dtype)
    numbers = np.array(order)
    for place, gates in ((numbers.ctypes.data, order), (0, range(len(order)))):
        for part in range(parts):
            make_pack_rows(dtype).python(*first, place, len(order), H, n, part, parts, out.ctypes.data)
        rows = np.concatenate([matrix[gate * H : (gate + 1) * H, 5 : 5 + n] for gate in gates])
        np.testing.assert_array_equal(out[:-5], panels(rows))
        assert np.isnan(out[-5:]).all()
        out[:-5] = np.nan


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("order", [(0,), (2, 0, 1), (1, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("shape", SHAPES_TO_PACK)
@pytest.mark.parametrize("parts", [1, 3])
def test_packing_gates(dtype, shape, order, parts):
    """The transpose of gates of a weight matrix: all their units side by side, or some units, gate by gate."""
    dtype = np.dtype(dtype)
    k, H = shape
    weights = np.arange(4 * H * k, dtype=dtype).reshape(4, H, k) + 1
    numbers, pack = np.array(order), make_pack_gates(dtype).python
    for unit, end_unit in {(0, H), (0, (H + 1) // 2), (H // 3, H)}:
        units = weights[list(order), unit:end_unit]
        whole = end_unit - unit == H
        expected = panels(units.reshape(-1, k).T) if whole else np.concatenate([panels(gate.T) for gate in units])
        out = np.full(len(expected) + 5, np.nan, dtype)
        for part in range(parts):
            pack(
                weights.ctypes.data, k, numbers.ctypes.data, len(order), H, unit, end_unit, part, parts, out.ctypes.data
            )  # fmt: skip
        np.testing.assert_array_equal(out[:-5], expected)
        assert np.isnan(out[-5:]).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("n", [1, 3, 8, 15, 16, 33, 70])
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13])
def test_products_with_weights_as_they_lie(dtype, m, n):
    """W by its rows (`dot`) and by its columns (`gemm`), in the middle of NaN: nothing beside them is read into a sum."""
    dtype, rng = np.dtype(dtype), np.random.default_rng(m + n)
    by_rows, by_columns = dot(dtype).python, make_gemm(dtype).python
    for k in (1, 5, 16, 40):
        for accumulate in (0, 1):
            steps = 2
            a = np.full((steps, m, k + 1), np.nan, dtype)
            a[..., :k] = rng.standard_normal((steps, m, k))
            rows, columns = (np.full((count + 2, width + 2), np.nan, dtype) for count, width in ((n, k), (k, n)))
            rows[1:-1, 1:-1] = rng.standard_normal((n, k))
            columns[1:-1, 1:-1] = rows[1:-1, 1:-1].T
            given = rng.standard_normal((steps, m, n + 1)).astype(dtype)
            expected = a[..., :k].astype(float) @ rows[1:-1, 1:-1].T + accumulate * given[..., :n].astype(float)
            places = (steps, a.ctypes.data, a.strides[0], a.strides[1], m)
            for name in ("rows", "columns") if may_lie(n, dtype) else ("rows",):
                c = given.copy()
                c_place = (c.ctypes.data, c.strides[0])
                if name == "rows":
                    w = rows[1:, 1:].ctypes.data, rows.strides[0]
                    by_rows(*places, *w, k, n, *c_place, c.strides[1], accumulate)
                else:
                    w = columns[1:, 1:].ctypes.data, columns.strides[0]
                    by_columns(*places, *w, k, 1, n, *c_place, 0, c.strides[1], accumulate)
                np.testing.assert_array_equal(c[..., n], given[..., n])
                np.testing.assert_allclose(c[..., :n], expected, atol=TOLERANCES[dtype.name] * 10)


@pytest.mark.parametrize("known", [True, False])
def test_the_address_of_an_array(monkeypatch, known):
    """As NumPy says it, from the array's own memory or, were that laid out differently one day, by asking for it."""
    assert simd._DATA > 0
    if not known:
        monkeypatch.setattr(simd, "_DATA", 0)
    array = np.arange(60.0).reshape(3, 4, 5)
    for view in (array, array[1:, 2:, 3], array.T, array[::-1], array[3:], np.float32(1)[None], np.empty(0)):
        assert address(view) == view.ctypes.data


def test_inputs_whose_strides_mean_nothing():
    """A dimension of length 1 may have any stride, in an array that calls itself contiguous."""
    p = problem(LSTM_CELL, 5, 1, 3, 20)
    expected = results(p, "numpy")
    p.x = np.lib.stride_tricks.as_strided(p.x, p.x.shape, (p.x.strides[0], 1 << 20, p.x.strides[2]))
    assert p.x.flags.c_contiguous
    assert_agree(results(p, "compiled"), expected, 1e-12)


@pytest.mark.parametrize("cell", [LSTM_CELL, GRU_CELL, RNN_CELLS["tanh"]], ids=lambda cell: cell.name)
@pytest.mark.parametrize("shape", [(6, 13, 300, 120), (30, 1, 700, 130)])
def test_large_enough_for_threads_and_split_products(monkeypatch, cell, shape):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    compare(cell, shape, "float64")
    compare(cell, shape, "float32", lengths=np.arange(shape[1]) % (shape[0] + 1))


# Special values


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
def test_special_values_come_through_as_in_numpy(any_cell, special, dtype):
    for clip in (None, 0.1):
        p = problem(any_cell, 4, 3, 2, 18, dtype=dtype)
        p.x[1, 2, 0] = special
        got, expected = results(p, "compiled", clip=clip), results(p, "numpy", clip=clip)
        for name, value in expected.items():
            np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(value), err_msg=f"NaN in {name}")
            np.testing.assert_array_equal(np.isinf(got[name]), np.isinf(value), err_msg=f"infinity in {name}")
        if np.isnan(special):
            assert np.isnan(got["y"][1:, 2]).all()
            assert np.isfinite(got["y"][:, :2]).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_nan_in_dy_reaches_every_gradient(any_cell, dtype):
    p = problem(any_cell, 4, 3, 2, 18, dtype=dtype)
    p.dy[2, 1] = np.nan
    got = results(p, "compiled", clip=0.1)
    expected = results(p, "numpy", clip=0.1)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.isnan(got[name]), np.isnan(value), err_msg=name)
    assert np.isnan(got["dx"][2, 1]).all()
    assert np.isnan(got["dweight_ih"]).any()
    assert np.isfinite(got["dx"][:, [0, 2]]).all()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", [1e4, 1e-40, 1e-310])
def test_saturation_and_denormals(dtype, size):
    """The gradients of saturated gates are differences of ones: they agree in units of the unsaturated gradient."""
    for cell in (LSTM_CELL, GRU_CELL, RNN_CELLS["tanh"], RNN_CELLS["sigmoid"]):
        p, exact = problem(cell, 3, 2, 4, 19, dtype=dtype), problem(cell, 3, 2, 4, 19)
        with np.errstate(under="ignore"):
            for each in (p, exact):
                each.x[...] = np.sign(each.x) * each.x.dtype.type(size)
            exact.x[...] = p.x
        got, expected = results(p, "compiled"), results(exact, "numpy")
        for name, value in expected.items():
            scale = max(1.0, np.abs(value).max(), size if name == "dweight_ih" else 0)
            assert np.abs(got[name] - value).max() <= TOLERANCES[dtype] * scale, name


# SIMD functions


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


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_log_and_sqrt(dtype):
    x = np.logspace(-37, 37, 200_001).astype(dtype)
    for operation, exact in ((Emitter.log, np.log(x.astype(FINEST))), (Emitter.sqrt, np.sqrt(x.astype(FINEST)))):
        function = vector_function(operation, dtype)
        assert (np.abs(function(x) - exact) <= np.finfo(dtype).eps * np.abs(exact)).all()
        assert np.isnan(function([np.nan, -1.0])).all()
        assert function([np.inf])[0] == np.inf
    np.testing.assert_array_equal(vector_function(Emitter.log, dtype)([0.0, -0.0]), [-np.inf, -np.inf])


@pytest.mark.parametrize("dtype", TOLERANCES)
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


WIDTHS = ("16", "32")


def test_narrower_vectors():
    chosen = (
        "test_every_cell_agrees[lstm-float32]",
        "test_every_cell_agrees[gru-float64]",
        "test_tanh",
        "test_packing_rows",
        "test_packing_gates",
    )
    nested(*(f"{Path(__file__)}::{test}" for test in chosen))


@pytest.mark.slow
def test_narrower_vectors_everywhere():
    nested(str(Path(__file__)), "-k", "not narrower")


def nested(*arguments):
    """Runs tests of this file with each of the narrower vectors, side by side."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"GPURNN_VECTOR_BYTES": width}, stdout=subprocess.PIPE, text=True
        )
        for width in WIDTHS
    ]
    outputs = [process.communicate()[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


def test_the_width_asked_for_is_checked():
    code = "from gpurnn.executors.simd import host; host()"
    env = os.environ | {"GPURNN_VECTOR_BYTES": "24"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert "GPURNN_VECTOR_BYTES: expected 16, 32 or 64, got '24'" in done.stderr


# Options of backward


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
def test_flow_is_the_gradient_of_each_state(executor, reverse):
    """dL/dstate_t, by restarting the rest of the sequence from a perturbed state_t (central differences)."""
    T, N, I, H = 4, 2, 3, 5
    p = problem(LSTM_CELL, T, N, I, H)
    order = list(range(T - 1, -1, -1) if reverse else range(T))
    options = {"reverse": reverse, "executor": executor, "training": False}

    def loss_after(state, steps):
        """The loss of `state`, the state behind the first of `steps`, and of all steps behind it."""
        total = (state[0] * p.dy[steps[0]]).sum()
        if len(steps) > 1:
            rest = slice(min(steps[1:]), max(steps[1:]) + 1)
            y, state, _ = run(p.cell, p.x[rest], p.weights, state, **options)
            total += (y * p.dy[rest]).sum()
        return total + sum((part * weight).sum() for part, weight in zip(state, p.dstate, strict=True))

    expected = np.zeros((2, T))
    state = p.state
    for k, t in enumerate(order):
        _, state, _ = run(p.cell, p.x[t : t + 1], p.weights, state, **options)
        for s in range(2):
            for index in np.ndindex(N, H):
                losses = []
                for shift in (1e-5, -1e-5):
                    moved = tuple(part.copy() for part in state)
                    moved[s][index] += shift
                    losses.append(loss_after(moved, order[k:]))
                expected[s, t] += ((losses[0] - losses[1]) / 2e-5) ** 2
    np.testing.assert_allclose(results(p, executor, reverse=reverse)["flow"], expected, rtol=1e-7)


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
def test_clip_in_time_bounds_what_is_passed_back(executor):
    p = problem(LSTM_CELL, 6, 3, 2, 17)
    free = results(p, executor)
    assert np.abs(free["dstate 0"]).max() > 0.05
    out = results(p, executor, clip=0.05)
    for s in (0, 1):
        assert np.abs(out[f"dstate {s}"]).max() == 0.05
    # with no loss before the last step, each earlier state receives at most the limit
    p.dy[:-1] = 0
    flow = results(p, executor, clip=0.05)["flow"]
    assert (flow[:, :-1] <= 3 * 17 * 0.05**2 * (1 + 1e-12)).all()
    assert_agree(results(p, executor, clip=1e9), results(p, executor), 0)


# The choice of an executor


def test_choose(monkeypatch):
    def chosen(asked):
        return choose(asked, LSTM_CELL, 8, 3, np.dtype("float32"), "float32")

    monkeypatch.delenv("GPURNN_EXECUTOR", raising=False)
    assert chosen(None) is compiled
    assert chosen("numpy") is numpy_loop
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")
    assert chosen(None) is numpy_loop
    assert chosen("compiled") is compiled
    with pytest.raises(ValueError, match="one of compiled, numpy on the numpy backend, got 'fast'"):
        chosen("fast")
    with pytest.raises(ValueError, match="got 'resident'"):
        chosen("resident")
