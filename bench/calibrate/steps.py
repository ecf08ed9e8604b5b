"""Experiments on the rest of a training step: BLAS's products and sums, zeros, memory, dropout, updates, waiting."""

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import gpurnn
from bench.calibrate.loops import ALONE, FLOAT32, NEVER, Pass
from bench.calibrate.measure import Case, Experiment, Way, always, either, fresh, patched, settings_of, sized, some
from gpurnn.cpu import barrier, cache, clear, costs, crew, dropout, ops, threads
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import host
from gpurnn.environment import cpu_threads

MEETINGS, SPIN = Record("steps", "number"), (100, 300, 1000, 3000, 10_000)
LINGER = (1, 1000, 5000, 20_000, 80_000)
ALLOCATED = tuple(1 << k for k in (12, 14, 16, 18, 20, 22, 40))
GAPS = (20e-6, 100e-6, 300e-6)  # s, between a step's calls: an embedding, a loss, an optimiser
SUM_BLOCKS, UPDATE_BLOCKS = (1 << 10, 1 << 12, 1 << 13, 1 << 14, 1 << 16), (1 << 12, 1 << 14, 1 << 16, 1 << 18, 1 << 20)


def _products(quick: bool) -> list[Case]:
    sizes = [(64, 256, 64), (128, 256, 256), (256, 256, 256), (512, 256, 256), (1024, 256, 256), (128, 650, 1000)]
    return [_product(*size) for size in (sizes[:1] if quick else sizes)]


def _product(m: int, k: int, n: int) -> Case:
    a, b = np.ones((m, k), FLOAT32), np.ones((k, n), FLOAT32)
    flops = 2 * m * k * n

    def run() -> None:
        with threads.one_blas_thread:
            threads.matmul(a, b)

    shared, alone = settings_of(PRODUCT_FLOPS=0), settings_of(PRODUCT_FLOPS=NEVER)
    return either(f"({m}, {k}) x ({k}, {n})", run, lambda: flops >= costs.PRODUCT_FLOPS, shared, alone)


def _behind() -> Callable[[], None]:
    """A short pass that threads share."""
    return Pass("lstm", 20, 8, 64, 64).forward


def _blas_products(quick: bool) -> list[Case]:
    sizes = [(1, 64, 64), (1, 128, 64), (1, 128, 128), (1, 256, 128), (1, 256, 256), (4, 64, 64), (16, 64, 64)]
    return [_blas_product(*size, _behind()) for size in (sizes[:1] if quick else sizes)]


def _blas_product(m: int, k: int, n: int, behind: Callable[[], None]) -> Case:
    """Plain, with as many threads as BLAS likes, or held to one; behind it a loop that wants the CPUs those spin on."""
    a, b = np.ones((m, k), FLOAT32), np.ones((n, k), FLOAT32).T

    def run() -> None:
        ops.product(a, b)
        behind()

    plain, held = settings_of(BLAS_PRODUCT=NEVER), settings_of(BLAS_PRODUCT=0)
    return either(f"({m}, {k}) x ({k}, {n})", run, lambda: m * k * n <= costs.BLAS_PRODUCT, plain, held)


def _blas_sums(quick: bool) -> list[Case]:
    behind, blocks = _behind(), some(SUM_BLOCKS, costs.BLAS_SUM, quick)

    def case(size: int) -> Case:
        values = np.ones(size, FLOAT32)

        def run() -> None:
            ops._sum_of_squares(values)
            behind()

        return sized(f"{size:,} values", run, "BLAS_SUM", blocks)

    return [case(size) for size in ((50_000,) if quick else (50_000, 400_000, 4_000_000))]


def _clearing(quick: bool) -> list[Case]:
    behind = _behind()
    return [_cleared(1 << k, asleep, behind) for k in ((18,) if quick else range(18, 26)) for asleep in (False, True)]


