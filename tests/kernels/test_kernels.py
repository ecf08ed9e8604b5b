"""The CUDA executors without a GPU: the kernels that Numba emits, run in the interpreter, against the NumPy executor.

A kernel takes seconds to build: tests that need no size of their own share their kernels, of 5 units, 17 or 33.
Every launch is also checked for bounds, alignment, races between threads and blocks, divergence, deadlock and reads of
memory that nobody wrote; `tests/ptx` says how.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend, executors
from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.app.training import Training
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL, Cell, exp
from gpurnn.cuda import on_chip
from gpurnn.cuda.on_chip import RESIDENT
from gpurnn.kernels import exchange, plan
from gpurnn.kernels.tiles import Ffma, Mma
from tests import fake_cupy
from tests.conftest import SOME, USER_CELLS
from tests.interpreted import Interpreted, interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

# Relative to a tensor's largest entry (or 1 for what is added to ones), against the NumPy executor in float64.
TOLERANCES = {"float64": 1e-12, "float32": 1e-5, "tf32": 3e-3, "float16": 3e-3, "bfloat16": 2e-2}
EXECUTORS = ("step", "resident", "persistent")
SEEDS = (1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow))


def results(
    cell, shape, *, dtype="float64", lengths=None, given=True, flow=False, keep=False, inference=True, seed=0, **options
):
    """Every tensor of a training pass of a layer, and of one without a tape, by name, on the host."""
    T, N, I, H = shape
    rng = np.random.default_rng(seed)
    layer = gpurnn.Recurrent(cell, I, H, dtype=dtype, rng=1, **options)
    D, L = layer.directions, layer.num_layers

    def draw(*size):
        return backend.asarray(rng.standard_normal(size).astype("float32"), dtype, "x")

    for name, value in layer.params.items():  # biases, too, and the cell's own parameters
        value[...] = draw(*value.shape) * (0.7 * H**-0.5 if "weight" in name else 0.5)
    layer.grads.flat[...] = 1
    x, dy = draw(T, N, I), draw(T, N, D * H)
    state, dstate = (tuple(draw(L * D, N, H) for _ in range(cell.states)) for _ in range(2))
    if cell.states == 1:
        state, dstate = state[0], dstate[0]
    found = {}
    y, final, backward = layer(x, state if given else None, lengths=lengths)
    found["y"] = y
    found |= _named("final", final)
    norms = backend.xp.zeros((L * D, cell.states, T)) if flow else None
    for call in range(2 if keep else 1):
        dx, dinitial = backward(dy, dstate, keep=keep and call == 0, flow=norms)
        found |= {f"dx {call}": dx} | _named(f"dinitial {call}", dinitial)
    if flow:
        found["flow"] = norms
    found |= {f"d{name}": value for name, value in layer.grads.items()}
    if inference:  # a kernel of its own, which has to be compiled
        found |= _named("inference", layer(x, state if given else None, lengths=lengths, training=False)[:2])
    return {name: np.asarray(backend.to_numpy(value), np.float64) for name, value in found.items()}


def _named(name, values):
    if not isinstance(values, tuple):
        return {name: values}
    return {key: value for k, part in enumerate(values) for key, value in _named(f"{name} {k}", part).items()}


def compare(cell, shape, executor, kind="float32", seed=None, **options):
    """kind: a dtype, or the precision of a float32 layer's products."""
    precise = {"dtype": kind} if kind.startswith("float") and kind != "float16" else {"precision": kind}
    expected = results(cell, shape, executor="numpy", **options)
    before = Interpreted.launches
    with interpreted(seed=seed):
        got = results(cell, shape, executor=executor, **({"dtype": "float32"} | precise | options))
    assert Interpreted.launches > before or not shape[0] or not shape[1], "nothing ran in the interpreter"
    for name, reference in expected.items():
        assert got[name].shape == reference.shape, name
        if reference.size:
            largest = max(np.abs(reference).max(), 1.0)
            error = np.abs(got[name] - reference).max() / largest
            assert error <= TOLERANCES[kind], f"{name}: off by {error:.1e} of its largest entry"


def test_step(any_cell):
    compare(any_cell, (4, 3, 2, 5), "step", inference=any_cell.name in SOME)


