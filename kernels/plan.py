"""Which blocks, tile and exchange a pass through time gets: all that fits is enumerated, and the cheapest is taken.

The model counts what one step costs, in cycles of an SM: issued products, shared memory (128 bytes a cycle), the cell's
instructions, the latency of what has to follow one another, the exchange between the blocks of a group, by latency and
by bytes, and memory where its latency shows.  FITTED constants are those with which it comes near to what 33 kernels
took on one H200 (bench/results): 30 of them within 25 %, a test holds it to that.  It ranks; which of two ways is
faster was measured for few shapes (in that test too), and `python -m bench model` prints its predictions beside what
was measured.
"""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from . import exchange, tiles
from .tiles import Ffma, Mma, Shape, Tile, layout

REGISTERS = 65536  # of an SM, and of a block: one block has the SM for itself
RESERVED = 1024  # bytes of shared memory of a block that the system keeps
MOST_THREADS = 512
MOST_OF_THREAD = 255
WORKING = 56  # registers for addresses, counters and what the cell computes
FRAGMENT = 192  # words: beyond, local arrays no longer become registers
UNROLLED = 6144  # multiplications of a thread and step: beyond, the loop outgrows the instruction cache

SHUFFLE, BARRIER, LOAD = 30, 30, 30  # cycles of latency; a load from shared memory takes 29
PRODUCT = 18  # of a chained product on tensor cores: 24 before the first, less behind one another
# FITTED, in cycles.  STEP: of any step, whatever it does.  LATENCY: a store seen by another SM, data that are their own
# flag and data behind a counter, which takes a fence more; a cluster's grows with its blocks.  ROUND: of each further
# round of loads of mail.  EXPOSED: memory's latency where a step waits for what it loads (mail through L2 takes as
# long); AT_LEAST: a step whose loads were given out a step before takes as long as they do.
STEP = 400
LATENCY, ROUND = {"flagged": (800, 1100), "counted": (1400, 1700)}, 200  # with slots in L2, and beyond
CLUSTER, OF_BLOCK = 100, 35
EXPOSED, AT_LEAST = {"alone": (150, 500), "clustered": (0, 500)}, (0, 1100)  # from L2, from beyond
# WORD: cycles of a word between SMs of a cluster; with more blocks than CROWD/2 it takes longer for each.
WORD, CROWD = 0.5, 100
LONG, NEAR = 512, 34e6  # steps, and bytes of slots in so many that stay in L2: nobody knows here how many there will be
L2_OF_SM, L2_OF_ALL = 64, 32  # bytes a cycle, from L2 to one SM, to each of all of them: measured by others; FITTED

LAUNCH = 2.5e-6  # seconds from one small kernel's begin to that of the next, by the driver and the device
HOST = 13e-6  # FITTED: seconds of a step by cuBLAS and a kernel that nothing else explains, Python's 1.1e-6 among them


class Chip(NamedTuple):
    """device: its ordinal.  capability: such as (9, 0).  shared: bytes of shared memory that a block may have."""

    device: int
    capability: tuple[int, int]
    multiprocessors: int
    shared: int

    @property
    def clock(self) -> float:
        """Cycles a second, at work."""
        return 1.41e9 if self.capability < (9, 0) else 1.98e9

    @property
    def lanes(self) -> int:
        """Float32 multiplications of an SM in a cycle."""
        return 64 if self.capability == (8, 0) else 128

    @property
    def tensor(self) -> float:
        """Cycles of an SM for one product on tensor cores; Hopper's give mma.sync 63 % of their rate."""
        return 2.0 if self.capability < (9, 0) else 1.6


class Cost(NamedTuple):
    """What one step costs, in cycles.  rounds: how often groups follow one another because not all can run at once.

    loads: cycles for which it waits for memory beyond that.
    """

    product: float
    cell: float
    exchange: float
    rounds: int
    loads: float = 0.0

    @property
    def cycles(self) -> float:
        return self.rounds * (STEP + self.product + self.cell + self.exchange + self.loads)


class Choice(NamedTuple):
    """How one direction runs.  exchange: "alone" for one block to a group."""

    tile: Tile
    blocks: int
    exchange: str
    cost: Cost


