"""Rows that begin again inside a sequence, in the compiled loop: what a step reads instead, and where its gradient goes.

States stay where they are, since y shows them and backward reads them.  A step with a reset reads copies, in which the
rows that begin again have their fresh states; only such a step costs anything.
"""

import functools
from typing import NamedTuple

import numpy as np

from gpurnn.cpu import cache, memory
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.instructions import instruction, word
from gpurnn.cpu.simd import add_wide, address, host, vector_loop
from gpurnn.executors.contract import Resets


class Again(NamedTuple):
    """What the loops are told about resets: addresses, all 0 where there are none; and the memory that they lie in.

    begin, end  the functions below
    some        (T,) int64, not 0 where a row is reset
    resets      (T, N) int64
    fresh       (S, H)
    copies      of h, (parts, N, H): one for each thread that reads all units
    """

    begin: int = 0
    end: int = 0
    some: int = 0
    resets: int = 0
    fresh: int = 0
    copies: int = 0
    held: tuple[np.ndarray, ...] = ()

    @classmethod
    def of(cls, resets: Resets | None, parts: int) -> "Again":
        if resets is None:
            return NONE
        flags, fresh = resets.before.astype(np.int64), np.stack(resets.state)
        held = flags.sum(1), flags, fresh, memory.empty((parts, flags.shape[1], fresh.shape[1]), fresh.dtype)
        dtype = fresh.dtype
        return cls(begin(dtype).address, end(dtype).address, *map(address, held), held)

    def copy(self, part: int, rows: slice) -> int:
        """Where a thread has room for a copy of its rows of h."""
        if not self.held:
            return 0
        copies = self.held[-1]
        return address(copies) + (part % len(copies)) * copies.strides[0] + rows.start * copies.strides[1]


NONE = Again()


@functools.cache
def begin(dtype: np.dtype) -> Compiled:
    """begin(resets, m, count, n, states, apart, fresh, copies, stride): n units of m rows of `count` states, copied.

    Rows are `stride` bytes apart, and fresh states from one to the next; states `apart`.  Where resets says so, the fresh
    state stands in the row's place.
    """

    @instruction
    def copy(builder, n, source, target):
        def body(emit, offset, mask):
            emit.store(emit.load(builder.add(source, offset), mask), builder.add(target, offset), mask)

        vector_loop(builder, dtype, n, body)

    def begin(resets, m, count, n, states, apart, fresh, copies, stride):
        for s in range(count):
            for i in range(m):
                place = s * apart + i * stride
                copy(n, fresh + s * stride if word(resets + i * 8) else states + place, copies + place)

    return cache.external(begin, dtype.str, host())


@functools.cache
def end(dtype: np.dtype) -> Compiled:
    """end(resets, m, count, n, dstate, apart, dfresh, stride): n units of m rows of `count` states' gradients: where resets says so,
    they are added to the float64 at dfresh, laid out alike, and become 0.
    """

    @instruction
    def move(builder, n, source, target):
        def body(emit, offset, mask):
            place = builder.add(source, offset)
            add_wide(emit, emit.load(place, mask), target, offset, mask)
            emit.store(emit.constant(0), place, mask)

        vector_loop(builder, dtype, n, body)

    wider = 8 // dtype.itemsize

    def end(resets, m, count, n, dstate, apart, dfresh, stride):
        for s in range(count):
            for i in range(m):
                if word(resets + i * 8):
                    place = s * apart + i * stride
                    move(n, dstate + place, dfresh + place * wider)

    return cache.external(end, dtype.str, host())
