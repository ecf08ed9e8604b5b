"""A large buffer set to zero by several threads: all of it, nothing beside it, and seen by whoever comes next."""

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cpu import costs, crew
from gpurnn.parameters import Parameters

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on CUDA it is one launch")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_everything_and_nothing_beside_it(monkeypatch, count, dtype, streamed):
    monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))
    monkeypatch.setattr(costs, "CLEAR_BYTES", 0)
    monkeypatch.setattr(costs, "STREAMED_BYTES", 0 if streamed else 1 << 62)
    for size in (1, 16, 17, 1000, 5001):
        parts = [Parameters({"a": (37,), "b": (size,)}, dtype) for _ in range(3)]
        whole = Parameters.join(dict(zip("xyz", parts, strict=True)))
        for round in range(20):
            whole.flat[...] = round + 1
            backend.ops.clear(parts[1].flat)
            assert not parts[1].flat.any()
            assert (parts[0].flat == round + 1).all() and (parts[2].flat == round + 1).all()


def test_small_buffers_wake_no_thread_and_nan_goes(monkeypatch):
    calls = []
    monkeypatch.setattr(crew, "run", lambda *call: calls.append(call))
    small = Parameters({"a": (100,)}, "float32")
    small.flat[...] = np.nan
    backend.ops.clear(small.flat)
    assert not calls and not small.flat.any()
    large = Parameters({"a": (costs.CLEAR_BYTES // 4,)}, "float32")
    backend.ops.clear(large.flat)
    assert len(calls) == 1
