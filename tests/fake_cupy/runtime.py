"""`cupy.cuda.runtime` of the stand-in: one device, and copies on raw addresses that stay within allocations."""

import ctypes
from typing import Any

import numpy as np

from .graphs import recorded
from .memory import allocations, counters

CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF = 0, 1, 2, 14
memcpyHostToHost, memcpyHostToDevice, memcpyDeviceToHost, memcpyDeviceToDevice = 0, 1, 2, 3

_PROPERTIES = {
    "name": b"a stand-in for an NVIDIA H200",
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "totalGlobalMem": 150_110_011_392,
    "sharedMemPerBlock": 49_152,
    "sharedMemPerBlockOptin": 232_448,
    "sharedMemPerMultiprocessor": 233_472,
    "regsPerBlock": 65_536,
    "regsPerMultiprocessor": 65_536,
    "warpSize": 32,
    "maxThreadsPerBlock": 1024,
    "maxThreadsPerMultiProcessor": 2048,
    "l2CacheSize": 62_914_560,
    "clockRate": 1_980_000,
}


def getDeviceCount() -> int:
    return 1


def getDevice() -> int:
    return 0


def setDevice(device: int) -> None:
    if device != 0:
        raise RuntimeError(f"cudaErrorInvalidDevice: expected device 0, got {device}")


def getDeviceProperties(device: int) -> dict[str, Any]:
    setDevice(device)
    return dict(_PROPERTIES)


def runtimeGetVersion() -> int:
    return 13_000


def driverGetVersion() -> int:
    return 13_000


def deviceSynchronize() -> None:
    counters.wait("the device")


def streamSynchronize(stream: int) -> None:
    counters.wait("a stream")


@recorded
def memset(ptr: int, value: int, size: int) -> None:
    if size:
        allocations.bytes_at(ptr, size)[...] = value


def memsetAsync(ptr: int, value: int, size: int, stream: int) -> None:
    memset(ptr, value, size)


def memcpy(dst: int, src: int, size: int, kind: int) -> None:
    """Copies `size` bytes; the side that lies on the device has to lie within one allocation."""
    if not size:
        return
    onto, of = (_bytes(dst, size, kind in (1, 3)), _bytes(src, size, kind in (2, 3)))
    if kind == memcpyDeviceToHost:
        counters.wait("a copy to the host")
    if kind == memcpyHostToDevice:
        counters.transfer()
    onto[...] = of


def memcpyAsync(dst: int, src: int, size: int, kind: int, stream: int) -> None:
    memcpy(dst, src, size, kind)


def _bytes(address: int, size: int, device: bool) -> np.ndarray:
    if device:
        return allocations.bytes_at(address, size)
    return np.frombuffer((ctypes.c_uint8 * size).from_address(address), np.uint8)
