"""Cells drawn at random: a graph of operations, and its backward by reverse mode of this file's own."""

from typing import Any, NamedTuple

import numpy as np

import gpurnn
from gpurnn import exp, log, maximum, minimum, relu, sigmoid, sqrt, tanh, where

# Of a value `a` and a number `c`: the value y, and its gradient from that of y.
UNARY: dict[str, tuple[Any, Any]] = {
    "tanh": (lambda a, c: tanh(a), lambda a, c, y, d: d * (1 - y * y)),
    "sigmoid": (lambda a, c: sigmoid(a), lambda a, c, y, d: d * y * (1 - y)),
    "exp": (lambda a, c: exp(minimum(a, 2)), lambda a, c, y, d: where(a < 2, d * y, 0)),
    "log": (lambda a, c: log(1 + a * a), lambda a, c, y, d: 2 * d * a / (1 + a * a)),
    "sqrt": (lambda a, c: sqrt(1 + a * a), lambda a, c, y, d: d * a / y),
    "abs": (lambda a, c: gpurnn.abs(a), lambda a, c, y, d: where(a > 0, d, -d)),
    "relu": (lambda a, c: relu(a), lambda a, c, y, d: where(a > 0, d, 0)),
    "negative": (lambda a, c: -a, lambda a, c, y, d: -d),
    "square": (lambda a, c: tanh(a) ** 2, lambda a, c, y, d: 2 * d * tanh(a) * (1 - tanh(a) ** 2)),
    "cube": (lambda a, c: sigmoid(a) ** 3, lambda a, c, y, d: 3 * d * y * (1 - sigmoid(a))),
    "plus": (lambda a, c: a + c, lambda a, c, y, d: d),
    "times": (lambda a, c: a * c, lambda a, c, y, d: d * c),
    "from": (lambda a, c: c - a, lambda a, c, y, d: -d),
    "over": (lambda a, c: a / (abs(c) + 0.5), lambda a, c, y, d: d / (abs(c) + 0.5)),
    "reciprocal": (lambda a, c: c / (2 + a * a), lambda a, c, y, d: -2 * c * d * a / ((2 + a * a) * (2 + a * a))),
    "at least": (lambda a, c: maximum(a, c), lambda a, c, y, d: where(a > c, d, 0)),
    "at most": (lambda a, c: minimum(c, a), lambda a, c, y, d: where(a < c, d, 0)),
}
# Of two values: y, and the gradients of both.
BINARY: dict[str, tuple[Any, Any]] = {
    "add": (lambda a, b: a + b, lambda a, b, d: (d, d)),
    "sub": (lambda a, b: a - b, lambda a, b, d: (d, -d)),
    "mul": (lambda a, b: a * b, lambda a, b, d: (d * b, d * a)),
    "div": (
        lambda a, b: a / (1.5 + b * b),
        lambda a, b, d: (d / (1.5 + b * b), -2 * d * a * b / ((1.5 + b * b) * (1.5 + b * b))),
    ),
    "maximum": (maximum, lambda a, b, d: (where(a > b, d, 0), where(a > b, 0, d))),
    "minimum": (minimum, lambda a, b, d: (where(a < b, d, 0), where(a < b, 0, d))),
}
# Of two values that are compared, and two of which one is taken.
CHOICES: dict[str, Any] = {"less": lambda a, b: a < b, "at least as large": lambda a, b: a >= b}


class Node(NamedTuple):
    """An operation on earlier nodes; for a leaf `args` is its kind and number."""

    op: str
    args: tuple
    number: float = 0.0

    def value(self, v: list) -> Any:
        a = [v[i] for i in self.args]
        if self.op in UNARY:
            return UNARY[self.op][0](a[0], self.number)
        if self.op in BINARY:
            return BINARY[self.op][0](*a)
        return where(CHOICES[self.op](a[0], a[1]), a[2], a[3])

    def back(self, v: list, y: Any, d: Any) -> list[tuple[int, Any]]:
        """(node, gradient) for each that has one."""
        a = [v[i] for i in self.args]
        if self.op in UNARY:
            return [(self.args[0], UNARY[self.op][1](a[0], self.number, y, d))]
        if self.op in BINARY:
            return list(zip(self.args, BINARY[self.op][1](*a, d), strict=True))
        chosen = CHOICES[self.op](a[0], a[1])
        return [(self.args[2], where(chosen, d, 0)), (self.args[3], where(chosen, 0, d))]


