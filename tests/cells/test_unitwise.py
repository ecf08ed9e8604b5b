"""Cells that never read r: no recurrent matrix anywhere, independent units, and the same results on every executor."""

import pickle

import numpy as np
import pytest

import gpurnn
from gpurnn import backend, diagnose
from gpurnn.cells import CELLS, UNITWISE_CELLS, Cell, tanh
from gpurnn.cells.functions import softplus
from gpurnn.cpu import costs, sharing

ON_CPU = pytest.mark.skipif(backend.name == "cuda", reason="the executors of a CPU")
each = pytest.mark.parametrize("cell", UNITWISE_CELLS, ids=lambda cell: cell.name)


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def results(layer, T=9, N=5, lengths=None, **options):
    """Every tensor of a step; `options` of backward."""
    x, dy = values(T, N, layer.input_size), values(T, N, layer.directions * layer.hidden_size, seed=1)
    y, final, backward = layer(backend.asarray(x, layer.dtype, "x"), lengths=lengths)
    layer.zero_grad()
    dx, dinitial = backward(backend.asarray(dy, layer.dtype, "dy"), **options)
    finals, dinitials = ((part,) if layer.cell.states == 1 else part for part in (final, dinitial))
    return [backend.to_numpy(part) for part in (y, dx, *finals, *dinitials, *layer.grads.values())]


def test_which_cells_are_without():
    assert [cell.name for cell in CELLS.values() if not cell.recurrent] == [cell.name for cell in UNITWISE_CELLS]


@each
def test_there_is_no_recurrent_parameter_and_no_slot_for_r(cell):
    layer = gpurnn.Recurrent(cell, 3, 4, 2, bidirectional=True)
    kinds = {name.removesuffix("_reverse").rsplit("_l", 1)[0] for name in layer.params}
    assert kinds == {"weight_ih", "bias_ih", *cell.params}
    assert {*gpurnn.Recurrent(cell, 3, 4, bias=False).state_dict()} == {f"{k}_l0" for k in ("weight_ih", *cell.params)}
    assert not cell.trace.split and cell.trace.x_start == 0
    assert cell.trace.slots == max(cell.gates, len(cell.trace.kept))
    with pytest.raises(ValueError, match="init: expected names among weight_ih, bias_ih"):
        gpurnn.Recurrent(cell, 3, 4, init={"weight_hh": "zeros"})


@ON_CPU
@each
def test_training_goes_down(cell):
    """Starting values are some that learn: the mean of what was seen so far."""
    model = gpurnn.SequenceModel(None, gpurnn.Recurrent(cell.name, 1, 16, rng=0), gpurnn.Linear(16, 1, rng=1))
    x = np.abs(values(20, 16, 1))
    target = x.cumsum(0) / np.arange(1, 21)[:, None, None]
    optimizer, losses = gpurnn.Adam(model, lr=0.01), []
    for _ in range(150):
        model.zero_grad()
        losses.append(float(gpurnn.full_bptt(model, x, target.astype(np.float32), gpurnn.mean_squared_error)[0]))
        optimizer.step()
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])


@ON_CPU
@pytest.mark.parametrize("way", ["rows", "units", "one"])
@pytest.mark.parametrize("options", [{}, {"clip_in_time": 0.05}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("lengths", [None, [9, 7, 7, 0, 2]], ids=["full", "ragged"])
def test_threads_share_rows_or_units(monkeypatch, way, options, lengths):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "1" if way == "one" else "3")
    monkeypatch.setattr(costs, "LOOP_FLOPS", 0)
    for name in ("ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"):
        monkeypatch.setattr(costs, name, 1e18 if way == "units" else 1)
    for name in ("PACKING_ROWS", "COPYING_ROWS"):
        monkeypatch.setattr(costs, name, 0)
    for cell in (CELLS["sru"], CELLS["mingru"]):
        made = {
            executor: gpurnn.Recurrent(cell, 7, 70, executor=executor, rng=0, **options)
            for executor in ("compiled", "numpy")
        }
        shared = sharing.plan_loop(cell, np.full(9, 5), 9, 5, 7, 70, np.dtype("float32"))
        assert (len(shared.shares) > 1, shared.by_units) == {
            "rows": (True, False),
            "units": (True, True),
            "one": (False, False),
        }[way]
        for got, expected in zip(*(results(layer, lengths=lengths, keep=True) for layer in made.values()), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


@ON_CPU
@each
def test_executors_agree(cell):
    for options in ({}, {"bias": False, "bidirectional": True}):
        layers = [gpurnn.Recurrent(cell, 3, 37, executor=name, rng=0, **options) for name in ("compiled", "numpy")]
        for got, expected in zip(*map(results, layers), strict=True):
            np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5)


def test_kernels_that_keep_a_matrix_refuse():
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.interpreted import interpreted

    with interpreted():
        for executor in ("resident", "persistent"):
            layer = gpurnn.Recurrent("mingru", 3, 4, executor=executor)
            with pytest.raises(ValueError, match=f"executor: {executor} keeps weight_hh on chip, and mingru has none"):
                layer(backend.xp.zeros((2, 1, 3), "float32"))


@pytest.mark.parametrize(
    "options",
    [
        {"lengths": [7, 7, 5, 4, 0, 1], "bidirectional": True, "clip_in_time": 0.1},
        {"dtype": "float64", "num_layers": 2, "trainable_h0": True, "given": False, "keep": True},
        {"bias": False, "flow": True},
        {"precision": "bfloat16"},
    ],
    ids=str,
)
def test_on_interpreted_kernels(options):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.kernels.test_kernels import compare

    others = {name: value for name, value in options.items() if name not in ("dtype", "precision")}
    kind = options.get("dtype", options.get("precision", "float32"))
    compare(CELLS["sru"], (7, 6, 3, 5), "step", kind, **others)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (0, 2, 3, 4), (2, 0, 3, 4), (5, 3, 2, 50)], ids=str)
