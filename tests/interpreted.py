"""gpurnn as on a GPU, without one: arrays are the stand-in's, and kernels run in the interpreter.

A launch copies the allocations that its pointers lie in, each as a span of its own, into the interpreter's memory, runs
the PTX that Numba emitted, and copies them back.  So every kernel of every executor is run with bounds, alignment, races,
divergence, deadlock and reads of what was never written checked.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from gpurnn import faults, launches
from gpurnn.executors import device
from gpurnn.kernels import build
from tests import fake_cupy
from tests.fake_cupy.backend import as_backend
from tests.fake_cupy.graphs import recorded
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

CAPABILITY = (9, 0)
RUNNING = 132  # blocks at once


@functools.lru_cache(maxsize=256)
def program(recipe: build.Recipe):
    source = recipe.factory(recipe.trace, **dict(recipe.constants))
    return source, parse(build.ptx(source, f"gpurnn_{source.function.__name__}", CAPABILITY))


class Interpreted:
    """Launches like `kernels.launch.Launcher`; `seed`: None, or that of a random order of warps."""

    seed: int | None = None
    launches = 0

    def __init__(self, recipe: build.Recipe):
        self.source, self.module = program(recipe)
        launched = {"cluster": self.source.cluster, "cooperative": self.source.cooperative}
        self.kernel = build.Kernel(
            self.module.entry, b"", len(self.module.params), self.source.threads, 0, 0, 0, 0, **launched
        )
        self.resident_blocks = RUNNING

    @recorded
    def __call__(self, blocks: int, *arguments) -> None:
        memory, spans, given = Memory(), {}, []
        for argument, (kind, name) in zip(arguments, self.module.params, strict=True):
            given.append(
                self._address(argument, name, memory, spans) if kind == "u64" and argument > 1 << 32 else argument
            )
        run(self.module, blocks, self.source.threads, given, memory, self.source.shared, self.seed, self.source.cluster)
        for address, buffer in spans.values():
            buffer[...] = memory.get(address, buffer)
        Interpreted.launches += 1

    def series(self, before, after):
        return lambda blocks, *between: self(blocks, *before, *between, *after)

    def _address(self, pointer: int, name: str, memory: Memory, spans: dict) -> int:
        """Where the interpreter has what `pointer` points to.  Arguments beyond 4 G are addresses, smaller ones numbers."""
        base, buffer, _ = fake_cupy.allocations.find(pointer)
        if base not in spans:
            spans[base] = memory.put(buffer, name=name), buffer
        return spans[base][0] + pointer - base


@contextmanager
def interpreted(executor: str | None = None, seed: int | None = None) -> Iterator[None]:
    """The CUDA backend with interpreted kernels.  executor: as for `as_backend`."""
    with as_backend(executor), pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_launcher", lambda recipe, number: Interpreted(recipe))
        patch.setattr(Interpreted, "seed", seed)
        faults.restart(0)
        launches._counter.cache_clear()  # a kernel that was refused may have left it at any number
        yield


def reference(array):
    """On the host, in float64."""
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)
