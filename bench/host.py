"""`python -m bench host`: what the host spends on a time step of the executor `step`, where nothing else takes time.

Arrays are CuPy's own, on the host's memory; cuBLAS and the driver's launch are functions that do nothing.  So no GPU is
needed, and what is left is Python: the difference between a long and a short sequence, a step.  The rest of the way,
cuBLAS's own and the driver's, is some 2 us more for each of the two.
"""

import argparse
import contextlib
import functools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from gpurnn import backend
from gpurnn.cells import LSTM_CELL
from gpurnn.executors.contract import Backward, Job, Weights

SHORT, LONG = 100, 600  # steps
N, H = 3, 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--repeats", type=int, default=20, help="of which the fastest counts (%(default)s)")


def main(options: argparse.Namespace) -> int:
    """Prints us a step, forward and back.  Raises ValueError where CuPy or the kernels' tools are not installed."""
    for name, seconds in step_seconds(options.repeats).items():
        print(f"{name:<9} {1e6 * seconds:5.2f} us of the host a step: a product and a kernel")
    return 0


def step_seconds(repeats: int) -> dict[str, float]:
    """Seconds of the host for a step forward and for a step back, the fastest of `repeats`."""
    with _nothing_else():
        short, long = (_seconds(T, repeats) for T in (SHORT, LONG))
    return {phase: (long[phase] - short[phase]) / (LONG - SHORT) for phase in long}


def _seconds(T: int, repeats: int) -> dict[str, float]:
    from gpurnn.cuda import step

    xp = backend.xp
    weights = Weights(xp.empty((4 * H, H)), xp.empty((4 * H, H)), None, None, ())
    x, state = xp.empty((T, N, H)), (xp.empty((N, H)),) * 2
    job = Job(LSTM_CELL, x, weights, state, np.full(T, N), False, True)
    fastest = {"forward": np.inf, "backward": np.inf}
    for _ in range(repeats):
        begun = time.perf_counter()
        _, tape = step.forward(job)
        between = time.perf_counter()
        assert tape is not None
        step.backward(tape, x, state, weights, Backward())
        spent = between - begun, time.perf_counter() - between
        fastest = {phase: min(best, now) for (phase, best), now in zip(fastest.items(), spent, strict=True)}
    return fastest


@contextlib.contextmanager
def _nothing_else() -> Iterator[None]:
    """CuPy without a device for the backend; `Launcher`s of kernels that nobody built, over a launch that does nothing."""
    try:
        import cupy

        from gpurnn.cuda import device
        from gpurnn.kernels import build
        from gpurnn.kernels.launch import Launcher
    except ImportError as error:
        raise ValueError(f"the host's share needs CuPy and the kernels' tools: {backend.one_line(error)}") from None

    def launcher(recipe: build.Recipe, number: int) -> Any:
        source = recipe.factory(recipe.trace, **dict(recipe.constants))
        made = Launcher.__new__(Launcher)
        made.kernel = build.Kernel("none", b"", len(source.signature), source.threads, 0, 0, 0, 0)
        made._launch, made._entry = (lambda *_: None), None
        made._config = functools.lru_cache(maxsize=4096)(lambda count: count)
        return made

    replaced: list[tuple[Any, str, Any]] = [
        (backend, "name", "cuda"),
        (backend, "xp", _quiet(cupy)),
        (device, "_launcher", launcher),
        (cupy.cuda, "get_current_stream", lambda: SimpleNamespace(ptr=0)),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(mock.patch.object(where, name, value))
        yield


def _quiet(cupy: Any) -> Any:
    """As much of CuPy as a pass needs, with arrays that nothing is ever computed in."""
    memory = np.zeros(1 << 24, np.uint8)
    owner = cupy.cuda.UnownedMemory(memory.ctypes.data, memory.size, memory, 0)

    class Array(cupy.ndarray):
        def __setitem__(self, key: Any, value: Any) -> None:
            self[key]  # a view is made, as by CuPy

        def copy(self) -> Any:
            return self

        def __iadd__(self, other: Any) -> Any:
            return self

    def empty(shape: Any, dtype: Any = np.float32) -> Any:
        return Array(shape, dtype, cupy.cuda.MemoryPointer(owner, 0))

    class Module(SimpleNamespace):
        def __hash__(self) -> int:  # type: ignore[override]
            return id(self)

    class Constants:
        def __getattr__(self, name: str) -> int:
            return 0

    cublas = Constants()
    cublas.gemmEx = lambda *_: None  # type: ignore[attr-defined]
    cuda = SimpleNamespace(
        cublas=cublas,
        device=SimpleNamespace(get_cublas_handle=lambda: 1),
        runtime=Constants(),
        Device=lambda: SimpleNamespace(id=0),
        get_current_stream=lambda: SimpleNamespace(ptr=0),
    )
    return Module(
        ndarray=cupy.ndarray,
        float64=np.float64,
        cuda=cuda,
        empty=empty,
        zeros=empty,
        ones=empty,
        full=lambda shape, value, dtype: empty(shape, dtype),
        stack=lambda parts: empty((len(parts), *parts[0].shape), parts[0].dtype),
        ascontiguousarray=lambda array: array,
    )