def random_cell(rng: np.random.Generator) -> gpurnn.Cell:
    """1 to 5 gates, 1 to 4 states, 0 to 3 parameters, some of them unused; up to 24 operations."""
    gates, states, count = int(rng.integers(1, 6)), int(rng.integers(1, 5)), int(rng.integers(0, 4))
    joint = [bool(rng.integers(2)) for _ in range(gates)]
    leaves = [leaf for g in range(gates) for leaf in ([("sum", g)] if joint[g] else [("x", g), ("r", g)])]
    leaves += [("state", s) for s in range(states)] + [("param", p) for p in range(count)]
    nodes = [Node("leaf", leaf) for leaf in leaves]
    known = [i for i in range(len(leaves)) if rng.random() < 0.9] or [0]
    for _ in range(rng.integers(2, 25)):
        table = UNARY if rng.random() < 0.5 else BINARY if rng.random() < 0.8 else CHOICES
        args = tuple(int(i) for i in rng.choice(known, {id(UNARY): 1, id(BINARY): 2}.get(id(table), 4)))
        nodes.append(Node(str(rng.choice(list(table))), args, float(np.round(rng.normal(), 2))))
        known.append(len(nodes) - 1)
    ends = [_end(rng, nodes, leaves, known, s) for s in range(states)]
    if rng.random() < 0.15:
        ends[-1] = ends[0]
    return _cell(nodes, leaves, ends, [i for i in range(len(leaves), len(nodes)) if rng.random() < 0.25], joint, count)


def _end(rng: np.random.Generator, nodes: list[Node], leaves: list, known: list[int], state: int) -> int:
    """The node of a next state: bounded, bounded beside a part of the old one, or an old one as it is."""
    if rng.random() < 0.2:
        return leaves.index(("state", int(rng.integers(sum(kind == "state" for kind, _ in leaves)))))
    nodes.append(Node(str(rng.choice(["tanh", "sigmoid"])), (int(rng.choice(known[-6:])),)))
    if rng.random() < 0.3:
        bounded = len(nodes) - 1
        nodes.append(Node("times", (leaves.index(("state", state)),), 0.5))
        nodes.append(Node("add", (bounded, len(nodes) - 1)))
    return len(nodes) - 1


def _cell(
    nodes: list[Node], leaves: list, ends: list[int], extra: list[int], joint: list[bool], count: int
) -> gpurnn.Cell:
    """extra: operations that forward saves; backward computes the others again."""

    def forward(x, r, state, params):
        given = {"x": x, "r": r, "state": state, "param": params}
        values = [x[g] + r[g] if kind == "sum" else given[kind][g] for kind, g in leaves]
        for node in nodes[len(leaves) :]:
            values.append(node.value(values))
        kept = [values[i] for i, (kind, _) in enumerate(leaves) if kind in ("sum", "x", "r")]
        return tuple(values[i] for i in ends), (*kept, *(values[i] for i in extra), 3.0, state[0], values[ends[0]])

    def backward(dnext, saved, state, next_state, params):
        seen, given = iter(saved), {"state": state, "param": params}
        values = [given[kind][k] if kind in given else next(seen) for kind, k in leaves]
        values += [None] * (len(nodes) - len(leaves))
        for i in extra:
            values[i] = next(seen)
        for s, i in enumerate(ends):
            values[i] = next_state[s] if i >= len(leaves) else values[i]
        for i in range(len(leaves), len(nodes)):
            values[i] = nodes[i].value(values) if values[i] is None else values[i]
        gradients: dict[int, Any] = {}
        for s, i in enumerate(ends):
            gradients[i] = gradients.get(i, 0) + dnext[s]
        for i in reversed(range(len(leaves), len(nodes))):
            for j, gradient in nodes[i].back(values, values[i], gradients[i]) if i in gradients else ():
                gradients[j] = gradients.get(j, 0) + gradient
        of = {leaf: gradients.get(i, 0) for i, leaf in enumerate(leaves)}
        dx, dr = (tuple(of["sum" if joint[g] else way, g] for g in range(len(joint))) for way in "xr")
        return dx, dr, tuple(of["state", s] for s in range(len(state))), tuple(of["param", p] for p in range(count))

    names = tuple(f"q{p}" for p in range(count))
    return gpurnn.Cell("drawn", len(joint), len(ends), forward, backward, names)
