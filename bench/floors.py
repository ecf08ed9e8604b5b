"""The floor: a time per step that no implementation can beat on this machine, by a model that is stated here in full.

Its inputs are peaks measured at the start of a run with the fastest library at hand, so the floor moves with the
machine (shared cores, clocks), and a few constants from the literature, each beside its source.  It is a lower bound,
made of things that must happen; an implementation at 100% would waste nothing.  What is left out only makes it lower:
the pointwise functions, the tape that backward needs, cache misses, launches.

CPU, per step: the largest of
  arithmetic  2 N G H (I + H/heads) flop forward, three times that in training, over the peak of a large product;
  memory      each input read once and each result written once, over the copy bandwidth, unless all fits in cache;
  latency     the chain h_{t-1} -> product -> activation -> h_t, CPU_CHAIN each way.

GPU, per step: the largest of memory as above and the sum of
  chain       for each direction of time the cheaper of two ways to arrange it:
              within one SM per 8 rows of the batch, where weight_hh fits there: the product on ceil(N/8) SMs, BARRIER;
              over all SMs: the product, weight_hh beyond what the chip holds read from L2, one EXCHANGE through L2, and
              8 rows of h (backward: of the G gates' gradients) fetched by every SM.  Rows count in eights, the
              smallest tile of a tensor core; in float32, which runs without them, one by one.
  products    the input projection, and in training dx and dW, at the peak of a large product.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.cases import SYMBOLS, Case
from bench.quiet import fastest
from gpurnn.environment import cpu_threads

CPU_CHAIN = 40e-9  # s; about 120 cycles: a load, dependent multiply-adds, exp and division (instruction tables, Fog)
BARRIER = 50e-9  # s; barrier of a block, shared-memory load, tensor-core latency, tanh: about 100 cycles on Hopper
EXCHANGE = (
    0.3e-6  # s; a value written by one SM and seen by another through L2, on Hopper, in the best arrangement known
)
SM_WEIGHTS = 430e3  # bytes of weights that registers and shared memory of one SM hold beside what a kernel needs
L2_BYTES_PER_CLOCK = 64  # of one SM
TILE = 8  # batch rows
BYTES = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2}
DEFAULT_CACHE = 8 << 20
PRODUCT = 1024  # rows and columns of the product that shows the peak
COPY = 128 << 20  # bytes


class Machine(NamedTuple):
    """What was measured: flop/s of a large product by dtype, bytes/s of a copy (read + written), cache in bytes."""

    device: str
    flops: dict[str, float]
    bandwidth: float
    cache: int
    sms: int = 0
    clock: float = 0.0  # Hz, the highest of an SM


def floor(case: Case, phase: str, part: str, machine: Machine, tokens: int) -> float:
    """Seconds per step.  tokens: steps that are computed, T*N without lengths; rows count as tokens / T."""
    rows = tokens / case.T
    model = _on_gpu if machine.device == "cuda" else _on_cpu
    return model(case, phase == "training", part, machine, rows)


def work(case: Case, training: bool, part: str, rows: float) -> tuple[float, float]:
    """(flop, bytes) per step that no implementation can do without."""
    G, I, H = case.gates, case.I, case.H
    inputs = 0 if part == "recurrence" else I
    flops = 2 * rows * G * H * (inputs + H / case.heads) * (3 if training else 1)
    weights = G * H * (inputs + H / case.heads)
    moved = rows * ((inputs or G * H) + H) * (2 if training else 1) + weights * (2 if training else 1) / case.T
    if part == "model":
        flops += 6 * rows * H * SYMBOLS
        moved = 7 * (weights + SYMBOLS * (I + H)) / case.T  # Adam reads four arrays of parameters and writes three
    return flops, moved * BYTES[case.dtype]


def _on_cpu(case: Case, training: bool, part: str, machine: Machine, rows: float) -> float:
    flops, moved = work(case, training, part, rows)
    memory = moved / machine.bandwidth if moved * case.T > machine.cache else 0.0
    return max(flops / machine.flops[case.dtype], memory, CPU_CHAIN * (2 if training else 1))


def _on_gpu(case: Case, training: bool, part: str, machine: Machine, rows: float) -> float:
    flops, moved = work(case, training, part, rows)
    recurrent = 2 * rows * case.gates * case.H * case.H / case.heads
    serial = _chain(case, machine, rows, case.H)
    if training:
        serial += _chain(case, machine, rows, case.gates * case.H)
        recurrent *= 2
    products = (flops - recurrent) / machine.flops[case.dtype]
    memory = moved / machine.bandwidth if moved * case.T > machine.cache else 0.0
    return max(serial + products, memory)


def _chain(case: Case, machine: Machine, rows: float, width: int) -> float:
    """One step in one direction of time; `width` values a row are what the next step waits for."""
    size, peak = BYTES[case.dtype], machine.flops[case.dtype]
    tile = 1 if case.dtype == "float32" else TILE
    tiles = max(1.0, rows / tile)
    flops = 2 * tiles * tile * case.gates * case.H * case.H / case.heads
    weights = case.gates * case.H * case.H / case.heads * size
    l2 = L2_BYTES_PER_CLOCK * machine.clock
    spread = flops / peak + EXCHANGE + tile * width / case.heads * size / l2
    spread += max(0.0, weights - machine.sms * SM_WEIGHTS) / (machine.sms * l2)
    if weights / case.heads > SM_WEIGHTS:
        return spread
    alone = flops / peak * machine.sms / min(machine.sms, math.ceil(tiles) * case.heads) + BARRIER
    return min(spread, alone)


def measure(device: str, dtypes: Sequence[str], quick: bool = False) -> Machine:
    """The machine's peaks, in some seconds; `quick` in about one."""
    if device == "cuda":
        return _measure_gpu(dtypes, 0.1 if quick else 0.4)
    seconds = 0.3 if quick else 1.0
    flops = max(_numpy_flops(seconds), _torch_flops(seconds), _own_flops(seconds))
    return Machine("cpu", {"float32": flops}, _copy_bandwidth(seconds), _cache_bytes())


