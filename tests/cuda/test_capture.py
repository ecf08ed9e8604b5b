"""A step as one graph: the same bits as kernel by kernel, nothing that a capture cannot bear, nobody who waits.

On the stand-in a graph does what was captured, on the memory it was captured with; what CUDA refuses, it refuses.
"""

import gc
import random
from dataclasses import replace
from functools import partial

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import Windows, load_corpus
from gpurnn.app.metrics import read_metrics
from gpurnn.app.training import Training, train
from gpurnn.bptt import TruncatedBPTT
from gpurnn.cells import Cell, tanh
from gpurnn.cuda.prefetch import Prefetch
from tests import fake_cupy
from tests.fake_cupy import HostWait
from tests.fake_cupy.backend import no_waiting
from tests.fake_cupy.graphs import CaptureError
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="written for the stand-in; see test_gpu_training")

counters = fake_cupy.counters


def put(array):
    return fake_cupy.asarray(np.asarray(array))


# Any function


def test_two_calls_as_they_are_then_a_graph():
    calls = []

    def double(x):
        calls.append(None)
        return x * 2, x.sum()

    with interpreted():
        step, before = gpurnn.captured(double), counters.graphs
        for k in range(6):
            with no_waiting():
                y, total = step(put([1.0 * k, 3.0]))
            assert y.get().tolist() == [2 * k, 6] and float(total) == k + 3
        assert len(calls) == 3 and counters.graphs - before == 4 and step.reason is None
        assert step(put([1.0, 2.0, 3.0]))[0].get().tolist() == [2, 4, 6], "another shape begins anew"
        assert step(put([5.0, 1.0]))[0].get().tolist() == [10, 2]
        assert len(calls) == 4


def test_state_in_arrays_that_stay():
    with interpreted():
        total = put(np.zeros(2))

        def add(x):
            total[...] = total + x

        step = gpurnn.captured(add)
        for k in range(5):
            assert step(put([1.0, k])) is None
            assert total.get().tolist() == [k + 1, sum(range(k + 1))], "recording a step does not do it as well"


def test_when_it_does_other_work():
    repeats = [True]
    with interpreted():
        step = gpurnn.captured(lambda x: x + len(repeats), when=lambda: repeats[-1])
        found = []
        for now in (True, True, True, False, True, True):
            repeats.append(now)
            found.append(float(step(put(0.0))))
        assert found == [2, 3, 4, 5, 4, 4], "the graph is that of its own time"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x * float(x.sum()), "the host cannot wait for a copy to the host"),
        (lambda x: x[x > 0], "the host cannot wait for the number of values under a mask"),
        (lambda x: x + backend.xp.asarray(np.ones(2)), "H2D transfers are disallowed"),
        (lambda x: backend.xp.stack([x] * 9), "H2D transfers are disallowed"),
        (lambda x: x @ x, "calling cuBLAS|cuBLAS cannot be called through CuPy"),
    ],
)
def test_what_cannot_be_captured_runs_as_it_is_and_says_why(function, why):
    x = put([1.0, 2.0])
    with interpreted():
        step = gpurnn.captured(function)
        expected = [function(x).get().tolist() for _ in range(4)][:2]
        assert [step(x).get().tolist() for _ in range(2)] == expected
        with pytest.warns(RuntimeWarning, match=f"the step runs kernel by kernel: .*({why})"):
            step(x)
        assert step(x).get().tolist() == function(x).get().tolist()
        assert step.reason and not backend.thread.capturing and backend.thread.cublas is None


