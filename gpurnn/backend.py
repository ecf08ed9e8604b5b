"""The one decision between NumPy and CUDA, taken once at import, and the arrays that go with it.

`name` is "cuda" or "numpy", `xp` is CuPy or NumPy, `reason` says in one sentence why.  The environment variable
GPURNN_BACKEND asks for one of them: `auto` (default) takes CUDA where it works and NumPy elsewhere, `numpy` looks for no
device, `cuda` raises RuntimeError where it cannot be had.

The driver library is asked first, through ctypes and in about a millisecond, so that a machine without a GPU never pays
for importing a CUDA package.  CuPy is imported only where there is a device, and has to add and multiply on it once.
"""

import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import numpy

from gpurnn import locks, variables
from gpurnn.types import Array

Version = tuple[int, int]


class _Thread(threading.local):
    """Of this thread, while it runs or records a step aside (`gpurnn.cuda.capture`).

    capturing: whether it records.  cublas: what has matrix products in the place of CuPy's module.  stream: on whose behalf.
    """

    capturing = False
    cublas: Any = None
    stream: int | None = None


thread = _Thread()

CHOICES = ("auto", "cuda", "numpy")
OLDEST_CUDA = (12, 0)  # the oldest one that gpurnn's extras, cuda12 and cuda13, are built for

_WINDOWS = sys.platform == "win32"
_DRIVER = "nvcuda.dll" if _WINDOWS else "libcuda.so.1"
_NVML = "nvml.dll" if _WINDOWS else "libnvidia-ml.so.1"

