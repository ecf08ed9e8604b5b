"""Makes the stand-in gpurnn's backend, for the time of a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import gpurnn.backend
import gpurnn.cuda.cublas
from tests import fake_cupy


@contextmanager
def as_backend(executor: str | None = "numpy") -> Iterator[None]:
    """gpurnn as on a machine with a GPU.  Arrays and layers of one backend are of no use in the other.

    executor: what GPURNN_EXECUTOR says meanwhile; None: nothing, so that the library chooses.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpurnn.backend, "name", "cuda")
        patch.setattr(gpurnn.backend, "xp", fake_cupy)
        patch.setattr(gpurnn.backend, "reason", "the tests' stand-in for CuPy")
        patch.setattr(gpurnn.cuda.cublas, "library", fake_cupy.cuda.cublas.Library)
        if executor is None:
            patch.delenv("GPURNN_EXECUTOR", raising=False)
        else:
            patch.setenv("GPURNN_EXECUTOR", executor)
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it whatever makes the host wait for the device raises HostWait."""
    fake_cupy.counters.forbidden = True
    try:
        yield
    finally:
        fake_cupy.counters.forbidden = False