def test_states_of_many_layers_and_parameters_of_many_gates():
    """More than 8 of either, which CuPy's own functions would join by addresses copied from the host."""
    gates = 9

    def forward(x, r, state, params):
        sums = [x[g] + params[g] for g in range(gates)]
        total = sum(sums[g] + r[g] if g % 2 else sums[g] * r[g] for g in range(gates))
        return (tanh(total),), (*sums, *r)

    def backward(dnext, saved, state, next_state, params):
        da = dnext[0] * (1 - next_state[0] * next_state[0])
        dx = tuple(da if g % 2 else da * saved[gates + g] for g in range(gates))
        return dx, tuple(da if g % 2 else da * saved[g] for g in range(gates)), (0,), dx

    cell = Cell("many_gates", gates, 1, forward, backward, params=tuple(f"p{g}" for g in range(gates)))
    with interpreted("step"):
        for layer in (gpurnn.LSTM(2, 3, 5, bidirectional=True, rng=1), gpurnn.Recurrent(cell, 2, 3, rng=1)):

            def step(x, layer=layer):
                layer.zero_grad()
                y, _, backward = layer(x)
                dx, dstate = backward(y)
                return y, dx, *(dstate if isinstance(dstate, tuple) else (dstate,))

            recorded = gpurnn.captured(step)
            for k in range(3):
                x = put(np.full((1, 2, 2), 0.1 * k, np.float32))
                found = recorded(x)
            assert [part.get().tolist() for part in found] == [part.get().tolist() for part in step(x)]
            assert recorded.reason is None


def test_an_error_of_the_function_is_its_own():
    with interpreted():
        step = gpurnn.captured(lambda x: x.reshape(5))
        with pytest.raises(ValueError, match="reshape"):
            step(put([1.0, 2.0]))


def test_numpy_just_calls():
    step = gpurnn.captured(lambda x: [x, 1])
    assert step([2]) == [[2], 1] and step.reason == "NumPy has no graphs"


def test_without_cublas_nothing_is_captured(monkeypatch):
    from gpurnn.cuda import capture, cublas

    def missing():
        raise OSError("libcublas.so.13: cannot open shared object file")

    with interpreted():
        capture._lane.cache_clear()
        monkeypatch.setattr(cublas, "library", missing)
        step = gpurnn.captured(lambda x: x + 1)
        with pytest.warns(RuntimeWarning, match=r"cuBLAS cannot be called: libcublas"):
            assert float(step(put(1.0))) == 2
        assert float(step(put(2.0))) == 3
    capture._lane.cache_clear()


def test_the_stand_in_refuses_what_a_graph_cannot_bear():
    with interpreted():
        cuda = fake_cupy.cuda
        stream, pool, a = cuda.Stream(non_blocking=True), cuda.MemoryPool(), put([1.0, 2.0])
        with pytest.raises(RuntimeError, match="legacy"):
            cuda.Stream.null.begin_capture()
        for work, allocator in (
            (lambda: a + 1, None),
            (lambda: a.get(), pool.malloc),
            (lambda: stream.synchronize(), pool.malloc),
            (lambda: put([1.0]), pool.malloc),
        ):
            with stream, cuda.using_allocator(allocator):
                stream.begin_capture()
                with pytest.raises(CaptureError):
                    work()
                stream.end_capture()
        stream.begin_capture()
        with pytest.raises(CaptureError, match="another stream"):
            a.fill(0)
        stream.end_capture()
        with stream, cuda.using_allocator(pool.malloc):
            stream.begin_capture()
            b = a + 1
            graph = stream.end_capture()
            with pytest.raises(CaptureError, match="a graph's pool"):
                b + 1
        assert np.isnan(b.get()).all(), "a captured kernel does not run"
        graph.launch()
        assert b.get().tolist() == [2, 3]
        del pool, work, allocator
        gc.collect()
        with pytest.raises(CaptureError, match="pool"):
            graph.launch()


# Truncated backpropagation through time in a user's own loop


