"""The time loops of one cell, compiled: T steps of recurrent product and fused cell, forward and backward.

One pair of loops is built per cell and element type, with the cell's traced graphs inside.  They work on addresses, on
the rows [first, last) of the batch and so on any thread's share of it.  Memory layout: `gpurnn.cells.cell.Trace`.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from gpurnn.cells import Cell
from gpurnn.executors import cache
from gpurnn.executors.gemm import make_gemm, make_pack
from gpurnn.executors.simd import I64, Emitter, evaluate, host, vector_loop


class Loops(NamedTuple):
    """Compiled functions; their arguments are explained where they are written, below."""

    forward: Callable
    backward: Callable


def _forward_row(cell: Cell, dtype: np.dtype):
    """One batch row at one step: slots (x and r, without biases) -> next state, and in the slots what is kept."""
    trace = cell.trace
    slot_of_r = {g: k for k, g in enumerate(trace.r_order)}
    slot_of_x = {g: trace.x_start + k for k, g in enumerate(trace.x_order)}

    def emit_row(b: ir.IRBuilder, n, slots, bias, h, h_next, rest, rest_next, params, stride, rest_stride):
        def at(base, number, step):
            return b.add(base, b.mul(step, I64(number)))

        def body(emit: Emitter, offset, mask):
            def load(base, number=0, step=stride):
                return emit.load(b.add(at(base, number, step), offset), mask)

            def slot(number):
                return emit.add(load(slots, number), load(bias, number))

            given = {}
            for gate in range(cell.gates):
                x, r = trace.x[gate].index, trace.r[gate].index
                if gate in trace.split:
                    given[x], given[r] = slot(slot_of_x[gate]), slot(slot_of_r[gate])
                else:
                    total = slot(slot_of_r[gate])
                    given |= {user: total for user in trace.forward.users(x)}
            for s, symbol in enumerate(trace.state):
                given[symbol.index] = load(rest, s - 1, rest_stride) if s else load(h)
            for p, symbol in enumerate(trace.params):
                given[symbol.index] = load(params, p)
            values = evaluate(emit, trace.forward, trace.outputs, given.get)
            for s, value in enumerate(values[: cell.states]):
                address = at(rest_next, s - 1, rest_stride) if s else h_next
                emit.store(value, b.add(address, offset), mask)
            for k, value in enumerate(values[cell.states :]):
                emit.store(value, b.add(at(slots, k, stride), offset), mask)

        vector_loop(b, dtype, n, body)

    @intrinsic
    def row(typing, n, slots, bias, h, h_next, rest, rest_next, params, stride, rest_stride):
        def codegen(context, builder, signature, args):
            emit_row(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), codegen

    return row


def _backward_row(cell: Cell, dtype: np.dtype):
    """One batch row at one step: dL/dnext_state -> in the slots dr and dx; dstate becomes its direct part.

    Assigns slots and dstate; adds to dparams.
    """
    trace = cell.trace
    graph = trace.backward
    slot_of_saved = {index: k for k, index in enumerate(trace.kept)}
    writes = {k: trace.dr[g].index for k, g in enumerate(trace.r_order)}
    writes |= {trace.x_start + k: trace.dx[g].index for k, g in enumerate(trace.x_order)}

    def emit_row(
        b, n, slots, h, h_next, rest, rest_next, dy, dstate, params, dparams, stride, rest_stride, dstate_stride
    ):
        def at(base, number, step):
            return b.add(base, b.mul(step, I64(number)))

        def body(emit: Emitter, offset, mask):
            def load(base, number=0, step=stride):
                return emit.load(b.add(at(base, number, step), offset), mask)

            def value_of(index):
                node = graph.nodes[index]
                if node.op != "input":
                    return None
                kind, number = node.value
                if kind == "saved":
                    return load(slots, slot_of_saved[number])
                if kind == "dnext":
                    direct = load(dstate, number, dstate_stride)
                    return direct if number else emit.add(direct, load(dy))
                if kind == "param":
                    return load(params, number)
                first, others = (h, rest) if kind == "state" else (h_next, rest_next)
                return load(others, number - 1, rest_stride) if number else load(first)

            outputs = [*writes.values(), *(s.index for s in (*trace.dstate, *trace.dparams))]
            values = iter(evaluate(emit, graph, outputs, value_of))
            for k in writes:
                emit.store(next(values), b.add(at(slots, k, stride), offset), mask)
            for s in range(cell.states):
                emit.store(next(values), b.add(at(dstate, s, dstate_stride), offset), mask)
            for p in range(len(cell.params)):
                address = b.add(at(dparams, p, stride), offset)
                emit.store(emit.add(emit.load(address, mask), next(values)), address, mask)

        vector_loop(b, dtype, n, body)

    @intrinsic
    def row(
        typing, n, slots, h, h_next, rest, rest_next, dy, dstate, params, dparams, stride, rest_stride, dstate_stride
    ):
        def codegen(context, builder, signature, args):
            emit_row(builder, *args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 13), codegen

    return row


def _clamp_row(dtype: np.dtype):
    """values within [-limit, limit], in place."""

    @intrinsic
    def clamp(typing, n, values, limit):
        def codegen(context, builder, signature, args):
            count, base, scalar = args

            def body(emit, offset, mask):
                address = builder.add(base, offset)
                narrow = scalar if dtype.itemsize == 8 else builder.fptrunc(scalar, emit.scalar)
                emit.store(emit.clamp(emit.load(address, mask), emit.splat(narrow)), address, mask)

            vector_loop(builder, dtype, count, body)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp, types.float64), codegen

    return clamp


def _forward_loop(cell: Cell, dtype: np.dtype):
    row = _forward_row(cell, dtype)
    gemm = make_gemm(dtype)
    gates, split, size = cell.gates, len(cell.trace.split), dtype.itemsize

    def forward(rows, reverse, first, last, slots, h, rest, bias, params, packed):
        """Fills h and rest with states, and slots with what backward needs.

        rows     (T,)             how many leading batch rows live at each step
        slots    (T, N, slots*H)  in: x W_ih^T where the trace puts x; out: the kept values
        h        (T+1, N, H)      at step t reads h[t] and writes h[t+1]; in reverse, reads h[t+1] and writes h[t]
        rest     (S-1, T+1, N, H) the states beyond h alike; of stride 0 in time they are updated in place
        bias     (slots, H)       what is added to each slot
        packed   (G, ...)         W_hh of each gate in slot order, as `pack` leaves its transpose
        """
        T, H = len(rows), h.shape[2]
        stride, rest_stride, next_row = H * size, rest.strides[0], slots.strides[1]
        for step in range(T):
            t = T - 1 - step if reverse else step
            before, after = (t + 1, t) if reverse else (t, t + 1)
            m = min(rows[t], last) - first
            if m <= 0:
                continue
            at = slots.ctypes.data + t * slots.strides[0] + first * next_row
            h_t = h.ctypes.data + before * h.strides[0] + first * stride
            h_next = h.ctypes.data + after * h.strides[0] + first * stride
            rest_t = rest.ctypes.data + before * rest.strides[1] + first * stride
            rest_next = rest.ctypes.data + after * rest.strides[1] + first * stride
            for k in range(gates):
                w = packed.ctypes.data + k * packed.strides[0]
                gemm(h_t, stride, m, w, H, H, at + k * stride, next_row, k >= split)
            for n in range(m):
                i = n * stride
                row(
                    H, at + n * next_row, bias.ctypes.data, h_t + i, h_next + i, rest_t + i, rest_next + i,
                    params.ctypes.data, stride, rest_stride,
                )  # fmt: skip

    return forward


def _backward_loop(cell: Cell, dtype: np.dtype):
    row = _backward_row(cell, dtype)
    gemm, clamp = make_gemm(dtype), _clamp_row(dtype)
    gates, states, size = cell.gates, cell.states, dtype.itemsize

    def backward(rows, reverse, first, last, slots, h, rest, dy, dstate, params, dparams, packed, clip, flow):
        """Turns the kept values in slots into dr and dx, and carries dstate from the last step to the first.

        dy       (T, N, H)  dL/dy_t, of any stride in T and N
        dstate   (S, N, H)  dL/d(final state) on entry, dL/d(initial state) on return
        dparams  (P, H)     is added to
        packed   W_hh with its rows in slot order, as `pack` leaves it
        clip     the largest magnitude that dstate may carry from one step to the one before; 0: no limit
        flow     (S, T)     where not empty, the sums of squares of dL/dstate_t over rows and units are added to it
        """
        T, H = len(rows), h.shape[2]
        stride, rest_stride, next_row = H * size, rest.strides[0], slots.strides[1]
        for step in range(T):
            t = step if reverse else T - 1 - step
            before, after = (t + 1, t) if reverse else (t, t + 1)
            m = min(rows[t], last) - first
            if m <= 0:
                continue
            at = slots.ctypes.data + t * slots.strides[0] + first * next_row
            h_t = h.ctypes.data + before * h.strides[0] + first * stride
            h_next = h.ctypes.data + after * h.strides[0] + first * stride
            rest_t = rest.ctypes.data + before * rest.strides[1] + first * stride
            rest_next = rest.ctypes.data + after * rest.strides[1] + first * stride
            dy_t = dy.ctypes.data + t * dy.strides[0] + first * dy.strides[1]
            passed = dstate.ctypes.data + first * stride
            if flow.size:
                for s in range(states):
                    flow[s, t] += sum_of_squares(dstate[s], dy[t], s == 0, first, first + m)
            for n in range(m):
                i = n * stride
                row(
                    H, at + n * next_row, h_t + i, h_next + i, rest_t + i, rest_next + i, dy_t + n * dy.strides[1],
                    passed + i, params.ctypes.data, dparams.ctypes.data, stride, rest_stride, dstate.strides[0],
                )  # fmt: skip
            gemm(at, next_row, m, packed.ctypes.data, gates * H, H, passed, stride, 1)
            if clip > 0:
                for s in range(states):
                    clamp(H * m, passed + s * dstate.strides[0], clip)

    return backward


@njit(nogil=True)
def sum_of_squares(dstate, dy, with_dy, first, last):
    """Of dL/dstate at one step over the rows [first, last): what later steps passed back, and for h also dy."""
    total = 0.0
    for n in range(first, last):
        for j in range(dstate.shape[1]):
            value = float(dstate[n, j]) + (float(dy[n, j]) if with_dy else 0.0)
            total += value * value
    return total


@functools.cache
def loops(cell: Cell, dtype: np.dtype) -> Loops:
    """The compiled loops of a cell, built at its first use and kept on disk for later processes."""
    real = types.float32 if dtype.itemsize == 4 else types.float64

    def array(dimensions, readonly=False):
        return types.Array(real, dimensions, "A", readonly=readonly)

    head = (types.Array(types.int64, 1, "A", readonly=True), types.boolean, types.int64, types.int64)
    weights = (array(2, readonly=True), array(2, readonly=True), array(2, readonly=True))
    forward = types.void(*head, array(3), array(3), array(4), *weights)
    tail = (
        array(2, readonly=True),
        array(2),
        array(1, readonly=True),
        types.float64,
        types.Array(types.float64, 2, "A"),
    )
    backward = types.void(*head, array(3), array(3), array(4), array(3, readonly=True), array(3), *tail)
    key = (cell.trace.text, dtype.str, host())
    return Loops(
        forward=cache.compiled(_forward_loop(cell, dtype), forward, *key),
        backward=cache.compiled(_backward_loop(cell, dtype), backward, *key),
    )


@functools.cache
def packer(dtype: np.dtype) -> Callable:
    """pack(b, out) for an element type: see `gemm.make_pack`."""
    real = types.float32 if dtype.itemsize == 4 else types.float64
    signature = types.void(types.Array(real, 2, "A", readonly=True), types.Array(real, 1, "C"))
    return cache.compiled(make_pack(dtype), signature, dtype.str, host())
