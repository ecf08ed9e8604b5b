"""What the GPU did while it was timed: clocks, power, temperature, throttle reasons, memory, energy, all by NVML.

A thread samples; the harness names the spans of time in which one implementation ran, and gets their summary.  NVML
only reads: nothing here changes a setting of the device.
"""

import importlib
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

PERIOD = 0.02  # s between samples

# Reasons that are no fault: an idle device, and clocks that somebody has set.
_HARMLESS = {"nvmlClocksEventReasonGpuIdle", "nvmlClocksEventReasonApplicationsClocksSetting"}


class Sample(NamedTuple):
    """One look at the device; None for what it does not tell."""

    time: float
    sm_clock_mhz: int | None
    power_w: float | None
    temperature_c: int | None
    reasons: int
    memory_bytes: int | None


class Telemetry:
    """A context manager that samples one GPU.  `uuid` as PyTorch gives it, or None for the first device.

    Where NVML cannot be used, `reason` says why and every summary is empty.
    """

    def __init__(self, uuid: str | None = None, nvml: Any = None):
        self.samples: list[Sample] = []
        self.reason: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        try:
            self.nvml = importlib.import_module("pynvml") if nvml is None else nvml
            self.nvml.nvmlInit()
            self.handle = _handle(self.nvml, uuid)
        except Exception as error:  # no package, no driver, no such device: timing goes on without telemetry
            self.reason = f"no telemetry: {error}"

    def __enter__(self) -> Self:
        if self.reason is None:
            self._thread = threading.Thread(target=self._watch, name="telemetry", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self.nvml.nvmlShutdown()

    def summary(self, spans: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """Over the samples within the spans (of time.monotonic), and the nearest one where a span has none."""
        samples = list(self.samples)
        if not samples or not spans:
            return {}
        inside = [s for s in samples if any(start <= s.time <= end for start, end in spans)]
        inside = inside or [min(samples, key=lambda s: abs(s.time - spans[-1][1]))]
        clocks = [s.sm_clock_mhz for s in inside if s.sm_clock_mhz is not None]
        reasons = sorted({name for s in inside for name in self._names(s.reasons)})
        found = {
            "samples": len(inside),
            "sm_clock_mhz": statistics.median(clocks) if clocks else None,
            "sm_clock_lowest_mhz": min(clocks, default=None),
            "power_w": _mean([s.power_w for s in inside]),
            "temperature_c": max((s.temperature_c for s in inside if s.temperature_c is not None), default=None),
            "memory_bytes": max((s.memory_bytes for s in inside if s.memory_bytes is not None), default=None),
            "throttle_reasons": reasons,
        }
        return {name: value for name, value in found.items() if value is not None}

    def energy(self) -> float | None:
        """Joules since the driver was loaded, for differences over a second or more; None where it is not told."""
        if self.reason is not None:
            return None
        millijoules = self._asked(self.nvml.nvmlDeviceGetTotalEnergyConsumption)
        return None if millijoules is None else millijoules / 1000

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.samples.append(self._sample())
            self._stop.wait(PERIOD)

    def _sample(self) -> Sample:
        nvml = self.nvml
        power = self._asked(nvml.nvmlDeviceGetPowerUsage)
        memory = self._asked(nvml.nvmlDeviceGetMemoryInfo)
        return Sample(
            time.monotonic(),
            self._asked(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
            None if power is None else power / 1000,
            self._asked(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            self._asked(nvml.nvmlDeviceGetCurrentClocksEventReasons) or 0,
            None if memory is None else memory.used,
        )

    def _asked(self, question: Any, *arguments: Any) -> Any:
        """An answer, or None: each device refuses some questions."""
        try:
            return question(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def _names(self, reasons: int) -> list[str]:
        """The throttle reasons in a bit mask, without those that are no fault."""
        prefix = "nvmlClocksEventReason"
        known = {name: getattr(self.nvml, name) for name in dir(self.nvml) if name.startswith(prefix)}
        single = {name: bit for name, bit in known.items() if isinstance(bit, int) and bit and not bit & (bit - 1)}
        return [name.removeprefix(prefix) for name, bit in single.items() if reasons & bit and name not in _HARMLESS]


def highest_sm_clock(uuid: str | None) -> float | None:
    """Hz; None where NVML does not say."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        try:
            return 1e6 * nvml.nvmlDeviceGetMaxClockInfo(_handle(nvml, uuid), nvml.NVML_CLOCK_SM)
        finally:
            nvml.nvmlShutdown()
    except Exception:  # the caller has another source
        return None


def _handle(nvml: Any, uuid: str | None) -> Any:
    """By UUID, since CUDA_VISIBLE_DEVICES renumbers CUDA's devices and not NVML's."""
    if uuid is None:
        return nvml.nvmlDeviceGetHandleByIndex(0)
    return nvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
