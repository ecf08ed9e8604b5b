"""A cell's backward from its forward: reverse mode over the traced graph, and a choice of what to keep.

Each node's rule says what its arguments' gradients are, in terms of its own gradient and of values of forward.  Of these
backward has states, next states, parameters and numbers for nothing.  Others are kept, each in a slot that is written and
read, or are computed again from what there is: the cheapest choice is a minimum cut.

At a kink the gradient is PyTorch's.  abs has 0 at 0.  Of maximum and minimum each side has half where both are equal; beside
a number it has 0 there, as relu at 0.  sqrt has 0 at 0, where PyTorch's is infinite.  `where` passes it to the value that it
took, and nothing that the other one makes of its own, be it NaN, gets past the `where`: a gradient that is there on a
condition is chosen by it last, not first.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gpurnn.cells.trace import COMPARISONS, ON_ARRAYS, Graph, Node, Symbol

Guards = tuple[
    tuple[int, bool], ...
]  # conditions, and whether each must hold: elsewhere a gradient is 0, whatever it says

RULES: dict[str, Callable] = {  # (gradient, the node's value, its arguments' values) -> their gradients
    "add": lambda g, y, a, b: (g, g),
    "sub": lambda g, y, a, b: (g, _negative(g)),
    "mul": lambda g, y, a, b: (g * b, g * a),
    "div": lambda g, y, a, b: (g / b, _negative(g / b * y)),
    "neg": lambda g, y, a: (_negative(g),),
    "abs": lambda g, y, a: (np.where(a < 0, _negative(g), np.where(a > 0, g, 0)),),
    "exp": lambda g, y, a: (g * y,),
    "log": lambda g, y, a: (g / a,),
    "sqrt": lambda g, y, a: (np.where(y <= 0, 0, 0.5 * g / y),),
    "tanh": lambda g, y, a: (g * (1 - y * y),),
    "sigmoid": lambda g, y, a: (g * y * (1 - y),),
}

# What computing a value again costs, and keeping it, in additions of a vector.
PRICES = {"tanh": 8, "exp": 12, "log": 30, "div": 4, "sqrt": 4}
RANDOM_PRICES = {"bernoulli": 5, "normal": 40}  # four of a unit share ten rounds of Philox
SLOT = 10
UNITWISE_SLOT = 30  # where no recurrent product stands between the steps, memory is what takes the time


def derive(
    forward: Graph, outputs: Sequence[int], wanted: Sequence[int], free: Mapping[int, tuple], slot: float = SLOT
) -> tuple[Graph, list[Symbol], list[int]]:
    """The backward of a forward graph: its graph, the gradients of the nodes `wanted` in it, and the nodes to keep.

    outputs: the next states; input ("dnext", s) of the backward is the gradient of outputs[s].
    free: names of inputs of the backward that are values of forward.  A node i that is kept is its input ("saved", i).
    slot: the price of keeping a value.
    """
    reverse = Reverse(forward, outputs)
    gradients = [reverse.total(index) for index in wanted]
    reached = reverse.graph.reachable(g.index for g in gradients)
    names = [reverse.graph.nodes[i].value for i in reached if reverse.graph.nodes[i].op == "input"]
    kept = cheapest(forward.nodes, {number for kind, number in names if kind == "primal"}, free, slot)
    graph = Graph()
    values = {index: graph.input("saved", index) for index in kept}
    values |= {index: graph.input(*name) for index, name in free.items()}

    def source(node: Node) -> Symbol:
        kind, number = node.value
        return graph.input(kind, number) if kind == "dnext" else _copied(forward, [number], graph, values)[0]

    return graph, _copied(reverse.graph, [g.index for g in gradients], graph, {}, source), kept


def _copied(
    graph: Graph, outputs: Sequence[int], into: Graph, values: dict[int, Symbol], source: Callable | None = None
) -> list[Symbol]:
    """`outputs` in another graph, down to what is in `values` (and stays there), and to inputs, which `source` provides."""
    needed, stack = set(), list(outputs)
    while stack:
        index = stack.pop()
        if index not in needed and index not in values:
            needed.add(index)
            stack.extend(graph.nodes[index].args)
    for index in sorted(needed):
        node = graph.nodes[index]
        if node.op == "input" and source is not None:
            values[index] = source(node)
        elif node.op == "const":
            values[index] = into.constant(node.value)
        elif node.op == "random":
            values[index] = into.again(node.value)
        else:
            values[index] = getattr(ON_ARRAYS, node.op)(*(values[argument] for argument in node.args))
    return [values[index] for index in outputs]


class Reverse:
    """Gradients as expressions of ("dnext", s) and of values of forward, ("primal", node)."""

    def __init__(self, forward: Graph, outputs: Sequence[int]):
        self.forward, self.graph = forward, Graph()
        self.zero = self.graph.constant(0)
        self.parts: dict[
            int, dict[Guards, Symbol]
        ] = {}  # of each node's gradient, by the conditions that they stand under
        for s, index in enumerate(outputs):
            self._add(index, (), self.graph.input("dnext", s))
        for index in sorted(forward.reachable(outputs), reverse=True):
            if index in self.parts and forward.nodes[index].args:
                self._step(index)

    def total(self, index: int) -> Symbol:
        """The whole gradient of a node, on no condition."""
        parts = self.parts.setdefault(index, {})
        parts.setdefault((), self.zero)
        return self._settled(parts)[1]

    def _step(self, index: int) -> None:
        """Passes a node's gradient on to its arguments."""
        op, args, _ = self.forward.nodes[index]
        guards, g = self._settled(self.parts[index])
        logistic = argument_of_sigmoid(self.forward.nodes, index)
        if logistic is not None:
            op, args = "sigmoid", (logistic,)
        if op in ("maximum", "minimum", "where"):
            self._choice(op, index, args, guards, g)
            return
        for argument, value in zip(args, RULES[op](g, *map(self._primal, (index, *args))), strict=True):
            self._add(argument, guards, value)

    def _choice(self, op: str, index: int, args: tuple[int, ...], guards: Guards, g: Symbol) -> None:
        if op == "where":
            (op, compared, _), *args_ = self.forward.nodes[args[0]], *args[1:]
            condition = getattr(ON_ARRAYS, op)(*map(self._primal, compared)).index
            for argument, holds in zip(args_, (True, False), strict=True):
                self._add(argument, (*guards, (condition, holds)), g)
            return

        def beats(one: Symbol, other: Symbol) -> Symbol:
            return one > other if op == "maximum" else one < other

        for mine, its in (args, args[::-1]):
            here, there = self._primal(mine), self._primal(its)
            if there.node.op == "const":  # the result says as well who it was, and is kept more often
                self._add(mine, (*guards, (beats(self._primal(index), there).index, True)), g)
            else:
                shared: Any = np.where(beats(here, there), g, 0.5 * g)
                self._add(mine, (*guards, (beats(there, here).index, False)), shared)

    def _primal(self, index: int) -> Symbol:
        node = self.forward.nodes[index]
        return self.graph.constant(node.value) if node.op == "const" else self.graph.input("primal", index)

    def _add(self, index: int, guards: Guards, value: Symbol) -> None:
        if self.forward.nodes[index].op != "const":
            parts = self.parts.setdefault(index, {})
            parts[guards] = _sum(parts[guards], value) if guards in parts else value

    def _settled(self, parts: dict[Guards, Symbol]) -> tuple[Guards, Symbol]:
        """The sum of a gradient's parts, on the conditions that they have in common; `parts` is used up."""
        while len(parts) > 1:
            guards = max(parts, key=len)
            outer, (condition, holds) = guards[:-1], guards[-1]
            mine, its = parts.pop(guards), parts.pop((*outer, (condition, not holds)), self.zero)
            pair = (mine, its) if holds else (its, mine)
            chosen: Any = np.where(Symbol(self.graph, condition), *pair)
            parts[outer] = _sum(parts[outer], chosen) if outer in parts else chosen
        return next(iter(parts.items()))


