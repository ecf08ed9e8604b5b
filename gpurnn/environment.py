"""What a run ran on: printed by `gpurnn info`, recorded in checkpoints, compared when one is resumed elsewhere."""

import functools
import itertools
import os
import platform
import threading
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gpurnn import backend, locks, variables
from gpurnn._version import __version__
from gpurnn.variables import MAX_THREADS as MAX_THREADS

NOT_INSTALLED = "not installed"
CPUINFO = Path("/proc/cpuinfo")

# The distributions that may bring a package, the first installed one counts.
_DISTRIBUTIONS = {
    "numpy": ("numpy",),
    "numba": ("numba",),
    "llvmlite": ("llvmlite",),
    "numba-cuda": ("numba-cuda",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "cublas": ("nvidia-cublas", "nvidia-cublas-cu12"),
}

# Entries that may change the bits of a result.  The platform is among them for its C library's exp and log.
_REPRODUCIBILITY = ("gpurnn", "python", "platform", "cpu", "threads", *_DISTRIBUTIONS, "blas", "backend", "device")


class _Threads(threading.local):
    most: int | None = None  # of this Python thread's calls


_chosen: list[int] = []
_threads = _Threads()


def cpu_threads() -> int:
    """Threads for the CPU executor: what `set_num_threads` was given, or GPURNN_NUM_THREADS, or the logical CPUs that this
    process may use.

    Raises ValueError where GPURNN_NUM_THREADS is anything but a whole number from 1 to 1024.
    """
    if _chosen:
        return _chosen[0]
    given = variables.given("GPURNN_NUM_THREADS")
    if given is not None:
        return int(given)
    return min(_usable_cpus(), _threads.most or MAX_THREADS)


def set_num_threads(threads: int | None) -> None:
    """Threads for the CPU executor from now on, 1 to 1024, whatever GPURNN_NUM_THREADS says; None: as at the start.

    A process that is one of many, a data loader's worker for instance, wants one.  Results may differ in their last bits
    from one number of threads to another.  Raises ValueError for anything else.
    """
    if threads is not None and (not isinstance(threads, int) or not 1 <= threads <= MAX_THREADS):
        raise ValueError(f"threads: expected a whole number from 1 to {MAX_THREADS} or None, got {threads!r:.80}")
    _chosen[:] = [] if threads is None else [int(threads)]


class at_most_threads:
    """No more threads than that in this Python thread's calls, where nobody has said how many there shall be."""

    def __init__(self, most: int):
        self._most = most

    def __enter__(self) -> None:
        self._before, _threads.most = _threads.most, self._most

    def __exit__(self, *_: object) -> None:
        _threads.most = self._before


@functools.cache
def compiles() -> bool:
    """Whether Numba compiles: its own NUMBA_DISABLE_JIT turns that off."""
    with locks.building:
        from numba import config

    return not config.DISABLE_JIT


def describe() -> dict[str, str]:
    """This process's environment by name, in reading order and ready for JSON; imports none of the packages it names.

    Where an NVIDIA driver is, it gives the driver and each GPU with its memory; what cannot be had is a line that says
    so, never an exception.  Raises ValueError for a GPURNN_NUM_THREADS that makes no sense.
    """
    return {
        "gpurnn": __version__,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": _platform(),
        "cpu": _cpu_model(),
        "logical cpus": str(_usable_cpus()),
        "threads": str(cpu_threads()),
        **{package: _installed(names) for package, names in _DISTRIBUTIONS.items()},
        "blas": _blas(),
        "backend": backend.name,
        "reason": backend.reason,
        "device": backend.device_name() or "none",
        **_nvidia(),
    }


def report() -> str:
    """`describe()` as aligned lines of text."""
    entries = describe()
    width = max(map(len, entries))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in entries.items())