def test_step_in_double(some_cell):
    compare(some_cell, (4, 3, 2, 5), "step", "float64", inference=False)


def test_resident(some_cell):
    """A cell's own mathematics is the same code as in `test_step`."""
    if not some_cell.recurrent:
        pytest.skip("it has no matrix to keep on chip")
    compare(some_cell, (4, 3, 2, 5), "resident", inference=some_cell.name == SOME[0])


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in ("lstm", "three_states")))  # gru: see the lengths
        for name, cell in (CELLS | USER_CELLS).items()
        if cell.recurrent and name != "every_function"  # whose kinks are crossed by rounding alone
    ],
)
def test_resident_on_tensor_cores(name):
    compare((CELLS | USER_CELLS)[name], (3, 9, 2, 17), "resident", "bfloat16", inference=name == "lstm")


@pytest.mark.parametrize(
    ("shape", "executor"),
    [(shape, executor) for shape in ((1, 1, 1, 5), (0, 2, 3, 5), (2, 0, 3, 5)) for executor in EXECUTORS]
    + [((3, 1, 4, 33), "step"), ((3, 1, 4, 33), "resident")]
    + [pytest.param((3, 1, 4, 33), "persistent", marks=pytest.mark.slow)],
    ids=str,
)
def test_odd_sizes(shape, executor):
    compare(LSTM_CELL, shape, executor)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "reverse",
    [pytest.param(False, id="forward", marks=pytest.mark.slow), pytest.param(True, id="both directions")],
)
def test_lengths_clipping_and_flow(executor, reverse):
    options = {"lengths": [2, 0, 5, 3, 5], "clip_in_time": 0.3, "bidirectional": reverse, "keep": True}
    compare(LSTM_CELL, (5, 5, 3, 5), executor, **options)
    compare(LSTM_CELL, (5, 5, 3, 5), executor, flow=True, **options)
    compare(LSTM_CELL, (5, 5, 3, 5), executor, flow=True, clip_in_time=0.3)


