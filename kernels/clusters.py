"""Exchanges through shared memory: `alone` within a block, `clustered` within a cluster of blocks (see `exchange`)."""

from . import tiles
from .exchange import WARP, Exchange, flags_at, nothing, nothing_to_tidy, patience
from .numba_cuda import cuda, types
from .ptx import (
    acquire_shared,
    cluster_arrive,
    cluster_wait,
    fence_mbarrier_init,
    mbarrier_arrive,
    mbarrier_expect,
    mbarrier_init,
    mbarrier_passed,
    of_block,
    release_shared,
    sleep,
    store_async,
    store_shared_u,
)
from .tiles import layout
from .waiting import FLAGS

u32, u64 = types.uint32, types.uint64
LANDING = 100_000  # nanoseconds, in which words come to rest that nobody waits for any more


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


def alone(shape, tile):
    spot, place = _local(shape, tile)

    @cuda.jit(device=True)
    def open(vector, fault):
        pass

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        store_shared_u(place(spot, k, step), word)

    @cuda.jit(device=True)
    def nothing_to_release(mail, vector, step):
        pass

    @cuda.jit(device=True)
    def stays(vector, step):
        return False

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        cuda.syncthreads()

    return Exchange(2, open, spot, send, nothing_to_tidy, nothing_to_release, stays, wait, nothing)


def clustered(shape, tile, free_when_done):
    spot, place = _local(shape, tile)
    FLAGS_AT = flags_at("clustered", shape, tile, free_when_done)
    waits, begin, gone = patience("clustered", shape, tile, free_when_done)
    begun, hopeless, give_up = waits.begun, waits.hopeless, waits.give_up
    BLOCKS, BYTES = shape.blocks, 4 * tile.rows * layout(shape, tile).words
    MBARRIERS = FLAGS_AT + FLAGS

    @cuda.jit(device=True)
    def mbarrier(vector, step):
        """The mbarrier of the vector after step `step`."""
        return u32(vector + (MBARRIERS + 8 * (step & 1)))

    @cuda.jit(device=True)
    def open(vector, fault):
        begin(vector, fault)
        if cuda.threadIdx.x == 0:
            mbarrier_init(mbarrier(vector, 0), u32(BLOCKS + 1))
            mbarrier_init(mbarrier(vector, 1), u32(BLOCKS + 1))
            fence_mbarrier_init()
        cluster_arrive()
        cluster_wait()

    @cuda.jit(device=True)
    def send(mail, vector, spot, k, step, word):
        here, counted = place(spot, k, step), mbarrier(vector, step)
        for block in range(BLOCKS):
            store_async(of_block(here, u32(block)), word, of_block(counted, u32(block)))

    @cuda.jit(device=True)
    def release(mail, vector, step):
        cuda.syncthreads()  # nobody of this block reads the step's vector or partial sums any more
        if cuda.threadIdx.x < BLOCKS:
            release_shared()
            mbarrier_arrive(of_block(mbarrier(vector, step), u32(cuda.threadIdx.x)))
        if cuda.threadIdx.x == 0:
            mbarrier_expect(mbarrier(vector, step), u32(BYTES))

    @cuda.jit(device=True)
    def wait(mail, vector, step, fault):
        """A warp waits as one, as in `mail.collecting`: shuffles and mma, which follow, are for whole warps."""
        tries, since = u32(0), u64(0)
        while not cuda.all_sync(WARP, mbarrier_passed(mbarrier(vector, step), u32(step >> 1 & 1)) != u32(0)):
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

    return Exchange(2, open, spot, send, nothing_to_tidy, release, left, wait, close)
