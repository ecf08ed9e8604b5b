"""A cell's mathematics in a kernel: an expression graph becomes straight-line code on one unit's registers.

A graph has `nodes`, each with `op`, `args` and `value`, in an order in which each stands behind its arguments, and
walks through them (`evaluate`); gpurnn's cells are traced into such graphs.  The code reads its inputs from one small
local array and writes its results to another: indices are constants, so both become registers.
"""

import math

import numpy as np
from llvmlite import ir

from . import deviates, lanes
from .numba_cuda import cgutils, cuda, intrinsic, types

u32 = types.uint32
NOWHERE = (np.uint32(0),) * 6

APPROXIMATE = "approximate"  # float32 by the special function unit: tanh good to 2^-11, for products in bfloat16
# NVIDIA's libdevice, within a few units in the last place; the logistic function within 3 and |x| of them.
EXACT = "exact"


class Scalar:
    """Operations on one number in a register, for the graphs' node names.  `NaN` passes through all of them."""

    def __init__(self, builder, real, accuracy):
        self.builder, self.single, self.accuracy = builder, real == types.float32, accuracy
        self.type = ir.FloatType() if self.single else ir.DoubleType()

    def constant(self, value):
        return ir.Constant(self.type, float(np.float32(value)) if self.single else value)

    def add(self, a, b):
        return self.builder.fadd(a, b)

    def sub(self, a, b):
        return self.builder.fsub(a, b)

    def mul(self, a, b):
        return self.builder.fmul(a, b)

    def div(self, a, b):
        """In float32 good to 2 units in the last place, and no call."""
        return self._ptx("div.full.f32", a, b) if self.single else self.builder.fdiv(a, b)

    def neg(self, a):
        return self.builder.fsub(self.constant(-0.0), a)  # NVVM's LLVM has no fneg

    def abs(self, a):
        return self._library("fabs", a)

    def sqrt(self, a):
        return self._ptx("sqrt.approx.f32", a) if self.single else self._library("sqrt", a)

    def log(self, a):
        return self._library("log", a)

    def exp(self, a):
        return self._library("exp", a)

    def tanh(self, a):
        return self._ptx("tanh.approx.f32", a) if self.accuracy == APPROXIMATE else self._library("tanh", a)

    def sigmoid(self, a):
        """1 / (1 + 2^(-a log2 e)) in five instructions, for float32.  What is below 2^-126 becomes 0."""
        power = self._ptx("ex2.approx.ftz.f32", self.mul(a, self.constant(-math.log2(math.e))))
        return self._ptx("rcp.approx.ftz.f32", self.add(power, self.constant(1.0)))

    def less(self, a, b):
        return self.builder.fcmp_ordered("<", a, b)

    def less_equal(self, a, b):
        return self.builder.fcmp_ordered("<=", a, b)

    def where(self, condition, a, b):
        return self.builder.select(condition, a, b)

    def maximum(self, a, b):
        return self._or_nan(self.builder.fcmp_unordered(">=", a, b), a, b)

    def minimum(self, a, b):
        return self._or_nan(self.builder.fcmp_unordered("<=", a, b), a, b)

    def _or_nan(self, first, a, b):
        """`a` where `first` (which holds where either is NaN), else `b`; NaN where b is."""
        return self.where(self.builder.fcmp_unordered("uno", b, b), b, self.where(first, a, b))

    def _library(self, name, a):
        kind = ir.FunctionType(self.type, [self.type])
        symbol = f"__nv_{name}{'f' if self.single else ''}"
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, kind, symbol), [a])

    def _ptx(self, opcode, *operands):
        numbers = ", ".join(f"${k}" for k in range(len(operands) + 1))
        kind = ir.FunctionType(self.type, [self.type] * len(operands))
        text = ir.InlineAsm(kind, f"{opcode} {numbers};", ",".join(["=f", *"f" * len(operands)]), side_effect=False)
        return self.builder.call(text, operands)


def with_sigmoids(nodes):
    """The nodes, with `sigmoid` of x for every 0.5 (1 + tanh(0.5 x)), as the logistic function is written in a cell.

    That loses what is small to the 1: at x = -8 it is off by 700 units in the last place, and sigmoid by 15; for
    positive x it is by 1, and sigmoid by 2.  An exact tanh is three times as long.
    """

    def other(index, op, value):
        """Of a node that combines one number, `value`, with another node: that one."""
        node = nodes[index]
        if node.op != op:
            return None
        for number, rest in (node.args, node.args[::-1]):
            if nodes[number].op == "const" and nodes[number].value == value:
                return rest
        return None

    found = list(nodes)
    for index in range(len(nodes)):
        total = other(index, "mul", 0.5)
        tanh = None if total is None else other(total, "add", 1)
        if tanh is not None and nodes[tanh].op == "tanh":
            x = other(nodes[tanh].args[0], "mul", 0.5)
            if x is not None:
                found[index] = nodes[index]._replace(op="sigmoid", args=(x,))
    return found


