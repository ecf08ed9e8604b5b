"""Layers in heads on the CPU: against the block-diagonal layer that they stand for, the oracle and central differences."""

import numpy as np
import pytest

import gpurnn
from gpurnn import GRU, LSTM, RNN, Recurrent, backend, check_gradients, diagnose
from gpurnn.cells import GRU_CELL, INDRNN_CELL, LSTM_CELL, RNN_CELLS
from gpurnn.cpu import costs, sharing
from gpurnn.cpu.simd import host
from tests.cpu.test_executors import TOLERANCES, compare, unwritten_memory_shows  # noqa: F401

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the CPU's executors")

CELLS = {"rnn": RNN_CELLS["tanh"], "gru": GRU_CELL, "lstm": LSTM_CELL}
FLOAT32 = np.dtype(np.float32)


def block_diagonal(blocks, G, heads):
    """(G*H, H/K) -> (G*H, H), entry by entry as the docstring of `Recurrent` says."""
    rows, width = blocks.shape
    H = rows // G
    whole = np.zeros((rows, H), blocks.dtype)
    for g in range(G):
        for u in range(H):
            k = u // (H // heads)
            whole[g * H + u, k * width : (k + 1) * width] = blocks[g * H + u]
    return whole


def pair(kind, heads, H, **options):
    """A layer in heads and the same with one head, its weight_hh block-diagonal."""
    layer, dense = (kind(3, H, heads=k, dtype="float64", rng=4, **options) for k in (heads, 1))
    for name, value in layer.params.items():
        if name.startswith("weight_hh"):
            value = block_diagonal(value, layer.cell.gates, heads)
        dense.params[name][...] = value
    return layer, dense


def outcome(layer, x, dy, lengths):
    y, state, backward = layer(x, lengths=lengths)
    flow = np.zeros((layer.num_layers * layer.directions, layer.cell.states, len(x)))
    dx, dstate = backward(dy, flow=flow)
    states = (state, dstate) if layer.cell.states == 1 else (*state, *dstate)
    return [y, layer(x, lengths=lengths, training=False)[0], dx, flow, *states]


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("heads, H", [(2, 10), (5, 35), (8, 8), (3, 51)])
@pytest.mark.parametrize("kind", [RNN, GRU, LSTM])
def test_heads_are_a_block_diagonal_layer(kind, heads, H, executor):
    options = {"bidirectional": True, "trainable_h0": True, "clip_in_time": 0.3, "executor": executor}
    layer, dense = pair(kind, heads, H, num_layers=2, **options)
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((6, 4, 3)), rng.standard_normal((6, 4, 2 * H))
    ours, theirs = (outcome(one, x, dy, [6, 0, 3, 5]) for one in (layer, dense))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * max(1, np.abs(b).max()))
    for name, gradient in layer.grads.items():
        expected = dense.grads[name]
        if name.startswith("weight_hh"):
            assert gradient.shape == (layer.cell.gates * H, H // heads)
            gradient, expected = (
                block_diagonal(gradient, layer.cell.gates, heads),
                expected * (block_diagonal(np.ones_like(gradient), layer.cell.gates, heads) > 0),
            )
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-12 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize("lengths", [[2, 1, 0], [0, 0, 0]])
def test_steps_at_which_no_row_lives(lengths):
    compare(LSTM_CELL, (4, 3, 2, 6), heads=3, lengths=lengths)
    compare(GRU_CELL, (0, 3, 2, 6), heads=3)
    compare(GRU_CELL, (4, 0, 2, 6), heads=3)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads, H", [(2, 34), (3, 48), (7, 7), (4, 260)])
@pytest.mark.parametrize("name", CELLS)
def test_compiled_agrees_with_the_oracle(name, heads, H, dtype):
    compare(CELLS[name], (5, 7, 4, H), dtype, heads=heads)
    compare(CELLS[name], (5, 3, 4, H), dtype, heads=heads, reverse=True, lengths=[2, 5, 0], clip=0.1, keep=True)
    compare(CELLS[name], (1, 1, 4, H), dtype, heads=heads, bias=False)


@pytest.mark.parametrize("lengths", [None, [9, 4, 0]])
@pytest.mark.parametrize(
    "count, heads, H, meets", [(2, 4, 64, False), (3, 3, 96, False), (2, 3, 96, True), (3, 2, 96, True)]
)
@pytest.mark.parametrize("packing", [0, 10**9])
def test_threads_have_whole_heads_or_meet(monkeypatch, count, heads, H, meets, packing, lengths):
    monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
    for name in ("LOOP_FLOPS", "SUM_FLOPS"):
        monkeypatch.setattr(costs, name, 0)
    for name in ("ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"):
        monkeypatch.setattr(costs, name, 1e18)
    monkeypatch.setattr(costs, "UNITS_FLOPS", 1)
    for name in ("PACKING_ROWS", "COPYING_ROWS"):
        monkeypatch.setattr(costs, name, packing)
    plan = sharing.plan_loop(LSTM_CELL, np.full(9, 3), 9, 3, 3, H, FLOAT32, heads)
    assert plan.by_units and plan.meets == meets and len(plan.shares) == count
    assert not meets or H % host().width(FLOAT32) == 0
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((9, 3, 3)), rng.standard_normal((9, 3, 2 * H))
    for kind in (GRU, LSTM):
        found = []
        for executor in ("numpy", "compiled"):
            layer = kind(3, H, heads=heads, dtype="float64", bidirectional=True, executor=executor, rng=1)
            found.append([*outcome(layer, x, dy, lengths), *layer.grads.values()])
        for expected, ours in zip(*found, strict=True):
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-12 * max(1, np.abs(expected).max()))


