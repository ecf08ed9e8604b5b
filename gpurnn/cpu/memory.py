"""Memory that earlier arrays of this executor have had, for those of the next call.

What goes back to the system comes again as empty pages, each with a fault when it is first touched: in a training step of
a small layer that takes as long as all the work.  So large blocks are kept.  One is free again when no array refers to it;
together they never hold more than was once in use at a time.  When none fits, what is free beyond KEPT is given back.
They begin where a cache line does: a vector that lies across two lines is read and written half as fast.
"""

import math
import os
import sys

import numpy as np

from gpurnn import locks
from gpurnn.cpu import costs
from gpurnn.cpu.simd import address
from gpurnn.parameters.buffers import ALIGNMENT

KEPT = 1 << 28  # bytes
FITS = 2  # times as large as what is asked for a block may be


def _references(blocks: list[np.ndarray], place: int) -> int:
    return sys.getrefcount(blocks[place])


_UNUSED = _references([np.empty(0)], 0)  # of the list, and of the question itself


class _Blocks:
    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._lock = locks.new_lock()
        self._blocks: list[np.ndarray] = []  # the last to be used last
        self._peak = 0

    def take(self, size: int) -> np.ndarray:
        """A block of at least `size` bytes that nobody uses."""
        with self._lock:
            blocks = self._blocks
            free = [place for place in range(len(blocks)) if _references(blocks, place) == _UNUSED]
            fitting = [place for place in free if size <= blocks[place].nbytes <= FITS * size]
            if fitting:
                blocks.append(blocks.pop(min(fitting, key=lambda place: blocks[place].nbytes)))
                return blocks[-1]
            held, unused = sum(block.nbytes for block in blocks), sum(blocks[place].nbytes for place in free)
            self._peak = max(self._peak, held - unused + size)
            for gone, place in enumerate(free):
                if held + size <= self._peak and unused <= KEPT:
                    break
                block = blocks.pop(place - gone)
                held, unused = held - block.nbytes, unused - block.nbytes
            blocks.append(np.empty(size, np.uint8))
            return blocks[-1]

    def release(self) -> None:
        with self._lock:
            used = [place for place in range(len(self._blocks)) if _references(self._blocks, place) > _UNUSED]
            self._blocks = [self._blocks[place] for place in used]
            self._peak = sum(block.nbytes for block in self._blocks)


_blocks = _Blocks()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_blocks.reset)


def release() -> None:
    """Gives back all that is free."""
    _blocks.release()


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.empty`."""
    size = math.prod(shape) * dtype.itemsize
    if size < costs.BLOCK_BYTES:
        return np.empty(shape, dtype)
    block = _blocks.take(size + ALIGNMENT)
    return np.ndarray(shape, dtype, block, -address(block) % ALIGNMENT)


def zeros(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """`np.zeros`."""
    array = empty(shape, dtype)
    array.fill(0)
    return array
