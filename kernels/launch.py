"""Launching built kernels: raw pointers, on CuPy's current stream, a few microseconds of Python each.

Work is ordered with CuPy's, nothing waits for the device, and a stream that is being captured captures the launch.
"""

import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .build import Kernel

WITHOUT_ASKING = 48 * 1024  # bytes of shared memory
LEGACY_STREAM = 1  # CUDA's handle for the stream that CuPy calls 0
# cuda.core hands an argument over in the size of its own type: int in 8 bytes, a bool or np.int32 in fewer than a
# kernel reads, and then it reads what lies behind.
PASSED = frozenset((int, np.float32, np.float64))


class DoesNotFit(RuntimeError):
    """The device cannot run even one block of a kernel, or one of the groups whose blocks wait for each other."""


class _Thread(threading.local):
    """Of this thread: the devices whose context it has had."""

    def __init__(self) -> None:
        self.devices: set[int] = set()


_thread = _Thread()


class Launcher:
    """A kernel on the current device: `launcher(blocks, *arguments)`, pointers and int64 as ints, reals as NumPy's.

    resident_blocks: how many run at once, in whole clusters.  Any thread may launch.
    Raises DoesNotFit where the device cannot run even one block, or one cluster.
    """

    def __init__(self, kernel: Kernel):
        import cupy
        from cuda.core import Device, LaunchConfig, ObjectCode, launch

        self._device_id = device_id = cupy.cuda.Device().id
        device = Device(device_id)
        device.set_current()
        _thread.devices.add(device_id)
        self.kernel = kernel
        self._entry = ObjectCode.from_cubin(kernel.cubin).get_kernel(kernel.name)
        if kernel.shared + kernel.static_shared > WITHOUT_ASKING:
            _allow_shared(self._entry, device_id, kernel.shared)
        self._launch = launch
        options: dict[str, Any] = {"block": kernel.threads, "shmem_size": kernel.shared}
        options |= {"cluster": kernel.cluster} if kernel.cluster > 1 else {"is_cooperative": kernel.cooperative}
        self._config = functools.lru_cache(maxsize=4096)(lambda count: LaunchConfig(grid=count, **options))
        occupancy = self._entry.occupancy
        if kernel.cluster > 1:
            self.resident_blocks = kernel.cluster * occupancy.max_active_clusters(
                self._config(1), stream=_stream(device_id)
            )
        else:
            each = occupancy.max_active_blocks_per_multiprocessor(kernel.threads, kernel.shared)
            self.resident_blocks = each * device.properties.multiprocessor_count
        if not self.resident_blocks:
            what = f"cluster of {kernel.cluster} blocks" if kernel.cluster > 1 else "block"
            raise DoesNotFit(
                f"{kernel.name}: no {what} fits {device.name}: {kernel.threads} threads of {kernel.registers} "
                f"registers and {kernel.shared + kernel.static_shared} bytes of shared memory"
            )

    def __call__(self, blocks: int, *arguments: Any) -> None:
        """Launches, unless `check` raises."""
        kernel = self.kernel
        check(kernel, self.resident_blocks, blocks, arguments)
        self._enter()
        self._launch(_stream(self._device_id), self._config(blocks // kernel.cluster), self._entry, *arguments)

    def series(self, before: Sequence[Any], after: Sequence[Any]) -> Callable[..., None]:
        """`again(blocks, *between)`: launches with the arguments before, between, after, on the current stream.

        For many launches in a row, by one thread, of a kernel without clusters or waits: what stays is looked up,
        checked and put together once.  between: ints.
        """
        missing = self.kernel.arguments - len(before) - len(after)
        check(self.kernel, self.resident_blocks, 0, (*before, *[0] * missing, *after))
        self._enter()
        launch, stream, entry, config = self._launch, _stream(self._device_id), self._entry, self._config

        def again(blocks: int, *between: int) -> None:
            if len(between) != missing:
                raise TypeError(f"{self.kernel.name}: expected {missing} arguments between, got {len(between)}")
            launch(stream, config(blocks), entry, *before, *between, *after)

        return again

    def _enter(self) -> None:
        """The driver launches in a thread's current context: a new thread has none."""
        if self._device_id not in _thread.devices:
            from cuda.core import Device

            Device(self._device_id).set_current()
            _thread.devices.add(self._device_id)


def check(kernel: Kernel, resident_blocks: int, blocks: int, arguments: tuple[Any, ...]) -> None:
    """Raises TypeError where arguments are missing, too many or of a type that has another size in a kernel: it would
    read what lies behind them; RuntimeError where a cooperative grid would not run at once: it would hang.
    """
    if len(arguments) != kernel.arguments:
        raise TypeError(f"{kernel.name}: expected {kernel.arguments} arguments, got {len(arguments)}")
    if not PASSED.issuperset(map(type, arguments)):
        place, wrong = next((k, given) for k, given in enumerate(arguments, 1) if type(given) not in PASSED)
        came = f"{type(wrong).__name__} {wrong!r}"
        raise TypeError(f"{kernel.name}: argument {place}: expected int, np.float32 or np.float64, got {came}")
    if blocks % kernel.cluster:
        raise RuntimeError(f"{kernel.name}: expected whole clusters of {kernel.cluster} blocks, got {blocks}")
    if kernel.cooperative and blocks > resident_blocks:
        raise RuntimeError(
            f"{kernel.name}: {blocks} blocks wait for each other, but only {resident_blocks} run at once"
        )


def _stream(device: int) -> Any:
    import cupy

    return _wrapped(cupy.cuda.get_current_stream().ptr or LEGACY_STREAM, device)


@functools.lru_cache(maxsize=64)
def _wrapped(handle: int, device: int) -> Any:
    """cuda.core's stream, which looks up its device once: the default stream is another one on each."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def _allow_shared(entry: Any, device: int, size: int) -> None:
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (code,) = driver.cuKernelSetAttribute(attribute, size, entry.handle, driver.CUdevice(device))
    if code != driver.CUresult.CUDA_SUCCESS:
        raise DoesNotFit(f"a block may not have {size} bytes of shared memory: {code.name}")
