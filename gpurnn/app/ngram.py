"""An n-gram model to measure a recurrent network against: what counting alone reaches on the same text.

Interpolated Witten-Bell smoothing: Witten and Bell, "The zero-frequency problem" (IEEE Trans. Inf. Theory 37(4), 1991);
Bell, Cleary and Witten, "Text Compression" (1990), escape method C.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

CHUNK = 1 << 22  # n-grams packed and sorted at a time: 32 MiB of keys


def witten_bell(train: Any, validation: Any, alphabet_size: int, order: int = 3) -> float:
    """Bits per symbol on `validation` of a model with a context of `order` symbols, counted on `train`.

    With N(c w) the count of symbol w after context c, and T(c) the number of distinct symbols seen after c,

        P_k(w | c_k) = (N(c_k w) + T(c_k) P_{k-1}(w | c_{k-1})) / (N(c_k) + T(c_k)),

    where c_k are the last k symbols, P_k = P_{k-1} for a context never seen, and P_{-1} = 1 / alphabet_size.

    train (length,) and validation (length,): integers in [0, alphabet_size), on the host; validation continues train,
    whose last symbols are its first context.  Memory grows with the number of distinct n-grams, not with the length.
    Raises ValueError where alphabet_size ** (order + 1) exceeds 64 bits, train has no more than `order` symbols,
    validation none, or a symbol lies outside the alphabet.
    """
    train, validation = np.asarray(train), np.asarray(validation)
    _check(train, validation, alphabet_size, order)
    keys, counts = _count_grams(np.concatenate((train[len(train) - order :], validation)), alphabet_size, order)
    trained_keys, trained_counts = _count_grams(train, alphabet_size, order)
    probability = np.full(len(keys), 1.0 / alphabet_size)
    for k in range(order + 1):
        level = _Level.of(*_suffixes(trained_keys, trained_counts, train, alphabet_size, order, k), alphabet_size)
        grams = keys % _power(alphabet_size, k + 1) if k < order else keys
        probability = level.interpolate(grams, probability, alphabet_size)
    return float(-(counts @ np.log2(probability)) / len(validation))


def _check(train: np.ndarray, validation: np.ndarray, alphabet_size: int, order: int) -> None:
    if order < 0 or alphabet_size < 1:
        raise ValueError(f"expected order >= 0 and alphabet_size >= 1, got {order} and {alphabet_size}")
    if alphabet_size ** (order + 1) > 1 << 64:
        raise ValueError(
            f"alphabet_size ** (order + 1) = {alphabet_size} ** {order + 1} does not fit in 64 bits: lower the order"
        )
    if len(train) <= order or not len(validation):
        raise ValueError(
            f"expected more than {order} training symbols and at least 1 for validation, "
            f"got {len(train)} and {len(validation)}"
        )
    for name, tokens in (("train", train), ("validation", validation)):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(f"{name}: expected a 1-D array of integers, got {tokens.dtype} {tokens.shape}")
        if tokens.min() < 0 or tokens.max() >= alphabet_size:
            raise ValueError(f"{name}: expected symbols in [0, {alphabet_size}), got {tokens.min()} to {tokens.max()}")


def _power(base: int, exponent: int) -> np.uint64:
    return np.uint64(base**exponent)


def _count_grams(tokens: np.ndarray, alphabet_size: int, order: int) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (order + 1)-grams of `tokens` as sorted uint64 keys, oldest symbol first, and their counts."""
    keys, counts = np.zeros(0, np.uint64), np.zeros(0, np.int64)
    total = len(tokens) - order
    for start in range(0, total, CHUNK):
        length = min(CHUNK, total - start)
        chunk = np.zeros(length, np.uint64)
        for i in range(start, start + order + 1):
            chunk *= np.uint64(alphabet_size)
            chunk += tokens[i : i + length].astype(np.uint64)
        keys, counts = _merge(keys, counts, *np.unique(chunk, return_counts=True))
    return keys, counts


def _merge(
    keys: np.ndarray, counts: np.ndarray, more_keys: np.ndarray, more_counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """One sorted table of distinct keys from two tables, counts of equal keys added; only the first may be empty."""
    keys, counts = np.concatenate((keys, more_keys)), np.concatenate((counts, more_counts))
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = _group_starts(keys)
    return keys[starts], np.add.reduceat(counts, starts)


def _suffixes(
    keys: np.ndarray, counts: np.ndarray, train: np.ndarray, alphabet_size: int, order: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The (k + 1)-grams of `train` and their counts, from those of `order`.

    A context of k symbols is the suffix of the longer one, so the oldest symbols are dropped.  Only the first
    order - k grams of the text end too early to be the end of an (order + 1)-gram: they are counted apart.
    """
    if k == order:
        return keys, counts
    first_keys, first_counts = _count_grams(train[:order], alphabet_size, k)
    return _merge(keys % _power(alphabet_size, k + 1), counts, first_keys, first_counts)


def _group_starts(sorted_keys: np.ndarray) -> np.ndarray:
    """Where each run of equal keys begins."""
    return np.flatnonzero(np.concatenate(([True], sorted_keys[1:] != sorted_keys[:-1])))


@dataclass
class _Level:
    """The counts of one context length: N(c w) by gram, N(c) and T(c) by context, keys sorted."""

    grams: np.ndarray
    gram_counts: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    distinct: np.ndarray

    @classmethod
    def of(cls, grams: np.ndarray, counts: np.ndarray, alphabet_size: int) -> "_Level":
        contexts = grams // np.uint64(alphabet_size)  # still sorted: the symbol is the lowest digit
        starts = _group_starts(contexts)
        distinct = np.diff(starts, append=len(grams))
        return cls(grams, counts, contexts[starts], np.add.reduceat(counts, starts), distinct)

    def interpolate(self, grams: np.ndarray, lower: np.ndarray, alphabet_size: int) -> np.ndarray:
        """P_k of `grams`, given their P_{k-1}."""
        contexts = grams // np.uint64(alphabet_size)
        place, known = _find(self.contexts, contexts)
        total, distinct = self.totals[place], self.distinct[place]
        gram_place, seen = _find(self.grams, grams)
        count = np.where(seen, self.gram_counts[gram_place], 0)
        return np.where(known, (count + distinct * lower) / (total + distinct), lower)


def _find(table: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The place of each key in a sorted table, and whether it is there; the place is valid in either case."""
    place = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return place, table[place] == keys
