"""The time loops, compiled: T steps of recurrent product and fused cell, forward and backward.

One pair of loops per element type serves every cell: what a cell does between the products is compiled by itself (`rows`)
and called where it lies.  They work on addresses, on a thread's share: the rows [first, last) of the batch, the units
[unit, end_unit).  Memory layout: `gpurnn.cells.traced.Trace`.
"""

import functools

import numpy as np

from gpurnn.cells import Cell
from gpurnn.cpu import cache
from gpurnn.cpu.barrier import make_meet
from gpurnn.cpu.cache import Compiled, call
from gpurnn.cpu.head_products import make_pack_heads, make_pack_heads_back, make_recur, make_recur_back
from gpurnn.cpu.instructions import least, word
from gpurnn.cpu.packing import make_pack_gates, make_pack_rows
from gpurnn.cpu.products import make_give_back, make_project
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import host

FORWARD = Record(
    "T N I H head S gates split reverse meets window chunk cell_rows dot_ih dot_hh rest_stride rest_step "
    "rows orders x slots h rest bias params weight_ih weight_hh fresh_rest begin_again runs some resets fresh draws",
    "packs packers first last unit end_unit w_ih w_split w_joint copies",
)
BACKWARD = Record(
    "T N I H head S gates split states reverse meets chunk cell_rows ldw_ih lies_hh combine clamp squares rest_stride "
    "rest_step dy_step dy_row rows orders slots h rest dy dstate dx params limit weight_ih weight_hh add drest fresh_rest "
    "runs end_again some resets fresh dfresh draws",
    "packs packers first last unit end_unit column end_column packed_ih packed_hh dparams flow",
)


@functools.cache
def orders(cell: Cell) -> np.ndarray:
    """(2, G): of which gate are the slots that the recurrent product fills, and those of the inputs' projection."""
    return np.array((cell.trace.r_order, cell.trace.x_order), np.int64)


