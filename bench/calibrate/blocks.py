"""Experiments on what is compiled in: the sizes of blocks, and sums side by side.  Each size is compiled by itself."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.calibrate.loops import FLOAT32, NEVER, Pass
from bench.calibrate.measure import Case, Experiment, Patches, Way, always, fresh, settings_of, some
from gpurnn.cpu import combine, compiled, costs, gemm, reduction
from gpurnn.cpu.packing import packed_size
from gpurnn.cpu.simd import address

CHAINS = (2, 4, 8, 16)
COLUMNS = (128, 256, 512, 1024, 2048)
SUM_ROWS, SUM_COLUMNS, FEW_COLUMNS = (128, 256, 512, 1024), (48, 96, 192, 384), (8, 16, 32, 64, 128)


def _chains(quick: bool) -> list[Case]:
    kernels = {value: fresh(gemm.make_gemm, FLOAT32, CHAINS=value) for value in some(CHAINS, costs.CHAINS, quick)}

    def case(m: int, n: int, k: int) -> Case:
        a, b, c = np.ones((m, k), FLOAT32), np.ones(packed_size(k, n, FLOAT32), FLOAT32), np.zeros((m, n), FLOAT32)

        def run(gemm: Any) -> None:
            for _ in range(20):
                gemm(1, address(a), 0, k * 4, m, address(b), 0, k, 1, n, address(c), 0, 0, n * 4, 0)

        ways = {value: Way(functools.partial(run, kernel.python)) for value, kernel in kernels.items()}
        return Case(f"({m}, {k}) x ({k}, {n})", ways, lambda: costs.CHAINS)

    sizes = [(1, 64, 512), (1, 16, 512), (2, 16, 512), (3, 16, 256), (1, 512, 512), (2, 48, 256)]
    return [case(*size) for size in (sizes[:1] if quick else sizes)]


def _combine(quick: bool) -> list[Case]:
    kept = costs.COMBINE_COLUMNS
    kernels = {value: fresh(combine.combine, FLOAT32, COMBINE_COLUMNS=value) for value in some(COLUMNS, kept, quick)}

    def case(m: int, k: int, n: int) -> Case:
        a, b, c = (np.ones(shape, FLOAT32) for shape in ((m, k), (k, n), (m, n)))

        def run(combine: Any) -> None:
            combine(address(a), k * 4, m, address(b), n * 4, k, n, address(c), n * 4, 0)

        ways = {value: Way(functools.partial(run, kernel.python)) for value, kernel in kernels.items()}
        return Case(f"({m}, {k}) x ({k}, {n})", ways, lambda: costs.COMBINE_COLUMNS)

    sizes = [(1, 1024, 1024), (1, 2048, 4096), (16, 8, 512), (16, 8, 2048), (16, 4, 4096)]
    return [case(*size) for size in (sizes[:1] if quick else sizes)]


def _reductions(names: tuple[str, ...], sizes: Sequence[tuple[int, ...]], passes: list[Pass]) -> list[Case]:
    """The weights' gradients of each pass, on one thread, with a reduction compiled for each of the sizes."""
    patches: dict[tuple[int, ...], Patches] = {}
    for size in sizes:
        own = dict(zip(names, size, strict=True))
        kernel = fresh(reduction.reduction, FLOAT32, **own)
        patches[size] = (
            (compiled, "reduction", always(kernel)),
            *settings_of(SUM_FLOPS=NEVER, **own),
        )

    def case(own: Pass) -> Case:
        ways = {size: Way(own.sum, patch) for size, patch in patches.items()}
        return Case(own.name, ways, lambda: tuple(getattr(costs, name) for name in names))

    return [case(own) for own in passes]


def _blocks(quick: bool) -> list[Case]:
    rows, columns = costs.SUM_ROWS, costs.SUM_COLUMNS
    sizes = {(r, columns) for r in some(SUM_ROWS, rows, quick)} | {(rows, c) for c in some(SUM_COLUMNS, columns, quick)}
    shapes = [(100, 16, 128, 128), (50, 64, 256, 256), (35, 20, 650, 650), (20, 40, 1024, 1024)]
    return _reductions(
        ("SUM_ROWS", "SUM_COLUMNS"), sorted(sizes), [Pass("lstm", *s) for s in shapes[: 1 if quick else 4]]
    )


def _few_columns(quick: bool) -> list[Case]:
    sizes = [(value,) for value in some(FEW_COLUMNS, costs.FEW_SUM_COLUMNS, quick)]
    shapes = [(1, 1, 512, 512), (8, 1, 256, 256), (4, 2, 512, 512), (1, 4, 1024, 1024)]
    return _reductions(("FEW_SUM_COLUMNS",), sizes, [Pass("lstm", *s) for s in shapes[: 1 if quick else 4]])


EXPERIMENTS = {
    "chains": Experiment(("CHAINS",), _chains, {"CHAINS": CHAINS}),
    "combine": Experiment(("COMBINE_COLUMNS",), _combine, {"COMBINE_COLUMNS": COLUMNS}),
    "blocks": Experiment(("SUM_ROWS", "SUM_COLUMNS"), _blocks, {"SUM_ROWS": SUM_ROWS, "SUM_COLUMNS": SUM_COLUMNS}),
    "few_columns": Experiment(("FEW_SUM_COLUMNS",), _few_columns, {"FEW_SUM_COLUMNS": FEW_COLUMNS}),
}
