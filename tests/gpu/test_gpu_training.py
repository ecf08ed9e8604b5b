"""A training step on a real GPU: losses, embeddings and optimisers against NumPy, and one graph against kernel by kernel."""

import contextlib
import random
import threading
from dataclasses import replace

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.app.training import Training, train
from gpurnn.cuda import faults
from tests.stand_in import size

pytestmark = pytest.mark.gpu
chip = pytest.mark.chip("large")

TOLERANCE = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-12}


@contextlib.contextmanager
def on_the_host():
    """gpurnn as on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "name", "numpy")
        patch.setattr(backend, "xp", np)
        yield


def assert_same(work, dtype="float32", room=1):
    with on_the_host():
        expected = [np.asarray(value) for value in work()]
    found = [backend.to_numpy(value) for value in work()]
    gpurnn.synchronize()
    for got, want in zip(found, expected, strict=True):
        assert got.shape == want.shape and got.dtype == want.dtype
        largest = np.abs(want[np.isfinite(want)]).max(initial=0) or 1
        np.testing.assert_allclose(got, want, rtol=TOLERANCE[dtype], atol=room * TOLERANCE[dtype] * largest)


def rows(C, R, dtype):
    rng = np.random.default_rng(0)
    return (3 * rng.standard_normal((R, C))).astype(dtype), rng.integers(0, C, R)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    ("C", "R"),
    [
        (2, 1),
        (33, size(4099, 99)),
        (257, size(8192, 50)),
        (1025, size(700, 7)),
        pytest.param(50_257, 300, marks=chip),
        pytest.param(131_072, 7, marks=chip),
    ],
)
def test_cross_entropy(C, R, dtype):
    logits, targets = rows(C, R, dtype)
    targets[::5] = -1
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits, targets, ignore_index=-1), dtype)
    targets[::5] = 1
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits, targets, reduction="none"), dtype)


def test_rows_that_are_not_finite():
    inf = np.inf
    logits = np.full((6, 1500), -inf, np.float32)
    logits[:5, :3] = [[0.5, -inf, 0.5], [inf, 0, 1], [np.nan, 0, 1], [3e38, 0, -3e38], [0, -inf, 1]]
    for C in (3, 1500):
        with np.errstate(over="ignore"):
            assert_same(lambda C=C: gpurnn.softmax_cross_entropy(logits[:, :C], np.arange(6) % 3, reduction="none"))


@pytest.mark.parametrize(
    ("V", "dim", "count"),
    [
        (100, 64, size(8192, 300)),
        (3, size(300, 40), size(5000, 90)),
        pytest.param(30_000, 512, 4096, marks=chip),
    ],
)
def test_embedding(V, dim, count):
    rng = np.random.default_rng(0)
    tokens = rng.zipf(1.3, count) % V
    dy = rng.standard_normal((count, dim)).astype("float32")

    def work():
        layer = gpurnn.Embedding(V, dim, rng=1)
        y, backward = layer(tokens)
        backward(dy)
        return y, layer.grads["weight"]

    assert_same(work)
    first, second = (backend.to_numpy(work()[1]) for _ in range(2))
    assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (gpurnn.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (gpurnn.RMSprop, {"momentum": 0.5, "centered": True, "weight_decay": 0.1, "eps": 1e-3}),
        (gpurnn.Adam, {"weight_decay": 0.1}),
        (gpurnn.AdamW, {"weight_decay": 0.3}),
    ],
)
def test_clipping_and_optimisers(kind, options, dtype):
    def work():
        model, rng = gpurnn.Linear(size(701, 37), 1013, dtype=dtype, rng=1), np.random.default_rng(0)
        optimizer, norms = kind(model, **options), []
        for _ in range(3):
            for gradient in model.grads.values():
                gradient[...] = backend.xp.asarray(rng.standard_normal(gradient.shape).astype(dtype))
            norms.append(gpurnn.clip_grad_norm(model, 3.0))
            optimizer.step()
        return (*norms, model.params["weight"], model.params["bias"], *(m.flat for m in optimizer.moments.values()))

    # where a gradient is next to nothing, Adam's quotient of moments makes much of the last bit of the norm
    assert_same(work, dtype, 20 if kind in (gpurnn.Adam, gpurnn.AdamW) else 1)


def test_faults_come_late_and_spoil_nothing():
    layer = gpurnn.Linear(30, 20, rng=1)
    optimizer = gpurnn.Adam(layer)
    layer.grads["weight"][7, 9] = np.inf
    before = backend.to_numpy(layer.params.flat)
    for _ in range(3):
        optimizer.step()
    gpurnn.softmax_cross_entropy(backend.xp.zeros((4, 3)), np.array([0, 1, 2, 3]))
    assert backend.to_numpy(layer.params.flat).tobytes() == before.tobytes()
    with pytest.raises(FloatingPointError, match=r"gradient of weight at \(7, 9\): expected finite values, got inf"):
        gpurnn.synchronize()
    gpurnn.synchronize()
    gpurnn.softmax_cross_entropy(backend.xp.zeros((4, 3)), np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match=r"got 3 at position \(3,\)"):
        gpurnn.synchronize()
    gpurnn.Embedding(5, 3)(np.array([0, -1]))
    with pytest.raises(ValueError, match=r"tokens: .* got -1 at position \(1,\)"):
        gpurnn.synchronize()


# Graphs

CONFIG = TrainConfig(hidden_size=40, embedding_size=24, batch=5, k1=8, steps=60, validation=0.1, schedule="constant")
VARIANTS = {
    "lstm": {},
    "gru, k2 > k1": {"cell": "gru", "k2": 13, "trainable_h0": True},
    "two layers, bfloat16": {"num_layers": 2, "precision": "bfloat16"},
    "large": {"hidden_size": size(600, 70), "batch": 16},
    "rnn, float64": {"cell": "rnn", "dtype": "float64", "clip_value": 0.01, "optimizer": "rmsprop"},
}


@pytest.fixture
def corpus(tmp_path):
    """Short enough for several epochs in a test."""
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(["red", "green", "blue", "yellow"]) for _ in range(150)))
    return load_corpus(path)


def tensors(training):
    state = training.bptt.state_dict()
    return {**training.model.state_dict(), **training.optimizer.state_dict(), **state}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_captured_step_has_the_bits_of_its_kernels_one_by_one(options, corpus):
    config = replace(CONFIG, **options)
    captured, plain = Training(config, corpus), Training(config, corpus)
    steps = size(40, 6)
    captured_losses = [captured.step()[0] for _ in range(steps)]
    assert captured.one_by_one is None and captured._captured._recorded, captured.one_by_one
    plain._captured._when = lambda: False
    plain_losses = [plain.step()[0] for _ in range(steps)]
    assert [float(loss) for loss in captured_losses] == [float(loss) for loss in plain_losses]
    expected = tensors(plain)
    assert all(value.tobytes() == expected[name].tobytes() for name, value in tensors(captured).items())
    assert faults.take() is None


def test_a_step_never_waits(corpus, monkeypatch):
    """Every way to the host that gpurnn has is closed meanwhile."""
    training = Training(CONFIG, corpus)
    for _ in range(4):
        training.step()
    cupy = backend.xp

    def wait(*_, **__):
        raise AssertionError("the host waits")

    monkeypatch.setattr(backend, "to_numpy", wait)
    monkeypatch.setattr(backend, "synchronize", wait)
    monkeypatch.setattr(cupy, "asnumpy", wait)
    monkeypatch.setattr(cupy.cuda.runtime, "deviceSynchronize", wait)
    monkeypatch.setattr(cupy.cuda.runtime, "streamSynchronize", wait)
    results = [training.step() for _ in range(size(30, 3))]
    monkeypatch.undo()
    assert np.isfinite([float(loss) for loss, _ in results]).all()


@pytest.mark.parametrize("k2", [8, 13])
def test_a_resumed_run_is_the_same_bit_for_bit(k2, corpus, tmp_path):
    pytest.importorskip("safetensors", reason="runs are kept in safetensors files")

    def go(run, steps):
        training = Training(replace(CONFIG, k2=k2, steps=steps), corpus)
        if run.exists():
            assert training.restore(checkpoint.load(run / checkpoint.MODEL)) == []
        else:
            checkpoint.create_run(run, CONFIG.to_mapping(), training.checkpoint())
        train(training, run, stop=lambda: False, report=lambda line: None)
        return tensors(training)

    whole = go(tmp_path / "whole", size(60, 9))
    for steps in size((17, 31), (3, 5)):
        go(tmp_path / "pieces", steps)
    pieces = go(tmp_path / "pieces", size(60, 9))
    assert all(value.tobytes() == whole[name].tobytes() for name, value in pieces.items())


def test_memory_of_a_graph_is_its_own(corpus):
    """Replays between other work of the same sizes, which would take the graph's memory if it could."""
    cupy, (quiet, busy) = backend.xp, (Training(CONFIG, corpus) for _ in range(2))
    expected = [float(quiet.step()[0]) for _ in range(size(20, 5))]
    found = []
    for _ in expected:
        held = [
            cupy.full(size, np.nan, np.float32)
            for size in (128, 1600, 5 * 40, 8 * 5 * 160, 8 * 5 * 40)
            for _ in range(4)
        ]
        found.append(float(busy.step()[0]))
        del held
    assert found == expected


