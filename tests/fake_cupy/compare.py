"""Runs the same work on NumPy and on the stand-in, and compares what comes: results, or errors."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import gpurnn
from tests.interpreted import interpreted

TOLERANCE = {"float16": 1e-3, "float32": 1e-5, "float64": 1e-12}


@contextlib.contextmanager
def on_numpy() -> Iterator[None]:
    """The NumPy backend with the executor that the stand-in uses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPURNN_EXECUTOR", "numpy")
        yield


def on_host(value: Any) -> Any:
    """The arrays in it as NumPy arrays.  Each of them, of whatever the library gave, has to be the backend's."""
    if isinstance(value, dict):
        return {name: on_host(part) for name, part in value.items()}
    if isinstance(value, tuple | list):
        return [on_host(part) for part in value]
    if gpurnn.backend.name == "cuda":
        assert not isinstance(value, np.generic | np.ndarray), "came from a device as NumPy's"
    return gpurnn.backend.to_numpy(value) if isinstance(value, gpurnn.backend.xp.ndarray | np.generic) else value


def assert_same(work: Callable[[], Any], dtype: str = "float64", seed: int | None = None) -> None:
    """`work()` gives the same on both backends.  seed: None, or that of a random order of warps."""
    with on_numpy():
        expected = on_host(work())
    with interpreted("numpy", seed):
        got = on_host(work())
        gpurnn.synchronize()
    _compare(got, expected, TOLERANCE[dtype], "")


def _compare(got: Any, expected: Any, tolerance: float, where: str) -> None:
    if isinstance(expected, dict | list):
        assert type(got) is type(expected) and len(got) == len(expected), where
        for name in expected if isinstance(expected, dict) else range(len(expected)):
            _compare(got[name], expected[name], tolerance, f"{where} {name}")
    elif isinstance(expected, np.ndarray | np.generic | float):
        expected = np.asarray(expected)
        assert np.asarray(got).dtype == expected.dtype and np.shape(got) == expected.shape, where
        scale = np.abs(expected[np.isfinite(expected)], dtype=float).max(initial=0) or 1.0
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * scale, err_msg=where)
    else:
        assert got == expected, where


def same_error(work: Callable[[], Any]) -> BaseException:
    """`work()` raises one error on both backends, word for word."""
    raised = []
    for backend in (on_numpy, lambda: interpreted("numpy")):
        with backend(), pytest.raises(Exception) as caught:
            work()
        raised.append((caught.type, str(caught.value)))
    assert raised[0] == raised[1]
    return caught.value