def choices(
    H: int, gates: int, transposed: bool, N: int, precision: str, pair: int, chip: Chip, alone: bool, heads: int = 1
) -> Iterator[Choice]:
    """All that fits, for one block to a group (`alone`) or for several.

    H: units, of each of `heads`, which are groups of their own.  N: batch rows.  precision: "float32", or a kind of
    products on tensor cores.  pair: registers that each (unit, row) pair of a thread needs beside the weights.
    """
    for tile, units in _tiles(H, precision, chip, alone):
        blocks = 1 if alone else -(-H // units)
        shape = Shape(H, gates, transposed, blocks)
        if alone or 2 <= blocks <= chip.multiprocessors:
            for kind in ("alone",) if alone else exchange.KINDS:
                if kind == "clustered" and (blocks > 8 or chip.capability < (9, 0)):
                    continue
                fitted = _fitted(shape, tile, kind, pair, chip)
                if fitted is not None:
                    yield Choice(fitted, blocks, kind, predicted(shape, fitted, kind, pair, N, chip, heads))


def best(found: Iterable[Choice]) -> Choice | None:
    """The cheapest of `choices`; among equals the one with the fewest blocks."""
    return min(found, key=lambda choice: (choice.cost.cycles, choice.blocks), default=None)


def step_cycles(H: int, gates: int, N: int, precision: str, chip: Chip, heads: int = 1) -> float:
    """Cycles of one time step by cuBLAS and a kernel: the host, two launches, the product by what binds it.

    H: units of the layer; of several heads the product is a call for each gate.
    """
    rate = {"float32": 0.8 * chip.lanes, "tf32": 1100 / chip.tensor}.get(precision, 2200 / chip.tensor)
    multiplied = N * gates * H * (H // heads) / (rate * chip.multiprocessors)
    moved = (
        (2 if precision in ("bfloat16", "float16") else 4)
        * gates
        * H
        * (H // heads)
        / (L2_OF_ALL * chip.multiprocessors)
    )
    launches = 2 if heads == 1 else 1 + gates
    return (HOST + launches * LAUNCH) * chip.clock + max(multiplied, moved)


def _tiles(H: int, precision: str, chip: Chip, alone: bool) -> Iterator[tuple[Tile, int]]:
    """Tiles with no weights in registers yet, and the units of a block."""
    every = _ffma_tiles(chip, alone) if precision == "float32" else _mma_tiles(precision)
    for tile in every:
        step = max(tile.units, 4) if isinstance(tile, Ffma) else 8 * tile.groups
        yield from ((tile, units) for units in ((H,) if alone else _counts(H, step)))


def _ffma_tiles(chip: Chip, alone: bool) -> Iterator[Tile]:
    """Before sm_90 the assembler makes a shuffle in a loop a function call, which saves registers to memory."""
    lanes = (1, 2, 4, 8, 16, 32) if chip.capability >= (9, 0) else (1,)
    for rows in (1, 2, 4) if alone else (1, 2, 4, 8, 16):
        yield from (Ffma(units, each, rows, 0) for each in lanes for units in (1, 2, 4))


def _mma_tiles(kind: str) -> Iterator[Tile]:
    for groups in (2, 4):
        yield from (Mma(kind, groups, split, rows, 0) for split in (1, 2, 4, 8) for rows in (8, 16, 32))


def _counts(H: int, step: int) -> list[int]:
    """Units of a block, multiples of `step` up to 64, one for each number of blocks that they lead to."""
    blocks = {math.ceil(H / units) for units in range(step, 65, step)}
    return sorted({math.ceil(H / count / step) * step for count in blocks})


def _fitted(shape: Shape, tile: Tile, kind: str, pair: int, chip: Chip) -> Tile | None:
    """The tile with as many weights in registers as there is room for; None where the rest does not fit either."""
    lay = layout(shape, tile)
    if lay.threads > MOST_THREADS:
        return None
    _, own = tiles.results(shape, tile)
    of_chunk = tiles.registers(shape, tile._replace(kept=1))
    room = _free(lay.threads) - own * pair - max(_accumulators(shape, tile), exchange.collected(kind, shape, tile))
    kept = min(lay.chunks, room // of_chunk, FRAGMENT // of_chunk)
    tile = tile._replace(kept=kept)
    if kept < 0 or shared_bytes(shape, tile, kind) > chip.shared - RESERVED:
        return None
    if isinstance(tile, Ffma) and tile.rows * of_chunk * lay.chunks > UNROLLED:
        return None
    return tile


def shared_bytes(shape: Shape, tile: Tile, kind: str) -> int:
    """Dynamic shared memory of a block."""
    free_when_done = isinstance(tile, Mma) and tile.split > 1
    here = tiles.partial_bytes(shape, tile) + tiles.spilled_bytes(shape, tile)
    return here + exchange.shared_bytes(kind, shape, tile, free_when_done)


def relaxed(shape: Shape, tile: Tile, kind: str, chip: Chip) -> Iterator[Tile]:
    """The tile, then the same with fewer chunks of weights in registers and more in shared memory, while they fit."""
    for kept in range(tile.kept, -1, -1):
        fewer = tile._replace(kept=kept)
        if kept == tile.kept or shared_bytes(shape, fewer, kind) <= chip.shared - RESERVED:
            yield fewer


def _accumulators(shape: Shape, tile: Tile) -> int:
    """Registers of a thread for sums, and for the piece of the vector that is being multiplied."""
    if isinstance(tile, Ffma):
        return tile.units * tile.rows * shape.outputs + (4 * tile.rows if tile.rows > 4 else 0)
    tensors, eights = tile.groups * shape.outputs // 2, tile.rows // 8
    return 4 * tensors * eights * (2 if tensors * eights <= 2 else 1) + 4 * eights


def predicted(shape: Shape, tile: Tile, kind: str, pair: int, N: int, chip: Chip, heads: int = 1) -> Cost:
    """The cost of a step of N rows, of `heads` of this shape.  pair: as for `choices`."""
    lay = layout(shape, tile)
    warps = lay.threads // 32
    _, own = tiles.results(shape, tile)
    groups = heads * max(1, -(-N // tile.rows))
    running = max(1, chip.multiprocessors // shape.blocks)
    product = _ffma_cycles(shape, tile, chip) if isinstance(tile, Ffma) else _mma_cycles(shape, tile, chip)
    cell = -(-warps // 4) * own * (24 + 4 * pair)  # some instructions to find each value, few to use it
    between = _exchange_cycles(shape, tile, kind, heads * N, min(groups, running), chip)
    loads = _waiting_cycles(shape, tile, kind, heads * N, STEP + product + cell + between)
    return Cost(product, cell, between, -(-groups // running), loads)


def _waiting_cycles(shape: Shape, tile: Tile, kind: str, N: int, step: float) -> float:
    """Cycles for which a step waits for memory, beyond what it takes anyway."""
    if tiles.ahead(shape, tile, kind):
        return max(0.0, AT_LEAST[_far(shape, N)] - step)
    return EXPOSED.get(kind, (0, 0))[_far(shape, N)]


def _far(shape: Shape, N: int) -> bool:
    """Whether what a step loads is in memory, not in L2."""
    return LONG * 4 * N * shape.gates * shape.H > NEAR


def _ffma_cycles(shape: Shape, tile: Ffma, chip: Chip) -> float:
    lay = layout(shape, tile)
    warps, (pairs, own) = lay.threads // 32, tiles.results(shape, tile)
    results = tile.units * shape.outputs
    reads = warps * lay.chunks * tile.rows * max(1, tile.lanes // 8) + tiles.spilled_bytes(shape, tile) / 128
    halved = pairs - own if pairs >= tile.lanes else pairs - 1 + (tile.lanes // pairs).bit_length() - 1
    multiplied = results * tile.rows * 4 * lay.chunks
    issued = -(-warps // 4) * multiplied * 128 / chip.lanes  # by the busiest of four schedulers
    reads += warps * halved * shape.outputs
    alike = -(-warps // 4)  # warps of a scheduler: one computes while another waits for what it has read
    return max(issued, reads) + min(issued, reads) / alike + SHUFFLE * (tile.lanes.bit_length() - 1) + LOAD


def _mma_cycles(shape: Shape, tile: Mma, chip: Chip) -> float:
    lay = layout(shape, tile)
    warps, (pairs, own) = lay.threads // 32, tiles.results(shape, tile)
    tensors, eights = tile.groups * shape.outputs // 2, tile.rows // 8
    chained = 2 * lay.chunks * PRODUCT / (2 if tensors * eights <= 2 else 1)
    issued = 2 * warps * tensors * eights * lay.chunks * chip.tensor
    reads = warps * lay.chunks * eights * 4 + tiles.spilled_bytes(shape, tile) / 128
    cycles = max(chained, issued, reads) + LOAD
    if tile.split > 1:
        moved = warps * shape.outputs * (pairs + tile.split * own)  # 128 bytes each
        cycles += moved + BARRIER + LOAD
    return cycles


def _exchange_cycles(shape: Shape, tile: Tile, kind: str, N: int, groups: int, chip: Chip) -> float:
    """Cycles of a step's exchange.  groups: how many run at the same time."""
    if kind == "alone":
        return BARRIER
    words = tile.rows * layout(shape, tile).words  # that a block takes in; within a cluster it sends as many
    if kind == "clustered":
        crowd = shape.blocks * groups / CROWD
        return CLUSTER + OF_BLOCK * shape.blocks + words * max(WORD, crowd) + 2 * BARRIER
    each = 4 * words
    moved = max(each / L2_OF_SM, each * shape.blocks * groups / (L2_OF_ALL * chip.multiprocessors))
    further = exchange.rounds(shape, tile) - 1
    return (
        LATENCY[kind][_far(shape, N)] + ROUND * further + moved + each / 128 + BARRIER * (3 if kind == "counted" else 1)
    )


def _free(threads: int) -> int:
    """Registers of a thread for weights and results.  Each of the four schedulers has a quarter of them."""
    warps = -(-threads // 128)
    return min(MOST_OF_THREAD, REGISTERS // 4 // (32 * warps) // 8 * 8) - WORKING
