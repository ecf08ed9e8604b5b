"""Work done dry: each kernel that it asks for is built into the cache, and none is launched.  No GPU is needed.

Arrays are those of the tests' stand-in for CuPy, so the library's own code runs as on the chip that is named and asks
for its kernels there, under the same keys; nothing here has to know which they are.  Matrix products do nothing either,
and results are whatever stood in memory: they are for nobody to look at.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

from gpurnn import backend
from gpurnn.cuda import cublas, device, faults, tuning
from gpurnn.files import code_folder
from gpurnn.kernels import build
from gpurnn.kernels.plan import Chip

_numbers = itertools.count(-1, -1)


class Target(NamedTuple):
    """name: of the device, under which choices that were measured on it are kept; "" where it is not at hand."""

    chip: Chip
    name: str = ""


class Kernels:
    """What has been asked for, as entries of the cache, and which of them were missing and `built`."""

    def __init__(self, target: Target, folder: Path):
        self.target, self.folder = target, folder
        self.asked: set[Path] = set()
        self.built: set[Path] = set()

    def launcher(self, recipe: build.Recipe, number: int) -> "Dry":
        entry = build.entry(recipe, self.target.chip.capability, self.folder)
        self.asked.add(entry)
        if not entry.exists():
            self.built.add(entry)
        return Dry(build.build(recipe, self.target.chip.capability, self.folder))


class Dry:
    """In a `Launcher`'s place: the kernel is there, a launch does nothing."""

    def __init__(self, kernel: build.Kernel):
        self.kernel = kernel
        self.resident_blocks = 1 << 30

    def __call__(self, blocks: int, *arguments: Any) -> None:
        pass

    def series(self, before: Sequence[Any], after: Sequence[Any]) -> Callable[..., None]:
        return self


def folder() -> Path:
    """Of the cache.  Raises ValueError where none can be written."""
    place = code_folder()
    if place is None:
        raise ValueError("no folder for kernels can be written: set GPURNN_CACHE_DIR to one that can")
    return place


@contextlib.contextmanager
def dry(target: Target) -> Iterator[Kernels]:
    """Within it work is done dry.  Arrays and layers from within are of no use outside, nor the other way round."""
    from tests import fake_cupy

    kernels = Kernels(target, folder())
    chip = target.chip._replace(device=next(_numbers))  # what is remembered by chip is remembered apart
    replaced: list[tuple[Any, str, Any]] = [
        (backend, "name", "cuda"),
        (backend, "xp", fake_cupy),
        (backend, "reason", "the tests' stand-in for CuPy, and no kernel is launched"),
        (cublas, "library", fake_cupy.cuda.cublas.Library),
        (fake_cupy.cuda.cublas, "_multiply", lambda *operands: None),
        (fake_cupy.cuda.runtime, "getDeviceProperties", lambda number: {"name": target.name.encode()}),
        (device, "_chip", lambda number: chip),
        (device, "_launcher", functools.cache(kernels.launcher)),
        (tuning, "_milliseconds", lambda run, given: run(*given) or 0.0),
        (tuning, "_write", lambda key, found: None),
    ]
    with contextlib.ExitStack() as stack:
        for where, name, value in replaced:
            stack.enter_context(patch.object(where, name, value))
        pool = SimpleNamespace(free_all_blocks=lambda: None)
        stack.enter_context(patch.object(fake_cupy, "get_default_memory_pool", lambda: pool, create=True))
        faults.restart(0)
        yield kernels
