"""Memory kept for the next call: never two arrays in one place, never more than was in use, none left to a forked child."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cpu import costs, memory
from gpurnn.parameters.buffers import ALIGNMENT
from gpurnn.recurrent import LSTM

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

FLOAT32 = np.dtype(np.float32)
SIZE = costs.BLOCK_BYTES  # elements; four times as many bytes


@pytest.fixture
def blocks(monkeypatch):
    own = memory._Blocks()
    monkeypatch.setattr(memory, "_blocks", own)
    return own


def place(array):
    return array.__array_interface__["data"][0]


def held(blocks):
    return sum(block.nbytes - ALIGNMENT for block in blocks._blocks)


def test_what_nobody_refers_to_is_used_again(blocks):
    first = memory.empty((4, SIZE // 4), FLOAT32)
    assert (
        first.shape == (4, SIZE // 4) and first.dtype == FLOAT32 and first.flags.c_contiguous and first.flags.writeable
    )
    where, view = place(first), first[1:3, ::2].T
    del first
    assert place(memory.empty((SIZE,), FLOAT32)) != where  # a view of a view still does
    del view
    assert place(memory.empty((SIZE // 2 + 1,), FLOAT32)) == where
    assert held(blocks) == 2 * 4 * SIZE


def test_large_arrays_begin_with_a_cache_line(blocks):
    arrays = [memory.empty((size,), FLOAT32) for size in range(SIZE, SIZE + 200, 7)]
    assert all(place(array) % ALIGNMENT == 0 for array in arrays)


def test_arrays_in_use_at_one_time_are_apart(blocks):
    arrays = [memory.zeros((SIZE - k,), FLOAT32) for k in range(6)]  # each would fit into the ones before
    for k, array in enumerate(arrays):
        array += k
    assert all((array == k).all() for k, array in enumerate(arrays))


def test_zeros_are_zeros_where_something_was(blocks):
    memory.empty((SIZE,), FLOAT32)[:] = 7
    assert not memory.zeros((SIZE,), FLOAT32).any()


def test_blocks_far_too_large_are_not_taken(blocks):
    large = place(memory.empty((3 * SIZE,), FLOAT32))
    small = memory.empty((SIZE,), FLOAT32)
    assert place(small) != large


def test_what_is_small_is_left_to_the_allocator(blocks):
    assert memory.empty((costs.BLOCK_BYTES // 4 - 1,), FLOAT32).base is None and memory.empty((0, 3), FLOAT32).size == 0
    assert held(blocks) == 0


def test_they_hold_no_more_than_was_in_use_at_a_time(blocks):
    """Of sizes that come once each, as batches of many lengths have them."""
    rng, most = np.random.default_rng(0), 0
    for _ in range(200):
        arrays = [memory.empty((int(rng.integers(SIZE, 9 * SIZE)),), FLOAT32) for _ in range(3)]
        most = max(most, sum(array.base.nbytes for array in arrays))
        del arrays
        assert held(blocks) <= most


def test_free_ones_beyond_what_is_to_be_kept_go_when_nothing_fits(blocks, monkeypatch):
    monkeypatch.setattr(memory, "KEPT", 20 * SIZE)
    arrays = [memory.empty((k * SIZE,), FLOAT32) for k in range(3, 8)]
    assert held(blocks) == 25 * 4 * SIZE  # in use, they may be more
    del arrays
    memory.empty((SIZE,), FLOAT32)
    assert held(blocks) <= (20 + 4) * SIZE


def test_threads_never_have_one_block_at_a_time(blocks):
    start = threading.Barrier(4)

    def fill(number):
        start.wait()
        for turn in range(200):
            array = memory.empty((SIZE,), FLOAT32)
            array[:] = 1000 * number + turn
            assert (array == 1000 * number + turn).all()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fill, range(4)))
    assert held(blocks) <= 2 * 4 * 4 * SIZE  # each thread has its last array until it has the next


def test_released_is_what_nobody_refers_to(blocks):
    kept, free = memory.zeros((SIZE,), FLOAT32), memory.empty((2 * SIZE,), FLOAT32)
    del free
    memory.release()
    assert held(blocks) == 4 * SIZE
    memory.empty((SIZE,), FLOAT32)[:] = 1
    assert not kept.any()


def test_outputs_stay_when_a_layer_is_called_again():
    layer = LSTM(32, 128, rng=0)
    x = np.random.default_rng(0).standard_normal((40, 16, 32)).astype(np.float32)
    y, (h, c), backward = layer(x)
    dx, _ = backward(np.ones_like(y))
    kept = [(array, array.copy()) for array in (y, h, c, dx)]
    for _ in range(3):
        again, _, backward = layer(2 * x)
        backward(np.ones_like(again))
    for array, copy in kept:
        np.testing.assert_array_equal(array, copy)


def test_training_steps_do_not_grow_it(blocks):
    layer, sizes = LSTM(32, 128, rng=0), []
    for _ in range(6):
        y, _, backward = layer(np.ones((40, 16, 32), np.float32))
        backward(np.ones_like(y))
        sizes.append(held(blocks))
    assert sizes[0] > 0 and sizes[-1] == sizes[1]
