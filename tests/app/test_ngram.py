"""The Witten-Bell model against its definition."""

import math
from collections import Counter

import numpy as np
import pytest

from gpurnn.app import ngram
from gpurnn.app.data import load_corpus, split
from gpurnn.app.ngram import witten_bell


def by_the_book(train, validation, alphabet_size, order):
    """The recursion of the docstring, with dictionaries, one symbol at a time."""
    counts, totals, distinct = Counter(), Counter(), Counter()
    for k in range(order + 1):
        for end in range(k, len(train)):
            gram = tuple(train[end - k : end + 1])
            distinct[gram[:-1]] += gram not in counts
            counts[gram] += 1
            totals[gram[:-1]] += 1

    def probability(context, symbol):
        lower = probability(context[1:], symbol) if context else 1 / alphabet_size
        if context not in totals:
            return lower
        return (counts[(*context, symbol)] + distinct[context] * lower) / (totals[context] + distinct[context])

    text = [*train[len(train) - order :], *validation]
    bits = [-math.log2(probability(tuple(text[i - order : i]), text[i])) for i in range(order, len(text))]
    return math.fsum(bits) / len(bits)


@pytest.mark.parametrize("chunk", [7, 1 << 22])
@pytest.mark.parametrize("order", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("size, seen", [(1, 1), (2, 2), (5, 3), (40, 40)])
def test_random_text(monkeypatch, size, seen, order, chunk):
    monkeypatch.setattr(ngram, "CHUNK", chunk)
    rng = np.random.default_rng(size * 10 + order)
    train = rng.integers(0, seen, 150).astype(np.uint8)  # the validation part may hold symbols never seen
    validation = rng.integers(0, size, 33).astype(np.uint8)
    expected = by_the_book(train.tolist(), validation.tolist(), size, order)
    assert witten_bell(train, validation, size, order) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_real_text():
    corpus = load_corpus(np.__file__)
    train, validation = split(corpus.tokens[:20_000], 0.1)
    bits = witten_bell(train, validation, len(corpus.alphabet))
    assert bits == pytest.approx(by_the_book(train.tolist(), validation.tolist(), len(corpus.alphabet), 3), rel=1e-12)
    assert bits < witten_bell(train, validation, len(corpus.alphabet), 1)


@pytest.mark.parametrize("length", [4, 5, 60])  # the shortest texts have barely one gram of the top order
def test_probabilities_sum_to_one(length):
    train = np.random.default_rng(length).integers(0, 6, length)
    total = sum(2 ** -witten_bell(train, [symbol], 7) for symbol in range(7))
    assert total == pytest.approx(1, abs=1e-12)


def test_limits():
    rng = np.random.default_rng(0)
    assert witten_bell(np.zeros(100_000, np.uint8), np.zeros(10, np.uint8), 256) < 1e-4
    bits = witten_bell(rng.integers(0, 8, 300_000), rng.integers(0, 8, 20_000), 8)
    assert bits == pytest.approx(3, abs=0.02)


def test_keys_of_the_full_64_bits():
    train, validation = [255, 0, 255, 255, 255, 255, 255, 255, 255, 255, 7], [255, 0]
    expected = by_the_book(train, validation, 256, 7)
    assert witten_bell(train, validation, 256, 7) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "train, validation, size, order, message",
    [
        ([0] * 9, [0], 257, 7, "64 bits"),
        ([0] * 9, [0], 2, -1, "order >= 0"),
        ([0] * 3, [0], 2, 3, "more than 3 training symbols"),
        ([0] * 9, [], 2, 3, "at least 1 for validation, got 9 and 0"),
        ([0] * 9, [2], 2, 3, r"validation: expected symbols in \[0, 2\), got 2 to 2"),
        ([-1] * 9, [0], 2, 3, "train: expected symbols"),
        ([0.5] * 9, [0], 2, 3, "train: expected a 1-D array of integers"),
        ([[0]] * 9, [0], 2, 3, "train: expected a 1-D array of integers"),
    ],
)
def test_bad_input_is_refused(train, validation, size, order, message):
    with pytest.raises(ValueError, match=message):
        witten_bell(train, validation, size, order)
