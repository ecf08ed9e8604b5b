"""Launching built kernels: raw pointers, on CuPy's current stream, a few microseconds of Python each.

Work is ordered with CuPy's, nothing waits for the device, and a stream that is being captured captures the launch.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .build import Kernel

WITHOUT_ASKING = 48 * 1024  # bytes of shared memory
LEGACY_STREAM = 1  # CUDA's handle for the stream that CuPy calls 0


class Launcher:
    """A kernel on the current device: `launcher(blocks, *arguments)`, pointers and int64 as ints, reals as NumPy scalars.

    resident_blocks: how many run at once, in whole clusters.
    Raises RuntimeError where the device cannot run even one block, or one cluster.
    """

    def __init__(self, kernel: Kernel):
        import cupy
        from cuda.core import Device, LaunchConfig, ObjectCode, launch

        number = cupy.cuda.Device().id
        device = Device(number)
        device.set_current()
        self.kernel = kernel
        self._entry = ObjectCode.from_cubin(kernel.cubin).get_kernel(kernel.name)
        if kernel.shared + kernel.static_shared > WITHOUT_ASKING:
            _allow_shared(self._entry, number, kernel.shared)
        self._launch = launch
        options: dict[str, Any] = {"block": kernel.threads, "shmem_size": kernel.shared}
        options |= {"cluster": kernel.cluster} if kernel.cluster > 1 else {"is_cooperative": kernel.cooperative}
        self._config = functools.lru_cache(maxsize=4096)(lambda count: LaunchConfig(grid=count, **options))
        occupancy = self._entry.occupancy
        if kernel.cluster > 1:
            self.resident_blocks = kernel.cluster * occupancy.max_active_clusters(self._config(1), stream=_stream())
        else:
            each = occupancy.max_active_blocks_per_multiprocessor(kernel.threads, kernel.shared)
            self.resident_blocks = each * device.properties.multiprocessor_count
        if not self.resident_blocks:
            what = f"cluster of {kernel.cluster} blocks" if kernel.cluster > 1 else "block"
            raise RuntimeError(
                f"{kernel.name}: no {what} fits {device.name}: {kernel.threads} threads of {kernel.registers} "
                f"registers and {kernel.shared + kernel.static_shared} bytes of shared memory"
            )

    def __call__(self, blocks: int, *arguments: Any) -> None:
        """Raises RuntimeError where a cooperative grid would not run at once: it would hang; TypeError where arguments
        are missing or too many: the driver would read what lies behind them.  Nothing is launched then.
        """
        if len(arguments) != self.kernel.arguments:
            raise TypeError(f"{self.kernel.name}: expected {self.kernel.arguments} arguments, got {len(arguments)}")
        if blocks % self.kernel.cluster:
            raise RuntimeError(
                f"{self.kernel.name}: expected whole clusters of {self.kernel.cluster} blocks, got {blocks}"
            )
        if self.kernel.cooperative and blocks > self.resident_blocks:
            raise RuntimeError(
                f"{self.kernel.name}: {blocks} blocks wait for each other, but only {self.resident_blocks} run at once"
            )
        self._launch(_stream(), self._config(blocks // self.kernel.cluster), self._entry, *arguments)

    def series(self, before: Sequence[Any], after: Sequence[Any]) -> Callable[..., None]:
        """`again(blocks, *between)`: launches with the arguments before, between, after, on the stream that is current now.

        For many launches in a row of a kernel without clusters or waits: what stays is looked up and put together once.
        """
        launch, stream, entry, config = self._launch, _stream(), self._entry, self._config
        missing = self.kernel.arguments - len(before) - len(after)

        def again(blocks: int, *between: Any) -> None:
            if len(between) != missing:
                raise TypeError(f"{self.kernel.name}: expected {missing} arguments between, got {len(between)}")
            launch(stream, config(blocks), entry, *before, *between, *after)

        return again


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