def argument_of_sigmoid(nodes: Sequence[Node], index: int) -> int | None:
    """x where the node is 0.5 (1 + tanh(0.5 x)), as `functions.sigmoid` writes it."""

    def other(index: int | None, op: str, value: float) -> int | None:
        if index is not None and nodes[index].op == op:
            for number, rest in (nodes[index].args, nodes[index].args[::-1]):
                if nodes[number] == Node("const", (), value):
                    return rest
        return None

    inner = other(other(index, "mul", 0.5), "add", 1.0)
    return other(nodes[inner].args[0], "mul", 0.5) if inner is not None and nodes[inner].op == "tanh" else None


def _negative(a: Symbol) -> Symbol:
    return Symbol(a.graph, a.node.args[0]) if a.node.op == "neg" else -a


def _sum(a: Symbol, b: Symbol) -> Symbol:
    """a + b: a difference where one is a negative, and p (q + r) for p q + p r.

    That saves a product, and p (1 - q) is exact for q near 1, where p - p q is not.
    """
    a, b = (b, a) if a.node.op == "neg" else (a, b)
    minus = b.node.op == "neg"
    b = _negative(b) if minus else b
    for mine, q in _factors(a):
        for its, r in _factors(b):
            if mine == its:
                return Symbol(a.graph, mine) * (q - r if minus else q + r)
    return a - b if minus else a + b


