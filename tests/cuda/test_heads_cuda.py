"""Layers in heads on the CUDA executors: stand-in and interpreter against NumPy, as `test_kernels` does it."""

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import numpy as np

import gpurnn
from gpurnn import backend, check_gradients
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL
from gpurnn.kernels.tiles import Ffma, Mma
from tests import fake_cupy
from tests.conftest import USER_CELLS
from tests.interpreted import interpreted
from tests.kernels.test_kernels import compare, forced, kind_of

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

RNN = CELLS["rnn_tanh"]


@pytest.mark.parametrize("cell", [RNN, GRU_CELL, LSTM_CELL], ids=lambda cell: cell.name)
@pytest.mark.parametrize("heads", [2, 6])
def test_step(cell, heads):
    """Fewer heads than gates and more: a call for each head, a call for each gate."""
    compare(cell, (4, 3, 2, 6), "step", heads=heads, flow=True, bidirectional=True, lengths=[2, 4, 0], clip_in_time=0.3)
    compare(cell, (4, 3, 2, 6), "step", "float64", heads=heads, num_layers=2, trainable_h0=True, given=False)


@pytest.mark.parametrize("kind", ["tf32", "bfloat16", "float16"])
def test_step_in_fewer_bits(kind):
    compare(LSTM_CELL, (3, 4, 2, 8), "step", kind, heads=2, inference=False)


def test_gradients_in_double():
    with interpreted():
        check_gradients(gpurnn.LSTM(1, 2, heads=2, bias=False, dtype="float64", executor="step", rng=0), T=2, N=1)


def test_a_captured_step_is_the_step():
    """The products of heads are recorded with the others."""
    with interpreted():
        seen = []
        for capture in (False, True):
            layer = gpurnn.LSTM(2, 6, heads=3, executor="step", rng=0)
            optimizer = gpurnn.SGD(layer, lr=0.1)
            x = fake_cupy.asarray(np.random.default_rng(0).standard_normal((3, 2, 2)).astype(np.float32))

            def step(layer=layer, optimizer=optimizer, x=x):
                layer.zero_grad()
                y, _, backward = layer(x, copy=False)
                backward(fake_cupy.ones(y.shape, np.float32))
                optimizer.step()
                return y

            run = gpurnn.captured(step) if capture else step
            for _ in range(4):
                run()
            seen.append(layer.params.flat.get())
        np.testing.assert_array_equal(*seen)


def test_who_runs_heads():
    with interpreted():

        def chosen(H, heads, precision="float32"):
            engine = gpurnn.executors.choose(None, LSTM_CELL, H, 16, np.dtype("float32"), precision, heads=heads)
            return getattr(engine, "name", "step")

        assert [chosen(768, heads, "bfloat16") for heads in (1, 4, 16)] == ["persistent", "persistent", "resident"]
        assert [chosen(4096, heads) for heads in (1, 4)] == ["step", "persistent"]
        layer = gpurnn.LSTM(2, 4096, heads=2, executor="resident")
        with pytest.raises(ValueError, match="weight_hh of lstm with 4096 units in 2 heads does not fit one SM"):
            layer(fake_cupy.zeros((2, 2, 2), np.float32))


TILES = [
    (LSTM_CELL, Ffma(2, 4, 2, 1), 1, "alone"),
    (GRU_CELL, Mma("bfloat16", 2, 1, 8, 1), 1, "alone"),
    (LSTM_CELL, Ffma(1, 4, 2, 1), 2, "flagged"),
    (RNN, Ffma(2, 8, 1, 0), 2, "counted"),
    (LSTM_CELL, Mma("tf32", 2, 2, 8, 1), 2, "flagged"),
    (GRU_CELL, Mma("float16", 2, 1, 8, 0), 2, "clustered"),
]


@pytest.mark.parametrize(
    ("cell", "tile", "blocks", "exchange"), TILES, ids=lambda value: getattr(value, "name", str(value))
)
def test_a_head_is_a_group(cell, tile, blocks, exchange):
    """Padding of a head's units and of rows, heads that stop at different steps."""
    executor = "resident" if blocks == 1 else "persistent"
    options = {"bidirectional": True, "lengths": [2, 3, 0, 5, 1], "clip_in_time": 0.3}
    with forced(tile, blocks, exchange):
        compare(cell, (5, 5, 2, 57), executor, kind_of(tile), heads=3, **options)


def test_states_and_parameters_of_a_users_cell():
    with forced(Ffma(1, 4, 2, 1), 1, "alone"):
        compare(USER_CELLS["peephole_lstm"], (4, 3, 2, 15), "resident", heads=3, trainable_h0=True, given=False)


def test_more_heads_than_run_at_once(monkeypatch):
    """A launch may end between the heads of one group of rows."""
    monkeypatch.setattr("tests.interpreted.RUNNING", 5)
    with forced(Ffma(1, 4, 1, 1), 2, "flagged"):
        compare(RNN, (4, 3, 2, 27), "persistent", heads=3, lengths=[4, 2, 3], inference=False)
