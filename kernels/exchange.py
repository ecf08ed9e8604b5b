"""How the blocks of a group give each other a step's vector.

Each thread sends the words it has computed, and tidies up behind them; `release` says that this block has sent all of its
own, and is called right behind that, before stores and loads that have time; `wait` returns when the whole vector stands in this block's
shared memory.

    alone      one block: a barrier.
    flagged    through the L2 cache, the word itself being the flag: memory begins as EMPTY, a pattern that no number
               has, and who loads anything else has the word.  Any chip.
    counted    through the L2 cache: all store, then one thread adds to the group's counter and waits for the others'.
    clustered  st.async from one SM's shared memory into another's; an mbarrier counts the bytes, and the blocks that have
               left the vector before.  sm_90, up to 8 blocks.

Two buffers suffice for `counted` and `clustered`: who sends step i knows that all blocks have sent step i-1, and so have
read all of step i-2 - which is what step i overwrites.  `flagged` has SLOTS of them, because a word must be EMPTY
again before it can be waited for.  Every PERIOD steps, at step t, each thread empties the words that it sent for steps
t-12 to t-9, and fences.  A reader of step j fences at the next multiple f of 4, and all know of that fence by step f+1; who
empties has fenced since, at f+4, so at f+8 nobody reads step j any more.  And the readers of what goes there next, step
j+32, have fenced since the first word that was sent after the emptying.  (Plain stores empty, so the interpreter that
tests run kernels in can see whether all this orders them.)  A step's way, store to load, has no fence.

A wait that never ends (a block that is not running) is given up after LIMIT and reported in `fault`: see `waiting`.
"""

from collections.abc import Callable
from typing import NamedTuple

from . import tiles
from .numba_cuda import cuda, types
from .ptx import (
    acquire,
    acquire_shared,
    add_release,
    cluster_arrive,
    cluster_wait,
    early,
    fence,
    fence_mbarrier_init,
    global_address,
    larger,
    load_global_4u,
    load_relaxed_4u,
    load_relaxed_u,
    mbarrier_arrive,
    mbarrier_expect,
    mbarrier_init,
    mbarrier_passed,
    of_block,
    release_shared,
    sleep,
    store_async,
    store_global_u,
    store_relaxed_u,
    store_shared_4u,
    store_shared_u,
    written_out,
)
from .tiles import Shape, Tile, layout
from .waiting import FLAGS, waiting

i64, u32, u64 = types.int64, types.uint32, types.uint64
KINDS = ("clustered", "flagged", "counted")
LIMIT = 4_000_000_000  # nanoseconds of a wait, which takes a microsecond
LOOK = {"clustered": 16, "flagged": 256, "counted": 256}  # tries; one of a cluster's may last some milliseconds itself
MOST_AT_ONCE = 8  # loads of a thread on their way: each round of them costs the latency of L2 once more
LANDING = 100_000  # nanoseconds, in which words come to rest that nobody waits for any more
LINE = 32  # words, of a counter
EMPTY, NUMBERLESS = 0xFFFFFFFF, 0x7FFFFFFF  # a NaN that arithmetic and conversions never give, and the one they do
SLOTS, PERIOD = 32, 4
WARP = 0xFFFFFFFF  # all its threads


class Exchange(NamedTuple):
    """open(vector, fault): before the first step.  spot(vector, row, k): where the word with element k of a row goes.

    send(mail, vector, spot, k, step, word): `word` to `spot`, k elements further, for the vector after step `step`.
    tidy(mail, spot, k, step): for each word sent, behind all of a step's, of which no block waits for any here.
    release(mail, vector, step): behind the sends and `tidy`, for all threads.  left(vector, step): whether the block has to leave, for
    all threads alike; behind `release`, and for step 0 before the first step too.
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


def exchange(kind: str, shape: Shape, tile: Tile, free_when_done: bool, as_one: bool = True) -> Exchange:
    """free_when_done: whether all threads have left the vector when a product is done.  as_one: a warp waits as one."""
    if shape.blocks == 1:
        return _alone(shape, tile)
    if kind == "flagged":
        return _flagged(shape, tile, free_when_done, as_one)
    return {"counted": _counted, "clustered": _clustered}[kind](shape, tile, free_when_done)


def launched(kind: str, shape: Shape) -> tuple[int, bool]:
    """Blocks of a cluster, and whether all blocks of the grid must run at once."""
    return (shape.blocks, False) if kind == "clustered" else (1, shape.blocks > 1)


def beginning(kind: str) -> int:
    """What all words of global memory have to be before a launch."""
    return EMPTY if kind == "flagged" else 0


def mail_words(kind: str, shape: Shape, tile: Tile) -> int:
    """32-bit words of global memory that one group needs."""
    if shape.blocks == 1 or kind == "clustered":
        return 0
    words = tile.rows * layout(shape, tile).words
    return SLOTS * words if kind == "flagged" else LINE + 2 * words


def buffers(kind: str, shape: Shape, free_when_done: bool) -> int:
    """One where nobody can write to the vector before all have read it."""
    free = {"clustered": False, "flagged": free_when_done, "counted": True}
    return 1 if shape.blocks > 1 and free[kind] else 2


def shared_bytes(kind: str, shape: Shape, tile: Tile, free_when_done: bool) -> int:
    """Of a block: the vector's buffers, the flags of who leaves, and the mbarriers of a cluster."""
    gates = 16 if shape.blocks > 1 and kind == "clustered" else 0
    return flags_at(kind, shape, tile, free_when_done) + (FLAGS if shape.blocks > 1 else 0) + gates