def _measure_gpu(dtypes: Sequence[str], seconds: float) -> Machine:
    from bench.peers import torch_peaks

    flops = torch_peaks.flops("cuda", dtypes, 8192, seconds)
    return Machine("cuda", flops, torch_peaks.bandwidth("cuda", 2 << 30, seconds), *torch_peaks.card())


def _numpy_flops(seconds: float) -> float:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((PRODUCT, PRODUCT), dtype=np.float32) for _ in range(2))
    out = np.empty_like(a)
    return 2 * PRODUCT**3 / fastest(lambda: np.matmul(a, b, out=out), seconds)


def _torch_flops(seconds: float) -> float:
    """MKL's or oneDNN's, which may beat OpenBLAS; 0 where torch is not installed."""
    try:
        import torch
    except ImportError:
        return 0.0
    from bench.peers import torch_peaks

    torch.set_num_threads(cpu_threads())
    return torch_peaks.flops("cpu", ["float32"], PRODUCT, seconds)["float32"]


def _own_flops(seconds: float) -> float:
    """Of our micro-kernel, each thread on operands that stay in its cache: a floor that we pass would be none."""
    from gpurnn.cpu import cache, threads
    from gpurnn.cpu.gemm import make_gemm
    from gpurnn.cpu.packing import packed_size
    from gpurnn.cpu.simd import address, host

    dtype, m, k, n, times = np.dtype(np.float32), 96, 256, 512, 20
    gemm, size = make_gemm(dtype), np.dtype(np.float32).itemsize

    def multiply(a, w, c):
        for _ in range(times):
            gemm(1, a, 0, k * size, m, w, 0, k, 1, n, c, 0, 0, n * size, 0)

    kernel = cache.external(multiply, "peak", m, k, n, times, host()).python
    sizes = m * k, packed_size(k, n, dtype), m * n
    operands = [[np.ones(count, dtype) for count in sizes] for _ in range(cpu_threads())]
    flops = 2 * times * m * k * n * len(operands)
    return flops / fastest(lambda: threads.run(lambda own: kernel(*map(address, own)), operands), seconds)


def _copy_bandwidth(seconds: float) -> float:
    """With all threads, each on its own part: one thread does not saturate a memory controller."""
    source = np.ones(COPY, np.uint8)
    target = np.empty_like(source)
    threads = cpu_threads()
    cuts = [slice(COPY * k // threads, COPY * (k + 1) // threads) for k in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        return (
            2 * COPY / fastest(lambda: list(pool.map(lambda cut: np.copyto(target[cut], source[cut]), cuts)), seconds)
        )


def _cache_bytes(folder: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> int:
    """The last-level cache's, as Linux gives it ("32768K"); a guess elsewhere."""
    sizes = []
    for file in folder.glob("index*/size"):
        text = file.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
        digits = text.rstrip("KM")
        sizes.append(int(digits) * unit if digits.isdigit() else 0)
    return max(sizes, default=0) or DEFAULT_CACHE
