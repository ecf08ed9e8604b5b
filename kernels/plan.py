"""Which tile a resident kernel gets: what fits one SM, and of that the cheapest by a model of one SM's cycles.

The model counts, for one step of one block, issued products, the cell's instructions, cycles of shared memory (128
bytes each), shuffles, and the latency of what has to follow one another.  It ranks tiles; times come from
`python -m bench`.
"""

from collections.abc import Iterator
from typing import NamedTuple

from .products import Ffma, Mma, Shape, ffma_sizes, mma_sizes

REGISTERS = 65536  # of an SM, and of a block: one block has the SM for itself
SHARED = 227 * 1024  # bytes a block may have on sm_90; sm_80 has 163 KB
STATIC = 48 * 1024  # of them without asking
MOST_THREADS = 512
MOST_OF_THREAD = 255
WORKING = 56  # registers for addresses, counters and what the cell computes
FRAGMENT = 192  # words: beyond, local arrays no longer become registers
SHUFFLE, PRODUCT, BARRIER = 30, 18, 40  # cycles of latency
TENSOR = 2  # cycles of an SM for one m16n8k16


class Fit(NamedTuple):
    tile: Ffma | Mma
    cycles: float


def ffma_tile(shape: Shape, rows: int, pair: int, shared: int = SHARED, shuffles: bool = True) -> Fit | None:
    """rows: of the batch in a block, 1, 2 or 4.  pair: registers that each (unit, row) needs beside the weights.

    shuffles: whether lanes may share a unit.  Before sm_90 the assembler makes each shuffle in a loop a function call,
    which saves registers to memory.
    """
    fits = []
    for units in (1, 2, 4):
        for lanes in (1, 2, 4, 8, 16, 32) if shuffles else (1,):
            threads, chunks = ffma_sizes(shape, Ffma(units, lanes, rows, 0))
            results, pairs, warps = units * shape.outputs, units * rows, threads // 32
            own = max(1, pairs // lanes)
            free = _free(threads) - results * rows - own * pair
            kept = min(chunks, free // (4 * results), FRAGMENT // (4 * results))
            tile = Ffma(units, lanes, rows, kept)
            vector, spilled = vector_bytes(shape, tile), spilled_bytes(shape, tile)
            if threads > MOST_THREADS or kept < 0 or vector > STATIC or vector + spilled > shared:
                continue
            reads = warps * chunks * rows * max(1, lanes // 8) + spilled / 128
            exchanged = (
                pairs - own if pairs >= lanes else pairs - 1 + (lanes // pairs).bit_length() - 1
            ) * shape.outputs
            issued = -(-warps // 4) * results * rows * 4 * chunks  # by the busiest of four schedulers
            latency = SHUFFLE * (lanes.bit_length() - 1) + _cell(warps, own, pair) + BARRIER
            cycles = max(issued, reads + warps * exchanged) + latency
            fits.append(Fit(tile, cycles))
    return min(fits, key=lambda fit: fit.cycles, default=None)


def mma_tile(shape: Shape, pair: int, shared: int = SHARED) -> Fit | None:
    fits = []
    for groups in (1, 2, 4):
        if groups * shape.outputs % 2:
            continue
        threads, chunks = mma_sizes(shape, Mma(groups, 0))
        tiles, warps = groups * shape.outputs // 2, threads // 32
        free = _free(threads) - 8 * tiles - 2 * groups * pair
        kept = min(chunks, free // (8 * tiles), FRAGMENT // (8 * tiles))
        tile = Mma(groups, kept)
        vector, spilled = vector_bytes(shape, tile), spilled_bytes(shape, tile)
        if threads > MOST_THREADS or kept < 0 or vector > STATIC or vector + spilled > shared:
            continue
        reads = warps * chunks * 4 + spilled / 128
        latency = PRODUCT * chunks + _cell(warps, 2 * groups, pair) + BARRIER
        cycles = max(warps * tiles * chunks * 2 * TENSOR, reads) + latency
        fits.append(Fit(tile, cycles))
    return min(fits, key=lambda fit: fit.cycles, default=None)


def _cell(warps: int, pairs: int, registers: int) -> int:
    """Instructions of the cell, its loads and stores, by the busiest scheduler: some to find each value, few to use it."""
    return -(-warps // 4) * pairs * (24 + 4 * registers)


def relaxed(shape: Shape, tile: Ffma | Mma, shared: int = SHARED) -> Iterator[Ffma | Mma]:
    """The tile, then the same with fewer chunks of weights in registers and more in shared memory, while that holds them."""
    for kept in range(tile.kept, -1, -1):
        fewer = tile._replace(kept=kept)
        if kept == tile.kept or vector_bytes(shape, fewer) + spilled_bytes(shape, fewer) <= shared:
            yield fewer


def vector_bytes(shape: Shape, tile: Ffma | Mma) -> int:
    """Of both buffers of the vector, which are static shared memory."""
    if isinstance(tile, Ffma):
        return 2 * tile.rows * 16 * tile.lanes * ffma_sizes(shape, tile)[1]
    return 2 * 8 * 64 * (mma_sizes(shape, tile)[1] + 1)


def spilled_bytes(shape: Shape, tile: Ffma | Mma) -> int:
    """Of the weights that are not in registers."""
    if isinstance(tile, Ffma):
        threads, chunks = ffma_sizes(shape, tile)
        return max(0, chunks - tile.kept) * tile.units * shape.outputs * threads * 16
    threads, chunks = mma_sizes(shape, tile)
    return max(0, chunks - tile.kept) * (tile.groups * shape.outputs // 2) * threads * 32


def _free(threads: int) -> int:
    """Registers of a thread for weights and results.  Each of the four schedulers has a quarter of them for its warps."""
    warps = -(-threads // 128)
    return min(MOST_OF_THREAD, REGISTERS // 4 // (32 * warps) // 8 * 8) - WORKING