def test_two_threads_record_at_once():
    rng, found, barrier = np.random.default_rng(0), {}, threading.Barrier(2)
    tokens = rng.integers(0, 11, (17, 4))

    def losses(seed, meet=lambda: None):
        model = gpurnn.SequenceModel(
            gpurnn.Embedding(11, 8, rng=seed), gpurnn.GRU(8, 33, rng=seed), gpurnn.Linear(33, 11, rng=seed)
        )
        optimizer, values = gpurnn.Adam(model), []

        def step(x, targets):
            model.zero_grad()
            loss, _ = gpurnn.full_bptt(model, x, targets, gpurnn.softmax_cross_entropy)
            optimizer.step()
            return loss

        step = gpurnn.captured(step)
        for _ in range(size(30, 4)):
            meet()
            values.append(float(step(tokens[:-1], tokens[1:])))
        assert step.reason is None
        return values

    def work(seed):
        with backend.xp.cuda.Stream(non_blocking=True):
            found[seed] = losses(seed, lambda: barrier.wait(120))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert [found.get(seed) for seed in (1, 2)] == [losses(seed) for seed in (1, 2)]


def test_windows_arrive_in_time():
    from gpurnn.app.data import Windows
    from gpurnn.cuda.prefetch import Prefetch

    windows = Windows(np.random.default_rng(0).integers(0, 250, 200_000).astype(np.uint8), 64, 128)
    source, cupy, sums = Prefetch(windows), backend.xp, []
    slow = cupy.ones((size(2048, 16),) * 2, np.float32)
    for index in range(40):
        x, targets, _ = source.at(index)
        slow = slow @ slow * np.float32(1e-4)  # so that copies run far ahead of the work that reads them
        sums.append((x.sum(), targets.sum()))
    for index, pair in enumerate(sums):
        x, targets, _ = windows.at(index)
        assert [int(value) for value in pair] == [x.sum(), targets.sum()]


def test_a_step_of_one_s_own():
    model = gpurnn.SequenceModel(gpurnn.Embedding(11, 8, rng=1), gpurnn.GRU(8, 33, rng=2), gpurnn.Linear(33, 11, rng=3))
    optimizer = gpurnn.Adam(model)

    def step(x, targets):
        model.zero_grad()
        loss, _ = gpurnn.full_bptt(model, x, targets, gpurnn.softmax_cross_entropy)
        gpurnn.clip_grad_norm(model, 1.0)
        optimizer.step()
        return loss

    step, rng = gpurnn.captured(step), np.random.default_rng(0)
    pattern = np.tile(np.arange(11), 20)
    for _ in range(size(400, 4)):
        start = rng.integers(0, 100, 4)
        x = np.stack([pattern[s : s + 16] for s in start], 1)
        loss = step(x, (x + 1) % 11)
    assert step.reason is None and float(loss) < size(0.1, 3)