# What cuInit returns on machines that are set up wrongly: the name, and what helps.
_INIT_ERRORS = {
    34: ("CUDA_ERROR_STUB_LIBRARY", "the toolkit's stub library was loaded in the driver's place"),
    35: ("CUDA_ERROR_INSUFFICIENT_DRIVER", "the driver is too old, update it"),
    100: ("CUDA_ERROR_NO_DEVICE", "the driver sees no device"),
    802: ("CUDA_ERROR_SYSTEM_NOT_READY", "the system's GPU fabric is not started yet"),
    803: ("CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "driver library and kernel module differ, reboot after a driver update"),
    804: ("CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE", "the CUDA compatibility package does not support this device"),
}

_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62  # bytes
_DLPACK_HOST = (1, 3)  # kDLCPU, kDLCUDAHost
_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _Unusable(Exception):
    """Why CUDA cannot be had, in one sentence."""


def _choose(wanted: str) -> tuple[str, Any, str]:
    """The backend's name, its array module and the reason, for one value of GPURNN_BACKEND."""
    if wanted not in CHOICES:
        raise ValueError(f"GPURNN_BACKEND: expected one of {', '.join(CHOICES)}, got {wanted!r}")
    if wanted == "numpy":
        return "numpy", numpy, "NumPy was asked for with GPURNN_BACKEND=numpy"
    try:
        cupy, why = _cuda()
    except Exception as error:
        why = str(error) if isinstance(error, _Unusable) else f"looking for CUDA failed: {one_line(error)}"
        if wanted == "cuda":
            raise RuntimeError(f"GPURNN_BACKEND=cuda was asked for, but {why}") from error
        return "numpy", numpy, why
    return "cuda", cupy, why


def _cuda() -> tuple[Any, str]:
    """CuPy, after it has proved itself, and the sentence that names its device.  Raises _Unusable."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError as error:
        raise _Unusable(f"there is no NVIDIA driver library ({one_line(error)}){_container_hint()}") from error
    version = _driver_version(driver)
    if version < OLDEST_CUDA:
        raise _Unusable(
            f"the NVIDIA driver supports only CUDA {_dotted(version)} and CUDA {_dotted(OLDEST_CUDA)} is needed: "
            "update the driver"
        )
    if importlib.util.find_spec("cupy") is None:
        raise _Unusable(_missing_cupy(version, _gpu_names()))
    try:
        import cupy

        built_for = _version(cupy.cuda.runtime.runtimeGetVersion())
        if version[0] >= built_for[0]:  # within one major version any driver serves any toolkit
            return cupy, _proof(cupy, built_for)
    except Exception as error:
        raise _Unusable(f"CuPy is installed but does not work: {one_line(error)}") from error
    raise _Unusable(
        f"CuPy {cupy.__version__} is built for CUDA {_dotted(built_for)} and the NVIDIA driver supports only CUDA "
        f"{_dotted(version)}: update the driver, or uninstall CuPy and pip install 'gpurnn[{_extra(version)}]'"
    )


def _driver_version(driver: Any) -> Version:
    """The newest CUDA version that the driver supports, once it has a device.  Raises _Unusable."""
    code = driver.cuInit(0)
    if code:
        label, hint = _INIT_ERRORS.get(code) or (_error_name(driver, code), "the driver does not start")
        raise _Unusable(f"the NVIDIA driver's cuInit failed with error {code} {label}: {hint}{_hidden_hint()}")
    version, count = ctypes.c_int(), ctypes.c_int()
    for function, argument in ((driver.cuDriverGetVersion, version), (driver.cuDeviceGetCount, count)):
        code = function(ctypes.byref(argument))
        if code:
            raise _Unusable(f"the NVIDIA driver does not answer: error {code} {_error_name(driver, code)}")
    if count.value < 1:
        raise _Unusable(f"the NVIDIA driver works but finds no device{_hidden_hint()}")
    return _version(version.value)


def _error_name(driver: Any, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorName(code, ctypes.byref(text))
    return text.value.decode() if text.value else "of no known name"


def _hidden_hint() -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible!r} may hide it)"


def _container_hint() -> str:
    """NVML without libcuda is a container that was started for monitoring only."""
    names = _gpu_names()
    return (
        f", though NVML sees {names[0]}: a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility" if names else ""
    )


def _gpu_names() -> list[str]:
    """Names of the GPUs that NVML sees; none where NVML cannot be asked.  Imports pynvml only beside a driver."""
    try:
        ctypes.CDLL(_NVML)
        import pynvml

        pynvml.nvmlInit()
        try:
            handles = map(pynvml.nvmlDeviceGetHandleByIndex, range(pynvml.nvmlDeviceGetCount()))
            return [str(pynvml.nvmlDeviceGetName(handle)) for handle in handles]
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # NVML only makes the sentence better: whatever is wrong with it, CUDA is what counts
        return []


def _missing_cupy(version: Version, names: list[str]) -> str:
    device = f" ({names[0]})" if names else ""
    return f"an NVIDIA GPU is here but CuPy is not installed: pip install 'gpurnn[{_extra(version)}]'{device}"


def _proof(cupy: Any, built_for: Version) -> str:
    """Has CuPy compile a kernel (NVRTC) and multiply matrices (cuBLAS); compares both on the host."""
    if cupy.cuda.runtime.getDeviceCount() < 1:
        raise RuntimeError("it finds no device")
    values = numpy.arange(9, dtype=numpy.float32).reshape(3, 3)
    array = cupy.asarray(values)
    for what, got, expected in (("sum", array + array, values + values), ("product", array @ array, values @ values)):
        if not numpy.array_equal(cupy.asnumpy(got), expected):
            raise RuntimeError(f"it computes a wrong {what}")
    return f"CuPy {cupy.__version__} with CUDA {_dotted(built_for)} works on {_name_of_device(cupy)}"


def _name_of_device(cupy: Any) -> str:
    return cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()


def _extra(version: Version) -> str:
    return "cuda12" if version[0] == 12 else "cuda13"


def _version(number: int) -> Version:
    """CUDA's own encoding: 12040 is 12.4."""
    return number // 1000, number % 1000 // 10


def _dotted(version: Version) -> str:
    return ".".join(map(str, version))


def one_line(error: BaseException) -> str:
    """The innermost cause of `error` on one line: CuPy wraps a short cause into a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def device_name() -> str | None:
    """The name of the GPU in use, such as "NVIDIA H200"; None on the NumPy backend."""
    return _name_of_device(xp) if name == "cuda" else None


def synchronize() -> None:
    """Waits until the device has done all work given to it; NumPy has nothing to wait for."""
    if name == "cuda":
        xp.cuda.Device().synchronize()


def to_numpy(array: Array) -> numpy.ndarray:
    """`array` on the host: a copy of a CuPy array, a NumPy array itself."""
    return xp.asnumpy(array) if name == "cuda" else numpy.asarray(array)


def joined(parts: Sequence[Array]) -> Array:
    """`parts`, of one dtype, one behind another along their first axis, in new memory.

    CuPy's own functions copy addresses from the host where there are more than 8 parts, which no graph can hold.
    """
    if isinstance(parts[0], numpy.ndarray):  # of the CPU's executor, which PyTorch's tensors have on any machine
        return numpy.concatenate(parts)
    if len(parts) <= 8:
        return xp.concatenate(parts)
    whole = xp.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
    start = 0
    for part in parts:
        whole[start : start + len(part)] = part
        start += len(part)
    return whole


def stacked(parts: Sequence[Array]) -> Array:
    """`parts`, of one shape and dtype, along a new first axis, in new memory; see `joined`."""
    return joined([part[None] for part in parts])


def asarray(array: Any, dtype: Any, name: str) -> Array:
    """Turns anything array-like into the backend's array, without a copy where memory and dtype are right already.

    array: NumPy (memory-mapped too) or CuPy array, an object with `__dlpack__` or `__cuda_array_interface__` such as a
        torch tensor, nested lists, or a scalar.
    dtype: the dtype wanted, or None to keep the array's own (in native byte order).
    name: what errors call the array.
    Raises TypeError for anything but real numbers, for floats where integers are expected, and for tensors that are part
    of an autograd graph; ValueError for integers (given on the host) beyond the range of `dtype`; MemoryError for a value
    that was broadcast beyond all memory.
    """
    if type(array) is xp.ndarray and array.dtype == dtype and array.dtype.kind in "biuf":  # as in every training step
        return _there(array, name)
    what = _described(array)
    if getattr(array, "requires_grad", False):
        raise TypeError(f"{name}: expected plain values, got {what} that requires grad: detach() it first")
    try:
        found = _array_of_own_dtype(array)
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        raise TypeError(f"{name}: expected an array of numbers, got {what}: {one_line(error)}") from error
    if found.dtype.kind not in "biuf":
        raise TypeError(f"{name}: expected real numbers, got {what} with dtype {found.dtype}")
    _there(found, name)
    wanted = found.dtype.newbyteorder("=") if dtype is None else numpy.dtype(dtype)
    if wanted.kind in "biu" and found.size:
        _check_whole(found, wanted, name, what)
    return xp.asarray(found.astype(wanted, copy=False))


def _there(array: Array, name: str) -> Array:
    """`array`; MemoryError where one value was broadcast to more than memory holds, since its copies would not be."""
    if isinstance(array, numpy.ndarray) and array.nbytes > _MEMORY and 0 in array.strides:
        raise MemoryError(f"{name}: expected an array that memory can hold, got one of {array.nbytes >> 30:,} GiB")
    return array


def _array_of_own_dtype(array: Any) -> Array:
    """`array` as a NumPy array where its memory is the host's or the backend is NumPy, as a CuPy array otherwise."""
    masked = sys.modules.get("numpy.ma")  # imported here, a fork meanwhile would leave its child waiting
    if masked is not None and isinstance(array, getattr(masked, "MaskedArray", ())):
        raise TypeError("its mask would be lost")
    if isinstance(array, xp.ndarray) and xp is not numpy:
        return array
    dlpack = hasattr(array, "__dlpack_device__")
    place = array.__dlpack_device__()[0] if dlpack else None
    if place in _DLPACK_CUDA or hasattr(array, "__cuda_array_interface__"):
        if xp is not numpy:  # DLPack first: it orders the two libraries' streams
            return xp.from_dlpack(array) if dlpack else xp.asarray(array)
        return _copied_to_host(array)
    if dlpack and place not in _DLPACK_HOST:
        return _copied_to_host(array)
    return numpy.from_dlpack(array) if dlpack and not hasattr(array, "__array__") else numpy.asarray(array)


def _copied_to_host(array: Any) -> numpy.ndarray:
    for method in ("get", "cpu", "copy_to_host"):  # CuPy's, torch's and Numba's names for it
        if hasattr(array, method):
            return numpy.asarray(getattr(array, method)())
    raise TypeError("it lies in device memory and has no method get(), cpu() or copy_to_host()")


def _check_whole(found: Array, wanted: numpy.dtype, name: str, what: str) -> None:
    """Refuses a conversion to integers (or bool) that would cut or wrap values; ranges are checked on the host only."""
    if found.dtype.kind == "f":
        raise TypeError(f"{name}: expected whole numbers ({wanted}), got {what} with dtype {found.dtype}")
    if isinstance(found, numpy.ndarray) and not numpy.can_cast(found.dtype, wanted, "safe"):
        low, high = (0, 1) if wanted.kind == "b" else (numpy.iinfo(wanted).min, numpy.iinfo(wanted).max)
        if found.min() < low or found.max() > high:
            range_found = f"{found.min()}..{found.max()}"
            raise ValueError(f"{name}: expected {wanted} values in {low}..{high}, got {what} with {range_found}")


def _described(array: Any) -> str:
    kind = type(array)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class _Operations:
    """A training step's operations, `gpurnn.cpu.ops` or `gpurnn.cuda.ops`: imported when first used, as CUDA's needs Numba."""

    def __getattr__(self, operation: str) -> Any:
        return getattr(_module_of(name), operation)


@functools.cache
def _module_of(backend: str) -> Any:
    with locks.building:
        return importlib.import_module("gpurnn.cuda.ops" if backend == "cuda" else "gpurnn.cpu.ops")


ops: Any = _Operations()
name: str
xp: Any
reason: str
name, xp, reason = _choose(variables.given("GPURNN_BACKEND") or "auto")
