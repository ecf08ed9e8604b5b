"""How weight_hh is shared out: over the blocks of a group, their threads, and in which order everybody counts.

A group of blocks has all H units of a few batch rows, each block the same number of units.  Forward, the vector that
weight_hh multiplies is h (one part, H values a batch row) and each unit has G results, one a gate; backward it is dL/dr
(G parts) and each unit has one result, dL/dh.

    Ffma   exact float32.  A team of lanes shares a few units and splits the vector; partial sums meet by shuffles.
    Mma    tensor cores, float32 sums.  weight_hh is the A operand and stays in fragments; 8 rows are one N = 8.  Warps
           that have the same units split the vector; partial sums meet in shared memory.

Padding happens here and nowhere else: blocks have whole teams, rows of the vector whole chunks.
"""

from typing import NamedTuple

KINDS = ("bfloat16", "float16", "tf32")  # of products on tensor cores
CHUNK = 64  # bytes of the vector that one lane quad reads at once, on tensor cores


class Shape(NamedTuple):
    """The product of one direction: with weight_hh forward, with its transpose backward, for a group of `blocks`."""

    H: int
    gates: int
    transposed: bool
    blocks: int = 1

    @property
    def outputs(self) -> int:
        """How many results a unit has."""
        return 1 if self.transposed else self.gates

    @property
    def parts(self) -> int:
        """How many parts the vector has, each with a value for every unit."""
        return self.gates if self.transposed else 1


class Ffma(NamedTuple):
    """A team of `lanes` has `units` units and splits the vector; `kept` of its chunks meet weights in registers."""

    units: int
    lanes: int
    rows: int
    kept: int


class Mma(NamedTuple):
    """A warp has `groups` (an even number) of 8 units; `split` warps have the same; `kept` chunks are in registers."""

    kind: str
    groups: int
    split: int
    rows: int
    kept: int


Tile = Ffma | Mma


class Layout(NamedTuple):
    """units: of a block.  width: of the group, with padding.  threads: of a block.  size: bytes of a vector's element.

    chunks: in which a thread takes the vector, `chunk` elements each for all that share it.  stride: elements from one
    row of the vector to the next.  grain: elements of a 32-bit word.  words: 32-bit words of a row that carry values.
    """

    units: int
    width: int
    threads: int
    size: int
    chunks: int
    chunk: int
    stride: int
    grain: int
    words: int


def layout(shape: Shape, tile: Tile) -> Layout:
    each = -(-shape.H // shape.blocks)
    if isinstance(tile, Ffma):
        units = _up(each, max(tile.units, 4) if shape.blocks > 1 else tile.units)  # 16 bytes are sent at once
        width, chunk = shape.blocks * units, 4 * tile.lanes
        chunks = -(-shape.parts * width // chunk)
        threads = _up(units // tile.units * tile.lanes, 32)
        return Layout(units, width, threads, 4, chunks, chunk, chunk * chunks, 1, shape.parts * width)
    size = 4 if tile.kind == "tf32" else 2
    units = _up(each, 8 * tile.groups)
    width, chunk = shape.blocks * units, CHUNK // size
    chunks = -(-shape.parts * width // (chunk * tile.split))
    whole = chunks * tile.split
    stride = chunk * (whole + (whole + 1) % 2)  # an odd number of half cache lines: 8 rows' 16 bytes meet no bank twice
    threads = 32 * (units // (8 * tile.groups)) * tile.split
    return Layout(units, width, threads, size, chunks, chunk, stride, 4 // size, shape.parts * width * size // 4)


def _up(value: int, step: int) -> int:
    return -(-value // step) * step


def paired(unit):
    """Where a unit stands in its part of the vector, where elements are half words.

    A thread of a product on tensor cores has units 8 apart; these stand side by side, so that it writes one word.
    """
    return unit // 16 * 16 + unit % 8 * 2 + unit // 8 % 2


def unpaired(place):
    """The inverse of `paired`."""
    return place // 16 * 16 + place % 2 * 8 + place % 16 // 2


def alike(unit):
    return unit


def results(shape: Shape, tile: Tile) -> tuple[int, int]:
    """(Unit, row) pairs of one lane before its partners have taken theirs, and those it keeps."""
    if isinstance(tile, Ffma):
        pairs = tile.units * tile.rows
        return pairs, max(1, pairs // tile.lanes)
    pairs = tile.groups * tile.rows // 4
    return pairs, max(2, pairs // tile.split)


def registers(shape: Shape, tile: Tile) -> int:
    """32-bit words of weights that a thread keeps."""
    if isinstance(tile, Ffma):
        return tile.kept * tile.units * shape.outputs * 4
    return tile.kept * (tile.groups * shape.outputs // 2) * 8


def spilled_bytes(shape: Shape, tile: Tile) -> int:
    """Bytes of a block's weights that are in shared memory because registers are full."""
    lay = layout(shape, tile)
    return max(0, lay.chunks - tile.kept) * (packed_words(shape, tile) // lay.chunks // shape.blocks) * 4


def vector_bytes(shape: Shape, tile: Tile) -> int:
    """Bytes of one buffer of the vector."""
    lay = layout(shape, tile)
    return tile.rows * lay.stride * lay.size


def partial_bytes(shape: Shape, tile: Tile) -> int:
    """Bytes of the partial sums that a block's warps leave for each other."""
    if isinstance(tile, Ffma) or tile.split == 1:
        return 0
    return layout(shape, tile).threads * results(shape, tile)[0] * shape.outputs * 4


def packed_words(shape: Shape, tile: Tile) -> int:
    """32-bit words of weight_hh in the order in which the blocks of a group read it."""
    lay = layout(shape, tile)
    if isinstance(tile, Ffma):
        return shape.blocks * lay.chunks * tile.units * shape.outputs * lay.threads * 4
    return shape.blocks * lay.threads // 32 * (tile.groups * shape.outputs // 2) * lay.chunks * 256


def ahead(shape: Shape, tile: Tile, exchange: str) -> bool:
    """Whether a time loop loads a step ahead: where that was faster, and there are registers for it."""
    if shape.gates == 1 or results(shape, tile)[1] > 2:
        return False
    if shape.transposed:
        return shape.blocks > 1
    return shape.blocks == 1 or (exchange == "flagged" and isinstance(tile, Mma))
