"""Random words by place: Philox's published answers, and dropout's masks, the same on every backend."""

import copy
import pickle

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cpu import costs, threads
from gpurnn.executors import random
from gpurnn.executors.random import Masks

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU test_training_kernels has the same words")

ONES = 0xFFFFFFFF
ANSWERS = {  # of Random123's kat_vectors: counter, key -> words
    "zeros": ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS.values(), ids=ANSWERS.keys())
def test_philox_gives_the_published_words(counter, key, answer):
    arrays = [np.array([word], np.uint32) for word in (*counter, *key)]
    assert tuple(int(word[0]) for word in random._words(*arrays)) == answer


def test_counter_and_key_stand_low_word_first():
    words = random.words(seed=0x299F31D0_A4093822, call=0x03707344_13198A2E, count=0)
    assert words.shape == (0,)
    wide = random.words(seed=5 << 32 | 7, call=2, count=9)
    for k in range(9):
        arrays = [np.array([word], np.uint32) for word in (k // 4, 0, 2, 0, 7, 5)]
        assert random._words(*arrays)[k % 4][0] == wide[k]


def expected(x, seed, call, p):
    keep = random.words(seed, call, x.size).reshape(x.shape) >= min(round(p * 2**32), ONES)
    return x * np.where(keep, x.dtype.type(1) / x.dtype.type(1 - p), x.dtype.type(0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (4, 4), (0, 3), (7, 11, 3)])
def test_compiled_masks_are_those_of_the_words(shape, dtype):
    masks, rng = Masks(np.random.default_rng(3)), np.random.default_rng(0)
    for call, p in enumerate((0.25, 0.9, 1 - 1e-12)):
        x = rng.standard_normal(shape).astype(dtype)
        y, masked = masks(x, p)
        assert y.shape == shape and y.dtype == dtype
        np.testing.assert_array_equal(y, expected(x, masks.seed, call, p))
        np.testing.assert_array_equal(masked(2 * x), 2 * y)
    assert masks.calls == 3


def test_calls_beyond_32_bits_and_any_layout():
    masks, x = Masks(np.random.default_rng(3)), np.arange(60.0).reshape(3, 4, 5).transpose(2, 0, 1)
    masks.calls = (9 << 32) + 1
    y, _ = masks(x, 0.5)
    np.testing.assert_array_equal(y, expected(x, masks.seed, (9 << 32) + 1, 0.5))
    masks.calls = 1
    assert (masks(x, 0.5)[0] != y).any()


@pytest.mark.parametrize("count", ["1", "3"])
def test_threads_share_the_values_out(monkeypatch, count):

    monkeypatch.setenv("GPURNN_NUM_THREADS", count)
    monkeypatch.setattr(costs, "DROPOUT_VALUES", 8)
    calls, run = [], threads.run
    monkeypatch.setattr(threads, "run", lambda work, parts: (calls.append(len(parts)), run(work, parts)))
    masks, x = Masks(np.random.default_rng(3)), np.ones(1001, np.float32)
    np.testing.assert_array_equal(masks(x, 0.3)[0], expected(x, masks.seed, 0, 0.3))
    assert calls == [int(count)]


def test_rate_and_mean():
    y, _ = Masks(np.random.default_rng(0))(np.ones(1_000_000, np.float32), 0.3)
    assert (y == 0).mean() == pytest.approx(0.3, abs=0.002) and y.mean(dtype=float) == pytest.approx(1, abs=0.003)


def test_what_is_no_number_stays_seen():
    y, _ = Masks(np.random.default_rng(0))(np.full(8, np.nan), 0.5)
    assert np.isnan(y).all()


def test_layers_have_masks_of_their_own_and_leave_what_else_is_drawn_as_it_was():
    rng = np.random.default_rng(5)
    first, second = (gpurnn.Dropout(0.5, rng=rng) for _ in range(2))
    assert first.masks.seed != second.masks.seed
    assert rng.random() == np.random.default_rng(5).random()
    deep = gpurnn.RNN(4, 16, 3, dropout=0.5, rng=1)
    deep(np.ones((2, 3, 4)))
    assert deep.masks.calls == 2, "one between each two layers"
    deep(np.ones((2, 3, 4)), training=False)
    assert deep.masks.calls == 2


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_on_alike_and_apart(clone):
    layer, x = gpurnn.Dropout(0.5, rng=1), np.ones((50, 3), np.float32)
    layer(x)
    other = clone(layer)
    expected = layer(x)[0]
    assert layer.masks.calls == 2 and other.masks.calls == 1
    np.testing.assert_array_equal(other(x)[0], expected)