def test_heads_that_are_shared_evenly_leave_no_thread_waiting():
    def plan(heads, N=16, H=768):
        return sharing._shared(LSTM_CELL, np.full(50, N), sharing.Share(slice(0, N), slice(0, H), slice(0, 64)), H // heads, 10**9, FLOAT32, 2)  # fmt: skip

    assert [share.units for share in plan(8).shares] == [slice(0, 384), slice(384, 768)] and not plan(8).meets
    assert not plan(1).by_units and not plan(3).by_units  # by rows, which need not meet either
    assert plan(3, N=1).meets and plan(1, N=1).meets


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("kind", [RNN, GRU, LSTM])
def test_gradients(kind, executor):
    options = {"heads": 2, "bidirectional": True, "dtype": "float64", "executor": executor, "rng": 0}
    check_gradients(kind(2, 6, 2, trainable_h0=True, **options), lengths=[3, 0, 4], N=3)
    check_gradients(kind(2, 6, 1, **options), T=2, N=2)


def test_parameters_begin_head_by_head():
    layer = LSTM(3, 12, heads=3, rng=0)
    weight = layer.params["weight_hh_l0"]
    assert weight.shape == (48, 4) and layer.params["weight_ih_l0"].shape == (48, 3)
    for block in weight.reshape(12, 4, 4):
        np.testing.assert_allclose(block @ block.T, np.eye(4), atol=1e-6)
    identity = RNN(3, 12, heads=3, init={"weight_hh": "identity"}).params["weight_hh_l0"]
    np.testing.assert_array_equal(identity, np.tile(np.eye(4, dtype=np.float32), (3, 1)))
    one, none = (LSTM(3, 12, rng=0, **given) for given in ({"heads": 1}, {}))
    np.testing.assert_array_equal(one.params.flat, none.params.flat)


def test_what_is_refused():
    with pytest.raises(ValueError, match="heads: expected a divisor of hidden_size = 12, got 5"):
        LSTM(3, 12, heads=5)
    with pytest.raises(ValueError, match="heads: expected a whole number from 1, got 0"):
        LSTM(3, 12, heads=0)
    with pytest.raises(ValueError, match="heads: expected 1 for indrnn, whose units meet no others, got 2"):
        Recurrent(INDRNN_CELL, 3, 12, heads=2)
    with pytest.raises(ValueError, match=r"weight_hh_l0.*\(4\*H, H/3\) = \(48, 4\).*\(48, 12\)"):
        LSTM(3, 12, heads=3).load_state_dict(LSTM(3, 12).state_dict())


@pytest.mark.parametrize("optimizer", [gpurnn.SGD, gpurnn.AdamW])
def test_training_goes_on_where_it_was(optimizer):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((5, 3, 3)).astype(np.float32), rng.standard_normal((5, 3, 12)).astype(np.float32)

    def step(layer, update):
        layer.zero_grad()
        layer(x)[2](dy)
        gpurnn.clip_grad_norm(layer, 0.5)
        update.step()

    layer = LSTM(3, 12, heads=3, rng=0)
    update = optimizer(layer, lr=0.01)
    step(layer, update)
    other = LSTM(3, 12, heads=3, rng=1)
    other.load_state_dict(layer.state_dict())
    resumed = optimizer(other, lr=0.01)
    resumed.load_state_dict(update.state_dict())
    before = layer.params.flat.copy()
    step(layer, update)
    step(other, resumed)
    assert (layer.params["weight_hh_l0"] != LSTM(3, 12, heads=3, rng=0).params["weight_hh_l0"]).all()
    assert not np.array_equal(layer.params.flat, before)
    np.testing.assert_array_equal(layer.params.flat, other.params.flat)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM])
def test_instruments_see_the_block_diagonal_layer(kind):
    layer, dense = pair(kind, 3, 12)
    x = np.random.default_rng(0).standard_normal((5, 2, 3))
    np.testing.assert_allclose(diagnose.jacobians(layer, x), diagnose.jacobians(dense, x), atol=1e-13)
    ours, theirs = (diagnose.recurrent_spectrum(one) for one in (layer, dense))
    np.testing.assert_allclose(ours.radius, theirs.radius)
    np.testing.assert_allclose(ours.sigma_max, theirs.sigma_max)
    assert ours.bound == pytest.approx(theirs.bound) and ours.eigenvalues.shape == theirs.eigenvalues.shape
    found = diagnose.decompose(layer, x)
    layer.zero_grad()
    y, _, backward = layer(x)
    backward(np.ones_like(y))
    for name, gradient in layer.grads.items():
        np.testing.assert_allclose(found.gradients[name], gradient, atol=1e-12, err_msg=name)
    assert diagnose.gradient_flow(layer, x).norms == pytest.approx(diagnose.gradient_flow(dense, x).norms)
