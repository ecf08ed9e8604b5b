"""How threads share a layer: every share once, none empty, and the same results whichever way."""

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cells import GRU_CELL, LSTM_CELL, RNN_CELLS
from gpurnn.cpu import costs, crew, sharing, threads
from gpurnn.cpu.simd import host
from gpurnn.initializers import normal
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

CELLS = (RNN_CELLS["tanh"], GRU_CELL, LSTM_CELL)
FLOAT32 = np.dtype(np.float32)


def full(T, N):
    return np.full(T, N)


def points(cuts):
    return [point for cut in cuts for point in range(cut.start, cut.stop)]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("rows", [[9, 9, 9], [9, 5, 1, 0], [0, 0], [1, 1, 1, 1], [9, 1, 1, 1, 1, 1], []])
@pytest.mark.parametrize("H", [1, 33, 200, 1000])
def test_a_loop_is_shared_without_gaps(monkeypatch, rows, count, H):
    monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
    monkeypatch.setattr(costs, "LOOP_FLOPS", 0)
    seen = set()
    for cell in CELLS:
        for batch in (9, 30, 100):
            for flops, enough in ((0.1, 10**9), (1e18, 4)):
                monkeypatch.setattr(costs, "UNITS_FLOPS", flops)
                monkeypatch.setattr(costs, "ENOUGH_ROWS", enough)
                monkeypatch.setattr(costs, "ENOUGH_ROWS_CACHED", enough)
                plan = sharing.plan_loop(cell, np.array(rows, np.int64), len(rows), batch, 7, H, FLOAT32)
                assert len(plan.shares) <= count
                parts, units, inputs = zip(*plan.shares, strict=True)
                assert all(cut.stop > cut.start for cut in (*parts, *units))
                if plan.by_units:
                    assert points(units) == list(range(H))
                    assert points(inputs) == list(range(7))
                    assert set(map(repr, parts)) == {repr(slice(0, batch))}
                else:
                    assert points(parts) == list(range(batch))
                    assert set(map(repr, (*units, *inputs))) == {repr(slice(0, H)), repr(slice(0, 7))}
                seen.add(plan.by_units)
    assert seen == ({False} if count == 1 or H < 2 * 16 else {False, True})


