"""Launching built kernels: raw pointers, on CuPy's current stream, a few microseconds of Python each.

Work is ordered with CuPy's, nothing waits for the device, and a stream that is being captured captures the launch.
"""

import functools
from typing import Any

from .build import Kernel

WITHOUT_ASKING = 48 * 1024  # bytes of shared memory
LEGACY_STREAM = 1  # CUDA's handle for the stream that CuPy calls 0


class Launcher:
    """A kernel on the current device: `launcher(blocks, *arguments)`, pointers and int64 as ints, reals as NumPy scalars.

    cooperative: all blocks must run at once, because they wait for each other; a launch that cannot raises.
    Raises RuntimeError where the device cannot run even one block.
    """

    def __init__(self, kernel: Kernel, cooperative: bool = False):
        import cupy
        from cuda.core import Device, LaunchConfig, ObjectCode, launch

        number = cupy.cuda.Device().id
        device = Device(number)
        device.set_current()
        self.kernel, self.cooperative = kernel, cooperative
        self._entry = ObjectCode.from_cubin(kernel.cubin).get_kernel(kernel.name)
        if kernel.shared + kernel.static_shared > WITHOUT_ASKING:
            _allow_shared(self._entry, number, kernel.shared)
        each = self._entry.occupancy.max_active_blocks_per_multiprocessor(kernel.threads, kernel.shared)
        self.resident_blocks = each * device.properties.multiprocessor_count
        if not each:
            raise RuntimeError(
                f"{kernel.name}: no block fits an SM of {device.name}: {kernel.threads} threads of {kernel.registers} "
                f"registers and {kernel.shared + kernel.static_shared} bytes of shared memory"
            )
        self._launch = launch
        options = {"block": kernel.threads, "shmem_size": kernel.shared, "is_cooperative": cooperative}
        self._config = functools.lru_cache(maxsize=4096)(lambda blocks: LaunchConfig(grid=blocks, **options))

    def __call__(self, blocks: int, *arguments: Any) -> None:
        """Raises RuntimeError where a cooperative grid would not run at once: it would hang; TypeError where arguments
        are missing or too many: the driver would read what lies behind them.  Nothing is launched then.
        """
        if len(arguments) != self.kernel.arguments:
            raise TypeError(f"{self.kernel.name}: expected {self.kernel.arguments} arguments, got {len(arguments)}")
        if self.cooperative and blocks > self.resident_blocks:
            raise RuntimeError(
                f"{self.kernel.name}: {blocks} blocks wait for each other, but only {self.resident_blocks} run at once"
            )
        self._launch(_stream(), self._config(blocks), self._entry, *arguments)


def _stream() -> Any:
    import cupy

    return _wrapped(cupy.cuda.get_current_stream().ptr or LEGACY_STREAM)


@functools.lru_cache(maxsize=64)
def _wrapped(handle: int) -> Any:
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _allow_shared(entry: Any, device: int, size: int) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (code,) = driver.cuKernelSetAttribute(attribute, size, entry.handle, driver.CUdevice(device))
    if code != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"a block may not have {size} bytes of shared memory: {code.name}")
