"""How the blocks of a group give each other a step's vector.

Each thread sends the words it has computed, and tidies up behind them; `release` says that this block has sent all of
its own, and is called right behind that, before stores and loads that have time; `wait` returns when the whole vector
stands in this block's shared memory.

    alone      one block: a barrier.
    flagged    through the L2 cache, the word itself being the flag: memory begins as EMPTY, a pattern that no number
               has, and who loads anything else has the word.  Any chip.
    counted    through the L2 cache: all store, then one thread adds to the group's counter and waits for the others'.
    clustered  st.async from one SM's shared memory into another's; an mbarrier counts the bytes, and the blocks that
               have left the vector before.  sm_90, up to 8 blocks.

Two buffers suffice for `counted` and `clustered`: who sends step i knows that all blocks have sent step i-1, and so
have read all of step i-2 - which is what step i overwrites.  `flagged` has BOXES of them, because a word must be EMPTY
again before it can be waited for.  Every PERIOD steps, at step t, each thread empties the words that it sent for steps
t-12 to t-9, and fences.  A reader of step j fences at the next multiple f of 4, and all know of that fence by step f+1;
who empties has fenced since, at f+4, so at f+8 nobody reads step j any more.  And the readers of what goes there next,
step j+32, have fenced since the first word that was sent after the emptying.  (Plain stores empty, so the interpreter
that tests run kernels in can see whether all this orders them.)  A step's way, store to load, has no fence.

A wait that never ends (a block that is not running) is given up after LIMIT and reported in `fault`: see `waiting`.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import tiles
from .numba_cuda import cuda, types
from .tiles import Shape, Tile, layout
from .waiting import FLAGS, Waiting, waiting

u32 = types.uint32
KINDS = ("clustered", "flagged", "counted")
LIMIT = 4_000_000_000  # nanoseconds of a wait, which takes a microsecond
LOOK = {"clustered": 16, "flagged": 256, "counted": 256}  # tries; one of a cluster's may last some milliseconds itself
MOST_AT_ONCE = 8  # loads of a thread on their way: each round of them costs the latency of L2 once more
LINE = 32  # words, of a counter
EMPTY = 0xFFFFFFFF  # a NaN that arithmetic and conversions never give
BOXES = 32  # of a flagged group, a step's vector in each
WARP = 0xFFFFFFFF  # all its threads


class Exchange(NamedTuple):
    """open(vector, fault): before the first step.  spot(vector, row, k): where the word with element k of a row goes.

    send(mail, vector, spot, k, step, word): `word` to `spot`, k elements further, for the vector after step `step`.
    tidy(mail, spot, k, step): for each word sent, behind all of a step's, of which no block waits for any here.
    release(mail, vector, step): behind the sends and `tidy`, for all threads.  left(vector, step): whether the block
    has to leave, for all threads alike; behind `release`, and for step 0 before the first step too.
    wait(mail, vector, step, fault).  close(): after the last.  buffers: of the vector in shared memory; the product of
    step i reads buffer i % buffers, and step i's words go to the next one.
    """

    buffers: int
    open: Callable
    spot: Callable
    send: Callable
    tidy: Callable
    release: Callable
    left: Callable
    wait: Callable
    close: Callable


def launched(kind: str, shape: Shape) -> tuple[int, bool]:
    """Blocks of a cluster, and whether all blocks of the grid must run at once."""
    return (shape.blocks, False) if kind == "clustered" else (1, shape.blocks > 1)


def beginning(kind: str) -> int:
    """The value of every word of mail before a launch."""
    return EMPTY if kind == "flagged" else 0


def mail_words(kind: str, shape: Shape, tile: Tile) -> int:
    """32-bit words of global memory that one group needs."""
    if shape.blocks == 1 or kind == "clustered":
        return 0
    words = tile.rows * layout(shape, tile).words
    return BOXES * words if kind == "flagged" else LINE + 2 * words


def buffers(kind: str, shape: Shape, free_when_done: bool) -> int:
    """How many a block has of the vector: one where nobody can write to it before all have read it, else two."""
    free = {"clustered": False, "flagged": free_when_done, "counted": True}
    return 1 if shape.blocks > 1 and free[kind] else 2


def shared_bytes(kind: str, shape: Shape, tile: Tile, free_when_done: bool) -> int:
    """Of a block: the vector's buffers, the flags of who leaves, and the mbarriers of a cluster."""
    mbarriers = 16 if shape.blocks > 1 and kind == "clustered" else 0
    return flags_at(kind, shape, tile, free_when_done) + (FLAGS if shape.blocks > 1 else 0) + mbarriers


def flags_at(kind: str, shape: Shape, tile: Tile, free_when_done: bool) -> int:
    """Where the flags stand, in bytes behind the vector."""
    return buffers(kind, shape, free_when_done) * tiles.vector_bytes(shape, tile)


def collected(kind: str, shape: Shape, tile: Tile) -> int:
    """Registers of a thread that hold words on their way into shared memory."""
    return at_once(shape, tile) if shape.blocks > 1 and kind != "clustered" else 0


def at_once(shape: Shape, tile: Tile) -> int:
    """Words of mail that a thread loads at once, in rounds as equal as can be."""
    return 4 * -(-_loads(shape, tile) // rounds(shape, tile))


def rounds(shape: Shape, tile: Tile) -> int:
    """How many rounds of loads, one after the other, bring a thread its part of a box."""
    return -(-_loads(shape, tile) // MOST_AT_ONCE)


def _loads(shape: Shape, tile: Tile) -> int:
    """How many loads of 16 bytes the busiest thread needs for its part of a box."""
    lay = layout(shape, tile)
    return -(-tile.rows * lay.words // 4 // lay.threads)


def patience(kind: str, shape: Shape, tile: Tile, free_when_done: bool) -> tuple[Waiting, Callable, Callable]:
    """How a block waits, and `open` and `left` of Exchange, for a vector behind which the flags stand."""
    FLAGS_AT, found = flags_at(kind, shape, tile, free_when_done), waiting(LIMIT, LOOK[kind])
    begin, gone = found.open, found.left

    @cuda.jit(device=True)
    def open(vector, fault):
        if cuda.threadIdx.x == 0:
            begin(u32(vector + FLAGS_AT), fault)

    @cuda.jit(device=True)
    def left(vector, step):
        return gone(u32(vector + FLAGS_AT), step)

    return found, open, left


@cuda.jit(device=True)
def nothing():
    pass


@cuda.jit(device=True)
def nothing_to_tidy(mail, spot, k, step):
    pass
