"""Numba function -> PTX -> cubin, on any machine, and a cache of the results on disk.

Neither a GPU nor a driver is needed: NVVM and nvJitLink are libraries.  A kernel's key is everything that decides its
code: the factory that writes it and its constants, the cell's traced mathematics, these sources and the trace's, the
tools' versions and the architecture.  Processes may share the folder; a damaged entry is built again.
"""

import contextlib
import functools
import json
import os
import re
import threading
import time
import types as python_types
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from . import entries, garbage

TOOLS = (
    "numba-cuda",
    "llvmlite",
    "numba",
    "nvidia-nvvm",
    "nvidia-nvvm-cu12",
    "nvidia-cuda-nvcc-cu12",
    "nvidia-nvjitlink",
    "nvidia-nvjitlink-cu12",
    "cuda-core",
)
PATIENCE = 60.0  # s, with a process that builds the same kernel

# What kernels are written in that came with PTX 8.6 and sm_90, and what stands for it where either is missing: the
# mbarrier's own ordering in place of the fences around it, which says more than is needed and takes longer.
SINCE = (8, 6), (9, 0)
OLDER = {
    "fence.acquire.gpu;": "fence.acq_rel.gpu;",
    "fence.release.sync_restrict::shared::cta.cluster;": "",
    "fence.acquire.sync_restrict::shared::cluster.cluster;": "",
    "mbarrier.arrive.relaxed.cluster.": "mbarrier.arrive.release.cluster.",
    "mbarrier.arrive.expect_tx.relaxed.cta.": "mbarrier.arrive.expect_tx.release.cta.",
    "mbarrier.try_wait.parity.relaxed.cluster.": "mbarrier.try_wait.parity.acquire.cluster.",
}

_compiling = threading.Lock()


class Source(NamedTuple):
    """What a factory returns: a Numba function and how it is launched.

    signature  Numba types of the arguments: pointers, int64, and the real type of a number.
    threads    of a block.  shared: bytes of dynamic shared memory of a block.
    cluster    blocks of a cluster, 1 for none.  cooperative: all blocks must run at once: they wait for each other.
    """

    function: Callable
    signature: tuple
    threads: int
    shared: int = 0
    cluster: int = 1
    cooperative: bool = False


class Kernel(NamedTuple):
    """A built kernel: machine code for one architecture, such as (9, 0).

    static_shared, shared: bytes of shared memory declared by the code, and added by a launch.  registers: of a thread.
    spilled: bytes of a thread's registers that had to go to memory.  cluster, cooperative: as in Source.
    """

    name: str
    cubin: bytes
    arguments: int
    threads: int
    shared: int
    static_shared: int
    registers: int
    spilled: int
    cluster: int = 1
    cooperative: bool = False


class Recipe(NamedTuple):
    """`factory(trace, **constants)` returns a Source; `trace` may be None."""

    factory: Callable[..., Source]
    trace: Any
    constants: tuple[tuple[str, Any], ...]

    @property
    def text(self) -> str:
        mathematics = self.trace.text if self.trace is not None else ""
        return (
            f"{self.factory.__module__.rpartition('.')[2]}.{self.factory.__qualname__}{self.constants}\n{mathematics}"
        )


def recipe(factory: Callable[..., Source], trace: Any = None, /, **constants: Any) -> Recipe:
    """Constants are numbers, strings and tuples of them: their text is part of the key."""
    return Recipe(factory, trace, tuple(sorted(constants.items())))


def build(recipe: Recipe, capability: tuple[int, int], folder: Path | None = None) -> Kernel:
    """Takes the kernel from the folder if an earlier process left it there; else compiles it and leaves it there.

    Compiling takes a processor half a second, 3 to 4 s for a kernel that runs all steps; processes that want the same
    kernel at the same time do it once.  Raises RuntimeError with the tool's message where the code does not assemble.
    """
    if folder is None:
        return _compiled(recipe, capability)
    path = entry(recipe, capability, folder)
    kernel = _read(path)
    if kernel is None:
        with _in_turn(path):
            kernel = _read(path)
            if kernel is None:
                kernel = _compiled(recipe, capability)
                _write(path, kernel)
    return kernel


def entry(recipe: Recipe, capability: tuple[int, int], folder: Path) -> Path:
    """The file in which a folder has that kernel, if it has it."""
    return folder / f"{recipe.factory.__name__}-{_key(recipe, capability)}.cubin"


def _compiled(recipe: Recipe, capability: tuple[int, int]) -> Kernel:
    source = recipe.factory(recipe.trace, **dict(recipe.constants))
    name = f"gpurnn_{source.function.__name__}"
    try:
        code, usage = assemble(ptx(source, name, capability), capability)
    except RuntimeError as error:
        raise RuntimeError(f"{name}: {error}") from error
    numbers: dict[str, Any] = {**usage, "cluster": source.cluster, "cooperative": source.cooperative}
    return Kernel(name, code, len(source.signature), source.threads, source.shared, **numbers)


