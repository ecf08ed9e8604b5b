"""Measuring and sampling a character model, against the plain way of doing it."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest

from gpurnn.app.character_model import bits_per_symbol, build, sample
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import Alphabet

CONFIG = TrainConfig(hidden_size=12, embedding_size=4, dtype="float64", dropout=0.5, num_layers=2)
ALPHABET = Alphabet("chars", "abcde")


@pytest.fixture
def model():
    return build(CONFIG, len(ALPHABET), np.random.default_rng(0))


def softmax(logits):
    e = np.exp(logits - logits.max())
    return e / e.sum()


def plain_bits(model, tokens) -> float:
    """One stream, one symbol at a time."""
    state, bits = None, 0.0
    for token, following in pairwise(tokens):
        logits, state, _ = model(np.array([[token]]), state, training=False)
        bits -= math.log2(softmax(logits[0, 0])[following])
    return bits / (len(tokens) - 1)


@pytest.mark.parametrize("length", [2, 50, 129, 200])
def test_bits_of_one_stream(model, length):
    tokens = np.random.default_rng(1).integers(0, 5, length).astype(np.uint8)
    assert bits_per_symbol(model, tokens) == pytest.approx(plain_bits(model, tokens), rel=1e-12)


def test_bits_of_many_streams(model):
    """A long text is read at several places side by side; each begins from the initial state."""
    tokens = np.random.default_rng(1).integers(0, 5, 128 * 3 + 1 + 2).astype(np.uint8)
    each = [plain_bits(model, tokens[start : start + 129]) for start in (0, 128, 256)]
    assert bits_per_symbol(model, tokens) == pytest.approx(np.mean(each), rel=1e-12)
    assert bits_per_symbol(model, tokens, limit=40) == pytest.approx(plain_bits(model, tokens[:41]), rel=1e-12)
    with pytest.raises(ValueError, match="at least 2, got 1"):
        bits_per_symbol(model, tokens[:1])


def draw(model, temperature, seed, prompt="abc", length=12):
    return list(sample(model, ALPHABET, prompt, length, temperature, np.random.default_rng(seed)))


def test_sampling(model):
    assert draw(model, 1.0, 5) == draw(model, 1.0, 5) != draw(model, 1.0, 6)
    assert draw(model, 0.0, 5) == draw(model, 0.0, 6) == greedy(model, "abc", 12)
    assert len(draw(model, 1.0, 5, prompt="", length=7)) == 7
    for temperature in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="temperature: expected a number from 0"):
            draw(model, temperature, 0)


def greedy(model, prompt, length):
    tokens = list(ALPHABET.encode(prompt))
    for _ in range(length):
        logits, _, _ = model(np.array(tokens)[:, None], training=False)
        tokens.append(int(logits[-1, 0].argmax()))
    return tokens[len(prompt) :]


def test_samples_follow_the_models_distribution(model):
    """The first symbol behind a prompt, 4000 times, at temperatures 1 and 1/2."""
    model.params["head.bias"][...] = [0.0, 1.0, 2.0, -1.0, 0.5]
    logits, _, _ = model(ALPHABET.encode("ab").astype(np.int32)[:, None], training=False)
    rng = np.random.default_rng(2)
    for temperature in (1.0, 0.5):
        drawn = [next(islice(sample(model, ALPHABET, "ab", 1, temperature, rng), 1)) for _ in range(4000)]
        expected = softmax(logits[-1, 0] / temperature)
        assert np.abs(np.bincount(drawn, minlength=5) / 4000 - expected).max() < 0.03


def test_a_diverged_model_is_told(model):
    model.params["head.weight"][...] = np.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        draw(model, 1.0, 0)
