"""The time loops, compiled: T steps of recurrent product and fused cell, forward and backward.

One pair of loops per element type serves every cell: what a cell does between the products is compiled by itself (`rows`)
and called where it lies.  They work on addresses, on a thread's share: the rows [first, last) of the batch, the units
[unit, end_unit).  Memory layout: `gpurnn.cells.cell.Trace`.
"""

import functools
from collections.abc import Callable

import numpy as np
from numba import types

from gpurnn.cells import Cell
from gpurnn.executors import cache
from gpurnn.executors.barrier import make_meet
from gpurnn.executors.cache import call
from gpurnn.executors.gemm import make_reduction
from gpurnn.executors.packing import make_pack_gates, make_pack_rows
from gpurnn.executors.products import make_give_back, make_project
from gpurnn.executors.simd import address, host, least

HEAD = types.Array(types.int64, 1, "A", readonly=True), types.boolean  # rows, reverse
ORDERS = types.Array(types.int64, 2, "C")


def _array(dtype: np.dtype, dimensions: int, layout: str = "A", readonly: bool = False) -> types.Array:
    return types.Array(types.float32 if dtype.itemsize == 4 else types.float64, dimensions, layout, readonly=readonly)


@functools.cache
def orders(cell: Cell) -> np.ndarray:
    """(2, G): of which gate are the slots that the recurrent product fills, and those of the inputs' projection."""
    return np.array((cell.trace.r_order, cell.trace.x_order), np.int64)


