"""`cupy.cuda` of the stand-in: one device, streams that run everything at once, cuBLAS and the runtime."""

from types import SimpleNamespace
from typing import Any, ClassVar

from . import cublas, runtime

__all__ = ["Device", "Stream", "cublas", "device", "get_current_stream", "is_available", "runtime"]

_CUBLAS_HANDLE = 1

_ATTRIBUTES = {
    "ComputeCapabilityMajor": 9,
    "ComputeCapabilityMinor": 0,
    "CooperativeLaunch": 1,
    "L2CacheSize": 62_914_560,
    "MaxBlocksPerMultiprocessor": 32,
    "MaxGridDimX": 2**31 - 1,
    "MaxRegistersPerBlock": 65_536,
    "MaxRegistersPerMultiprocessor": 65_536,
    "MaxSharedMemoryPerBlock": 49_152,
    "MaxSharedMemoryPerBlockOptin": 232_448,
    "MaxSharedMemoryPerMultiprocessor": 233_472,
    "MaxThreadsPerBlock": 1024,
    "MaxThreadsPerMultiProcessor": 2048,
    "MultiProcessorCount": 132,
    "WarpSize": 32,
}


class Device:
    """The one device."""

    def __init__(self, device: int | None = None):
        self.id = 0 if device is None else int(device)
        runtime.setDevice(self.id)

    compute_capability = "90"
    cublas_handle = _CUBLAS_HANDLE

    @property
    def attributes(self) -> dict[str, int]:
        return dict(_ATTRIBUTES)

    def __int__(self) -> int:
        return self.id

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Device) and self.id == other.id

    __hash__ = None  # as CuPy's, which defines comparisons only

    def __enter__(self) -> "Device":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def use(self) -> "Device":
        return self

    def synchronize(self) -> None:
        runtime.deviceSynchronize()


class Stream:
    """Work on it is done when the call that gives it returns."""

    _current: ClassVar[list["Stream"]] = []

    def __init__(self, null: bool = False, non_blocking: bool = False):
        self.ptr = 0 if null else id(self)

    def __enter__(self) -> "Stream":
        Stream._current.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        Stream._current.pop()

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self.ptr

    def synchronize(self) -> None:
        runtime.streamSynchronize(self.ptr)


Stream.null = Stream(null=True)


def get_current_stream() -> Any:
    return Stream._current[-1] if Stream._current else Stream.null


def is_available() -> bool:
    return True


device = SimpleNamespace(Device=Device, get_cublas_handle=lambda: _CUBLAS_HANDLE, get_device_id=runtime.getDevice)