@pytest.mark.parametrize(("k1", "k2"), [(2, 5), *(pytest.param(*k, marks=pytest.mark.slow) for k in ((3, 3), (2, 4)))])
def test_a_user_s_loop(k1, k2):
    stream = np.random.default_rng(0).integers(0, 7, (40, 2))

    def run(wrap):
        common = {"rng": np.random.default_rng(1)}
        recurrent = gpurnn.GRU(5, 9, trainable_h0=True, executor="step", **common)
        model = gpurnn.SequenceModel(gpurnn.Embedding(7, 5, **common), recurrent, gpurnn.Linear(9, 7, **common))
        optimizer = gpurnn.Adam(model, lr=0.05)
        bptt = TruncatedBPTT(model, partial(gpurnn.softmax_cross_entropy, reduction="sum"), k1, k2)

        def step(x, targets):
            model.zero_grad()
            loss = bptt.step(x, targets)
            gpurnn.clip_grad_norm(model, 0.7)
            optimizer.step()
            return loss

        do, losses = wrap(step, bptt), []
        for start in [*range(0, 6 * k1, k1), 0, *range(k1, 4 * k1, k1)]:
            if start == 0:
                bptt.reset()
            optimizer.lr = 0.05 / (1 + start)
            loss = do(put(stream[start : start + k1]), put(stream[start + 1 : start + k1 + 1]))
            losses.append(float(loss))
        return losses, model.params.flat.get(), bptt.state_dict()

    with interpreted():
        graphs = counters.graphs
        plain = run(lambda step, bptt: step)
        assert counters.graphs == graphs
        captured = run(lambda step, bptt: gpurnn.captured(step, when=lambda: bptt.steady))
        assert counters.graphs - graphs >= 2
    assert plain[0] == captured[0] and (plain[1] == captured[1]).all()
    assert plain[2].keys() == captured[2].keys()
    assert all((value == captured[2][name]).all() for name, value in plain[2].items())


# gpurnn train

SMALL = TrainConfig(
    hidden_size=5,  # whose kernels `test_kernels` has as well
    embedding_size=5,
    batch=3,
    k1=4,
    steps=12,
    validation=0.2,
    validate_every=50,
    save_every=5,
    log_every=4,
)
VARIANTS = {
    "lstm": {},  # slow: other tests train one as well
    "gru, k2 > k1": {"cell": "gru", "k2": 7, "trainable_h0": True},
    "rnn, clipped by value": {"cell": "rnn", "clip_value": 0.01, "optimizer": "rmsprop", "num_layers": 2},
}


@pytest.fixture
def corpus(tmp_path):
    """Short enough for an epoch to end within a test."""
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(["red", "green", "blue"]) for _ in range(20)))
    return load_corpus(path)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name == "lstm")) for name in VARIANTS])
def test_steps_of_training_wait_for_nothing_and_are_those_of_numpy(name, corpus):
    config = replace(SMALL, **VARIANTS[name])
    host = Training(config, corpus)
    assert len(host.windows) < config.steps, "an epoch ends on the way"
    expected = [host.step() for _ in range(config.steps)]
    with interpreted("step"):
        before, training, found = counters.graphs, Training(config, corpus), []
        for _ in range(config.steps):
            with no_waiting():
                loss, norm = training.step()
            found.append((float(loss), float(norm)))
        assert training.fault() is None and training.one_by_one is None
        assert counters.graphs - before >= 4
    np.testing.assert_allclose(found, expected, rtol=1e-4)


OPERATIONS = """
    __setitem__
    gather_rows move_all pack_ffma _multiply persistent_forward _multiply add cross_entropy
    _multiply add_columns _multiply zeros pack_ffma persistent_backward _multiply _multiply _multiply add_columns add_to_rows
    move_all norm_of_values scale_by_norm begin_an_update update
"""


def test_a_step_of_an_lstm_is_25_operations(corpus):
    """Gradients to 0; embedding, layer, head, loss; and back; states kept, clipping, Adam."""
    with interpreted():
        training = Training(SMALL, corpus)
        for _ in range(5):
            training.step()
        (recorded,) = training._captured._recorded.values()
    operations = [name.removeprefix("gpurnn_") for name in recorded.graph.operations]
    assert operations == OPERATIONS.split() and len(operations) == 25


def test_waiting_would_show(corpus):
    with interpreted("step"):
        training = Training(SMALL, corpus)
        clip = training._clipped
        training._clipped = lambda: float(clip())
        with no_waiting(), pytest.raises(HostWait):
            training.step()


def go(config, corpus, run, steps):
    training = Training(config, corpus)
    if run.exists():
        assert training.restore(checkpoint.load(run / checkpoint.MODEL)) == []
    else:
        checkpoint.create_run(run, config.to_mapping(), training.checkpoint())
    train(training, run, stop=lambda: training.steps_done >= steps, report=lambda line: None)
    return training


