"""A cell as it was traced once: its two graphs, and the memory layout that follows from them."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurnn.cells.derive import SLOT, UNITWISE_SLOT, derive
from gpurnn.cells.trace import ON_ARRAYS, Graph, Node, Symbol, recording

if TYPE_CHECKING:
    from gpurnn.cells.cell import Cell


class Trace:
    """A cell's two graphs, and the memory layout that follows from them.

    The engine keeps one row of H-wide slots for each (step, batch row).  Where forward uses x[g] and r[g] only as the
    sum x[g] + r[g], and backward gives both the same gradient, gate g is *joint*: the recurrent product accumulates
    onto the input projection, in one slot.  Other gates are *split*: r has a slot of its own.  The slots are

        r of the split gates | joint gates | x of the split gates

    so that the recurrent product fills the first G slots and the input projection the G slots from `len(split)` on,
    each in one GEMM.  Forward overwrites the slots with what backward needs to see (`kept`), backward overwrites that
    with the gradients dr and dx, in the same places: a training step moves one buffer and not three.  A cell without r
    has the slots of x alone, and no recurrent product.

    Traces are equal where their texts are: caches of compiled code are keyed by them.
    """

    def __init__(self, cell: "Cell"):
        self.cell = cell
        self._trace_forward()
        self._derive_backward() if cell.backward is None else self._trace_backward(cell.backward)
        self._lay_out()
        self.text = self._text()

    def _trace_forward(self) -> None:
        cell, graph = self.cell, Graph()
        self.forward = graph
        self.x = [graph.input("x", g) for g in range(cell.gates)]
        self.r = [graph.input("r", g) for g in range(cell.gates)]
        self.state = [graph.input("state", s) for s in range(cell.states)]
        self.params = [graph.input("param", p) for p in range(len(cell.params))]
        with _naming(cell, "forward"), recording(graph):
            result = cell.forward(tuple(self.x), tuple(self.r), tuple(self.state), tuple(self.params))
        saved: Any = ()
        if cell.backward is None:
            next_state = _next_state_alone(cell, result)
        else:
            next_state, saved = _parts(cell, "forward", result, ("next_state", "saved"))
        self.next_state = _values(cell, "forward", "next_state", next_state, cell.states, graph)
        self.saved = _values(cell, "forward", "saved", saved, None, graph)

    def _derive_backward(self) -> None:
        known: dict[int, tuple] = {}
        for kind, symbols in (("state", self.state), ("param", self.params), ("next_state", self.next_state)):
            for number, symbol in enumerate(symbols):
                known.setdefault(symbol.index, (kind, number))
        inputs = (self.x, self.r, self.state, self.params)
        wanted = [symbol.index for symbols in inputs for symbol in symbols]
        ends = [symbol.index for symbol in self.next_state]
        slot = SLOT if self.forward.reachable(ends) & {r.index for r in self.r} else UNITWISE_SLOT
        self.backward, gradients, kept = derive(self.forward, ends, wanted, known, slot)
        self.saved = [Symbol(self.forward, index) for index in kept]
        each = iter(gradients)
        self.dx, self.dr, self.dstate, self.dparams = (list(itertools.islice(each, len(own))) for own in inputs)

    def _trace_backward(self, by_hand: Callable) -> None:
        """Values in `saved` that are a constant, a state or a next state by another name are not kept twice."""
        cell, graph = self.cell, Graph()
        self.backward = graph
        state = [graph.input("state", s) for s in range(cell.states)]
        next_state = [graph.input("next_state", s) for s in range(cell.states)]
        known = {symbol.index: state[s] for s, symbol in enumerate(self.state)}
        known |= {symbol.index: next_state[s] for s, symbol in enumerate(self.next_state)}
        known |= {s.index: graph.constant(s.node.value) for s in self.saved if s.node.op == "const"}
        known |= {p.index: graph.input("param", i) for i, p in enumerate(self.params)}
        known |= {s.index: graph.again(s.node.value) for s in self.saved if s.node.op == "random"}
        saved = [known[s.index] if s.index in known else graph.input("saved", s.index) for s in self.saved]
        dnext = tuple(graph.input("dnext", s) for s in range(cell.states))
        params = tuple(graph.input("param", p) for p in range(len(cell.params)))
        with _naming(cell, "backward"):
            result = by_hand(dnext, tuple(saved), tuple(state), tuple(next_state), params)
        dx, dr, dstate, dparams = _parts(cell, "backward", result, ("dx", "dr", "dstate", "dparams"))
        self.dx = _values(cell, "backward", "dx", dx, cell.gates, graph)
        self.dr = _values(cell, "backward", "dr", dr, cell.gates, graph)
        self.dstate = _values(cell, "backward", "dstate", dstate, cell.states, graph)
        self.dparams = _values(cell, "backward", "dparams", dparams, len(cell.params), graph)

    def _lay_out(self) -> None:
        needed = self.backward.reachable(s.index for s in self._gradients)
        reads = [self.backward.nodes[i].value for i in sorted(needed) if self.backward.nodes[i].op == "input"]
        self.kept = tuple(name[1] for name in reads if name[0] == "saved")
        gates = range(self.cell.gates)
        reached = self.forward.reachable(self.outputs)
        self.randoms = {*self.forward.randoms(self.outputs), *self.backward.randoms(needed)}
        self.recurrent = any(r.index in reached for r in self.r) or any(
            dr.node != Node("const", (), 0.0) for dr in self.dr
        )
        joint = tuple(g for g in gates if self._meets_only_in_a_sum(g) and self.dx[g].index == self.dr[g].index)
        self.split = tuple(g for g in gates if g not in joint and self.recurrent)
        joint = tuple(g for g in gates if g not in self.split)
        self.r_order = (*self.split, *joint)
        self.x_order = (*joint, *self.split)
        self.x_start = len(self.split)
        self.slots = max(len(self.split) + self.cell.gates, len(self.kept))

    def __eq__(self, other: object) -> bool:
        return self.text == other.text if isinstance(other, Trace) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.text)

    def run_forward(self, x: tuple, r: tuple, state: tuple, params: tuple, random: Any = None) -> tuple[tuple, tuple]:
        """What the cell's forward was when it was traced, on arrays."""
        given = {"x": x, "r": r, "state": state, "param": params, "random": random}
        values = self.forward.run([s.index for s in (*self.next_state, *self.saved)], given)
        return tuple(values[: self.cell.states]), tuple(values[self.cell.states :])

    def run_mean(self, x: tuple, r: tuple, state: tuple, params: tuple) -> tuple:
        """The next states of symbols, each random number replaced by its mean."""
        given = {"x": x, "r": r, "state": state, "param": params}

        def value(index: int) -> Any:
            op, _, name = self.forward.nodes[index]
            if op == "random":
                return x[0].graph.constant(name.mean)
            return given[name[0]][name[1]] if op == "input" else None

        operations = SimpleNamespace(**vars(ON_ARRAYS) | {"constant": x[0].graph.constant})
        return tuple(self.forward.evaluate(operations, [s.index for s in self.next_state], value))

    def run_backward(
        self, dnext: tuple, saved: tuple, state: tuple, next_state: tuple, params: tuple, random: Any = None
    ) -> tuple:
        """What the cell's backward was when it was traced, on arrays."""
        seen = {symbol.index: value for symbol, value in zip(self.saved, saved, strict=True)}
        given = {
            "dnext": dnext,
            "saved": seen,
            "state": state,
            "next_state": next_state,
            "param": params,
            "random": random,
        }
        with np.errstate(all="ignore"):  # of values that a `where` does not take
            values = iter(self.backward.run([s.index for s in self._gradients], given))
        return tuple(tuple(itertools.islice(values, len(p))) for p in (self.dx, self.dr, self.dstate, self.dparams))

    @property
    def _gradients(self) -> list[Symbol]:
        return [*self.dx, *self.dr, *self.dstate, *self.dparams]

    @property
    def given(self) -> list[list[int]]:
        """Of each slot in turn, what it gives forward: the nodes of that value."""

        def gate(g: int) -> list[int]:
            if not self.recurrent:
                return [self.x[g].index]
            return [self.r[g].index] if g in self.split else self.forward.users(self.x[g].index)

        return [*map(gate, self.r_order), *([self.x[g].index] for g in self.split)]

    @property
    def written(self) -> list[int]:
        """Of each slot in turn, what backward writes there: the node of that gradient."""
        first = self.dr if self.recurrent else self.dx
        return [*(first[g].index for g in self.r_order), *(self.dx[g].index for g in self.split)]

    @property
    def outputs(self) -> list[int]:
        """What forward computes: the nodes of the next states, then those that backward reads."""
        return [*(s.index for s in self.next_state), *self.kept]

    def _meets_only_in_a_sum(self, gate: int) -> bool:
        x, r = self.x[gate].index, self.r[gate].index
        users = (set(self.forward.users(x)) | set(self.forward.users(r))) & self.forward.reachable(self.outputs)
        sums = all(self.forward.nodes[u].op == "add" and set(self.forward.nodes[u].args) == {x, r} for u in users)
        return sums and not {x, r} & set(self.outputs)

    def _text(self) -> str:
        """Both graphs as text: the mathematics of the cell, and the key of the compile caches.

        It decides the memory layout as well: nothing that the graphs do not need has a say in that.
        """
        cell = self.cell
        forward = self.forward.text(self.outputs)
        names = {("saved", index): ("saved", k) for k, index in enumerate(self.kept)}
        backward = self.backward.text([s.index for s in self._gradients], names)
        counts = f"gates {cell.gates} states {cell.states} params {len(cell.params)}"
        return f"{counts}\nforward\n{forward}\nbackward\n{backward}\n"