def _cleared(size: int, asleep: bool, behind: Callable[[], None]) -> Case:
    """Zeros for gradients, and the forward pass behind them."""
    buffer = ops.zeros(size // 4, FLOAT32)

    def run() -> None:
        ops.clear(buffer)
        behind()

    name, shared, alone = (
        f"{size >> 10:,} KiB" + " asleep" * asleep,
        settings_of(CLEAR_BYTES=0),
        settings_of(CLEAR_BYTES=NEVER),
    )
    return either(name, run, lambda: size >= costs.CLEAR_BYTES, shared, alone, asleep)


def _streaming(quick: bool) -> list[Case]:
    return [_streamed(1 << k) for k in ((20,) if quick else range(21, 28))]


def _streamed(size: int) -> Case:
    """Zeros, and what a backward pass does with them: something is added."""
    buffer = ops.zeros(size // 4, FLOAT32)

    def run() -> None:
        clear.clear(buffer)
        np.add(buffer, 1, out=buffer)

    past, through = settings_of(STREAMED_BYTES=0), settings_of(STREAMED_BYTES=NEVER)
    return either(f"{size >> 10:,} KiB", run, lambda: size > costs.STREAMED_BYTES, past, through)


def _allocating(quick: bool) -> list[Case]:
    """The arrays of whole passes, on one thread."""
    sizes = [(10, 4, 32), (20, 8, 64), (50, 16, 128), (100, 32, 256)]
    passes = [Pass("lstm", T, N, H, H) for T, N, H in (sizes[:1] if quick else sizes)]
    values = some(ALLOCATED, costs.BLOCK_BYTES, quick)
    return [
        Case(
            own.name, {v: Way(own.train, ALONE + settings_of(BLOCK_BYTES=v)) for v in values}, lambda: costs.BLOCK_BYTES
        )
        for own in passes
    ]


def _dropping(quick: bool) -> list[Case]:
    return [_dropped(1 << k) for k in ((14,) if quick else range(13, 22))]


def _dropped(size: int) -> Case:
    x = np.ones(size, FLOAT32)

    def run() -> None:
        dropout.drop(x, 1, 1, 1 << 31, np.float32(2))

    shared, alone = settings_of(DROPOUT_VALUES=1), settings_of(DROPOUT_VALUES=NEVER)
    return either(f"{size:,} values", run, lambda: size > costs.DROPOUT_VALUES, shared, alone)


def _updating(quick: bool) -> list[Case]:
    def case(size: int) -> Case:
        ways = {}
        for block in some(UPDATE_BLOCKS, costs.UPDATE_VALUES, quick):
            with patched(settings_of(UPDATE_VALUES=block)):
                ways[block] = Way(gpurnn.Adam(gpurnn.Linear(size, size, rng=0), lr=1e-3).step)
        return Case(f"Adam, {size * size + size:,} values", ways, lambda: costs.UPDATE_VALUES)

    return [case(size) for size in ((300,) if quick else (300, 1000, 2000))]


def _lingering(quick: bool) -> list[Case]:
    """Two passes that threads share, and before each so long a gap."""
    behind, waits = _behind(), {}
    for turns in some(LINGER, costs.LINGER_TURNS, quick):
        serve = always(fresh(crew._serve, LINGER_TURNS=turns))
        waits[turns] = ((crew, "_serve", serve), (crew, "_office", crew._Office()))

    def case(gap: float) -> Case:
        def run() -> None:
            for _ in range(2):
                end = time.perf_counter() + gap
                while time.perf_counter() < end:
                    pass
                behind()

        ways = {turns: Way(run, patches) for turns, patches in waits.items()}
        return Case(f"gaps of {1e6 * gap:.0f} us", ways, lambda: costs.LINGER_TURNS)

    return [case(gap) for gap in GAPS[: 1 if quick else 3]]


def _spinning(quick: bool) -> list[Case]:
    """Threads that meet, as many as there are CPUs, and one more than those."""
    made, many = {turns: _meetings(turns) for turns in some(SPIN, costs.SPIN_TURNS, quick)}, cpu_threads()

    def case(parts: int) -> Case:
        shares = [(part,) for part in range(parts)]
        ways = {turns: Way(functools.partial(crew.run, task, (100,), shares)) for turns, task in made.items()}
        return Case(f"{parts} threads on {many} CPUs", ways, lambda: costs.SPIN_TURNS)

    return [case(parts) for parts in ((many,) if quick else (many, many + 1))]


def _meetings(turns: int) -> Any:
    """meetings(values, part): its threads meet `steps` times, and wait for one another with this many turns."""
    pause = always(fresh(barrier.make_pause, SPIN_TURNS=turns))
    with patched(((barrier, "make_pause", pause),)):
        meet = fresh(barrier.make_meet, SPIN_TURNS=turns)
    read = MEETINGS.read

    def meetings(values, part):
        parties, ready, step, _shares, steps = read(values)
        meet(ready, parties)
        met = 0
        for _ in range(steps):
            met += parties
            meet(step, met)

    return cache.external(meetings, "calibrate", turns, host(), record=MEETINGS)


EXPERIMENTS = {
    "products": Experiment(("PRODUCT_FLOPS",), _products, threads=2),
    "blas_products": Experiment(("BLAS_PRODUCT",), _blas_products, threads=2),
    "blas_sums": Experiment(("BLAS_SUM",), _blas_sums, {"BLAS_SUM": SUM_BLOCKS}, threads=2),
    "clearing": Experiment(("CLEAR_BYTES",), _clearing, threads=2),
    "streaming": Experiment(("STREAMED_BYTES",), _streaming, threads=2),
    "allocating": Experiment(("BLOCK_BYTES",), _allocating, {"BLOCK_BYTES": ALLOCATED}),
    "dropping": Experiment(("DROPOUT_VALUES",), _dropping, threads=2),
    "updating": Experiment(("UPDATE_VALUES",), _updating, {"UPDATE_VALUES": UPDATE_BLOCKS}),
    "lingering": Experiment(("LINGER_TURNS",), _lingering, {"LINGER_TURNS": LINGER}, threads=2),
    "spinning": Experiment(("SPIN_TURNS",), _spinning, {"SPIN_TURNS": SPIN}, threads=2),
}