def differences(recorded: Mapping[str, str], now: Mapping[str, str] | None = None) -> list[str]:
    """One line for each entry that may change the bits of a result: versions, CPU, threads, BLAS, backend, device.

    recorded: what `describe()` gave when a checkpoint was written.  now: the same of today, by default this process's.
    The NVIDIA driver counts only where one of the two runs is on a GPU; memory and the like never do.
    """
    now = describe() if now is None else now
    on_gpu = "cuda" in (recorded.get("backend"), now.get("backend"))
    compared = _REPRODUCIBILITY + (("driver",) if on_gpu else ())
    return [
        f"{name}: recorded {recorded.get(name, 'nothing')}, now {now.get(name, 'nothing')}"
        for name in compared
        if recorded.get(name) != now.get(name)
    ]


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _platform() -> str:
    library = " ".join(platform.libc_ver())
    return f"{platform.system()} {platform.machine()}, {library if library.strip() else platform.release()}"


def cpu_family(cpuinfo: Path = CPUINFO) -> tuple[str, str, str]:
    """The CPU's vendor, family and model as the system calls them: ("GenuineIntel", "6", "85"); "" where it is silent."""
    found = _first_cpu(cpuinfo)
    names = ("vendor_id", "cpu family", "model"), ("cpu implementer", "cpu architecture", "cpu part")
    vendor, family, model = (found.get(x86) or found.get(arm, "") for x86, arm in zip(*names, strict=True))
    return vendor, family, model


def _cpu_model(cpuinfo: Path = CPUINFO) -> str:
    return _first_cpu(cpuinfo).get("model name") or platform.processor() or platform.machine() or "unknown"


def _first_cpu(cpuinfo: Path) -> dict[str, str]:
    """What the system says of the first CPU, by names in small letters; nothing where this is not Linux.

    The rest is not read: to ask hundreds of CPUs takes milliseconds.
    """
    found: dict[str, str] = {}
    try:
        with cpuinfo.open(errors="replace") as lines:
            for line in itertools.takewhile(str.strip, lines):
                key, _, value = line.partition(":")
                found[key.strip().lower()] = value.strip()
    except OSError:
        pass
    return found


def _installed(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return NOT_INSTALLED


def _blas() -> str:
    """The BLAS that NumPy calls: its own copy where other packages loaded theirs beside it."""
    try:
        import threadpoolctl
    except ModuleNotFoundError:
        return "unknown: threadpoolctl is not installed"
    loaded = [library for library in threadpoolctl.threadpool_info() if library["user_api"] == "blas"]
    own = [library for library in loaded if "numpy" in library["filepath"]] or loaded
    return "; ".join(map(_blas_library, own)) or "unknown"


def _blas_library(library: Mapping[str, Any]) -> str:
    parts = (library["internal_api"], library["version"], library.get("architecture"))
    threads = library["num_threads"]
    return f"{' '.join(part for part in parts if part)}, {threads} thread{'s' * (threads != 1)}"


def _nvidia() -> dict[str, str]:
    """The driver and its GPUs, hidden ones too, as NVML sees them."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            return _driver_and_gpus(pynvml)
        finally:
            pynvml.nvmlShutdown()
    except Exception as error:  # not installed, no driver, a driver half updated: each is a line for the reader
        return {"nvml": f"not usable: {backend.one_line(error)}"}


def _driver_and_gpus(nvml: Any) -> dict[str, str]:
    cuda = nvml.nvmlSystemGetCudaDriverVersion()
    entries = {
        "driver": nvml.nvmlSystemGetDriverVersion(),
        "driver's cuda": f"{cuda // 1000}.{cuda % 1000 // 10}",
    }
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        entries[f"gpu {index}"] = _asked(lambda h: str(nvml.nvmlDeviceGetName(h)), handle)
        entries[f"gpu {index} compute capability"] = _asked(
            lambda h: "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(h)), handle
        )
        entries[f"gpu {index} memory"] = _asked(lambda h: _memory(nvml.nvmlDeviceGetMemoryInfo(h)), handle)
    return entries


def _asked(question: Callable[[Any], str], handle: Any) -> str:
    """One answer; a device may refuse some, such as memory where it is the host's."""
    try:
        return question(handle)
    except Exception as error:
        return f"unknown: {backend.one_line(error)}"


def _memory(info: Any) -> str:
    return f"{info.total / 2**30:.1f} GiB, {info.free / 2**30:.1f} GiB free"
