"""Two threads, or two streams, at once: what one records, finds wrong or multiplies with is not the other's."""

import threading

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.cuda import faults
from tests import fake_cupy
from tests.fake_cupy.graphs import CaptureError
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="written for the stand-in; see test_gpu_training")


def put(array):
    return fake_cupy.asarray(np.asarray(array))


def losses(seed, meet=lambda: None):
    """Of some captured steps of a model of its own; `meet()` before each.  No kernel has to be compiled for them."""
    rng = np.random.default_rng(seed)
    model, x, targets = gpurnn.Linear(5, 4, rng=rng), rng.standard_normal((6, 5)), rng.standard_normal((6, 4))

    def step(x, targets):
        model.zero_grad()
        y, backward = model(x)
        loss, dy = gpurnn.mean_squared_error(y, targets)
        backward(dy)
        model.params.flat -= 0.1 * model.grads.flat
        return loss

    step, found = gpurnn.captured(step), []
    for _ in range(30):
        meet()
        found.append(float(step(put(x.astype("float32")), put(targets.astype("float32")))))
    assert step.reason is None, step.reason
    return found


def test_two_threads_record_their_steps_at_once():
    with interpreted():
        expected = [losses(seed) for seed in (0, 1)]
        barrier, found = threading.Barrier(2), {}

        def work(seed):
            with fake_cupy.cuda.Stream(non_blocking=True):
                found[seed] = losses(seed, lambda: barrier.wait(120))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
        assert [found.get(seed) for seed in (0, 1)] == expected


def test_while_one_thread_records_another_is_not_recording():
    seen = []

    def look():
        seen.append((backend.thread.capturing, backend.thread.cublas, backend.thread.stream))

    def step(x):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join(60)
        look()
        return x + 1

    with interpreted():
        step = gpurnn.captured(step)
        for _ in range(3):
            step(put([1.0]))
    others, own = seen[::2], seen[1::2]
    assert set(others) == {(False, None, None)} and [capturing for capturing, *_ in own] == [False, False, True]
    assert all(cublas is not None and stream == 0 for _, cublas, stream in own)


def test_what_a_thread_records_gets_no_work_of_another():
    lanes = []

    def aside():
        with gpurnn.captured(lambda x: x)._aside(None) as stream:
            lanes.append(stream)

    with interpreted():
        aside()
        thread = threading.Thread(target=aside)
        thread.start()
        thread.join(60)
        first, second = lanes
        assert first is not second
        with first:
            first.begin_capture()
            raised = []

            def intrude():
                with first, pytest.raises(CaptureError, match="another thread is capturing"):
                    put([1.0]) + 1
                raised.append(True)

            thread = threading.Thread(target=intrude)
            thread.start()
            thread.join(60)
            first.end_capture()
        assert raised, "the stand-in sees it"


def test_each_stream_tells_its_own_faults():
    with interpreted():
        first, second = (fake_cupy.cuda.Stream(non_blocking=True) for _ in range(2))
        layer = gpurnn.Linear(3, 2, rng=1)
        optimizer = gpurnn.SGD(layer, lr=1.0)
        with first:
            gpurnn.softmax_cross_entropy(put(np.zeros((4, 3))), put([0, 1, 2, 9]))
        with second:
            layer.grads["weight"][...] = 1
            before = layer.params["weight"].get()
            optimizer.step()
            assert (layer.params["weight"].get() == before - 1).all(), "nothing is wrong on this stream"
        with first:
            optimizer.step()
            assert (layer.params["weight"].get() == before - 1).all(), "a fault came before"
        with pytest.raises(ValueError, match=r"step 1: targets: .* got 9 at position \(3,\)"):
            gpurnn.synchronize()
        assert faults.take() is None


def test_a_step_that_runs_aside_finds_the_faults_of_its_own_stream():
    """Before it is recorded, while it is, and from the graph."""

    def step(targets):
        return gpurnn.softmax_cross_entropy(backend.xp.zeros((2, 3)), targets)[0]

    with interpreted():
        step = gpurnn.captured(step)
        for wrong in (5, 6, 7, 8):
            step(put([0, wrong]))
            assert step.reason is None
            place = faults.record()
            with pytest.raises(ValueError, match=f"got {wrong} at"):
                faults.check()
            assert faults.record() is place
            step(put([0, 1]))
            assert faults.take() is None
