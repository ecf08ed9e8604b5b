"""A ring of blocks in a cluster, as Numba compiles it: every step each sends its vector to the next one's shared memory.

Two buffers and four mbarriers a block: `full` counts the bytes of a buffer, `empty` says to the sender that it was read.
Right, it gives the right numbers in every order; each planted bug is found.
"""

import functools

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.kernels.numba_cuda import cuda, types
from gpurnn.kernels.ptx import (
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
    shared_address,
    store_async,
)
from tests.ptx.errors import BarrierMisuse, Deadlock, OutOfBounds, PeerExited, PtxError, Race, Uninitialised
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx_tests.test_numba_kernels import compiled

SEEDS = (None, 0, 1, 2)
BLOCKS, THREADS, STEPS = 3, 64, 5
BUFFERS = 2 * THREADS
u32 = types.uint32


# What may be wrong with it; 0: nothing
SHORT, LONG, PARITY, ONE_BUFFER, NO_WAIT, NOT_FREE, EARLY, BOTH_FAR, DATA_FAR = range(1, 10)
MBARRIER_FAR, BEYOND, NO_START, NO_END = range(10, 14)


def ring(out, steps, bug):
    inbox = cuda.shared.array(BUFFERS, types.int32)
    gates = cuda.shared.array(4, types.uint64)
    t = cuda.threadIdx.x
    rank = cuda.blockIdx.x % BLOCKS
    before, after = (rank + BLOCKS - 1) % BLOCKS, (rank + 1) % BLOCKS
    to = before if bug in (BOTH_FAR, DATA_FAR) else rank + 1 if bug == BEYOND else after
    told = before if bug in (BOTH_FAR, MBARRIER_FAR) else rank + 1 if bug == BEYOND else after
    size = u32(4 * THREADS - 4) if bug == SHORT else u32(4 * THREADS + 4) if bug == LONG else u32(4 * THREADS)
    other, buffers = u32(bug == PARITY), 1 if bug == ONE_BUFFER else 2
    full, empty = shared_address(gates, 0), shared_address(gates, 2)
    if t == 0:
        for k in range(2):
            mbarrier_init(u32(full + 8 * k), u32(1))
            mbarrier_init(u32(empty + 8 * k), u32(1))
        fence_mbarrier_init()
    cuda.syncthreads()
    if bug != NO_START:
        cluster_arrive()
        cluster_wait()
    value = types.int32(cuda.grid(1))
    for step in range(steps):
        now, turn, slot = 8 * (step & 1), u32(step >> 1 & 1), (step & buffers - 1) * THREADS
        if t == 0:
            mbarrier_expect(u32(full + now), size)
        if step >= 2 and bug != NOT_FREE:
            while mbarrier_passed(u32(empty + now), turn ^ u32(1)) == u32(0):
                pass
            acquire_shared()
        place = of_block(shared_address(inbox, slot + t), u32(to))
        store_async(place, u32(value), of_block(u32(full + now), u32(told)))
        if bug != NO_WAIT:
            while mbarrier_passed(u32(full + now), turn ^ other) == u32(0):
                pass
            acquire_shared()
        value = types.int32(inbox[slot + (t ^ 33)] * 3 + step)
        if bug != EARLY:
            cuda.syncthreads()
        if t == 0:
            release_shared()
            mbarrier_arrive(of_block(u32(empty + now), u32(before)))
    out[cuda.grid(1)] = value
    if bug != NO_END:
        cluster_arrive()
        cluster_wait()


@functools.cache
def module():
    return compiled(ring, "i4", "n", "n")


def execute(seed, steps=STEPS, bug=0) -> np.ndarray:
    """Two clusters."""
    memory, out = Memory(), np.zeros(2 * BLOCKS * THREADS, "i4")
    address = memory.put(out, name="out", initialised=False)
    arguments = [0, 0, out.size, out.itemsize, address, out.size, out.itemsize, steps, bug]
    run(module(), 2 * BLOCKS, THREADS, arguments, memory, seed=seed, cluster=BLOCKS)
    return memory.get(address, out)


def expected(steps=STEPS) -> np.ndarray:
    values = np.arange(2 * BLOCKS * THREADS).reshape(2, BLOCKS, THREADS)
    for step in range(steps):
        values = np.roll(values, 1, axis=1)[:, :, np.arange(THREADS) ^ 33] * 3 + step
    return values.ravel()


@pytest.mark.parametrize("seed", SEEDS)
def test_a_ring_of_blocks(seed):
    for steps in (0, 1, STEPS):
        assert (execute(seed, steps) == expected(steps)).all()


MUTANTS = {
    "an element less is expected": (SHORT, {Race}),
    "an element more is expected": (LONG, {Deadlock}),
    "the wrong parity": (PARITY, {Race, Uninitialised, Deadlock}),
    "one buffer for both": (ONE_BUFFER, {Race}),
    "no wait for the data": (NO_WAIT, {Race, Uninitialised}),
    "no wait for the buffer": (NOT_FREE, {Race}),
    "told that it is free before all have read": (EARLY, {Race}),
    "data and mbarrier one block too far": (BOTH_FAR, {Race}),
    "the data one block too far": (DATA_FAR, {BarrierMisuse}),
    "the mbarrier one block too far": (MBARRIER_FAR, {BarrierMisuse}),
    "beyond the last block": (BEYOND, {OutOfBounds}),
    "a peer's mbarriers not initialised yet": (NO_START, {Race, Uninitialised}),
    "a peer exits while it is still told of buffers": (NO_END, {PeerExited}),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_ring_gone_wrong(name):
    bug, errors = MUTANTS[name]
    for seed in SEEDS[:2] if Deadlock in errors else SEEDS:
        with pytest.raises(PtxError) as found:
            execute(seed, bug=bug)
        assert found.type in errors, (seed, found.value)