def ptx(source: Source, name: str, capability: tuple[int, int]) -> str:
    """The PTX that Numba emits, its entry called `name`."""
    from .numba_cuda import cuda

    options = {"cc": capability, "device": False, "abi": "numba", "output": "ptx"}
    with _without_device(capability), garbage.left_lying():
        text, _ = cuda.compile(source.function, source.signature, launch_bounds=(source.threads, 1), **options)
    entry = re.search(r"\.visible \.entry (\w+)\(", text)
    if entry is None:
        raise RuntimeError(f"expected an entry in the PTX of {name}, got none")
    text = text.replace(entry.group(1), name)  # Numba's own name is hundreds of characters long
    return re.sub(r"\.common \.global \.align 8 \.u64 \w+;\n", "", text)  # Numba's environment, never read


def assemble(text: str, capability: tuple[int, int]) -> tuple[bytes, dict[str, int]]:
    """PTX of one kernel -> cubin, and what it uses, as the assembler reports it: the numbers of Kernel by name.

    Raises RuntimeError with the assembler's message, on one line.
    """
    from cuda.core import Linker, LinkerOptions, ObjectCode

    chip = f"sm_{capability[0]}{capability[1]}"
    try:
        readable = ObjectCode.from_ptx(_as_old_as(_assembler(), text, capability).encode())
        linker = Linker(readable, options=LinkerOptions(arch=chip, verbose=True))
        code = bytes(linker.link("cubin").code)
    except Exception as error:  # nvJitLink's kind, or the driver's where that assembles in its place
        said = " ".join(str(error).replace("\0", "").split())
        raise RuntimeError(f"the PTX does not assemble for {chip}: {said}") from error
    log = linker.get_info_log()
    reports = {
        "registers": r"[Uu]sed (\d+) registers",
        "spilled": r"(\d+) bytes stack frame",
        "static_shared": r"(\d+) bytes smem",
    }
    found = {name: re.search(pattern, log) for name, pattern in reports.items()}
    return code, {name: int(match.group(1)) if match else 0 for name, match in found.items()}


def _assembler() -> tuple[int, int]:
    """The version of PTX that nvJitLink reads at most; a driver that assembles in its place reads what it is given."""
    try:
        from cuda.bindings import nvjitlink

        major, minor = nvjitlink.version()
    except Exception:  # not installed, or too old to tell
        return (9, 99)
    return (9, minor) if major >= 13 else (8, minor if minor < 6 else minor - 1)  # CUDA 12.6 had no PTX of its own


def older(text: str) -> str:
    """The PTX with its newer words replaced by older ones (OLDER)."""
    for new, old in OLDER.items():
        text = text.replace(new, old)
    return text


def _as_old_as(newest: tuple[int, int], text: str, capability: tuple[int, int]) -> str:
    """The PTX under a version that the assembler reads, and in words that it and the chip know: NVVM may be newer."""
    if newest < SINCE[0] or capability < SINCE[1]:
        text = older(text)
    written = re.search(r"^\.version (\d+)\.(\d+)$", text, re.MULTILINE)
    if written is None or tuple(map(int, written.groups())) <= newest:
        return text
    return text.replace(written.group(), ".version {}.{}".format(*newest), 1)


@contextlib.contextmanager
def _without_device(capability: tuple[int, int]) -> Iterator[None]:
    """Device functions ask the current device for its capability while they are compiled; this answers for it.

    One thread at a time: another would take this answer for the real one.
    """
    from .numba_cuda import dispatcher

    with _compiling:
        real = dispatcher.get_current_device
        dispatcher.get_current_device = lambda: python_types.SimpleNamespace(compute_capability=capability)
        try:
            yield
        finally:
            dispatcher.get_current_device = real


def _key(recipe: Recipe, capability: Sequence[int]) -> str:
    text = f"{recipe.text}\n{tuple(capability)}\n{environment()}\n{_walk(recipe.trace)}"
    return entries.key(text)


@functools.cache
def environment() -> str:
    sources = entries.sources(__package__, _version("gpurnn"))
    return f"{sources} {[(tool, _version(tool)) for tool in TOOLS]}"


def _walk(trace: Any) -> str:
    """A digest of the source by which a trace's graphs walk through themselves (`pointwise`)."""
    return "" if trace is None else _source(type(trace.forward).__module__)


@functools.cache
def _source(module: str) -> str:
    package, _, name = module.rpartition(".")
    return entries.sources(package, _version("gpurnn"), (name,))


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


@contextlib.contextmanager
def _in_turn(path: Path) -> Iterator[None]:
    """Lets one process at a time through for an entry, by a lock that ends with its holder; nobody waits for longer
    than PATIENCE, and where there are no such locks nobody waits at all.
    """
    lock = path.with_name(f".lock-{path.name}")
    try:
        import fcntl

        descriptor = os.open(lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    except (ImportError, OSError):
        yield
        return
    try:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                break
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)


def _write(path: Path, kernel: Kernel) -> None:
    about = json.dumps(kernel._replace(cubin=b"")._asdict() | {"cubin": len(kernel.cubin)}).encode()
    payload = about + b"\n" + kernel.cubin
    entries.write(path, payload)


def _read(path: Path) -> Kernel | None:
    payload = entries.read(path)
    if payload is None:
        return None
    about, _, code = payload.partition(b"\n")
    return Kernel(**(json.loads(about) | {"cubin": code}))
