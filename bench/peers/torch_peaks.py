"""The machine's peaks as PyTorch reaches them: a large product by dtype, a copy; what floors rest on."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from bench.peers.torch_nn import DTYPES, set_tf32
from bench.quiet import fastest


def flops(device: str, dtypes: Iterable[str], size: int, seconds: float) -> dict[str, float]:
    """Floating-point operations a second of a square product, by dtype, on random values."""
    found = {}
    for dtype in dtypes:
        set_tf32(dtype == "tf32")
        a, b = (torch.randn(size, size, device=device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        found[dtype] = 2 * size**3 / _best(device, partial(torch.mm, a, b, out=out), seconds)
    return found


def bandwidth(device: str, size: int, seconds: float) -> float:
    """Bytes a second of a copy within the device's memory, read and written bytes both counted."""
    a = torch.ones(size, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    return 2 * size / _best(device, lambda: b.copy_(a), seconds)


def card() -> tuple[int, int, float]:
    """Of the current GPU: (L2 cache in bytes, SMs, the highest SM clock in Hz)."""
    from bench.telemetry import highest_sm_clock

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    clock = highest_sm_clock(str(properties.uuid)) or getattr(properties, "clock_rate", 1_500_000) * 1e3
    return properties.L2_cache_size, properties.multi_processor_count, clock


def _best(device: str, run: Callable[[], Any], seconds: float) -> float:
    """Seconds of the fastest try, over so many seconds."""

    def waited() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return fastest(waited, seconds)