@pytest.mark.parametrize("executor", ["step", pytest.param(None, marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_same_bit_for_bit(executor, corpus, tmp_path):
    """Though it was captured elsewhere, and though lines of metrics, with their looks at the gradient, fell elsewhere."""
    config = replace(SMALL, k2=7, steps=7, schedule="constant")
    with interpreted(executor):
        go(config, corpus, tmp_path / "whole", 7)
        for budget in (2, 5, 7):
            go(replace(config, steps=budget), corpus, tmp_path / "pieces", budget)
    whole, pieces = (checkpoint.load(tmp_path / name / checkpoint.MODEL) for name in ("whole", "pieces"))
    for group in ("tensors", "optimizer", "state"):
        expected, got = getattr(whole, group), getattr(pieces, group)
        assert got.keys() == expected.keys()
        assert all((got[name] == value).all() for name, value in expected.items())
    lines = [line for line in read_metrics(tmp_path / "whole" / checkpoint.METRICS) if "loss" in line]
    assert [line["step"] for line in lines] == [1, 4, 7]
    assert all(np.isfinite(line["flow"]).all() and line["grad_norm"] > 0 for line in lines)


def test_divergence_is_told_at_the_next_line_with_its_own_step(corpus, tmp_path):
    config = replace(SMALL, save_every=4, log_every=7)

    def poison(line):
        if line["step"] == 5:
            training.model.params["head.weight"][0, 0] = np.nan

    with interpreted("step"):
        training = Training(config, corpus)
        checkpoint.create_run(tmp_path / "run", config.to_mapping(), training.checkpoint())
        with pytest.raises(
            FloatingPointError, match=r"step 6: gradient of .* at .*; a new run with a lower --lr"
        ) as caught:
            train(training, tmp_path / "run", stop=lambda: False, report=poison)
    assert caught.value.__notes__ == ["the checkpoint of step 4 stands"]
    saved = checkpoint.load(tmp_path / "run" / checkpoint.MODEL)
    assert saved.meta["step"] == 4 and all(np.isfinite(value).all() for value in saved.tensors.values())


def test_dropout_is_captured_with_the_masks_of_numpy(corpus):
    config = replace(SMALL, dropout=0.4, num_layers=2)
    host = Training(config, corpus)
    expected, calls = [host.step()[0] for _ in range(7)], host.checkpoint().meta["dropout"]
    with interpreted("step"):
        captured, plain = Training(config, corpus), Training(config, corpus)
        plain._captured._when = lambda: False
        before, found = counters.graphs, []
        for _ in range(7):
            with no_waiting():
                found.append(captured.step()[0])
                loss = plain.step()[0]
            assert float(found[-1]) == float(loss)
        assert counters.graphs - before >= 2 and captured.one_by_one is None
        assert (captured.model.params.flat.get() == plain.model.params.flat.get()).all()
        np.testing.assert_allclose([float(loss) for loss in found], expected, rtol=1e-4)
        assert captured.checkpoint().meta["dropout"] == calls == {"recurrent": 7, "dropout": 7}


def test_a_captured_step_drops_other_values_each_time_and_goes_back_the_same_way():
    with interpreted():
        layer = gpurnn.Dropout(0.5, rng=1)

        def there_and_back(x):
            y, backward = layer(x)
            return y, backward(x)

        step, x = gpurnn.captured(there_and_back), put(np.ones((5, 13), np.float32))
        found = []
        for _ in range(6):
            y, dx = step(x)
            assert (y.get() == dx.get()).all()
            found.append(y.get().tobytes())
        assert step.reason is None and len(set(found)) == 6


# Windows


def test_windows_come_as_they_are_whatever_the_order_and_however_late_they_are_copied():
    windows = Windows(np.arange(200, dtype=np.uint8), 3, 4)
    with interpreted():
        source = Prefetch(windows)
        for index in (0, 1, 2, 3, 9, 10, 4, 5, 6, 40, 40, 41, 0):
            with no_waiting():
                x, targets, first = source.at(index)
            expected = windows.at(index)
            assert (x.get() == expected[0]).all() and (targets.get() == expected[1]).all() and first == expected[2]