def _factors(a: Symbol) -> list[tuple[int, Any]]:
    """The pairs of a node and what it is multiplied by that make `a`."""
    if a.node.op != "mul":
        return [(a.index, 1)]
    one, other = a.node.args
    return [(one, Symbol(a.graph, other)), (other, Symbol(a.graph, one)), (a.index, 1)]


def cheapest(nodes: Sequence[Node], needed: Iterable[int], free: Iterable[int], slot: float = SLOT) -> list[int]:
    """Which nodes to keep, so that backward has those `needed` and keeping and computing again costs least.

    A node that is there, by either way, costs a slot; computed again its price instead, and its arguments have to be
    there.  So everything that is chosen asks for other choices: what closes at the least cost is a minimum cut.
    """
    network: dict = {}

    def edge(a: object, b: object, capacity: float) -> None:
        network.setdefault(a, {})[b] = capacity
        network.setdefault(b, {}).setdefault(a, 0)

    given, seen, stack = set(free), set(), list(needed)
    for index in set(stack) - given:
        edge("source", ("there", index), np.inf)
    while stack:
        index = stack.pop()
        op, args, value = nodes[index]
        if index in seen or index in given or op == "const":
            continue
        seen.add(index)
        there, again = ("there", index), ("again", index)
        edge(there, "sink", slot)
        if op == "input":  # x and r are gone
            continue
        gain = slot - (RANDOM_PRICES[value.kind] if op == "random" else PRICES.get(op, 1))
        edge("source", again, max(gain, 0))
        edge(again, "sink", max(-gain, 0))
        edge(again, there, np.inf)
        if op in COMPARISONS:  # no number, so no slot holds it
            edge(there, again, np.inf)
        for argument in args:
            if argument not in given and nodes[argument].op != "const":
                edge(again, ("there", argument), np.inf)
        stack.extend(args)
    chosen = _source_side(network)
    return sorted(i for i in seen if ("there", i) in chosen and ("again", i) not in chosen)


def _source_side(network: dict) -> set:
    """The nodes on the source's side of the minimum cut that is nearest to it (Dinic 1970); `network` is used up."""
    while True:
        level, queue = {"source": 0}, deque(["source"])
        while queue:
            here = queue.popleft()
            for there, capacity in network.get(here, {}).items():
                if capacity > 0 and there not in level:
                    level[there] = level[here] + 1
                    queue.append(there)
        if "sink" not in level:
            return set(level)
        ahead = {node: [there for there in network[node] if level.get(there) == level[node] + 1] for node in level}
        path = ["source"]
        while path:
            here = path[-1]
            while ahead[here] and network[here][ahead[here][-1]] == 0:
                ahead[here].pop()
            if here == "sink":
                steps = list(itertools.pairwise(path))
                flow = min(network[a][b] for a, b in steps)
                for a, b in steps:
                    network[a][b] -= flow
                    network[b][a] += flow
                path = ["source"]
            elif ahead[here]:
                path.append(ahead[here][-1])
            else:
                path.pop()
                if path:
                    ahead[path[-1]].pop()
