"""What stands between the products of a time step: the cell, fused and in SIMD, forward and backward.

The code is emitted from the cell's traced graphs.  Memory layout: `gpurnn.cells.traced.Trace`.
"""

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from gpurnn.cells import Cell
from gpurnn.cpu import cache, deviates
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.instructions import instruction
from gpurnn.cpu.simd import I32, I64, Emitter, add_wide, host, vector_loop


@functools.cache
def forward_rows(cell: Cell, dtype: np.dtype) -> Compiled:
    """forward_rows(m, next_row, n, slots, bias, h, h_next, rest, rest_next, params, stride, rest_stride, draws, t, first, unit):
    n units of m batch rows at one step: slots (x and r, without biases) -> next state, and in the slots what is kept.

    Slots are `next_row` bytes apart from row to row, states `stride`, as slots from one to the next are.
    draws: the address of `Draws.numbers`, read by cells that are `random` only; t, first, unit: which step, and where rows
    and units begin.
    """
    trace = cell.trace

    @instruction
    def row(b: ir.IRBuilder, n, slots, bias, h, h_next, rest, rest_next, params, stride, rest_stride, *place):
        random = deviates.values(b, *place) if trace.forward.randoms(trace.outputs) else None

        def at(base, number, step):
            return b.add(base, b.mul(step, I64(number)))

        def body(emit: Emitter, offset, mask):
            def load(base, number=0, step=stride):
                return emit.load(b.add(at(base, number, step), offset), mask)

            def slot(number):
                return emit.add(load(slots, number), load(bias, number))

            given: dict[int, ir.Value] = {}
            for k, nodes in enumerate(trace.given):
                given |= dict.fromkeys(nodes, slot(k))
            for s, symbol in enumerate(trace.state):
                given[symbol.index] = load(rest, s - 1, rest_stride) if s else load(h)
            for p, symbol in enumerate(trace.params):
                given[symbol.index] = load(params, p)
            if random is not None:
                own = random(emit, offset)
                for index, node in enumerate(trace.forward.nodes):
                    if node.op == "random":
                        given[index] = own(node.value)
            values = trace.forward.evaluate(emit, trace.outputs, given.get)
            for s, value in enumerate(values[: cell.states]):
                place = at(rest_next, s - 1, rest_stride) if s else h_next
                emit.store(value, b.add(place, offset), mask)
            for k, value in enumerate(values[cell.states :]):
                emit.store(value, b.add(at(slots, k, stride), offset), mask)

        vector_loop(b, dtype, n, body)

    def forward_rows(
        m, next_row, n, slots, bias, h, h_next, rest, rest_next, params, stride, rest_stride, draws, t, first, unit
    ):  # fmt: skip
        for i in range(m):
            at = i * stride
            row(
                n, slots + i * next_row, bias, h + at, h_next + at, rest + at, rest_next + at, params, stride, rest_stride,
                draws, t, first + i, unit,
            )  # fmt: skip

    return cache.external(forward_rows, cell.trace.text, dtype.str, host())