def test_odd_sizes_on_interpreted_kernels(shape):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.kernels.test_kernels import compare

    compare(CELLS["indrnn"], shape, "step")


def test_a_minlstm_with_both_gates_shut_holds():
    cell = CELLS["minlstm"]
    gates = tuple(np.full(3, v, np.float32) for v in (-500, -500, 0.25))
    after, saved = cell.trace.run_forward(gates, (0,) * 3, (np.full(3, 2, np.float32),), ())
    np.testing.assert_allclose(after[0], (2 + 0.75) / 2, rtol=1e-6)
    dx, *_ = cell.trace.run_backward((np.ones(3, np.float32),), saved, (np.full(3, 2, np.float32),), after, ())
    assert all(np.isfinite(part).all() for part in dx)


def test_softplus():
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    with np.errstate(all="raise", under="ignore"):
        np.testing.assert_allclose(softplus(x), [0, np.log1p(np.exp(-1)), np.log(2), np.log1p(np.e), 1e4], rtol=1e-12)


def test_cells_begin_where_they_say():
    lru = gpurnn.Recurrent("lru", 2, 5000, rng=0).params
    m = np.exp(-np.exp(backend.to_numpy(lru["nu_l0"])))
    assert 0.9 <= m.min() < 0.91 and 0.99 < m.max() < 0.9995
    decay = backend.to_numpy(gpurnn.Recurrent("rglru", 2, 5000, rng=0).params["decay_l0"])
    a = np.exp(-8 * np.log1p(np.exp(decay)))
    assert 0.9 <= a.min() < 0.91 and 0.99 < a.max() < 0.9995
    u = backend.to_numpy(gpurnn.Recurrent("indrnn", 2, 5000, rng=0, init={"u": "zeros"}).params["u_l0"])
    assert not u.any()


@pytest.mark.parametrize(
    ("init", "says"),
    [
        ({"v": np.ones}, "expected names in init among u, got 'v'"),
        ({"u": 3}, r"init\['u'\]: expected a function"),
        ([], "expected init to be a mapping from names of params"),
    ],
)
def test_starting_values_are_functions_of_params(init, says):
    with pytest.raises((ValueError, TypeError), match=says):
        Cell("c", 1, 1, lambda x, r, state, params: (tanh(x[0] + params[0]),), params=("u",), init=init)


def test_names_of_shipped_cells():
    assert gpurnn.Recurrent("lru", 2, 3).cell is CELLS["lru"]
    assert pickle.loads(pickle.dumps(CELLS["lru"])) is CELLS["lru"]
    with pytest.raises(TypeError, match=r"expected a gpurnn.Cell or one of rnn_tanh, .*lru.*, got 'elru'"):
        gpurnn.Recurrent("elru", 2, 3)


def test_a_verdict_without_a_matrix():
    layer = gpurnn.Recurrent("mingru", 2, 8, dtype="float64", rng=0)
    (verdict,) = diagnose.verdicts(layer, values(12, 3, 2).astype(np.float64))
    assert verdict.radius is None and verdict.sigma_max is None and "weight_hh" not in str(verdict)
    with pytest.raises(ValueError, match="expected a cell with a recurrent matrix, got mingru"):
        diagnose.recurrent_spectrum(layer)