@contextmanager
def _naming(cell: "Cell", function: str) -> Iterator[None]:
    """Whatever is raised within says which function of which cell it came from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in {function} of cell {cell.name}")
        raise


def _next_state_alone(cell: "Cell", result: Any) -> Any:
    """What a forward without a backward returned; ValueError where it is what one with a backward returns."""
    if isinstance(result, tuple) and any(isinstance(part, tuple | list) for part in result):
        came = f"({', '.join(_kind(part) for part in result)})"
        raise ValueError(
            f"cell {cell.name}: without a backward, forward returns next_state alone, a tuple of {cell.states} values, "
            f"got {came}; what backward needs of forward is found by itself"
        )
    return result


def _kind(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"a {type(value).__name__} of {len(value)}"
    return "a value" if isinstance(value, Symbol) else f"{type(value).__name__}"


def _parts(cell: "Cell", function: str, result: Any, names: tuple[str, ...]) -> tuple:
    if not isinstance(result, tuple) or len(result) != len(names):
        hint = "; without a backward, next_state alone" if function == "forward" else ""
        raise ValueError(f"cell {cell.name}: {function} returns {', '.join(names)}, got {_kind(result)}{hint}")
    return result


def _values(cell: "Cell", function: str, what: str, given: Any, count: int | None, graph: Graph) -> list[Symbol]:
    if not isinstance(given, tuple | list) or count not in (None, len(given)):
        wanted = "values" if count is None else f"{count} values" if count != 1 else "1 value, such as (h,)"
        raise ValueError(f"cell {cell.name}: {function} returns {what} as a tuple of {wanted}, got {_kind(given)}")
    with _naming(cell, f"{what}, as returned by {function}"):
        return [graph.lift(value) for value in given]