def deviates_of(builder, place, constant):
    """What gives a unit's random numbers.  place: six u32, key (2), call, row, step, unit; constant: of their type."""

    def product(builder, a, b):
        """No sum takes it into one operation: all executors have the same bits."""
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType()] * 2)
        text = ir.InlineAsm(kind, "mul.rn.f32 $0, $1, $2;", "=f,f,f", side_effect=False)
        return builder.call(text, [a, b])

    low, high, call, row, step, unit = (lanes.Lanes(builder, value, mul=product) for value in place)
    known = {}

    def value(random):
        block, which = divmod(random.number, deviates.EACH)
        if (random.per, block) not in known:
            at = step.like(ir.IntType(32)(deviates.SEQUENCE)) if random.per == "sequence" else step
            known[random.per, block] = lanes.words((low, high), call, row, at, unit, block)
        return lanes.deviate(random, known[random.per, block][which], constant(1.0), constant(0.0))

    return value


def place_of(random):
    """A device function: a unit's place from `Draws.numbers`, its row n, step and unit; all 0 without `random`."""
    random = bool(random)

    @cuda.jit(device=True)
    def place(draws, n, t, u):
        if random:
            call, high = draws[2], u32(draws[1] + (draws[2] >> 32))
            return u32(draws[0]), high, u32(call), u32(draws[3 + n]), u32(t), u32(u)
        return NOWHERE

    return place


def drawing(random, pairs, H):
    """Device functions for a thread of several pairs: what is at hand of their places, and a pair's place at a step.

    begin(draws, state_at, drawn): assigns drawn, of `drawn_words`.  of_pair(drawn, p, t, state_at).
    """
    random = bool(random)

    @cuda.jit(device=True)
    def begin(draws, state_at, drawn):
        if random:
            drawn[0], drawn[1], drawn[2] = u32(draws[0]), u32(draws[1] + (draws[2] >> 32)), u32(draws[2])
            for p in range(pairs):
                drawn[3 + p] = u32(draws[3 + u32(state_at[p]) // u32(H)])

    @cuda.jit(device=True)
    def of_pair(drawn, p, t, state_at):
        if random:
            return drawn[0], drawn[1], drawn[2], drawn[3 + p], u32(t), u32(state_at[p]) % u32(H)
        return NOWHERE

    return begin, of_pair


def drawn_words(random, pairs):
    return 3 + pairs if random else 1


@cuda.jit(device=True)
def at_step(place, t):
    """The same unit at another step."""
    return place[0], place[1], place[2], place[3], u32(t), place[5]


def function(graph, inputs, outputs, real, accuracy):
    """An intrinsic `f(given, result, place)` on two local arrays of `real`: result[k] = the value of node outputs[k].

    inputs[k]: the nodes, none or one or several, whose value is given[k].  place: six u32, see `deviates_of`.
    """
    position = {node: k for k, nodes in enumerate(inputs) for node in nodes}
    if real == types.float32 and accuracy == EXACT:
        graph = type(graph)(with_sigmoids(graph.nodes))

    def emit(builder, given, result, place):
        scalar = Scalar(builder, real, accuracy)
        random = deviates_of(builder, place, scalar.constant)

        def value(node):
            k = position.get(node)
            if graph.nodes[node].op == "random":
                return random(graph.nodes[node].value)
            return None if k is None else builder.load(builder.gep(given, [ir.IntType(64)(k)]))

        for k, found in enumerate(graph.evaluate(scalar, outputs, value)):
            builder.store(found, builder.gep(result, [ir.IntType(64)(k)]))

    @intrinsic
    def pointwise(context, given, result, place):
        def codegen(context, builder, sig, args):
            arrays = [
                context.make_array(kind)(context, builder, value=a).data
                for kind, a in zip(sig.args[:2], args[:2], strict=True)
            ]
            emit(builder, arrays[0], arrays[1], cgutils.unpack_tuple(builder, args[2]))
            return context.get_dummy_value()

        return types.none(given, result, types.UniTuple(types.uint32, 6)), codegen

    return pointwise


def forward(trace, real, accuracy):
    """A cell's forward.  given: slots without a product's share of joint gates' (see below), states, params.

    given[k]      as `trace.given` says: r of the split gates, then x + r of the joint gates; then x of the split gates.
    result[k]     the next states, then what backward wants to see, `trace.kept`.
    """
    inputs = [*trace.given, *((symbol.index,) for symbol in (*trace.state, *trace.params))]
    return function(trace.forward, inputs, trace.outputs, real, accuracy)


def backward(trace, real, accuracy):
    """A cell's backward.  given: what forward kept, states, next states, their gradients, params.

    result[k]     as `trace.written` says: dr in `trace.r_order`, then dx of the split gates; then dstate, dparams.
    """
    graph, cell = trace.backward, trace.cell
    kinds = [("saved", index) for index in trace.kept]
    kinds += [(kind, s) for kind in ("state", "next_state", "dnext") for s in range(cell.states)]
    kinds += [("param", p) for p in range(len(cell.params))]
    place = {node.value: k for k, node in enumerate(graph.nodes) if node.op == "input"}
    inputs = [(place[kind],) if kind in place else () for kind in kinds]
    outputs = [*trace.written, *(symbol.index for symbol in (*trace.dstate, *trace.dparams))]
    return function(graph, inputs, outputs, real, accuracy)
