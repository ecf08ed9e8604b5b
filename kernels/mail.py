"""Exchanges through global memory, which is the L2 cache in a time loop: `flagged` and `counted` (see `exchange`).

A group's mail is `exchange.mail_words`: boxes, each of which holds a step's vector, words row by row without gaps.
"""

from . import tiles
from .exchange import (
    BOXES,
    EMPTY,
    LINE,
    WARP,
    Exchange,
    at_once,
    buffers,
    flags_at,
    nothing,
    nothing_to_tidy,
    patience,
)
from .numba_cuda import cuda, types
from .ptx import (
    acquire,
    add_release,
    early,
    fence,
    global_address,
    larger,
    load_global_4u,
    load_relaxed_4u,
    load_relaxed_u,
    store_global_u,
    store_relaxed_u,
    store_shared_4u,
    written_out,
)
from .tiles import layout

u32, u64 = types.uint32, types.uint64
NUMBERLESS = 0x7FFFFFFF  # the NaN that arithmetic and conversions give: in place of EMPTY
PERIOD = 4  # steps from one emptying to the next


def _in_global(shape, tile):
    """Words stand in global memory row by row without gaps; spot: bytes from the box's begin."""
    lay = layout(shape, tile)
    WORDS, GRAIN = lay.words, lay.grain

    @cuda.jit(device=True)
    def spot(vector, row, k):
        return u32((row * WORDS + k // GRAIN) * 4)

    return spot


def flagged(shape, tile, free_when_done, as_one):
    lay, spot = layout(shape, tile), _in_global(shape, tile)
    FLAGS_AT = flags_at("flagged", shape, tile, free_when_done)
    waits, open, left = patience("flagged", shape, tile, free_when_done)
    GRAIN, BOX = lay.grain, 4 * tile.rows * lay.words
    BUFFERS, BUFFER = buffers("flagged", shape, free_when_done), tiles.vector_bytes(shape, tile)
    collect = collecting(shape, tile, load_relaxed_4u, waits, True, as_one)

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        address = global_address(mail, 0) + u64(spot) + u64(k // GRAIN * 4)
        full = u32(NUMBERLESS) if GRAIN == 1 and word == u32(EMPTY) else word  # what is packed is never EMPTY
        store_relaxed_u(address + u64((step & BOXES - 1) * BOX), full)

    @cuda.jit(device=True)
    def tidy(mail, spot, k, step):
        if step & PERIOD - 1 == 0 and step >= 3 * PERIOD:
            address = global_address(mail, 0) + u64(spot) + u64(k // GRAIN * 4)
            for back in range(2 * PERIOD + 1, 3 * PERIOD + 1):
                store_global_u(address + u64((step - back & BOXES - 1) * BOX), u32(EMPTY))

    @cuda.jit(device=True)
    def release(mail, vector, step):
        if step & PERIOD - 1 == 0:
            fence()

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        box = global_address(mail, 0) + u64((step & BOXES - 1) * BOX)
        collect(box, u32(vector + (step + 1 & BUFFERS - 1) * BUFFER), u32(vector + FLAGS_AT), step, fault)
        cuda.syncthreads()

    return Exchange(BUFFERS, open, spot, send, tidy, release, left, wait, nothing)


def counted(shape, tile, free_when_done):
    lay, spot = layout(shape, tile), _in_global(shape, tile)
    FLAGS_AT = flags_at("counted", shape, tile, free_when_done)
    waits, open, left = patience("counted", shape, tile, free_when_done)
    begun, hopeless, give_up = waits.begun, waits.hopeless, waits.give_up
    GRAIN, BOX, BLOCKS = lay.grain, 4 * tile.rows * lay.words, shape.blocks
    collect = collecting(shape, tile, load_global_4u, waits, False)

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        address = global_address(mail, LINE) + u64(spot) + u64((step & 1) * BOX + k // GRAIN * 4)
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
        collect(global_address(mail, LINE) + u64((step & 1) * BOX), vector, flags, step, fault)
        cuda.syncthreads()

    return Exchange(1, open, spot, send, nothing_to_tidy, release, left, wait, nothing)


def collecting(shape, tile, load, waits, until_full, as_one=False):
    """Brings a box into shared memory, 16 bytes at a time, several on their way.

    until_full: it waits until none of it is EMPTY, which is the largest of all words, and with as_one a warp waits as
    one: on an H200, threads that left such a loop one by one met the block's next barrier apart, and it let them
    through too early.  Before sm_90 the assembler makes a vote in a loop a function call, which saves registers to
    memory: there it stays as it was, seen by no chip yet.
    """
    lay = layout(shape, tile)
    THREADS, QUARTER, ROW = lay.threads, lay.words // 4, lay.stride * lay.size
    PIECES, WORDS = tile.rows * QUARTER, at_once(shape, tile)
    AT_ONCE, UNTIL_FULL, AS_ONE = WORDS // 4, until_full, as_one
    ROUND = THREADS * AT_ONCE
    begun, hopeless, give_up = waits.begun, waits.hopeless, waits.give_up
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
    def collect(box, into, flags, step, fault):
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
                    a, b, c, d = load(box + u64(piece) * u64(16))
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
