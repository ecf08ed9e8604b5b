"""What forward and backward of a persistent kernel share: the sizes of a group's blocks, and a thread's pairs.

A group of blocks has a few batch rows and all H units; a block has some of the units; a thread has `pairs` (unit, row)
pairs, and all gates of each.  In a layer of several heads a group has the units of one: a Shape's H are those, a
kernel's are the layer's.
"""

from typing import NamedTuple

from . import clusters, pointwise, tiles
from . import exchange as exchanges
from . import mail as through_mail
from .exchange import Exchange
from .numba_cuda import cuda, types
from .products import Product, columns, product
from .ptx import settled, u32, written_out
from .tiles import Ffma, Shape, layout


class Group(NamedTuple):
    """make, post: the product, and how blocks exchange its vector, as device functions.

    blocks, and rows of the batch: of a group.  units, threads, shared (bytes of shared memory): of a block.
    width: units of all blocks, padding included.  grain: elements of a word of the vector.
    pairs, weights (32-bit words in registers), sent (words that it sends of each part): of a thread.
    vector: where the first of `buffers` begins in shared memory, `buffer` bytes each.  flags: of who leaves, in bytes
    behind that.  share: packed words of weight_hh of a block.  mail: words of global memory of a group.
    ahead: whether a step's loads are given out a step before.  walks: whether pointers go on from step to step.
    launched: blocks of a cluster, and whether all blocks run at once.
    """

    make: Product
    post: Exchange
    accuracy: str
    blocks: int
    rows: int
    units: int
    threads: int
    shared: int
    width: int
    grain: int
    pairs: int
    weights: int
    sent: int
    vector: int
    buffers: int
    buffer: int
    flags: int
    share: int
    mail: int
    ahead: bool
    walks: bool
    launched: tuple[int, bool]


def group_of(shape: Shape, tile: tiles.Tile, kind: str, newer: bool) -> Group:
    """kind: of exchange.  newer: sm_90 or later."""
    make, lay, blocks = product(shape, tile), layout(shape, tile), shape.blocks
    post = _exchange(kind, shape, tile, make.barriers, newer)
    return Group(
        make,
        post,
        accuracy=pointwise.EXACT if isinstance(tile, Ffma) else pointwise.APPROXIMATE,
        blocks=blocks,
        rows=tile.rows,
        units=lay.units,
        threads=lay.threads,
        shared=make.vector + exchanges.shared_bytes(kind, shape, tile, make.barriers),
        width=lay.width,
        grain=lay.grain,
        pairs=make.pairs,
        weights=max(1, make.registers),
        sent=make.pairs // lay.grain,
        vector=make.vector,
        buffers=post.buffers,
        buffer=tiles.vector_bytes(shape, tile),
        flags=exchanges.flags_at(kind, shape, tile, make.barriers),
        share=tiles.packed_words(shape, tile) // blocks,
        mail=exchanges.mail_words(kind, shape, tile),
        ahead=newer and tiles.ahead(shape, tile, kind),
        walks=blocks == 1,
        launched=exchanges.launched(kind, shape),
    )


def _exchange(kind: str, shape: Shape, tile: tiles.Tile, free_when_done: bool, as_one: bool) -> Exchange:
    """free_when_done: whether all threads have left the vector when a product is done.  as_one: a warp waits as one."""
    if shape.blocks == 1:
        return clusters.alone(shape, tile)
    if kind == "flagged":
        return through_mail.flagged(shape, tile, free_when_done, as_one)
    return {"counted": through_mail.counted, "clustered": clusters.clustered}[kind](shape, tile, free_when_done)


def own_pair(of: Group, shape: Shape, tile: tiles.Tile, slots: int, heads: int):
    """A device function: where a thread's p-th pair stands.  slots: of a unit.  heads: of the layer.

    own(tid, p, corner, N, vector, places) -> whether this thread has the pair, whether it is a unit of a row of the
    batch, unit of the layer, row; the last two within bounds, so that every load is of something.  corner: the block's
    first row and unit, and how many units lie in heads before.
    places: assigned the spot of a word in the vector, the pair's first slot in its step, and its state.
    """
    place, address, column = of.make.place, of.post.spot, columns(layout(shape, tile)).column
    UNITS, GRAIN, HEAD, H = of.units, of.grain, shape.H, heads * shape.H
    SLOT_STEP = slots * H

    @cuda.jit(device=True)
    def own(tid, p, corner, N, vector, places):
        first, base, before = corner
        spot, slot_at, state_at = places
        part, r = place(tid, p)
        unit, n = base + part, first + r
        owner = part < UNITS
        living = owner and unit < HEAD and n < N
        u, n = before + min(unit, HEAD - 1), min(n, N - 1)
        if p % GRAIN == 0:
            spot[p // GRAIN] = address(vector, r, column(base + part)) if owner else u32(0)
        slot_at[p], state_at[p] = n * SLOT_STEP + u, n * H + u
        return owner, living, u, n

    return own


def loading_flags(of: Group):
    """A device function: which of a thread's pairs begin a step anew, by its rows' flags `now`; none unless `any`."""
    PAIRS = of.pairs

    @cuda.jit(device=True)
    def load_flags(flags, now, length, row_at, any):
        for p in range(PAIRS):
            flags[p] = types.int32(now[row_at[p]]) if any and length[p] > 0 else types.int32(0)

    return load_flags


def settling(count, needed):
    """What waits until all values of an array are there, before a loop, if that is `needed`.

    What is still on its way when a loop begins is waited for in every step, at its first use; and as scoreboards are
    few, so is what the step itself has loaded ahead.
    """

    @written_out
    def settle(b, values):
        for k in range(count if needed else 0):
            values[k] = settled.emit(b, values[k])[0]

    return settle
