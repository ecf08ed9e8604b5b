"""A caller may fill his buffers anew between forward and backward, and call a closure from one thread at a time."""

import sys
import threading

import numpy as np
import pytest

import gpurnn
from gpurnn import TruncatedBPTT, full_bptt, mean_squared_error, softmax_cross_entropy

T, N, I, H = 6, 3, 4, 5


def values(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def stack(embedding=None, **options):
    return gpurnn.SequenceModel(embedding, gpurnn.GRU(I, H, 2, rng=0, **options), gpurnn.Linear(H, 7, rng=0))


TOKENS = np.random.default_rng(0).integers(0, 9, (T, N))
LAYERS = {
    "Linear": (lambda: gpurnn.Linear(I, H, rng=0), lambda: values(T, N, I)),
    "Embedding": (lambda: gpurnn.Embedding(9, I, rng=0), TOKENS.copy),
    "LSTM": (lambda: gpurnn.LSTM(I, H, rng=0), lambda: values(T, N, I)),
    "LSTM, numpy": (lambda: gpurnn.LSTM(I, H, bidirectional=True, executor="numpy", rng=0), lambda: values(T, N, I)),
    "model": (stack, lambda: values(T, N, I)),
    "model of tokens": (lambda: stack(gpurnn.Embedding(9, I, rng=0)), TOKENS.copy),
    "model of features": (lambda: stack(gpurnn.Linear(2, I, rng=0)), lambda: values(T, N, 2)),
    "model of what passes through": (lambda: stack(gpurnn.Dropout(0.0)), lambda: values(T, N, I)),
    "monitor": (lambda: gpurnn.Monitor(stack()), lambda: values(T, N, I)),
}


def gradients(make, x, refill):
    layer = make()
    y, *_, backward = layer(x)
    if refill:
        x[...] = 1
    dx = backward(values(*y.shape, seed=1))
    dx = dx[0] if isinstance(dx, tuple) else dx
    return [np.array(layer.grads.flat), *([dx] if dx is not None else [])]


@pytest.mark.parametrize(("make", "draw"), LAYERS.values(), ids=LAYERS)
def test_x_may_be_filled_anew_before_backward(make, draw):
    for a, b in zip(gradients(make, draw(), True), gradients(make, draw(), False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 5), (3, 9), (4, 9)])
@pytest.mark.parametrize("tokens", [True, False])
def test_truncated_bptt_keeps_nothing_of_the_callers(k1, k2, tokens):
    """One buffer serves all windows, the initial state's and a checkpoint's arrays are overwritten once they were given."""
    stream = np.random.default_rng(1).integers(0, 9, (14, N)) if tokens else values(14, N, I)
    targets = values(14, N, 7, seed=2)
    totals = []
    for reused in (False, True):
        model = stack(gpurnn.Embedding(9, I, rng=0) if tokens else None)
        bptt = TruncatedBPTT(model, mean_squared_error, k1, k2)
        state = values(2, N, H, seed=3)
        bptt.reset(state)
        state[...] = 100 if reused else state
        buffer = np.empty_like(stream[:k1])
        for start in range(0, 14, k1):
            x = stream[start : start + k1]
            if reused:
                buffer[: len(x)] = x
                x = buffer[: len(x)]
            bptt.step(x, targets[start : start + k1])
            if reused:
                buffer[...] = 0
                saved = bptt.state_dict()
                bptt = TruncatedBPTT(model, mean_squared_error, k1, k2)
                bptt.load_state_dict(saved)
                for array in saved.values():
                    array[...] = 0
        totals.append(np.array(model.grads.flat))
    np.testing.assert_array_equal(*totals)


def test_without_a_copy_x_is_kept_as_it_is():
    layer, x = gpurnn.Linear(I, H, rng=0), values(T, N, I)
    _, backward = layer(x, copy=False)
    x[...] = 0
    backward(np.ones((T, N, H), "float32"))
    assert not layer.grads["weight"].any()