def flags_at(kind: str, shape: Shape, tile: Tile, free_when_done: bool) -> int:
    """Where the flags stand, in bytes behind the vector."""
    return buffers(kind, shape, free_when_done) * tiles.vector_bytes(shape, tile)


@cuda.jit(device=True)
def _nothing():
    pass


@cuda.jit(device=True)
def _tidy(mail, spot, k, step):
    pass


@cuda.jit(device=True)
def _nothing_to_release(mail, vector, step):
    pass


@cuda.jit(device=True)
def _stays(vector, step):
    return False


def _local(shape, tile):
    """spot and buffer of words that go to this block's shared memory, or to another's at the same place."""
    lay = layout(shape, tile)
    STRIDE, SIZE, BUFFER = lay.stride, lay.size, tiles.vector_bytes(shape, tile)

    @cuda.jit(device=True)
    def spot(vector, row, k):
        return u32(vector + (row * STRIDE + k) * SIZE)

    @cuda.jit(device=True)
    def place(spot, k, step):
        return u32(spot + ((step + 1 & 1) * BUFFER + k * SIZE))

    return spot, place


def _alone(shape, tile):
    spot, place = _local(shape, tile)

    @cuda.jit(device=True)
    def open(vector, fault):
        pass

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        store_shared_u(place(spot, k, step), word)

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        cuda.syncthreads()

    return Exchange(2, open, spot, send, _tidy, _nothing_to_release, _stays, wait, _nothing)


def _waiting(kind, shape, tile, free_when_done):
    """`waiting`, and its open and left for a vector behind which the flags stand."""
    FLAGS_AT, patience = flags_at(kind, shape, tile, free_when_done), waiting(LIMIT, LOOK[kind])
    begin, gone = patience.open, patience.left

    @cuda.jit(device=True)
    def open(vector, fault):
        if cuda.threadIdx.x == 0:
            begin(u32(vector + FLAGS_AT), fault)

    @cuda.jit(device=True)
    def left(vector, step):
        return gone(u32(vector + FLAGS_AT), step)

    return FLAGS_AT, patience, open, left


