"""Rows that begin again inside a sequence, in the compiled loop: what a step reads instead, and where its gradient goes.

States stay where they are, since y shows them and backward reads them.  In a step with a reset the cell is called for runs
of rows, with fresh states for those that begin again; forward, the product reads a copy of h in which these stand.  Only
such a step costs anything.
"""

import functools
from typing import NamedTuple

import numpy as np

from gpurnn.cpu import cache, memory
from gpurnn.cpu.cache import Compiled, call
from gpurnn.cpu.instructions import instruction, word
from gpurnn.cpu.simd import add_wide, address, host, vector_loop
from gpurnn.executors.contract import Resets


class Again(NamedTuple):
    """What the loops are told about resets: addresses, and the memory that they lie in.

    begin, runs, end   of the functions below those that this direction needs
    some        (T,) int64, not 0 where a row is reset
    resets      (T, N) int64
    fresh       (H,): h; the others stand behind the steps of `rest`
    copies      of h, (parts, N, H): one for each thread that reads all units
    """

    begin: int
    runs: int
    end: int
    some: int
    resets: int
    fresh: int
    copies: int
    held: tuple[np.ndarray, ...]

    @classmethod
    def forward(cls, resets: Resets, parts: int) -> "Again":
        held = _arrays(resets, parts)
        own = begin(held[-1].dtype).address, forward_runs().address, 0
        return cls._make((*own, *map(address, held), held))

    @classmethod
    def backward(cls, resets: Resets) -> "Again":
        held = _arrays(resets, 0)
        own = 0, backward_runs().address, end(held[-1].dtype).address
        return cls._make((*own, *map(address, held), held))

    def copy(self, part: int, rows: slice) -> int:
        """Where a thread has room for a copy of its rows of h."""
        copies = self.held[-1]
        return address(copies) + (part % len(copies)) * copies.strides[0] + rows.start * copies.strides[1]


def _arrays(resets: Resets, parts: int) -> tuple[np.ndarray, ...]:
    flags, fresh = resets.before.astype(np.int64), np.ascontiguousarray(resets.state[0])
    return flags.sum(1), flags, fresh, memory.empty((parts, flags.shape[1], len(fresh)), fresh.dtype)


@functools.cache
def begin(dtype: np.dtype) -> Compiled:
    """begin(resets, m, n, h, fresh, copies, stride): m rows of n values, `stride` bytes apart, copied; where resets says so,
    the fresh ones stand in the row's place.
    """

    @instruction
    def copy(builder, n, source, target):
        def body(emit, offset, mask):
            emit.store(emit.load(builder.add(source, offset), mask), builder.add(target, offset), mask)

        vector_loop(builder, dtype, n, body)

    def begin(resets, m, n, h, fresh, copies, stride):
        for i in range(m):
            copy(n, fresh if word(resets + i * 8) else h + i * stride, copies + i * stride)

    return cache.external(begin, dtype.str, host())


@functools.cache
def forward_runs() -> Compiled:
    """forward_runs(cell_rows, resets, fresh, fresh_rest, m, ...): `rows.forward_rows` of m rows, with the fresh states before
    the step where resets says so.
    """

    def forward_runs(
        cell_rows, resets, fresh, fresh_rest, m, next_row, n, slots, bias, h, h_next, rest, rest_next, params, stride,
        rest_stride, draws, t, first, unit,
    ):  # fmt: skip
        i = 0
        while i < m:
            end, at, again = i + 1, i * stride, word(resets + i * 8)
            while not again and end < m and not word(resets + end * 8):
                end += 1
            call(
                cell_rows, end - i, next_row, n, slots + i * next_row, bias, fresh if again else h + at, h_next + at,
                fresh_rest if again else rest + at, rest_next + at, params, stride, rest_stride, draws, t, first + i, unit,
            )  # fmt: skip
            i = end

    return cache.external(forward_runs)


@functools.cache
def backward_runs() -> Compiled:
    """backward_runs(cell_rows, resets, fresh, fresh_rest, m, ...): `rows.backward_rows` alike."""

    def backward_runs(
        cell_rows, resets, fresh, fresh_rest, m, next_row, dy_row, n, slots, h, h_next, rest, rest_next, dy, dstate, params,
        dparams, stride, rest_stride, dstate_stride, draws, t, first, unit,
    ):  # fmt: skip
        i = 0
        while i < m:
            end, at, again = i + 1, i * stride, word(resets + i * 8)
            while not again and end < m and not word(resets + end * 8):
                end += 1
            call(
                cell_rows, end - i, next_row, dy_row, n, slots + i * next_row, fresh if again else h + at, h_next + at,
                fresh_rest if again else rest + at, rest_next + at, dy + i * dy_row, dstate + at, params, dparams, stride,
                rest_stride, dstate_stride, draws, t, first + i, unit,
            )  # fmt: skip
            i = end

    return cache.external(backward_runs)


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