@functools.cache
def forward_loop(dtype: np.dtype) -> Callable:
    """forward(...) of every cell, for an element type."""
    pack, project, meet, size = make_pack_gates(dtype), make_project(dtype), make_meet(), dtype.itemsize

    def forward(
        rows, reverse, cell_rows, split, part, parts, first, last, unit, end_unit, parties, ready, barrier, chunk, dot_ih,
        dot_hh, split_at, joint_at, orders, x, slots, h, rest, bias, params, weight_ih, weight_hh, packed,
    ):  # fmt: skip
        """Fills h and rest with states, and slots with what backward needs.

        rows     (T,)             how many leading batch rows live at each step
        cell_rows                 the address of the cell's `rows.forward_rows`
        split                     of its gates G how many are split
        part                      of `parts`, of the weights that this thread packs
        parties                   threads that meet: first where it is `ready`, when the weights are packed; then at `barrier`,
                                  after each step where they share the units, and at the end
        chunk                     so many steps' inputs are projected at once
        dot_ih, dot_hh            0, or the address of `dot.dot` where that matrix is not packed but read as it lies
        x        (T, N, I), C-ordered
        slots    (T, N, slots*H)  out: the kept values; or (chunk, N, slots*H), where nobody wants to see them
        h        (T+1, N, H)      at step t reads h[t] and writes h[t+1]; in reverse, reads h[t+1] and writes h[t]
        rest     (S-1, T+1, N, H) the states beyond h alike; of stride 0 in time they are updated in place
        bias     (slots, H)       what is added to each slot
        packed                    room for what is packed: W_ih, at `split_at` W_hh's split and at `joint_at` its joint gates
        """
        T, N, I = x.shape
        H, gates = h.shape[2], orders.shape[1]
        joint = gates - split
        stride, rest_stride, next_row, aside = H * size, rest.strides[0], slots.strides[1], unit * size
        slots_step, h_step, rest_step = slots.strides[0], h.strides[0], rest.strides[1]
        units, met, r_order = end_unit - unit, 0, address(orders)
        x_order, joint_order = r_order + gates * 8, r_order + split * 8
        w_ih = address(weight_ih)
        w_split = w_joint = address(weight_hh)
        if not dot_ih:
            w_ih = address(packed)
            pack(address(weight_ih), I, x_order, gates, H, unit, end_unit, part, parts, w_ih)
        if not dot_hh:
            w_split, w_joint = address(packed) + split_at, address(packed) + joint_at
            if split:
                pack(address(weight_hh), H, r_order, split, H, unit, end_unit, part, parts, w_split)
            if joint:
                pack(address(weight_hh), H, joint_order, joint, H, unit, end_unit, part, parts, w_joint)
        meet(ready, parties)
        for done in range(0, T, chunk):
            begin = (T - 1) // chunk * chunk - done if reverse else done
            end = least(T, begin + chunk)
            steps, m = end - begin, least(rows[begin], last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            slots_at = address(slots) + begin % len(slots) * slots_step + first * next_row + aside
            project(
                dot_ih, steps, address(x) + (begin * N + first) * I * size, N * I * size, I * size, m, w_ih, I, H, unit,
                end_unit, x_order, gates, slots_at + split * stride, slots_step, next_row, 0,
            )  # fmt: skip
            for step in range(begin, end):
                t = begin + end - 1 - step if reverse else step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = least(rows[t], last) - first
                if m <= 0:
                    continue
                at = slots_at + (t - begin) * slots_step
                h_t = address(h) + before * h_step + first * stride
                h_next = address(h) + after * h_step + first * stride + aside
                rest_t = address(rest) + before * rest_step + first * stride + aside
                rest_next = address(rest) + after * rest_step + first * stride + aside
                if split:
                    project(
                        dot_hh, 1, h_t, 0, stride, m, w_split, H, H, unit, end_unit, r_order, split, at, 0, next_row, 0
                    )  # fmt: skip
                if joint:
                    project(
                        dot_hh, 1, h_t, 0, stride, m, w_joint, H, H, unit, end_unit, joint_order, joint,
                        at + split * stride, 0, next_row, 1,
                    )  # fmt: skip
                call(
                    cell_rows, m, next_row, units, at, address(bias) + aside, h_t + aside, h_next, rest_t, rest_next,
                    address(params) + aside, stride, rest_stride,
                )  # fmt: skip
                if units < H:
                    met += parties
                    meet(barrier, met)
        meet(barrier, met + parties)

    x, weight, given = _array(dtype, 3, "C", True), _array(dtype, 2, "C", True), _array(dtype, 2, "A", True)
    states = _array(dtype, 3), _array(dtype, 3), _array(dtype, 4)
    arrays = ORDERS, x, *states, given, given, weight, weight, _array(dtype, 1, "C")
    return cache.compiled(forward, types.void(*HEAD, *[types.int64] * 16, *arrays), dtype.str, host())


@functools.cache
def backward_loop(dtype: np.dtype) -> Callable:
    """backward(...) of every cell, for an element type."""
    pack, give_back, meet, size = make_pack_rows(dtype), make_give_back(dtype), make_meet(), dtype.itemsize

    def backward(
        rows, reverse, cell_rows, split, part, parts, first, last, unit, end_unit, column, end_column, parties, ready,
        barrier, chunk, ldw_ih, ldw_hh, hh_at, clamp, squares, orders, slots, h, rest, dy, dstate, dx, params, dparams,
        weight_ih, weight_hh, packed, limit, flow,
    ):  # fmt: skip
        """Turns the kept values in slots into dr and dx, and carries dstate from the last step to the first.

        dy       (T, N, H)  dL/dy_t, of any stride in T and N
        dstate   (S, N, H)  dL/d(final state) on entry, dL/d(initial state) on return
        dx       (T, N, I)  the gradient of the inputs, C-ordered: columns [column, end_column), `chunk` steps at once
        dparams  (P, H)     is added to
        ldw_*    0, or the bytes of a row of that matrix where it is not packed but read as it lies
        packed   room for what is packed: those columns of W_ih, and at `hh_at` those of the units of W_hh
        clamp    0, or the address of `rows.clamp`: dstate may carry no more than `limit` from one step to the one before
        limit    (1,)
        squares  0, or the address of `rows.squares`: sums of squares of dL/dstate_t over rows and units, added to `flow`
        flow     (S, T)
        """
        T, N, I = dx.shape
        H, gates = h.shape[2], orders.shape[1]
        stride, rest_stride, next_row, aside = H * size, rest.strides[0], slots.strides[1], unit * size
        slots_step, h_step, rest_step, dy_step, dy_row, dstate_stride = (
            slots.strides[0], h.strides[0], rest.strides[1], dy.strides[0], dy.strides[1], dstate.strides[0],
        )  # fmt: skip
        units, met, r_order = end_unit - unit, 0, address(orders)
        x_order, columns = r_order + gates * 8, end_column - column
        w_ih, w_hh = address(weight_ih) + column * size, address(weight_hh) + aside
        if not ldw_ih:
            pack(w_ih, I * size, x_order, gates, H, columns, part, parts, address(packed))
            w_ih = address(packed)
        if not ldw_hh:
            pack(w_hh, stride, r_order, gates, H, units, part, parts, address(packed) + hh_at)
            w_hh = address(packed) + hh_at
        meet(ready, parties)
        passed = address(dstate) + first * stride + aside
        for done in range(0, T, chunk):
            begin = done if reverse else (T - 1) // chunk * chunk - done
            end = least(T, begin + chunk)
            slots_at = address(slots) + begin * slots_step + first * next_row
            for step in range(begin, end):
                t = step if reverse else begin + end - 1 - step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = least(rows[t], last) - first
                if m <= 0:
                    continue
                at = slots_at + (t - begin) * slots_step
                h_t = address(h) + before * h_step + first * stride + aside
                h_next = address(h) + after * h_step + first * stride + aside
                rest_t = address(rest) + before * rest_step + first * stride + aside
                rest_next = address(rest) + after * rest_step + first * stride + aside
                dy_t = address(dy) + t * dy_step + first * dy_row + aside
                if squares:
                    flow_t = address(flow) + t * flow.strides[1]
                    call(
                        squares, m, dy_row, units, len(dstate), passed, dstate_stride, stride, dy_t, flow_t, flow.strides[0]
                    )  # fmt: skip
                call(
                    cell_rows, m, next_row, dy_row, units, at + aside, h_t, h_next, rest_t, rest_next, dy_t, passed,
                    address(params) + aside, address(dparams) + aside, stride, rest_stride, dstate_stride,
                )  # fmt: skip
                if units < H:
                    met += parties
                    meet(barrier, met)
                give_back(ldw_hh, 1, at, 0, next_row, m, w_hh, H, units, r_order, gates, passed, 0, stride, 1)
                if clamp:
                    call(clamp, m, units, len(dstate), passed, dstate_stride, stride, address(limit))
            steps, m = end - begin, least(rows[begin], last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            give_back(
                ldw_ih, steps, slots_at + split * stride, slots_step, next_row, m, w_ih, H, columns, x_order, gates,
                address(dx) + ((begin * N + first) * I + column) * size, N * I * size, I * size, 0,
            )  # fmt: skip
        meet(barrier, met + parties)

    weight, given, line = _array(dtype, 2, "C", True), _array(dtype, 2, "A", True), _array(dtype, 1, "C")
    states, gradients = (_array(dtype, 3), _array(dtype, 3), _array(dtype, 4)), (_array(dtype, 3), _array(dtype, 3))
    wide = types.Array(types.float64, 1, "C"), types.Array(types.float64, 2, "C")
    arrays = (
        ORDERS, *states, _array(dtype, 3, "A", True), *gradients, given, _array(dtype, 2), weight, weight, line, *wide
    )  # fmt: skip
    return cache.compiled(backward, types.void(*HEAD, *[types.int64] * 19, *arrays), dtype.str, host())


@functools.cache
def reduction(dtype: np.dtype) -> Callable:
    """reduce(...) for an element type: see `gemm.make_reduction`."""
    line, given, weight = _array(dtype, 1, "C"), _array(dtype, 2, "C", True), _array(dtype, 2, "C")
    arrays = _array(dtype, 2), ORDERS, types.int64, given, given, line, weight, weight, line
    return cache.compiled(make_reduction(dtype), types.void(*[types.int64] * 4, *arrays), dtype.str, host())