def test_lengths_on_tensor_cores():
    options = {"lengths": [2, 0, 4, 3, 4, 1, 1, 4, 4, 2], "clip_in_time": 0.3, "bidirectional": True}
    compare(GRU_CELL, (4, 10, 3, 17), "resident", "bfloat16", inference=False, **options)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_layers_and_trained_initial_states(executor):
    compare(LSTM_CELL, (3, 2, 3, 5), executor, num_layers=2, trainable_h0=True, given=False, bias=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_any_order_of_warps(kind, seed):
    H = 33 if kind == "float32" else 17  # several warps of a block
    compare(LSTM_CELL, (3, 9, 2, H), "resident", kind, seed, lengths=[3, 3, 1, 0, 2, 3, 2, 2, 3], inference=False)


RNN = CELLS["rnn_tanh"]
SLOW = pytest.mark.slow  # every value of each number, cell and precision stands in a faster case too
TILES = [
    (RNN, Ffma(1, 1, 1, 0)),
    pytest.param(RNN, Ffma(4, 8, 1, 1), marks=SLOW),
    (RNN, Ffma(4, 2, 4, 2)),
    pytest.param(RNN, Mma("bfloat16", 4, 1, 8, 1), marks=SLOW),
    pytest.param(GRU_CELL, Ffma(2, 4, 2, 1), marks=SLOW),
    (GRU_CELL, Ffma(1, 8, 4, 0)),
    (GRU_CELL, Mma("tf32", 2, 1, 8, 0)),
    (LSTM_CELL, Mma("bfloat16", 2, 8, 8, 1)),  # more warps than words to keep
    (LSTM_CELL, Mma("float16", 4, 2, 16, 0)),
]


@contextmanager
def forced(tile, blocks, exchange):
    """Both directions run so, whatever the plan says."""
    choice = plan.Choice(tile, blocks, exchange, plan.Cost(1.0, 1.0, 1.0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_chip.OnChip, "choice", lambda *_: choice)
        yield


def kind_of(tile):
    return getattr(tile, "kind", "float32")


@pytest.mark.parametrize(("cell", "tile"), TILES, ids=lambda value: getattr(value, "name", str(value)))
def test_every_kind_of_tile(cell, tile):
    """More lanes than pairs and fewer, weights in registers, in shared memory and in both."""
    with forced(tile, 1, "alone"):
        options = {"bidirectional": True, "lengths": [2, 3, 0, 4, 1], "inference": False}
        compare(cell, (4, 5, 2, 37), "resident", kind_of(tile), **options)


GROUPS = [
    (RNN, Ffma(1, 2, 2, 1), 3, "flagged"),
    (RNN, Ffma(2, 8, 1, 0), 2, "counted"),
    (RNN, Ffma(1, 4, 4, 1), 2, "clustered"),
    pytest.param(GRU_CELL, Ffma(1, 4, 4, 1), 2, "flagged", marks=SLOW),
    pytest.param(LSTM_CELL, Ffma(1, 4, 2, 1), 4, "clustered", marks=SLOW),
    (LSTM_CELL, Mma("bfloat16", 2, 1, 8, 0), 2, "flagged"),  # two buffers
    pytest.param(LSTM_CELL, Mma("bfloat16", 2, 2, 8, 1), 3, "flagged", marks=SLOW),  # one
    pytest.param(LSTM_CELL, Mma("bfloat16", 2, 2, 8, 1), 3, "clustered", marks=SLOW),
    (GRU_CELL, Mma("float16", 2, 1, 16, 0), 2, "counted"),
    pytest.param(GRU_CELL, Mma("tf32", 2, 2, 8, 1), 2, "clustered", marks=SLOW),
    (RNN, Mma("tf32", 4, 4, 8, 1), 2, "flagged"),  # one
    (USER_CELLS["three_states"], Mma("bfloat16", 2, 2, 8, 1), 3, "clustered"),
    (USER_CELLS["peephole_lstm"], Ffma(1, 4, 2, 1), 2, "flagged"),
]


@pytest.mark.parametrize(
    ("cell", "tile", "blocks", "exchange"), GROUPS, ids=lambda value: getattr(value, "name", str(value))
)
def test_groups_of_blocks(cell, tile, blocks, exchange):
    """Padding of units and of rows, rows of all lengths, groups that stop at different steps."""
    with forced(tile, blocks, exchange):
        options = {"bidirectional": True, "lengths": [2, 3, 0, 5, 1, 5, 4, 5, 1], "inference": kind_of(tile) == "tf32"}
        compare(cell, (5, 9, 2, 41), "persistent", kind_of(tile), **options)


def test_words_come_round():
    """Longer than there are slots for steps, so that words are emptied and waited for again."""
    lengths = [2 * exchange.BOXES + 7, 0, exchange.BOXES + 2]
    with forced(Ffma(1, 4, 1, 1), 2, "flagged"):
        compare(RNN, (lengths[0], 3, 2, 9), "persistent", lengths=lengths, bidirectional=True, inference=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", exchange.KINDS)
def test_groups_in_any_order_of_warps(kind, seed):
    tile = Mma("bfloat16", 2, 2, 8, 0) if kind != "flagged" else Ffma(1, 4, 2, 1)
    with forced(tile, 2, kind):
        compare(RNN, (6, 3, 2, 20), "persistent", kind_of(tile), seed, lengths=[3, 6, 1], inference=False)


def test_more_groups_than_run_at_once(monkeypatch):
    """Blocks that wait for each other are launched as many as run together; the rest of the batch follows."""
    monkeypatch.setattr("tests.interpreted.RUNNING", 5)
    with forced(Ffma(1, 4, 1, 1), 2, "flagged"):
        compare(RNN, (4, 5, 2, 9), "persistent", lengths=[4, 4, 2, 3, 4], inference=False)
    with forced(Ffma(1, 4, 1, 1), 3, "counted"):
        compare(RNN, (4, 3, 2, 9), "persistent", inference=False)


@pytest.mark.parametrize("kind", ["flagged", "counted"])
def test_a_wait_in_vain_is_given_up_and_told(kind, monkeypatch):
    """As where half of a group never came to run: the launch ends, no optimiser would use what it left, and all is told."""
    monkeypatch.setattr(exchange, "LIMIT", 500)
    monkeypatch.setitem(exchange.LOOK, kind, 16)
    launch = Interpreted.__call__

    def half(self, blocks, *arguments):
        launch(self, blocks // 2 if "persistent" in self.kernel.name else blocks, *arguments)

    with interpreted(), forced(Ffma(1, 4, 1, 0), 2, kind):
        monkeypatch.setattr(Interpreted, "__call__", half)
        layer = gpurnn.RNN(2, 6, rng=1, executor="persistent")
        layer(fake_cupy.zeros((3, 1, 2), np.float32), training=False)
        with pytest.raises(RuntimeError, match="gave up waiting for a block that did not run"):
            gpurnn.synchronize()
        gpurnn.synchronize()


def test_inference_in_pieces(monkeypatch):
    """Long sequences are projected and run a few steps at a time; states go from piece to piece."""
    monkeypatch.setattr("gpurnn.cuda.sweeps.INFERENCE_BYTES", 2 * 3 * 4 * 5 * 4)
    for executor in EXECUTORS:
        compare(LSTM_CELL, (5, 3, 2, 5), executor, lengths=[5, 2, 3], bidirectional=True)


def test_what_one_executor_wrote_the_other_goes_back_over():
    found = []
    with interpreted():
        for there, back in (("step", "step"), ("step", "resident"), ("resident", "step")):
            layer = gpurnn.LSTM(3, 5, rng=1, executor=there)
            x = fake_cupy.asarray(np.random.default_rng(0).standard_normal((4, 3, 3)).astype("float32"))
            _, _, backward = layer(x)
            with pytest.MonkeyPatch.context() as patch:
                owner = executors.executor(there) if there == "step" else on_chip.OnChip
                way = executors.executor(back).backward
                patch.setattr(owner, "backward", way if there == "step" else lambda self, *given, way=way: way(*given))
                dx, _ = backward(fake_cupy.ones((4, 3, 5), np.float32))
            found.append(dx.get())
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-5, atol=1e-6)


def test_the_same_bits_twice():
    with interpreted():
        first, second = (results(LSTM_CELL, (4, 3, 2, 17), dtype="float32", executor="resident") for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_the_main_job_trains_on_the_kernels(tmp_path):
    """The steps of `gpurnn train`, gone on with from a checkpoint bit for bit; the losses are those of the CPU."""
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox, die schnelle Füchsin.\n" * 20, "utf-8")
    corpus = load_corpus(text)
    config = TrainConfig(batch=2, k1=4, k2=6, hidden_size=5, embedding_size=5, steps=4, seed=3)

    def whole():
        training = Training(config, corpus)
        return [figures(training.step(flow=k == 1)) for k in range(4)], training

    def figures(result):
        return [float(value) for value in result]

    with interpreted():
        before = Interpreted.launches
        seen, training = whole()
        assert Interpreted.launches >= before + 4 * 4, "each step packs weight_hh twice, goes forward and back"
        pieces = Training(config, corpus)
        first = [figures(pieces.step(flow=k == 1)) for k in range(2)]
        checkpoint.save(tmp_path / "model.safetensors", pieces.checkpoint())
        resumed = Training(config, corpus)
        assert resumed.restore(checkpoint.load(tmp_path / "model.safetensors")) == []
        assert first + [figures(resumed.step()) for _ in range(2)] == seen
        for name, value in training.model.state_dict().items():
            np.testing.assert_array_equal(resumed.model.state_dict()[name], value)
        rounded = Training(replace(config, precision="bfloat16"), corpus)
        fewer_bits = [figures(rounded.step()) for _ in range(4)]
        assert fewer_bits != seen
    np.testing.assert_allclose(seen, whole()[0], rtol=1e-4)
    np.testing.assert_allclose(fewer_bits, seen, rtol=2e-2)


def test_a_row_s_nan_stays_in_its_row():
    for precision, H in (("float32", 33), ("bfloat16", 17)):
        with interpreted():
            layer = gpurnn.LSTM(2, H, rng=1, executor="resident", precision=precision)
            x = np.zeros((3, 10, 2), np.float32)
            x[1, 4] = np.nan
            y, _, backward = layer(fake_cupy.asarray(x))
            dx, _ = backward(fake_cupy.ones((3, 10, H), np.float32))
            y, dx = y.get(), dx.get()
        others = [n for n in range(10) if n != 4]
        assert np.isfinite(y[:, others]).all() and np.isfinite(dx[:, others]).all()
        assert np.isnan(y[1:, 4]).all() and np.isfinite(y[0, 4]).all()


LARGEST = ((RNN, "float32", 288), (RNN, "bfloat16", 320), (GRU_CELL, "bfloat16", 192), (LSTM_CELL, "float32", 136))


def _dividing():
    """Its backward makes NaN of nothing but zeros, as padding has them."""

    def forward(x, r, state, params):
        return (exp(0.1 * (x[0] + r[0])),), ()

    def backward(dnext, saved, state, next_state, params):
        da = 0.1 * dnext[0] * next_state[0] * next_state[0] / next_state[0]
        return (da,), (da,), (0,), ()

    return Cell("dividing", 1, 1, forward, backward)


@pytest.mark.parametrize(
    ("tile", "blocks", "kind"),
    [
        pytest.param(Ffma(2, 4, 2, 1), 1, "alone", marks=SLOW),
        (Ffma(2, 4, 2, 1), 2, "flagged"),
        (Mma("bfloat16", 2, 1, 8, 0), 2, "clustered"),
    ],
    ids=str,
)
def test_padding_reaches_no_unit(tile, blocks, kind):
    with forced(tile, blocks, kind):
        compare(_dividing(), (3, 3, 2, 35), "persistent", kind_of(tile), inference=False)


def test_an_infinite_initial_state_stays_where_it_is():
    state = np.zeros((1, 3, 35), np.float32)
    state[0, 1, 34] = np.inf
    outputs = {}
    for name, context in (("numpy", nullcontext()), ("resident", interpreted())):
        with context, forced(Ffma(2, 4, 2, 1), 1, "alone"):
            layer = gpurnn.RNN(2, 35, rng=1, executor=name)
            outputs[name] = backend.to_numpy(
                layer(backend.xp.ones((3, 3, 2), np.float32), backend.xp.asarray(state))[0]
            )
    np.testing.assert_allclose(outputs["resident"], outputs["numpy"], rtol=1e-5, atol=1e-6)


def test_the_choice_and_its_limits():
    float32 = np.dtype("float32")
    with interpreted():

        def chosen(cell, H, N, dtype=float32, precision="float32"):
            engine = gpurnn.executors.choose(None, cell, H, N, dtype, precision)
            return engine.name if isinstance(engine, on_chip.OnChip) else engine.__name__.rpartition(".")[2]

        assert chosen(LSTM_CELL, 16, 4) == "resident"
        assert chosen(LSTM_CELL, 512, 16) == chosen(GRU_CELL, 1024, 32, precision="bfloat16") == "persistent"
        assert chosen(LSTM_CELL, 4096, 64) == chosen(LSTM_CELL, 16, 4, np.dtype("float64")) == "step"
        many = RESIDENT.choice(LSTM_CELL, 128, 2000, "float32", False)
        assert many is not None, "what fits does not depend on the batch"
        for cell, precision, largest in LARGEST:  # the README's
            fits = [RESIDENT.cycles(cell, H, 64, float32, precision) is not None for H in (largest, largest + 1)]
            assert fits == [True, False], (cell.name, precision)
        with pytest.raises(ValueError, match="weight_hh of lstm with 512 units does not fit one SM"):
            gpurnn.LSTM(3, 512, executor="resident")(fake_cupy.zeros((2, 1, 3), np.float32))
        with pytest.raises(ValueError, match="weight_hh of lstm with 2048 units does not fit this GPU in float32"):
            gpurnn.LSTM(3, 2048, executor="persistent")(fake_cupy.zeros((2, 1, 3), np.float32))
        with pytest.raises(ValueError, match="'persistent' computes in float32, got float64"):
            gpurnn.GRU(3, 4, dtype="float64", executor="persistent")(fake_cupy.zeros((2, 1, 3)))
        with pytest.raises(
            ValueError, match="one of resident, persistent, step, numpy on the cuda backend, got 'compiled'"
        ):
            gpurnn.LSTM(3, 4, executor="compiled")