def _in_global(shape, tile):
    """Words stand in global memory row by row without gaps; spot: bytes from the slot's begin."""
    lay = layout(shape, tile)
    WORDS, GRAIN = lay.words, lay.grain

    @cuda.jit(device=True)
    def spot(vector, row, k):
        return u32((row * WORDS + k // GRAIN) * 4)

    return spot


def collected(kind: str, shape: Shape, tile: Tile) -> int:
    """Registers of a thread that hold words on their way into shared memory."""
    return _at_once(shape, tile) if shape.blocks > 1 and kind != "clustered" else 0


def _at_once(shape: Shape, tile: Tile) -> int:
    """Words of a thread on their way at once: in rounds as equal as can be."""
    return 4 * -(-_loads(shape, tile) // rounds(shape, tile))


def rounds(shape: Shape, tile: Tile) -> int:
    """In which a thread takes in its part of a slot, one after the other."""
    return -(-_loads(shape, tile) // MOST_AT_ONCE)


def _loads(shape: Shape, tile: Tile) -> int:
    """Of 16 bytes, of the busiest thread."""
    lay = layout(shape, tile)
    return -(-tile.rows * lay.words // 4 // lay.threads)


def _collect(shape, tile, load, patience, as_one=False):
    """Brings a slot into shared memory, 16 bytes at a time, several on their way.

    patience: None, or a `Waiting`; then it waits until none of it is EMPTY, which is the largest of all words,
    and with as_one a warp waits as one: on an H200, threads that left such a loop one by one met the block's next barrier
    apart, and it let them through too early.  Before sm_90 the assembler makes a vote in a loop a function call, which saves
    registers to memory: there it stays as it was, seen by no chip yet.
    """
    lay = layout(shape, tile)
    THREADS, QUARTER, ROW = lay.threads, lay.words // 4, lay.stride * lay.size
    PIECES, WORDS = tile.rows * QUARTER, _at_once(shape, tile)
    AT_ONCE, UNTIL_FULL = WORDS // 4, patience is not None
    ROUND = THREADS * AT_ONCE
    begun, hopeless, give_up = (patience or waiting(LIMIT, 1))[1:4]
    AS_ONE = as_one
    WHOLE, FIXED = PIECES % ROUND == 0, _fixed(PIECES, THREADS, ROUND, QUARTER)
    SPOTS = 1 if FIXED else AT_ONCE
    FURTHER = tuple(k * THREADS // QUARTER * ROW + k * THREADS % QUARTER * 16 if FIXED else 0 for k in range(AT_ONCE))

    @written_out
    def find_largest(b, words, largest):
        found = [words[k] for k in range(WORDS)]
        while len(found) > 1:
            pairs = [larger.emit(b, *found[k : k + 2])[0] for k in range(0, len(found) - 1, 2)]
            found = pairs + found[2 * len(pairs) :]
        largest[0] = found[0]

    @cuda.jit(device=True)
    def collect(slot, into, flags, step, fault):
        tid = u32(cuda.threadIdx.x)
        words = cuda.local.array(WORDS, u32)
        spots = cuda.local.array(SPOTS, u32)
        largest = cuda.local.array(1, u32)
        for first in range(0, PIECES, ROUND):
            for k in range(SPOTS):
                piece = u32(u32(first + k * THREADS) + tid)
                row = u32(piece // u32(QUARTER))
                spots[k] = early(u32(into + row * u32(ROW) + (piece - row * u32(QUARTER)) * u32(16)))
            tries, since = u32(0), u64(0)
            while True:
                for k in range(AT_ONCE):
                    piece = u32(u32(first + k * THREADS) + tid)
                    if not WHOLE:
                        piece = u32(min(piece, u32(PIECES - 1)))
                    a, b, c, d = load(slot + u64(piece) * u64(16))
                    words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3] = a, b, c, d
                if not UNTIL_FULL:
                    break
                find_largest(words, largest)
                full = largest[0] != u32(EMPTY)
                if AS_ONE:
                    full = cuda.all_sync(WARP, full)
                if full:
                    break
                tries = u32(tries + u32(1))
                since = begun(tries, since)
                lost = hopeless(tries, since, fault)
                if AS_ONE:
                    lost = cuda.any_sync(WARP, lost)
                if lost:
                    give_up(flags, step, fault)
                    break
            for k in range(AT_ONCE):
                piece = u32(u32(first + k * THREADS) + tid)
                if WHOLE or piece < u32(PIECES):
                    at = u32(spots[0] + u32(FURTHER[k])) if FIXED else spots[k]
                    store_shared_4u(at, words[4 * k], words[4 * k + 1], words[4 * k + 2], words[4 * k + 3])

    return collect


def _fixed(pieces: int, threads: int, at_once: int, row: int) -> bool:
    """Whether a thread's pieces of a round, every `threads`-th of `at_once`, have the same distances in every round."""
    in_rows = row % threads == 0 and (row % at_once == 0 or at_once % row == 0)
    return pieces % at_once == 0 and (threads % row == 0 or in_rows)


def _flagged(shape, tile, free_when_done, as_one):
    lay, spot = layout(shape, tile), _in_global(shape, tile)
    FLAGS_AT, patience, open, left = _waiting("flagged", shape, tile, free_when_done)
    GRAIN, SLOT = lay.grain, 4 * tile.rows * lay.words
    BUFFERS, BUFFER = buffers("flagged", shape, free_when_done), tiles.vector_bytes(shape, tile)
    collect = _collect(shape, tile, load_relaxed_4u, patience, as_one)

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        address = global_address(mail, 0) + u64(spot) + u64(k // GRAIN * 4)
        full = u32(NUMBERLESS) if GRAIN == 1 and word == u32(EMPTY) else word  # what is packed is never EMPTY
        store_relaxed_u(address + u64((step & SLOTS - 1) * SLOT), full)

    @cuda.jit(device=True)
    def tidy(mail, spot, k, step):
        if step & PERIOD - 1 == 0 and step >= 3 * PERIOD:
            address = global_address(mail, 0) + u64(spot) + u64(k // GRAIN * 4)
            for back in range(2 * PERIOD + 1, 3 * PERIOD + 1):
                store_global_u(address + u64((step - back & SLOTS - 1) * SLOT), u32(EMPTY))

    @cuda.jit(device=True)
    def release(mail, vector, step):
        if step & PERIOD - 1 == 0:
            fence()

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        slot = global_address(mail, 0) + u64((step & SLOTS - 1) * SLOT)
        collect(slot, u32(vector + (step + 1 & BUFFERS - 1) * BUFFER), u32(vector + FLAGS_AT), step, fault)
        cuda.syncthreads()

    return Exchange(BUFFERS, open, spot, send, tidy, release, left, wait, _nothing)


def _counted(shape, tile, free_when_done):
    lay, spot = layout(shape, tile), _in_global(shape, tile)
    FLAGS_AT, patience, open, left = _waiting("counted", shape, tile, free_when_done)
    begun, hopeless, give_up = patience.begun, patience.hopeless, patience.give_up
    GRAIN, SLOT, BLOCKS = lay.grain, 4 * tile.rows * lay.words, shape.blocks
    collect = _collect(shape, tile, load_global_4u, None)

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        address = global_address(mail, LINE) + u64(spot) + u64((step & 1) * SLOT + k // GRAIN * 4)
        store_global_u(address, word)

    @cuda.jit(device=True)
    def release(mail, vector, step):
        cuda.syncthreads()  # what all threads stored comes before what one releases
        if cuda.threadIdx.x == 0:
            add_release(global_address(mail, 0), u32(1))

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        flags = u32(vector + FLAGS_AT)
        if cuda.threadIdx.x == 0:
            counter, tries, since = global_address(mail, 0), u32(0), u64(0)
            while load_relaxed_u(counter) < u32((step + 1) * BLOCKS):
                tries = u32(tries + u32(1))
                since = begun(tries, since)
                if hopeless(tries, since, fault):
                    give_up(flags, step, fault)
                    break
            acquire()
        cuda.syncthreads()
        collect(global_address(mail, LINE) + u64((step & 1) * SLOT), vector, flags, step, fault)
        cuda.syncthreads()

    return Exchange(1, open, spot, send, _tidy, release, left, wait, _nothing)


def _clustered(shape, tile, free_when_done):
    spot, place = _local(shape, tile)
    FLAGS_AT, patience, begin, gone = _waiting("clustered", shape, tile, free_when_done)
    begun, hopeless, give_up = patience.begun, patience.hopeless, patience.give_up
    BLOCKS, BYTES = shape.blocks, 4 * tile.rows * layout(shape, tile).words
    GATES = FLAGS_AT + FLAGS

    @cuda.jit(device=True)
    def gate(vector, step):
        """The mbarrier of the vector after step `step`."""
        return u32(vector + (GATES + 8 * (step & 1)))

    @cuda.jit(device=True)
    def open(vector, fault):
        begin(vector, fault)
        if cuda.threadIdx.x == 0:
            mbarrier_init(gate(vector, 0), u32(BLOCKS + 1))
            mbarrier_init(gate(vector, 1), u32(BLOCKS + 1))
            fence_mbarrier_init()
        cluster_arrive()
        cluster_wait()

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        here, counted = place(spot, k, step), gate(vector, step)
        for block in range(BLOCKS):
            store_async(of_block(here, u32(block)), word, of_block(counted, u32(block)))

    @cuda.jit(device=True)
    def release(mail, vector, step):
        cuda.syncthreads()  # nobody of this block reads the step's vector or partial sums any more
        if cuda.threadIdx.x < BLOCKS:
            release_shared()
            mbarrier_arrive(of_block(gate(vector, step), u32(cuda.threadIdx.x)))
        if cuda.threadIdx.x == 0:
            mbarrier_expect(gate(vector, step), u32(BYTES))

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        """A warp waits as one, as in `_collect`: what follows, shuffles or products of matrices, is for whole warps."""
        tries, since = u32(0), u64(0)
        while not cuda.all_sync(WARP, mbarrier_passed(gate(vector, step), u32(step >> 1 & 1)) != u32(0)):
            tries = u32(tries + u32(1))
            since = begun(tries, since)
            if cuda.any_sync(WARP, hopeless(tries, since, fault)):
                give_up(u32(vector + FLAGS_AT), step, fault)
                break
        acquire_shared()

    @cuda.jit(device=True)
    def left(vector, step):
        if gone(vector, step):
            sleep(u32(LANDING))  # what others have sent lands while this block still has its memory
            return True
        return False

    @cuda.jit(device=True)
    def close():
        cluster_arrive()
        cluster_wait()

    return Exchange(2, open, spot, send, _tidy, release, left, wait, close)