def test_ragged_batches_are_cut_into_equal_work(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    lengths = np.array([100] + [10] * 10)  # longest first
    rows = (lengths[None, :] > np.arange(100)[:, None]).sum(1)
    first, second = sharing.plan_loop(LSTM_CELL, rows, 100, 11, 200, 200, FLOAT32).shares
    assert (first.rows, second.rows) == (slice(0, 1), slice(1, 11))


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_a_sum_is_shared_without_gaps(monkeypatch, cell):
    monkeypatch.setattr(costs, "SUM_FLOPS", 0)
    for count in (1, 2, 3, 20):
        monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
        for I in (1, 500):
            alone = sharing.Plan([None])
            cuts = sharing.plan_reduction(cell, 50, I, 40, 40, alone)
            assert points(cuts) == list(range((cell.trace.x_start + cell.gates) * 40))
            assert len(cuts) == count


def test_what_is_short_stays_with_one_thread_and_few_rows_share_units(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")

    def shared(T, N, I, H, cell=LSTM_CELL):
        plan = sharing.plan_loop(cell, full(T, N), T, N, I, H, FLOAT32)
        return "one" if len(plan.shares) == 1 else "units" if plan.by_units else "rows"

    assert shared(64, 1, 32, 32) == "one"
    assert shared(5000, 1, 1, 64) == "one"
    assert shared(1, 16, 64, 64) == "one"
    assert shared(1, 1, 200, 200) == shared(1, 1, 512, 512, RNN_CELLS["tanh"]) == "one"
    assert (
        shared(1, 1, 512, 512) == shared(1, 4, 1024, 1024, RNN_CELLS["tanh"]) == "units"
    )  # to read them takes its time
    assert shared(20, 1, 512, 512) == shared(64, 4, 256, 256) == shared(20, 5, 512, 512) == "units"
    assert shared(100, 5, 128, 128) == "units" and shared(100, 6, 128, 128) == "rows"
    assert shared(1000, 8, 64, 64) == shared(50, 64, 512, 512) == shared(1000, 4, 64, 64) == "rows"
    assert shared(1000, 8, 64, 64, RNN_CELLS["tanh"]) == "rows"
    assert shared(0, 8, 64, 64) == shared(8, 0, 64, 64) == "one"


@pytest.mark.parametrize("by_units", [False, True])
@pytest.mark.parametrize("clip, lengths", [(None, None), (0.05, None), (0.05, "ragged")])
@pytest.mark.parametrize(
    "T, N, I, H", [(1, 1, 530, 97), (7, 1, 5, 32), (9, 3, 64, 97), (40, 2, 33, 200), (5, 7, 1, 300)]
)
@pytest.mark.parametrize("layer", [RNN, GRU, LSTM])
@pytest.mark.parametrize("count", [pytest.param(2, marks=pytest.mark.slow), 3])  # other tests run on two
@pytest.mark.parametrize("packing", [0, 10**9])
def test_shared_work_gives_what_numpy_gives(monkeypatch, layer, T, N, I, H, lengths, clip, count, packing, by_units):
    """Both directions, training and inference, gradient flow included, weights packed and as they lie."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
    for name in ("LOOP_FLOPS", "SUM_FLOPS", "ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"):
        monkeypatch.setattr(costs, name, (1e18 if by_units else 1) if name.startswith("ENOUGH") else 0)
    monkeypatch.setattr(costs, "UNITS_FLOPS", 1 if by_units else 1e18)
    for name in ("PACKING_ROWS", "COPYING_ROWS"):
        monkeypatch.setattr(costs, name, packing)
    plan = sharing.plan_loop(LSTM_CELL, full(T, N), T, N, I, H, FLOAT32)
    assert plan.by_units == by_units and len(plan.shares) == min(count, H // host().width(FLOAT32) if by_units else N)
    rng = np.random.default_rng(T)
    x, dy = rng.standard_normal((T, N, I)), rng.standard_normal((T, N, 2 * H))
    given = None if lengths is None else rng.integers(0, T + 1, N)
    outcomes = []
    for executor in ("numpy", "compiled"):
        made = layer(I, H, executor=executor, dtype="float64", rng=1, bidirectional=True, clip_in_time=clip)
        y, state, backward = made(x, lengths=given)
        flow = np.zeros((2, made.cell.states, T))
        dx, dstate = backward(dy, flow=flow)
        inferred, _, _ = made(x, lengths=given, training=False)
        states = (state, dstate) if layer is not LSTM else (*state, *dstate)
        outcomes.append([y, inferred, dx, flow, *states, *made.grads.values()])
    for ours, expected in zip(outcomes[1], outcomes[0], strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("by_units", [False, True])
def test_a_cells_own_parameters_learn_from_every_thread(monkeypatch, request, by_units):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    for name, value in (("LOOP_FLOPS", 0), ("SUM_FLOPS", 0), ("UNITS_FLOPS", 1 if by_units else 1e18)):
        monkeypatch.setattr(costs, name, value)
    for name in ("ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"):
        monkeypatch.setattr(costs, name, 1e18 if by_units else 1)
    cell, (T, N, I, H) = request.config.user_cells["peephole_lstm"], (4, 7, 3, 96)
    plan = sharing.plan_loop(cell, full(T, N), T, N, I, H, np.dtype(np.float64))
    assert len(plan.shares) == 3 and plan.by_units == by_units
    gradients = []
    for executor in ("numpy", "compiled"):
        layer = Recurrent(
            cell, I, H, executor=executor, dtype="float64", rng=1, init=dict.fromkeys(cell.params, normal(0.5))
        )
        y, _, backward = layer(np.random.default_rng(2).standard_normal((T, N, I)))
        backward(np.random.default_rng(3).standard_normal(y.shape))
        gradients.append(layer.grads)
    for name, expected in gradients[0].items():
        np.testing.assert_allclose(gradients[1][name], expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_layers_that_share_units_in_several_python_threads_at_once(monkeypatch):
    """Their parts wait for each other: two calls that held one of the pool's threads each would wait for ever."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")

    def step(seed):
        layer = LSTM(96, 320, executor="compiled", rng=seed)
        y, _, backward = layer(np.random.default_rng(seed).standard_normal((20, 2, 96)))
        return np.concatenate([part.ravel() for part in (y, backward(np.ones_like(y))[0], *layer.grads.values())])

    assert sharing.plan_loop(LSTM_CELL, full(20, 2), 20, 2, 96, 320, FLOAT32).by_units
    alone = [step(seed) for seed in range(4)]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(step, list(range(4)) * 6))
    for k, found in enumerate(together):
        np.testing.assert_array_equal(found, alone[k % 4])


def test_where_no_thread_can_be_started_one_does_all(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    layer, x = LSTM(96, 320, executor="compiled", rng=0), np.ones((20, 2, 96), np.float32)

    def step():
        layer.zero_grad()
        y, _, backward = layer(x)
        return y, backward(np.ones_like(y))[0], layer.grads.flat.copy()

    def none(work):
        raise RuntimeError("can't start new thread")

    expected = step()
    assert sharing.plan_loop(LSTM_CELL, full(20, 2), 20, 2, 96, 320, FLOAT32).by_units
    with monkeypatch.context() as patch:
        patch.setattr(crew, "_office", crew._Office())
        patch.setattr(threads, "start", none)
        for alone, both in zip(step(), expected, strict=True):
            np.testing.assert_allclose(alone, both, rtol=0, atol=1e-5 * np.abs(both).max())
        a, b = np.ones((300, 400)), np.ones((400, 300))
        np.testing.assert_array_equal(threads.matmul(a, b), a @ b)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_shares_units_too():
    code = """
        import os
        import numpy as np
        from gpurnn.recurrent import LSTM

        layer, x = LSTM(96, 320, executor="compiled", rng=0), np.ones((20, 2, 96), np.float32)
        before = layer(x)[0].sum()
        child = os.fork()
        same = layer(x)[0].sum() == before
        if child == 0:
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0 and same
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPURNN_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, cwd=ROOT, check=True, timeout=120)
