"""Values that nobody expects: objects that are no numbers, numbers beyond all types, arrays that claim to be others."""

import datetime
import decimal
import fractions
import pathlib
from typing import Any

import numpy as np

import gpurnn

T, N, I, H = 2, 3, 4, 6  # of the layers and arrays that the fuzzer calls with


class NoArray:
    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("it becomes no array")


class NowhereArray:
    __array_interface__ = {"shape": (2,), "typestr": "<f4", "data": None, "version": 3}  # noqa: RUF012


class Index:
    def __index__(self) -> int:
        return 3


class Liar(list):
    def __len__(self) -> int:
        return 10**6


class Subclass(np.ndarray):
    pass


def strange(rng: np.random.Generator) -> list[Any]:
    """All of them, made anew."""
    return [*_numbers(), *_texts(), *_containers(), *_objects(), *_arrays(rng), *_states(), *_of_this_library()]


def _numbers() -> list[Any]:
    whole = [0, 1, -1, 2, 3, 10**9, 2**63, 2**64, 10**400, -(10**400), True, False]
    real = [0.0, 1.0, 0.5, 2.5, -0.0, -1.5, 1e308, 1e-320, float("nan"), float("inf"), -float("inf")]
    others = [1j, complex("nan"), decimal.Decimal("0.5"), decimal.Decimal("nan"), fractions.Fraction(1, 2)]
    sized = [np.float32(0.5), np.float64("nan"), np.int64(3), np.int8(-3), np.uint64(2**64 - 1), np.longdouble(0.5)]
    kinds = [np.bool_(True), np.complex64(1), np.datetime64("2020"), np.timedelta64(1, "s"), np.void(b"abc")]
    return [*whole, *real, *others, *sized, *kinds]


def _texts() -> list[Any]:
    plain = ["", "a", "no", "0.5", "\0", "é\ud800", "x" * 1000, b"", b"ab", bytearray(b"x"), memoryview(b"abc")]
    meant = ["mean", "sum", "none", "softmax", "compiled", "numpy", "step", "tf32", "identity", "weight_hh"]
    dtypes = ["float32", "float16", "int64", "f4,,", ">f8", "d", np.dtype("float32"), np.float32, np.dtype(">f4")]
    return [*plain, *meant, *dtypes, np.dtype("f8,f4"), np.str_("a"), np.bytes_(b"a")]


def _containers() -> list[Any]:
    lists = [[], [1], [1, 2, 3], [[1, 2], [3]], [2.0, 1.0, 0.0], ["2", "1", "0"], [None, 1, 2], [2**70, 1, 1]]
    tuples = [(), (1,), (None, None), (1, 2, 3), range(5), range(0), slice(1, 2), ("a", "a"), ("leak",)]
    others = [{}, {"a": 1}, {"names": 1}, {1, 2}, set(), frozenset(), iter([1, 2]), (1.0 for _ in "a"), Liar([1])]
    return [*lists, *tuples, *others, [2, 2, 1], [2, 1, -1], [True, False, True], [("a",)]]


def _objects() -> list[Any]:
    functions = [len, lambda *_, **__: None, lambda *_: (0, 0), np.random.default_rng]
    things = [None, Ellipsis, NotImplemented, object(), object, int, np, Index(), NoArray(), NowhereArray()]
    random = [np.random.default_rng(0), np.random.RandomState(0), np.random.SeedSequence(5), np.random.PCG64(1)]
    return [*functions, *things, *random, pathlib.Path("/"), datetime.datetime(2020, 1, 1)]


def _arrays(rng: np.random.Generator) -> list[Any]:
    drawn = rng.standard_normal((T, N, I))
    shapes = [np.zeros(()), np.ones(()), *(np.zeros(shape) for shape in ((0,), (0, 0), (0, 0, 0), (1, 2, 3, 4)))]
    shapes += [drawn.astype("f4"), drawn.reshape(N, T, I), np.zeros((T, N, I + 1)), np.ones((T, N)), np.ones(3)]
    filled = [np.full((T, N, I), value) for value in (np.nan, np.inf, 1e300, 1e-310)]
    kinds = (int, bool, complex, object, "S3", "U3", "f2", np.longdouble, [("a", "f4")], "M8[s]", ">f4")
    kinds = [np.zeros((T, N, I), kind) for kind in kinds]
    masked = [np.ma.masked_array(drawn, mask=True), np.ma.zeros((T, N, I))]
    spread = [np.broadcast_to(np.float32(1), shape) for shape in ((T, N, I), (2**20, 2**12, I))]
    whole = [np.full((T, N), value, kind) for value, kind in ((0, "i8"), (10**12, "i8"), (-1, "i8"), (2**64 - 1, "u8"))]
    whole += [np.zeros((T, N), "u1"), np.zeros((T, N), bool), np.array([2, 3, 1]), np.array([2**63, 0, 1], "u8")]
    return [*shapes, *filled, *kinds, *masked, *spread, *whole, drawn.view(Subclass), np.matrix([[1, 2], [3, 4]])]


def _states() -> list[Any]:
    right, wrong = np.zeros((1, N, H)), np.zeros((1, N, H + 1))
    pairs = [(right,), (right, right), [right, None], (right, "x"), (right, wrong), (right, np.full((1, N, H), np.nan))]
    return [*pairs, right, wrong, right.astype(object)]


def _of_this_library() -> list[Any]:
    layers = [gpurnn.LSTM(I, H, rng=0), gpurnn.Linear(H, 2, rng=0), gpurnn.Embedding(5, I, rng=0), gpurnn.Dropout(0.5)]
    drawers = [lambda *_: "x", lambda _, a, b: np.zeros((a, b), complex), lambda _, a, b: np.full((a, b), np.nan)]
    drawers += [lambda *_: 1 / 0, "identity", 3]
    inits = [{"weight_hh": draw} for draw in drawers]
    return [*layers, gpurnn.LSTM, gpurnn.LSTM(I, H).cell, gpurnn.softmax_cross_entropy, *inits, {"foo": "identity"}]
