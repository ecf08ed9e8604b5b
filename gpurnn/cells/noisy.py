"""A cell made from a cell: with zoneout, recurrent dropout, and noise on the pre-activations.

    zoneout            s_t keeps, unit by unit, the value of s_{t-1} with probability z (Krueger et al. 2017): of an LSTM, h
                       and c each by numbers of its own, h_t being made of the new c_t as ever
    recurrent dropout  what the cell would add to its memory is 0 with probability p, else divided by 1-p: g of an LSTM,
                       n of a GRU (Semeniuta et al. 2016); nothing of the memory itself is dropped
    noise              a normal deviate, times a standard deviation, is added to each gate before its nonlinearity

Without training each random number is its mean: a zoned-out state becomes z s_{t-1} + (1-z) s_t, nothing is dropped and
nothing added.
"""

from collections.abc import Mapping
from typing import Any, cast

from gpurnn.arguments import at_least_0, probability
from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import bernoulli, normal
from gpurnn.cells.trace import ON_ARRAYS


def noisy(cell: Cell, *, zoneout: Any = 0.0, recurrent_dropout: float = 0.0, noise: float = 0.0) -> Cell:
    """`cell` with these; `cell` itself where all are 0.

    zoneout            a probability in [0, 1) for all states, a tuple of one for each, or a dict by their names: {"c": 0.5}.
    recurrent_dropout  a probability in [0, 1), for cells that mark what they add to their memory (`cells.candidate`).
    noise              a standard deviation.
    Raises ValueError for other values, or where the cell marks nothing to drop.
    """
    rates = _rates(cell, zoneout)
    p, noise = probability("recurrent_dropout", recurrent_dropout), at_least_0("noise", noise)
    if p and not cell.trace.forward.candidates:
        raise ValueError(
            f"recurrent_dropout: expected 0 for {cell.name}, which does not mark what it adds to its memory "
            f"(gpurnn.cells.candidate), got {p}"
        )
    if p and cell.backward is not None:
        raise ValueError(f"recurrent_dropout: expected 0 for {cell.name}, whose backward is by hand, got {p}")
    given = {"zoneout": rates if any(rates) else 0, "recurrent_dropout": p, "noise": noise}
    told = [f"{name} {_short(value)}" for name, value in given.items() if value]
    if not told:
        return cell
    made = Noisy(cell, rates, p, noise)
    backward = None if cell.backward is None else made.backward
    name = f"{cell.name} with {', '.join(told)}"
    return Cell(name, cell.gates, cell.states, made, backward, cell.params, cell.init)


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return f"{value[0]:g}" if len(set(value)) == 1 else "/".join(f"{part:g}" for part in value)
    return f"{value:g}"


def _rates(cell: Cell, given: Any) -> tuple[float, ...]:
    """Zoneout's probability for each state."""
    names = cell.state_names
    if isinstance(given, Mapping):
        unknown = [name for name in given if name not in names]
        if unknown:
            raise ValueError(f"zoneout: expected states of {cell.name} among {', '.join(names)}, got {unknown[0]!r}")
        given = tuple(given.get(name, 0.0) for name in names)
    if not isinstance(given, tuple | list):
        return (probability("zoneout", given),) * len(names)
    if len(given) != len(names):
        raise ValueError(f"zoneout: expected one number, or one for each of {', '.join(names)}, got {given!r:.80}")
    return tuple(probability(f"zoneout of {name}", rate) for name, rate in zip(names, given, strict=True))


class Noisy:
    """The forward of such a cell, and its backward where that of the cell within is by hand."""

    def __init__(self, cell: Cell, zoneout: tuple[float, ...], recurrent_dropout: float, noise: float):
        self.cell, self.zoneout, self.recurrent_dropout, self.noise = cell, zoneout, recurrent_dropout, noise

    def __call__(self, x: tuple, r: tuple, state: tuple, params: tuple) -> Any:
        trace = self.cell.trace
        wanted = [symbol.index for symbol in (*trace.next_state, *trace.saved)]
        values = self._replayed(wanted, {"x": x, "r": r, "state": state, "param": params})
        inner, saved = values[: self.cell.states], values[self.cell.states :]
        keeps = [bernoulli(rate) for rate in self.zoneout]
        after = tuple(m * old + (1 - m) * new for m, old, new in zip(keeps, state, inner, strict=True))
        return after if self.cell.backward is None else (after, (*keeps, *inner, *saved))

    def backward(self, dnext: tuple, saved: tuple, state: tuple, next_state: tuple, params: tuple) -> tuple:
        S = self.cell.states
        keeps, inner, own = saved[:S], saved[S : 2 * S], saved[2 * S :]
        passed = tuple((1 - m) * d for m, d in zip(keeps, dnext, strict=True))
        assert self.cell.backward is not None
        dx, dr, dstate, dparams = self.cell.backward(passed, own, state, inner, params)
        return dx, dr, tuple(d + m * by for d, m, by in zip(dstate, keeps, dnext, strict=True)), dparams

    def _replayed(self, wanted: list[int], inputs: dict[str, tuple]) -> list[Any]:
        """The nodes `wanted` of the cell's own graph, with noise where x comes in and units of candidates dropped.

        Noise is added behind x + r where the cell reads only that sum, so that it stays one value.
        """
        trace, forward = self.cell.trace, self.cell.trace.forward
        noises = [self.noise * normal() if self.noise else 0.0 for _ in inputs["x"]]
        sums = {frozenset((x.index, r.index)): g for g, (x, r) in enumerate(zip(trace.x, trace.r, strict=True))}
        graph, values = inputs["x"][0].graph, cast(dict[int, Any], {})
        for index in sorted(forward.reachable(wanted)):
            op, args, own = forward.nodes[index]
            if op == "input":
                kind, k = own
                value = inputs[kind][k] + (noises[k] if kind == "x" else 0)
            elif op == "const":
                value = graph.constant(own)
            elif op == "random":
                value = graph.random(own.kind, own.per, own.p)
            elif op == "add" and frozenset(args) in sums:
                g = sums[frozenset(args)]
                value = inputs["x"][g] + inputs["r"][g] + noises[g]
            else:
                value = getattr(ON_ARRAYS, op)(*(values[a] for a in args))
            if self.recurrent_dropout and index in forward.candidates:
                stays = 1 - self.recurrent_dropout
                value = value * (bernoulli(stays) * (1 / stays))
            values[index] = value
        return [values[index] for index in wanted]
