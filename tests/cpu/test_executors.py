"""The compiled executor against the NumPy oracle: every cell, every result, odd sizes, special values, vector widths."""

import os
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpurnn import backend
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL, RNN_CELLS
from gpurnn.cpu import compiled, costs, memory
from gpurnn.executors import choose, numpy_loop
from gpurnn.executors.contract import Backward, Job, Weights
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

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


def problem(cell, T, N, I, H, *, bias=True, seed=0, dtype="float64", heads=1):
    """Inputs, parameters and gradients at the outputs; the same numbers for both dtypes."""
    rng = np.random.default_rng(seed)
    G = cell.gates

    def draw(*shape, scale=1.0):
        return (scale * rng.standard_normal(shape)).astype("float32").astype(dtype)

    weights = Weights(
        draw(G * H, I, scale=I**-0.5),
        draw(G * H, H // heads, scale=0.7 * (H // heads) ** -0.5),
        draw(G * H, scale=0.3) if bias else None,
        draw(G * H, scale=0.3) if bias else None,
        tuple(draw(H, scale=0.5) for _ in cell.params),
    )
    if not cell.recurrent:
        weights = weights._replace(weight_hh=None, bias_hh=None)
    state = tuple(draw(N, H, scale=0.5) for _ in range(cell.states))
    dstate = tuple(draw(N, H) for _ in range(cell.states))
    return SimpleNamespace(
        cell=cell, x=draw(T, N, I), weights=weights, state=state, dy=draw(T, N, H), dstate=dstate, shape=(T, N, I, H)
    )


def forward(p, executor, x, state, rows, reverse, training):
    """y, the final states and the tape."""
    engine = choose(executor, p.cell, p.shape[3], x.shape[1], x.dtype, "float32")
    states, tape = engine.forward(Job(p.cell, x, p.weights, state, rows, reverse, training))
    return states.h[: len(x)] if reverse else states.h[1:], states.final, tape


def results(p, executor, *, lengths=None, reverse=False, clip=None, keep=False, dy=None):
    """Every tensor that comes out of a training and an inference pass, by name; gradients are added to ones."""
    T, N, _, _ = p.shape
    engine = choose(executor, p.cell, p.shape[3], N, p.x.dtype, "float32")
    rows = np.full(T, N) if lengths is None else (np.arange(T)[:, None] < np.sort(lengths)[::-1]).sum(1)
    x, living = p.x.copy(), np.arange(N) < rows[:, None]
    x[~living] = 0
    given = p, executor, x, p.state, rows, reverse
    (y, final, tape), (y_inference, final_inference, nothing) = forward(*given, True), forward(*given, False)
    assert nothing is None and not y[~living].any() and not y_inference[~living].any()
    out = {"y": y.copy(), "y in inference": y_inference}
    for s in range(p.cell.states):
        out |= {f"final state {s}": final[s], f"final state {s} in inference": final_inference[s]}
    for call in range(2 if keep else 1):
        flow = np.zeros((p.cell.states, T))
        grads = Weights(*(None if w is None else np.ones_like(w) for w in p.weights[:4]), ())
        grads = grads._replace(params=tuple(np.ones_like(w) for w in p.weights.params))
        options = Backward(clip, flow, keep and call == 0)
        dx, dinitial = engine.backward(tape, p.dy if dy is None else dy, p.dstate, grads, options)
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


def compare(cell, shape, dtype="float64", *, bias=True, seed=0, heads=1, **options):
    """The compiled executor in `dtype`, with weights packed and as they lie, against the oracle in float64."""
    expected = results(problem(cell, *shape, bias=bias, seed=seed, heads=heads), "numpy", **options)
    for never_worth_it in (0, 10**9):
        with mock.patch.multiple(costs, PACKING_ROWS=never_worth_it, COPYING_ROWS=never_worth_it):
            p = problem(cell, *shape, bias=bias, seed=seed, dtype=dtype, heads=heads)
            got = results(p, "compiled", **options)
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
    p.x[:, 3] = np.nan
    p.dy[:, 3] = np.nan
    out = results(p, executor, lengths=[3, 2, 1, 0], reverse=reverse)
    for s in (0, 1):
        np.testing.assert_array_equal(out[f"final state {s}"][3], p.state[s][3])
        np.testing.assert_array_equal(out[f"dstate {s}"][3], p.dstate[s][3])
    assert not out["y"][:, 3].any()
    assert not out["dx"][:, 3].any()
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
    monkeypatch.setattr(costs, "PROJECTED_ROWS", 20)
    for reverse in (False, True):
        compare(LSTM_CELL, (11, 5, 3, 7), dtype, reverse=reverse)
        compare(GRU_CELL, (11, 5, 3, 7), dtype, reverse=reverse, lengths=[11, 2, 0, 7, 5])


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


WIDTHS = ("16", "32")


def test_narrower_vectors():
    nested(
        "tests/cpu/test_executors.py::test_every_cell_agrees[lstm-float32]",
        "tests/cpu/test_simd.py::test_tanh",
        "tests/cpu/test_products.py::test_packing_rows",
    )


@pytest.mark.slow
def test_narrower_vectors_everywhere():
    nested("tests/cpu/test_executors.py", "tests/cpu/test_simd.py", "tests/cpu/test_products.py", "-k", "not narrower")


def nested(*arguments):
    """Runs tests with each of the narrower vectors, side by side."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *arguments]
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"GPURNN_VECTOR_BYTES": width}, stdout=subprocess.PIPE, text=True
        )
        for width in WIDTHS
    ]
    outputs = [process.communicate(timeout=600)[0] for process in started]
    for process, output in zip(started, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]


# Options of backward


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
def test_flow_is_the_gradient_of_each_state(executor, reverse):
    """dL/dstate_t, by restarting the rest of the sequence from a perturbed state_t (central differences)."""
    T, N, I, H = 4, 2, 3, 5
    p = problem(LSTM_CELL, T, N, I, H)
    order = list(range(T - 1, -1, -1) if reverse else range(T))

    def loss_after(state, steps):
        """The loss of `state`, the state behind the first of `steps`, and of all steps behind it."""
        total = (state[0] * p.dy[steps[0]]).sum()
        if len(steps) > 1:
            rest = slice(min(steps[1:]), max(steps[1:]) + 1)
            y, state, _ = forward(p, executor, p.x[rest], state, np.full(len(steps) - 1, N), reverse, False)
            total += (y * p.dy[rest]).sum()
        return total + sum((part * weight).sum() for part, weight in zip(state, p.dstate, strict=True))

    expected = np.zeros((2, T))
    state = p.state
    for k, t in enumerate(order):
        _, state, _ = forward(p, executor, p.x[t : t + 1], state, np.full(1, N), reverse, False)
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
