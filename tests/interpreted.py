"""gpurnn as on a GPU, without one: arrays are the stand-in's, and kernels run in the interpreter.

A launch copies the allocations that its pointers lie in, each as a span of its own, into the interpreter's memory, runs
the PTX that Numba emitted, and copies them back.  So every kernel of every executor is run with bounds, alignment, races,
divergence, deadlock and reads of what was never written checked.

The PTX is kept in the cache folder, which the processes of a session share, under the key of its machine code and the
versions of what ran Numba.  Kernels that a test has changed, in their module or in one that they call, are not.
"""

import functools
import importlib
import os
import pkgutil
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import gpurnn.kernels
from gpurnn.cuda import device, faults, launches
from gpurnn.files import code_folder
from gpurnn.kernels import build
from gpurnn.kernels.launch import check
from tests import fake_cupy
from tests.fake_cupy.backend import as_backend
from tests.fake_cupy.graphs import recorded
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

CAPABILITY = (9, 0)
RUNNING = 132  # blocks at once
TYPES = {"u64": int, "f32": np.float32, "f64": np.float64}  # of an argument, by what the kernel reads


def _state(name: str) -> dict[str, tuple[int, int]]:
    """What a kernel's module is made of, and the code of its functions."""
    everything = vars(importlib.import_module(name)).items()
    return {
        key: (id(value), id(getattr(value, "__code__", None))) for key, value in everything if not key.startswith("__")
    }


AS_WRITTEN = {name: _state(name) for _, name, _ in pkgutil.iter_modules(gpurnn.kernels.__path__, "gpurnn.kernels.")}


@functools.lru_cache(maxsize=256)
def program(recipe: build.Recipe):
    source = recipe.factory(recipe.trace, **dict(recipe.constants))
    path = _kept(recipe)
    if path and path.exists():
        return source, parse(path.read_text())
    text = build.ptx(source, f"gpurnn_{source.function.__name__}", CAPABILITY)
    if path:
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)
    return source, parse(text)


def _kept(recipe: build.Recipe) -> Path | None:
    """Where the recipe's PTX is or will be; None where a test has changed the kernels."""
    factory, folder = recipe.factory, code_folder()
    own = AS_WRITTEN.get(factory.__module__, {}).get(factory.__name__, (None,))[0] == id(factory)
    if folder is None or not own or any(_state(name) != state for name, state in AS_WRITTEN.items()):
        return None
    versions = f"{platform.python_version()}-numpy{np.__version__}"
    return folder / f"{factory.__name__}-{build._key(recipe, CAPABILITY)}-{versions}.ptx"


class Interpreted:
    """Launches like `kernels.launch.Launcher`; `seed`: None, or that of a random order of warps."""

    seed: int | None = None
    launches = 0
    executed = 0  # instructions, each counted once for each thread

    def __init__(self, recipe: build.Recipe):
        self.source, self.module = program(recipe)
        launched = {"cluster": self.source.cluster, "cooperative": self.source.cooperative}
        self.kernel = build.Kernel(
            self.module.entry, b"", len(self.module.params), self.source.threads, 0, 0, 0, 0, **launched
        )
        self.resident_blocks = RUNNING

    @recorded
    def __call__(self, blocks: int, *arguments) -> None:
        check(self.kernel, self.resident_blocks, blocks, arguments)
        memory, spans, given = Memory(), {}, []
        for argument, (kind, name) in zip(arguments, self.module.params, strict=True):
            if type(argument) is not TYPES[kind]:
                raise TypeError(f"{self.kernel.name}: {name} is {kind}, got {type(argument).__name__} {argument!r}")
            given.append(
                self._address(argument, name, memory, spans) if kind == "u64" and argument > 1 << 32 else argument
            )
        threads, shared, cluster = self.source.threads, self.source.shared, self.source.cluster
        report = run(self.module, blocks, threads, given, memory, shared, self.seed, cluster)
        for address, buffer in spans.values():
            buffer[...] = memory.get(address, buffer)
        Interpreted.launches += 1
        Interpreted.executed += report.executed

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
        faults.take()
        faults.restart(0)
        launches._counter.cache_clear()  # a kernel that was refused may have left it at any number
        yield


def reference(array):
    """On the host, in float64."""
    return np.asarray(array.get() if hasattr(array, "get") else array, np.float64)
