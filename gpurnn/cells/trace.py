"""Turns a cell's Python functions into expression graphs, by running them once on symbolic values.

A cell is elementwise, so its forward or backward is a straight line of operations on the values of one unit.  Running
it on a `Symbol` records that line, whatever Python was used to write it: helper functions, closures, loops over gates.
The compiled executors emit their code from the graph: explicit SIMD on a CPU, float32 registers on a GPU.  Equal
expressions become one node, which is how the engine sees that two gradients are the same value and stores it once.  The
graph's text is also the exact key of a compile cache: it changes if, and only if, the cell's mathematics does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

BINARY = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "maximum": np.maximum,
    "minimum": np.minimum,
}
UNARY = {
    "neg": np.negative,
    "abs": np.absolute,
    "exp": np.exp,
    "log": np.log,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
}
OP_OF_UFUNC = {ufunc: op for op, ufunc in (BINARY | UNARY).items()}
COMMUTATIVE = ("add", "mul")  # exactly so in floating point: a*b and b*a are one node
COMPARISONS = {"less": np.less, "less_equal": np.less_equal}
GIVEN = ("input", "random")  # no number of the graph's own
ON_ARRAYS = SimpleNamespace(**BINARY, **UNARY, **COMPARISONS, where=np.where, constant=float)  # see `Graph.evaluate`
ALLOWED = "+ - * / ** 2, comparisons, tanh sigmoid exp log sqrt abs maximum minimum where relu"


class Random(NamedTuple):
    """A random number of a unit: which it is among the cell's of that kind of `per`, "step" or "sequence".

    p: of a "bernoulli", the probability of 1; 0 of a "normal".
    """

    kind: str
    per: str
    number: int
    p: float

    @property
    def mean(self) -> float:
        return self.p


class Node(NamedTuple):
    """`op` on earlier nodes; `value` is the constant of a `const`, the name of an `input`, the Random of a `random`."""

    op: str
    args: tuple[int, ...] = ()
    value: Any = None


class Graph:
    """Nodes in an order in which each stands behind its arguments; equal expressions are one node."""

    def __init__(self, nodes: Iterable[Node] = ()) -> None:
        self.nodes: list[Node] = list(nodes)
        self._index: dict[Node, int] = {node: index for index, node in enumerate(self.nodes)}
        self._plans: dict[tuple[int, ...], tuple] = {}
        self.candidates: set[int] = set()  # see `functions.candidate`

    def add(self, op: str, *args: int, value: Any = None) -> int:
        node = Node(op, args, value)
        if node not in self._index:
            self._index[node] = len(self.nodes)
            self.nodes.append(node)
        return self._index[node]

    def input(self, *name: Any) -> "Symbol":
        return Symbol(self, self.add("input", value=name))

    def constant(self, value: float) -> "Symbol":
        return Symbol(self, self.add("const", value=float(value)))

    def random(self, kind: str, per: str, p: float = 0.0) -> "Symbol":
        """One more random number: no two calls give the same."""
        number = sum(node.op == "random" and node.value.per == per for node in self.nodes)
        return self.again(Random(kind, per, number, p))

    def again(self, random: Random) -> "Symbol":
        return Symbol(self, self.add("random", value=random))

    def randoms(self, outputs: Iterable[int]) -> list[Random]:
        """Those that `outputs` need."""
        return [self.nodes[i].value for i in sorted(self.reachable(outputs)) if self.nodes[i].op == "random"]

    def lift(self, value: Any) -> "Symbol":
        """`value` as a number of this graph; TypeError for anything that is none."""
        if isinstance(value, Symbol):
            if value.graph is not self:
                raise TypeError("a value of another trace: what backward needs of forward, forward returns in `saved`")
            if value.node.op in COMPARISONS:
                raise TypeError("a comparison is not a number: choose values with where(condition, a, b)")
            return value
        if isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool):
            try:
                return self.constant(float(value))
            except OverflowError:
                raise ValueError("a cell's number: expected one that a float can hold, got a larger one") from None
        raise TypeError(f"a cell may combine its values with each other and with numbers, got {type(value).__name__}")

    def users(self, index: int) -> list[int]:
        return [user for user, node in enumerate(self.nodes) if index in node.args]

    def reachable(self, outputs: Iterable[int]) -> set[int]:
        """The nodes that `outputs` need, themselves included."""
        seen: set[int] = set()
        stack = list(outputs)
        while stack:
            index = stack.pop()
            if index not in seen:
                seen.add(index)
                stack.extend(self.nodes[index].args)
        return seen

    def text(self, outputs: Sequence[int], names: Mapping[tuple, tuple] | None = None) -> str:
        """The expressions behind `outputs`, a line each: what a reader wants to see, and what a cache is keyed by.

        Nodes are counted as they come, so that what is not needed has no say.  names: other names for inputs.
        """
        number = {index: k for k, index in enumerate(sorted(self.reachable(outputs)))}
        lines = []
        for index, k in number.items():
            op, args, value = self.nodes[index]
            value = (names or {}).get(value, value) if op == "input" else value
            words = [f"%{k} = {op}", *(f"%{number[a]}" for a in args), *([str(value)] if value is not None else [])]
            lines.append(" ".join(words))
        return "\n".join([*lines, "return " + " ".join(f"%{number[i]}" for i in outputs)])

    def evaluate(self, operations: Any, outputs: Sequence[int], given: Callable[[int], Any]) -> list[Any]:
        """The values of `outputs`: arrays, or code that is emitted for them, as `operations` has it.

        operations   a function for each op, by its name, and `constant(number)`.  Each node that is needed is computed once,
                     in the graph's order.
        given(node)  the value of a node that the caller has; None: it is computed from its arguments.
        """
        values: dict[int, Any] = {}
        for index in sorted(self.reachable(outputs)):
            op, args, number = self.nodes[index]
            value = given(index)
            if value is None and op == "const":
                value = operations.constant(number)
            elif value is None and op not in GIVEN and all(a in values for a in args):
                value = getattr(operations, op)(*(values[a] for a in args))
            if value is not None:
                values[index] = value
        return [values[output] for output in outputs]

    def run(self, outputs: Sequence[int], inputs: Mapping[str, Any]) -> list[Any]:
        """`evaluate` for arrays, again and again: an input (kind, number) is inputs[kind][number], a random number
        inputs["random"][its Random]."""
        if tuple(outputs) not in self._plans:
            self._plans[tuple(outputs)] = self._plan(outputs)
        constants, reads, operations = self._plans[tuple(outputs)]
        values = dict(constants)
        for index, (kind, number) in reads:
            values[index] = inputs[kind][number]
        for index, operation, args in operations:
            values[index] = operation(*[values[a] for a in args])
        return [values[i] for i in outputs]

    def _plan(self, outputs: Sequence[int]) -> tuple[dict[int, float], list[tuple], list[tuple]]:
        needed = [(index, self.nodes[index]) for index in sorted(self.reachable(outputs))]
        constants = {index: node.value for index, node in needed if node.op == "const"}
        reads = [(index, node.value) for index, node in needed if node.op == "input"]
        reads += [(index, ("random", node.value)) for index, node in needed if node.op == "random"]
        operations = [(index, getattr(ON_ARRAYS, node.op), node.args) for index, node in needed if node.args]
        return constants, reads, operations


_being_traced: ContextVar[Graph | None] = ContextVar("graph", default=None)


@contextmanager
def recording(graph: Graph) -> Iterator[None]:
    """What a cell's function asks for inside, without a value at hand, is this graph's."""
    token = _being_traced.set(graph)
    try:
        yield
    finally:
        _being_traced.reset(token)


def recorded() -> Graph | None:
    return _being_traced.get()


class Symbol:
    """One value of one unit, not known yet.  Operators and NumPy's elementwise functions record themselves."""

    __slots__ = ("graph", "index")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, graph: Graph, index: int):
        self.graph, self.index = graph, index

    @property
    def node(self) -> Node:
        return self.graph.nodes[self.index]

    def _binary(self, op: str, left: Any, right: Any) -> "Symbol":
        a, b = self.graph.lift(left), self.graph.lift(right)
        if a.node.op == b.node.op == "const":
            return self.graph.constant(_folded(BINARY[op], a, b))
        same = _simplified(op, a, b)
        if same is not None:
            return same
        pair = sorted((a.index, b.index)) if op in COMMUTATIVE else (a.index, b.index)
        return Symbol(self.graph, self.graph.add(op, *pair))

    def _unary(self, op: str) -> "Symbol":
        a = self.graph.lift(self)
        if a.node.op == "const":
            return self.graph.constant(_folded(UNARY[op], a))
        return Symbol(self.graph, self.graph.add(op, a.index))

    def _compare(self, op: str, left: Any, right: Any) -> "Symbol":
        a, b = self.graph.lift(left), self.graph.lift(right)
        return Symbol(self.graph, self.graph.add(op, a.index, b.index))

    def __add__(self, other):
        return self._binary("add", self, other)

    def __radd__(self, other):
        return self._binary("add", other, self)

    def __sub__(self, other):
        return self._binary("sub", self, other)

    def __rsub__(self, other):
        return self._binary("sub", other, self)

    def __mul__(self, other):
        return self._binary("mul", self, other)

    def __rmul__(self, other):
        return self._binary("mul", other, self)

    def __truediv__(self, other):
        return self._binary("div", self, other)

    def __rtruediv__(self, other):
        return self._binary("div", other, self)

    def __pow__(self, exponent):
        if not isinstance(exponent, int) or exponent < 1:
            raise TypeError(f"a power in a cell is a positive whole number, got {exponent!r}")
        result = self
        for _ in range(exponent - 1):
            result = result * self
        return result

    def __neg__(self):
        return self._unary("neg")

    def __pos__(self):
        return self

    def __abs__(self):
        return self._unary("abs")

    def __lt__(self, other):
        return self._compare("less", self, other)

    def __le__(self, other):
        return self._compare("less_equal", self, other)

    def __gt__(self, other):
        return self._compare("less", other, self)

    def __ge__(self, other):
        return self._compare("less_equal", other, self)

    def __eq__(self, other):
        raise TypeError("== compares the values of a whole array: a cell is elementwise, use where(a < b, c, d)")

    def __bool__(self):
        raise TypeError("a cell has no `if`: it works on many units at once, choose with where(condition, a, b)")

    def __float__(self):
        raise TypeError("a cell's values are not numbers yet: use gpurnn's functions, not float() or those of math")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method == "__call__" and not kwargs:
            if ufunc is np.square:
                return inputs[0] * inputs[0]
            if ufunc in (np.less, np.less_equal):
                return self._compare(ufunc.__name__, *inputs)
            if ufunc in (np.greater, np.greater_equal):
                return self._compare(ufunc.__name__.replace("greater", "less"), *reversed(inputs))
            if ufunc in OP_OF_UFUNC:
                op = OP_OF_UFUNC[ufunc]
                return self._binary(op, *inputs) if op in BINARY else inputs[0]._unary(op)
        raise TypeError(f"a cell may not use {ufunc.__name__}; it may use {ALLOWED}")

    def __array_function__(self, function, types, args, kwargs):
        if function is np.where and len(args) == 3 and not kwargs:
            condition, a, b = args
            if not isinstance(condition, Symbol) or condition.node.op not in COMPARISONS:
                raise TypeError("the condition of where is a comparison such as `x > 0`")
            a, b = condition.graph.lift(a), condition.graph.lift(b)
            return Symbol(self.graph, self.graph.add("where", condition.index, a.index, b.index))
        raise TypeError(f"a cell may not use {function.__name__}; it may use {ALLOWED}")

    def __getattr__(self, name):
        if name.startswith("__"):  # copy, pickle and inspect ask what an object can do, and expect this answer
            raise AttributeError(name)
        raise TypeError(f"a cell is elementwise, its values have no `{name}`; it may use {ALLOWED}")


def _folded(ufunc: np.ufunc, *operands: Symbol) -> float:
    with np.errstate(all="ignore"):  # 1/0 of constants is infinite, as it is of arrays
        return float(ufunc(*(operand.node.value for operand in operands)))


def _simplified(op: str, a: Symbol, b: Symbol) -> Symbol | None:
    """x+0, x-0, x*1, x/1 are x and x*0 is 0 (a zero that stands in a cell's source means `no such path`)."""
    left = a.node.value if a.node.op == "const" else None
    right = b.node.value if b.node.op == "const" else None
    if op == "mul" and 0 in (left, right):
        return a.graph.constant(0)
    if (op in ("add", "sub") and right == 0) or (op in ("mul", "div") and right == 1):
        return a
    if (op == "add" and left == 0) or (op == "mul" and left == 1):
        return b
    return None
