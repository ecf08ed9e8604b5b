"""The time loops of one cell, compiled: T steps of recurrent product and fused cell, forward and backward.

One pair of loops is built per cell and element type, with the cell's traced graphs inside.  They work on addresses, on a
thread's share: the rows [first, last) of the batch, the units [unit, end_unit).  Memory layout: `gpurnn.cells.cell.Trace`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import types

from gpurnn.cells import Cell
from gpurnn.executors import cache
from gpurnn.executors.barrier import make_meet
from gpurnn.executors.cache import call
from gpurnn.executors.gemm import make_reduction
from gpurnn.executors.packing import make_pack_share
from gpurnn.executors.products import make_projection, make_return
from gpurnn.executors.rows import make_backward_row, make_forward_row
from gpurnn.executors.simd import address, host


class Loops(NamedTuple):
    """Compiled functions; their arguments are explained where they are written, below."""

    forward: Callable
    backward: Callable


def _forward_loop(cell: Cell, dtype: np.dtype):
    trace, split = cell.trace, len(cell.trace.split)
    row, meet, pack_share = make_forward_row(cell, dtype), make_meet(), make_pack_share(dtype)
    orders = trace.x_order, trace.r_order[:split], trace.r_order[split:]
    project_x, project_split, project_joint = (make_projection(dtype, order) for order in orders)
    joint, x_start, size = cell.gates - split, trace.x_start, dtype.itemsize

    def forward(
        rows, reverse, jobs, part, parts, first, last, unit, end_unit, parties, ready, barrier, chunk, dot_ih, dot_hh,
        x, slots, h, rest, bias, params, weight_ih, weight_split, weight_joint,
    ):  # fmt: skip
        """Fills h and rest with states, and slots with what backward needs.

        rows     (T,)             how many leading batch rows live at each step
        jobs                      of packing the weights, for `packing.make_pack_share`: this thread's `part` of `parts`
        parties                   threads that meet: first where it is `ready`, when the weights are packed; then at `barrier`,
                                  after each step where they share the units, and at the end
        chunk                     so many steps' inputs are projected at once
        x        (T, N, I), C-ordered
        slots    (T, N, slots*H)  out: the kept values; or (chunk, N, slots*H), where nobody wants to see them
        h        (T+1, N, H)      at step t reads h[t] and writes h[t+1]; in reverse, reads h[t+1] and writes h[t]
        rest     (S-1, T+1, N, H) the states beyond h alike; of stride 0 in time they are updated in place
        bias     (slots, H)       what is added to each slot
        weight_*                  W_ih, W_hh's split and its joint gates for `products`: packed, or where dot_* is not 0 all of
                                  the matrix as it lies
        """
        T, N, I = x.shape
        H = h.shape[2]
        stride, rest_stride, next_row, aside = H * size, rest.strides[0], slots.strides[1], unit * size
        slots_step, h_step, rest_step = slots.strides[0], h.strides[0], rest.strides[1]
        units, met = end_unit - unit, 0
        pack_share(address(jobs), len(jobs), part, parts)
        meet(ready, parties)
        for done in range(0, T, chunk):
            begin = (T - 1) // chunk * chunk - done if reverse else done
            end = min(T, begin + chunk)
            steps, m = end - begin, min(rows[begin], last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            slots_at = address(slots) + begin % len(slots) * slots_step + first * next_row + aside
            project_x(
                dot_ih, steps, address(x) + (begin * N + first) * I * size, N * I * size, I * size, m,
                address(weight_ih), I, H, unit, end_unit, slots_at + x_start * stride, slots_step, next_row, 0,
            )  # fmt: skip
            for step in range(begin, end):
                t = begin + end - 1 - step if reverse else step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = min(rows[t], last) - first
                if m <= 0:
                    continue
                at = slots_at + (t - begin) * slots_step
                h_t = address(h) + before * h_step + first * stride
                h_next = address(h) + after * h_step + first * stride + aside
                rest_t = address(rest) + before * rest_step + first * stride + aside
                rest_next = address(rest) + after * rest_step + first * stride + aside
                if split:
                    project_split(
                        dot_hh, 1, h_t, 0, stride, m, address(weight_split), H, H, unit, end_unit, at, 0, next_row, 0
                    )  # fmt: skip
                if joint:
                    project_joint(
                        dot_hh, 1, h_t, 0, stride, m, address(weight_joint), H, H, unit, end_unit, at + split * stride, 0,
                        next_row, 1,
                    )  # fmt: skip
                for i in range(m):
                    i_row = i * stride
                    row(
                        units, at + i * next_row, address(bias) + aside, h_t + i_row + aside, h_next + i_row,
                        rest_t + i_row, rest_next + i_row, address(params) + aside, stride, rest_stride,
                    )  # fmt: skip
                if units < H:
                    met += parties
                    meet(barrier, met)
        meet(barrier, met + parties)

    return forward


def _backward_loop(cell: Cell, dtype: np.dtype):
    row, meet, pack_share = make_backward_row(cell, dtype), make_meet(), make_pack_share(dtype)
    give_h, give_x = make_return(dtype, cell.trace.r_order), make_return(dtype, cell.trace.x_order)
    states, x_start, size = cell.states, cell.trace.x_start, dtype.itemsize

    def backward(
        rows, reverse, jobs, part, parts, first, last, unit, end_unit, column, end_column, parties, ready, barrier, chunk,
        ldw_ih, ldw_hh, slots, h, rest, dy, dstate, dx, params, dparams, weight_ih, weight_hh, clamp, limit, squares, flow,
    ):  # fmt: skip
        """Turns the kept values in slots into dr and dx, and carries dstate from the last step to the first.

        dy       (T, N, H)  dL/dy_t, of any stride in T and N
        dstate   (S, N, H)  dL/d(final state) on entry, dL/d(initial state) on return
        dx       (T, N, I)  the gradient of the inputs, C-ordered: columns [column, end_column), `chunk` steps at once
        dparams  (P, H)     is added to
        weight_* W_ih and W_hh for `products`: those columns, and those of the units, their rows in slot order, packed; or
                 where ldw_* is not 0 all of the matrix as it lies
        clamp    0, or the address of `rows.clamp`: dstate may carry no more than `limit` from one step to the one before
        limit    (1,)
        squares  0, or the address of `rows.squares`: sums of squares of dL/dstate_t over rows and units, added to `flow`
        flow     (S, T)
        """
        T, N, I = dx.shape
        H = h.shape[2]
        stride, rest_stride, next_row, aside = H * size, rest.strides[0], slots.strides[1], unit * size
        slots_step, h_step, rest_step, dy_step, dy_row, dstate_stride = (
            slots.strides[0], h.strides[0], rest.strides[1], dy.strides[0], dy.strides[1], dstate.strides[0],
        )  # fmt: skip
        units, met = end_unit - unit, 0
        pack_share(address(jobs), len(jobs), part, parts)
        meet(ready, parties)
        passed = address(dstate) + first * stride + aside
        ih_at = address(weight_ih) + (column * size if ldw_ih else 0)
        hh_at = address(weight_hh) + (aside if ldw_hh else 0)
        for done in range(0, T, chunk):
            begin = done if reverse else (T - 1) // chunk * chunk - done
            end = min(T, begin + chunk)
            slots_at = address(slots) + begin * slots_step + first * next_row
            for step in range(begin, end):
                t = step if reverse else begin + end - 1 - step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = min(rows[t], last) - first
                if m <= 0:
                    continue
                at = slots_at + (t - begin) * slots_step
                h_t = address(h) + before * h_step + first * stride + aside
                h_next = address(h) + after * h_step + first * stride + aside
                rest_t = address(rest) + before * rest_step + first * stride + aside
                rest_next = address(rest) + after * rest_step + first * stride + aside
                dy_t = address(dy) + t * dy_step + first * dy_row + aside
                if squares:
                    for n in range(m):
                        for s in range(states):
                            direct = 0 if s else dy_t + n * dy_row
                            place = address(flow) + s * flow.strides[0] + t * flow.strides[1]
                            call(squares, units, passed + s * dstate_stride + n * stride, direct, place)
                for n in range(m):
                    i = n * stride
                    row(
                        units, at + n * next_row + aside, h_t + i, h_next + i, rest_t + i, rest_next + i,
                        dy_t + n * dy_row, passed + i, address(params) + aside, address(dparams) + aside,
                        stride, rest_stride, dstate_stride,
                    )  # fmt: skip
                if units < H:
                    met += parties
                    meet(barrier, met)
                give_h(ldw_hh, 1, at, 0, next_row, m, hh_at, H, units, passed, 0, stride, 1)
                if clamp:
                    for s in range(states):
                        for n in range(m):
                            call(clamp, units, passed + s * dstate_stride + n * stride, address(limit))
            steps, m = end - begin, min(rows[begin], last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            give_x(
                ldw_ih, steps, slots_at + x_start * stride, slots_step, next_row, m, ih_at, H, end_column - column,
                address(dx) + ((begin * N + first) * I + column) * size, N * I * size, I * size, 0,
            )  # fmt: skip
        meet(barrier, met + parties)

    return backward


@functools.cache
def loops(cell: Cell, dtype: np.dtype) -> Loops:
    """The compiled loops of a cell, built at its first use and kept on disk for later processes."""
    real = types.float32 if dtype.itemsize == 4 else types.float64

    def array(dimensions, readonly=False):
        return types.Array(real, dimensions, "A", readonly=readonly)

    jobs = types.Array(types.int64, 2, "C")
    head = types.Array(types.int64, 1, "A", readonly=True), types.boolean, jobs
    numbers = [types.int64] * 12, [types.int64] * 14
    given, weights = array(2, readonly=True), types.Array(real, 1, "C", readonly=True)
    ordered = types.Array(real, 3, "C", readonly=True)
    forward = types.void(
        *head, *numbers[0], ordered, array(3), array(3), array(4), given, given, weights, weights, weights
    )
    limit, flow = types.Array(types.float64, 1, "C"), types.Array(types.float64, 2, "C")
    backward = types.void(
        *head, *numbers[1], array(3), array(3), array(4), array(3, readonly=True), array(3), array(3), given, array(2),
        weights, weights, types.int64, limit, types.int64, flow,
    )  # fmt: skip
    key = (cell.trace.text, dtype.str, host())
    return Loops(
        forward=cache.compiled(_forward_loop(cell, dtype), forward, *key),
        backward=cache.compiled(_backward_loop(cell, dtype), backward, *key),
    )


@functools.cache
def reduction(dtype: np.dtype) -> Callable:
    """reduce(...) for an element type: see `gemm.make_reduction`."""
    real = types.float32 if dtype.itemsize == 4 else types.float64
    line, order = types.Array(real, 1, "C"), types.Array(types.int64, 1, "C", readonly=True)
    slots, given, weight = (types.Array(real, 2, *kind) for kind in (("A",), ("C", True), ("C",)))
    signature = types.void(
        *[types.int64] * 4, slots, order, order, types.int64, given, given, line, weight, weight, line
    )
    return cache.compiled(make_reduction(dtype), signature, dtype.str, host())