@functools.cache
def forward_loop(dtype: np.dtype) -> Compiled:
    """forward(values, part), see `crew.run`: fills h and rest with states, and slots with what backward needs.

    The numbers of FORWARD:
    T, N, I, H                as in the layer; S: how many slots, G: how many gates, `split`: how many of them are split
    head                      how many units meet each other: H, or those of one head
    reverse                   1 to go from the last step to the first
    meets                     1 if threads share units that meet each other: they wait for each other after every step
    window, chunk             how many steps the slots are for; how many steps' inputs are projected at once
    cell_rows                 the address of the cell's `rows.forward_rows`
    dot_ih, dot_hh            0, or the address of `dot.dot` where that matrix is not packed but read as it lies
    rest_stride, rest_step    in bytes, from state to state and from step to step in `rest`

    And the addresses of arrays:
    rows     (T,)             int64, how many leading batch rows live at each step
    orders   (2, G)           as `orders` gives them
    x        (T, N, I)
    slots    (window, N, S*H) out: the kept values; window is T, or `chunk` where nobody wants to see them
    h        (T+1, N, H)      at step t reads h[t] and writes h[t+1]; in reverse, reads h[t+1] and writes h[t]
    rest     (S-1, T+1, N, H) the states beyond h alike; of stride 0 in time they are updated in place
    bias     (S, H)           what is added to each slot
    params   (P, H)
    weight_* (G*H, I), (G*H, head); weight_hh 0 where the cell has none: then no product stands between the steps

    Of resets: fresh_rest, the address of fresh states beyond h, as far apart as those in `rest`; and what `restart.Again` has,
    `some` 0 where there are none.
    draws    `Draws.numbers`; 0 where the cell asks for none

    A part's share: which part of how many it packs; the rows [first, last) of the batch, the units [unit, end_unit); where
    there is room for W_ih packed, for W_hh's split and for its joint gates; for a copy of the share's rows of h.
    """
    pack, project, meet, size = make_pack_gates(dtype), make_project(dtype), make_meet(), dtype.itemsize
    pack_heads, recur = make_pack_heads(dtype), make_recur(dtype)
    read, read_share, apart = FORWARD.read, FORWARD.read_share, FORWARD.stride

    def forward(values, part):
        (
            parties, ready, barrier, shares, T, N, I, H, head, S, gates, split, reverse, meets, window, chunk, cell_rows,
            dot_ih, dot_hh, rest_stride, rest_step, rows, orders, x, slots, h, rest, bias, params, weight_ih, weight_hh,
            fresh_rest, begin_again, runs, some, resets, fresh, draws,
        ) = read(values)  # fmt: skip
        packs, packers, first, last, unit, end_unit, w_ih, w_split, w_joint, copies = read_share(
            values + shares + part * apart
        )
        stride, aside, units, joint = H * size, unit * size, end_unit - unit, gates - split if weight_hh else 0
        next_row, h_step = S * stride, N * stride
        x_orders, joint_orders = orders + gates * 8, orders + split * 8
        if dot_ih:
            w_ih = weight_ih
        else:
            pack(weight_ih, I, x_orders, gates, H, unit, end_unit, packs, packers, w_ih)
        if dot_hh:
            w_split = w_joint = weight_hh
        else:
            pack_heads(weight_hh, orders, split, H, head, unit, end_unit, packs, packers, w_split)
            pack_heads(weight_hh, joint_orders, joint, H, head, unit, end_unit, packs, packers, w_joint)
        meet(ready, parties)
        met = 0
        for done in range(0, T, chunk):
            begin = (T - 1) // chunk * chunk - done if reverse else done
            end = least(T, begin + chunk)
            steps, m = end - begin, least(word(rows + begin * 8), last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            slots_at = slots + (begin % window * N + first) * next_row + aside
            x_at = x + (begin * N + first) * I * size
            project(
                dot_ih, steps, x_at, N * I * size, I * size, m, w_ih, I, H, unit, end_unit, x_orders, gates,
                slots_at + split * stride, N * next_row, next_row, 0,
            )  # fmt: skip
            for step in range(begin, end):
                t = begin + end - 1 - step if reverse else step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = least(word(rows + t * 8), last) - first
                if m <= 0:
                    continue
                at, row = slots_at + (t - begin) * N * next_row, first * stride + aside
                h_t, again = h + before * h_step + first * stride, 0
                factor = h_t
                if some and word(some + t * 8):
                    again = resets + (t * N + first) * 8
                    if weight_hh:
                        factor = copies
                        call(begin_again, again, m, H, h_t, fresh, copies, stride)
                if split:
                    recur(dot_hh, factor, m, w_split, H, head, unit, end_unit, orders, split, at, next_row, 0)
                if joint:
                    recur(
                        dot_hh, factor, m, w_joint, H, head, unit, end_unit, joint_orders, joint, at + split * stride,
                        next_row, 1,
                    )  # fmt: skip
                if again:
                    call(
                        runs, cell_rows, again, fresh + aside, fresh_rest + aside, m, next_row, units, at, bias + aside,
                        h_t + aside, h + after * h_step + row, rest + before * rest_step + row,
                        rest + after * rest_step + row, params + aside, stride, rest_stride, draws, t, first, unit,
                    )  # fmt: skip
                else:
                    call(
                        cell_rows, m, next_row, units, at, bias + aside, h_t + aside, h + after * h_step + row,
                        rest + before * rest_step + row, rest + after * rest_step + row, params + aside, stride, rest_stride,
                        draws, t, first, unit,
                    )  # fmt: skip
                if meets:
                    met += parties
                    meet(barrier, met)

    return cache.external(forward, dtype.str, host(), record=FORWARD)


@functools.cache
def backward_loop(dtype: np.dtype) -> Compiled:
    """backward(values, part), see `crew.run`: turns the kept values in slots into dr and dx, and carries dstate from the last
    step to the first.

    What BACKWARD has not in common with FORWARD:
    states             how many the cell has
    ldw_ih, lies_hh    0, or where that matrix is not packed but read as it lies the bytes of a row, 1
    combine            the address of `combine.combine` if there is but one row in all, else 0
    clamp              0, or the address of `rows.clamp`: dstate may carry no more than `limit` from one step to the one before
    squares            0, or the address of `rows.squares`: sums of squares of dL/dstate_t over rows and units, added to `flow`
    dy_step, dy_row    in bytes, from step to step and from row to row in dy

    dy       (T, N, H)  dL/dy_t
    dstate   (states, N, H)  dL/d(final state) on entry, dL/d(initial state) on return
    dx       (T, N, I)  out: the gradient of the inputs, `chunk` steps at once
    limit               a float64
    add, drest          0, or the address of `rows.add_above`, and dL/d(the states beyond h behind each step), (S-1, T, N, H)
    dfresh              (states, N, H) in float64, added to: gradients of the states that rows were set back to

    In a part's share follow the columns [column, end_column) of dx; where there is room for those columns of W_ih, and for
    those of W_hh; dparams (P, H), which is added to, and flow (states, T), both in float64.
    """
    pack, give_back, meet, size = make_pack_rows(dtype), make_give_back(dtype), make_meet(), dtype.itemsize
    pack_heads_back, recur_back = make_pack_heads_back(dtype), make_recur_back(dtype)
    read, read_share, apart = BACKWARD.read, BACKWARD.read_share, BACKWARD.stride

    def backward(values, part):
        (
            parties, ready, barrier, shares, T, N, I, H, head, S, gates, split, states, reverse, meets, chunk, cell_rows,
            ldw_ih, lies_hh, combine, clamp, squares, rest_stride, rest_step, dy_step, dy_row, rows, orders, slots, h, rest,
            dy, dstate, dx, params, limit, weight_ih, weight_hh, add, drest, fresh_rest, runs, end_again, some, resets,
            fresh, dfresh, draws,
        ) = read(values)  # fmt: skip
        packs, packers, first, last, unit, end_unit, column, end_column, packed_ih, packed_hh, dparams, flow = (
            read_share(values + shares + part * apart)
        )
        stride, aside, units, columns = H * size, unit * size, end_unit - unit, end_column - column
        next_row, h_step, x_orders = S * stride, N * stride, orders + gates * 8
        w_ih, w_hh = weight_ih + column * size, weight_hh
        if not ldw_ih:
            pack(w_ih, I * size, x_orders, gates, H, columns, packs, packers, packed_ih)
            w_ih = packed_ih
        if weight_hh and not lies_hh:
            pack_heads_back(w_hh, orders, gates, H, head, unit, end_unit, packs, packers, packed_hh)
            w_hh = packed_hh
        meet(ready, parties)
        met, row = 0, first * stride + aside
        for done in range(0, T, chunk):
            begin = done if reverse else (T - 1) // chunk * chunk - done
            end = least(T, begin + chunk)
            slots_at = slots + (begin * N + first) * next_row
            for step in range(begin, end):
                t = step if reverse else begin + end - 1 - step
                before, after = (t + 1, t) if reverse else (t, t + 1)
                m = least(word(rows + t * 8), last) - first
                if m <= 0:
                    continue
                at, dy_t = slots_at + (t - begin) * N * next_row, dy + t * dy_step + first * dy_row + aside
                if add:
                    call(
                        add, m, states - 1, units, dstate + h_step + row, h_step, drest + t * h_step + row, T * h_step, stride
                    )  # fmt: skip
                if squares:
                    call(squares, m, dy_row, units, states, dstate + row, h_step, stride, dy_t, flow + t * 8, T * 8)
                again = resets + (t * N + first) * 8 if some and word(some + t * 8) else 0
                if again:
                    call(
                        runs, cell_rows, again, fresh + aside, fresh_rest + aside, m, next_row, dy_row, units, at + aside,
                        h + before * h_step + row, h + after * h_step + row, rest + before * rest_step + row,
                        rest + after * rest_step + row, dy_t, dstate + row, params + aside, dparams + unit * 8, stride,
                        rest_stride, h_step, draws, t, first, unit,
                    )  # fmt: skip
                else:
                    call(
                        cell_rows, m, next_row, dy_row, units, at + aside, h + before * h_step + row,
                        h + after * h_step + row, rest + before * rest_step + row, rest + after * rest_step + row, dy_t,
                        dstate + row, params + aside, dparams + unit * 8, stride, rest_stride, h_step,
                        draws, t, first, unit,
                    )  # fmt: skip
                if meets:
                    met += parties
                    meet(barrier, met)
                if weight_hh:
                    recur_back(
                        lies_hh, combine, at, next_row, m, w_hh, H, head, unit, end_unit, orders, gates, dstate + row, stride
                    )  # fmt: skip
                if clamp:
                    call(clamp, m, units, states, dstate + row, h_step, stride, limit)
                if again:
                    place = first * H + unit
                    call(end_again, again, m, states, units, dstate + row, h_step, dfresh + place * 8, stride)
            if not meets and units < H:  # dx is a sum over all units
                met += parties
                meet(barrier, met)
            steps, m = end - begin, least(word(rows + begin * 8), last) - first
            if m == N:  # the rows of all steps are one matrix
                steps, m = 1, steps * m
            give_back(
                ldw_ih, combine, steps, slots_at + split * stride, N * next_row, next_row, m, w_ih, H, columns, x_orders,
                gates, dx + ((begin * N + first) * I + column) * size, N * I * size, I * size, 0,
            )  # fmt: skip

    return cache.external(backward, dtype.str, host(), record=BACKWARD)