def test_inner_layers_are_not_asked_to_copy(monkeypatch):
    """What a model hands from layer to layer is its own, and full BPTT goes back at once."""
    asked = []
    for kind in (gpurnn.Linear, gpurnn.Embedding, gpurnn.recurrent.Recurrent):
        call = kind.__call__

        def seen(self, x, state=None, *, lengths=None, training=True, copy=True, call=call):
            asked.append((type(self).__name__, copy))
            given = (x, state) if isinstance(self, gpurnn.recurrent.Recurrent) else (x,)
            options = {"lengths": lengths} if len(given) == 2 else {}
            return call(self, *given, training=training, copy=copy, **options)

        monkeypatch.setattr(kind, "__call__", seen)
    model = stack(gpurnn.Embedding(9, I, rng=0))
    model(TOKENS)
    assert asked == [("Embedding", True), ("GRU", False), ("Linear", False)]
    asked.clear()
    full_bptt(model, TOKENS, TOKENS % 7, softmax_cross_entropy)
    assert [copy for _, copy in asked] == [False] * 3


@pytest.fixture
def restless():
    """Threads change places as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(function, count=2):
    """What `count` threads got from function(), called by all of them at one moment."""
    results, begin = [], threading.Barrier(count)

    def call():
        begin.wait()
        try:
            results.append(function())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=call) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


@pytest.mark.parametrize("executor", ["compiled", "numpy"])
@pytest.mark.parametrize("whole", [False, True])
def test_of_two_threads_in_one_closure_the_second_is_refused(restless, executor, whole):
    x = values(20, 8, 4)
    recurrent = gpurnn.LSTM(4, 16, 2, bidirectional=True, rng=0, executor=executor)
    layer = gpurnn.SequenceModel(None, recurrent, gpurnn.Linear(32, 3, rng=0)) if whole else recurrent
    y, _, backward = layer(x)
    expected, _ = backward(np.ones_like(y))
    grads = layer.grads.flat.copy()
    for _ in range(10):
        layer.zero_grad()
        y, _, backward = layer(x)
        results = at_once(lambda y=y, backward=backward: backward(np.ones_like(y))[0])
        errors = [result for result in results if isinstance(result, Exception)]
        assert [type(error) for error in errors] == [RuntimeError] and "backward" in str(errors[0])
        np.testing.assert_array_equal(next(r for r in results if not isinstance(r, Exception)), expected)
        np.testing.assert_array_equal(layer.grads.flat, grads)


def test_a_kept_tape_and_a_layer_without_memory_are_for_one_thread_at_a_time(restless):
    """Every call that was not refused has added its gradients."""
    recurrent, linear, embedding = (
        gpurnn.GRU(4, 16, rng=0),
        gpurnn.Linear(64, 64, rng=0),
        gpurnn.Embedding(9, 64, rng=0),
    )
    y, _, kept = recurrent(values(20, 8, 4))
    out, back = linear(values(400, 64))
    row, gather = embedding(TOKENS)
    closures = {
        recurrent: lambda: kept(np.ones_like(y), keep=True),
        linear: lambda: back(np.ones_like(out)),
        embedding: lambda: gather(np.ones_like(row)),
    }
    for layer, closure in closures.items():
        closure()
        one = layer.grads.flat.copy()
        for _ in range(10):
            layer.zero_grad()
            results = at_once(closure, 3)
            done = [result for result in results if not isinstance(result, Exception)]
            assert done and all(isinstance(r, RuntimeError) for r in results if isinstance(r, Exception))
            np.testing.assert_allclose(layer.grads.flat, len(done) * one, rtol=1e-5)


def test_a_backward_that_was_refused_its_arguments_can_be_called_again():
    layer = gpurnn.GRU(4, 5, rng=0)
    y, _, backward = layer(values(T, N, 4))
    for _ in range(2):
        with pytest.raises(ValueError, match="dy"):
            backward(np.ones((1, 2, 3)))
    backward(np.ones_like(y))
    with pytest.raises(RuntimeError, match="keep=True"):
        backward(np.ones_like(y))