@functools.cache
def backward_rows(cell: Cell, dtype: np.dtype) -> Compiled:
    """backward_rows(m, next_row, dy_row, n, slots, h, h_next, rest, rest_next, dy, dstate, params, dparams, stride,
    rest_stride, dstate_stride, draws, t, first, unit): the same, backward: dL/dnext_state -> in the slots dr and dx; dstate becomes its direct part.

    Assigns slots and dstate; adds to dparams, in float64.  dy is `dy_row` bytes apart from row to row.
    """
    trace = cell.trace
    graph = trace.backward
    slot_of_saved = {index: k for k, index in enumerate(trace.kept)}

    @instruction
    def row(
        b, n, slots, h, h_next, rest, rest_next, dy, dstate, params, dparams, stride, rest_stride, dstate_stride, *place
    ):  # fmt: skip
        def at(base, number, step):
            return b.add(base, b.mul(step, I64(number)))

        wide_stride = b.mul(stride, I64(8 // dtype.itemsize))
        outputs = [*trace.written, *(s.index for s in (*trace.dstate, *trace.dparams))]
        random = deviates.values(b, *place) if graph.randoms(outputs) else None

        def body(emit: Emitter, offset, mask):
            own = random(emit, offset) if random is not None else None

            def load(base, number=0, step=stride):
                return emit.load(b.add(at(base, number, step), offset), mask)

            def value_of(index):
                node = graph.nodes[index]
                if own is not None and node.op == "random":
                    return own(node.value)
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

            values = iter(graph.evaluate(emit, outputs, value_of))
            for k in range(len(trace.written)):
                emit.store(next(values), b.add(at(slots, k, stride), offset), mask)
            for s in range(cell.states):
                emit.store(next(values), b.add(at(dstate, s, dstate_stride), offset), mask)
            for p in range(len(cell.params)):
                add_wide(emit, next(values), at(dparams, p, wide_stride), offset, mask)

        vector_loop(b, dtype, n, body)

    def backward_rows(
        m, next_row, dy_row, n, slots, h, h_next, rest, rest_next, dy, dstate, params, dparams, stride, rest_stride,
        dstate_stride, draws, t, first, unit,
    ):  # fmt: skip
        for i in range(m):
            at = i * stride
            row(
                n, slots + i * next_row, h + at, h_next + at, rest + at, rest_next + at, dy + i * dy_row, dstate + at, params,
                dparams, stride, rest_stride, dstate_stride, draws, t, first + i, unit,
            )  # fmt: skip

    return cache.external(backward_rows, cell.trace.text, dtype.str, host())


@functools.cache
def squares(dtype: np.dtype) -> Compiled:
    """squares(m, dy_row, n, states, dstate, dstate_stride, stride, dy, flow, flow_stride): adds the sums of squares of
    dL/dstate_t over n units of m batch rows to the float64 at `flow`, a state's `flow_stride` apart.  dL/dh_t is dstate + dy.
    """

    @instruction
    def row(builder, n, first, second, total):
        """The sum of (first + second)^2; of first^2 where second is 0."""
        width = host().width(dtype)
        wide = ir.VectorType(ir.DoubleType(), width)
        lanes = cgutils.alloca_once_value(builder, ir.Constant(wide, [0.0] * width))

        def square(both, emit, offset, mask):
            values = [emit.load(builder.add(address, offset), mask) for address in ((first, second)[: 1 + both])]
            doubles = [builder.fpext(value, wide) if dtype.itemsize == 4 else value for value in values]
            term = builder.fadd(*doubles) if both else doubles[0]
            builder.store(builder.fadd(builder.load(lanes), builder.fmul(term, term)), lanes)

        with builder.if_else(builder.icmp_signed("!=", second, I64(0))) as (with_second, without):
            with with_second:
                vector_loop(builder, dtype, n, functools.partial(square, True))
            with without:
                vector_loop(builder, dtype, n, functools.partial(square, False))
        sums = builder.load(lanes)
        parts = [builder.extract_element(sums, I32(lane)) for lane in range(width)]
        place = builder.inttoptr(total, ir.DoubleType().as_pointer())
        builder.store(builder.fadd(builder.load(place), functools.reduce(builder.fadd, parts)), place)

    def squares(m, dy_row, n, states, dstate, dstate_stride, stride, dy, flow, flow_stride):
        for i in range(m):
            for s in range(states):
                direct = 0 if s else dy + i * dy_row
                row(n, dstate + s * dstate_stride + i * stride, direct, flow + s * flow_stride)

    return cache.external(squares, dtype.str, host())


@functools.cache
def add_above(dtype: np.dtype) -> Compiled:
    """add_above(m, count, n, dstate, dstate_stride, above, above_stride, stride): n units of m batch rows of `count` states:
    dstate += above, states so many bytes apart.
    """

    @instruction
    def row(builder, n, target, source):
        def body(emit, offset, mask):
            place = builder.add(target, offset)
            value = emit.load(builder.add(source, offset), mask)
            emit.store(emit.add(emit.load(place, mask), value), place, mask)

        vector_loop(builder, dtype, n, body)

    def add_above(m, count, n, dstate, dstate_stride, above, above_stride, stride):
        for s in range(count):
            for i in range(m):
                row(n, dstate + s * dstate_stride + i * stride, above + s * above_stride + i * stride)

    return cache.external(add_above, dtype.str, host())


@functools.cache
def clamp(dtype: np.dtype) -> Compiled:
    """clamp(m, n, states, dstate, dstate_stride, stride, limit): brings n units of m batch rows of every state's gradient
    within plus and minus the float64 at `limit`, in place.
    """

    @instruction
    def row(builder, n, values, limit):
        scalar = builder.load(builder.inttoptr(limit, ir.DoubleType().as_pointer()))

        def body(emit, offset, mask):
            address = builder.add(values, offset)
            narrow = scalar if dtype.itemsize == 8 else builder.fptrunc(scalar, emit.scalar)
            emit.store(emit.clamp(emit.load(address, mask), emit.splat(narrow)), address, mask)

        vector_loop(builder, dtype, n, body)

    def clamp(m, n, states, dstate, dstate_stride, stride, limit):
        for i in range(m):
            for s in range(states):
                row(n, dstate + s * dstate_stride + i * stride, limit)

    return cache.external(clamp, dtype.str, host())
