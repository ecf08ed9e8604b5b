"""Why a gradient vanishes or explodes: what one layer's units and gates did over a sequence."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.cells import GRU_CELL, LSTM_CELL
from gpurnn.diagnose.spectrum import steepest_slope
from gpurnn.executors.numpy_loop import Tape

GATES = {LSTM_CELL: {"i": 0, "f": 1, "o": 3}, GRU_CELL: {"r": 0, "z": 1}}
CANDIDATE = 2  # the gate of both that is none
SHUT, FLAT = 0.05, 0.1


@dataclass(frozen=True)
class GateValues:
    """Of a sigmoid gate over steps, rows and units: the mean, and the shares below 0.05 and above 0.95."""

    mean: float
    closed: float
    open: float


@dataclass(frozen=True)
class Evidence:
    """What one layer's units did.

    slope      mean |f'| of a vanilla RNN's units; None for other cells.
    saturated  a vanilla RNN: the share of units with |f'| below a tenth of its maximum; LSTM and GRU: of candidates (g, n)
               with |tanh| above 0.95; None for a cell of one's own.
    gates      {"i": GateValues, "f": ..., "o": ...} for LSTM, r and z for GRU, else none.
    carry      {"h": ..., "c": ...}: the part of itself that each state keeps over a step by the direct path alone, past
               weight_hh: an LSTM's forget gate for c, a GRU's update gate for h, 0 for a vanilla RNN.  The mean over
               steps, rows and units.
    kept       the same over `span` steps, the last ones: of each unit the product, then the mean over rows and units.
    """

    slope: float | None
    saturated: float | None
    gates: dict[str, GateValues]
    carry: dict[str, float]
    kept: dict[str, float]
    span: int


def evidence(tape: Tape, reach: int) -> Evidence:
    """Over all steps of `tape`, `kept` over the last `reach` that were run.  Costs S elementwise backward products a step."""
    cell = tape.job.cell
    shipped = cell in (LSTM_CELL, GRU_CELL)
    steepest = steepest_slope(cell)
    slope = saturated = None
    if steepest is not None:
        slopes = np.stack([_slope(tape, step) for step in tape.steps])
        slope, saturated = float(slopes.mean()), float((slopes < FLAT * steepest).mean())
    elif shipped:
        saturated = float((abs(_saved(tape, CANDIDATE)) > 1 - SHUT).mean())
    gates = {name: _gate(_saved(tape, gate)) for name, gate in GATES.get(cell, {}).items()}
    carry, kept = {}, {}
    span = min(reach, len(tape.steps))
    for s, name in enumerate(cell.state_names):
        factors = np.stack([_carried(tape, step, s) for step in tape.steps])
        carry[name] = float(factors.mean())
        kept[name] = float(abs(factors[-span:].prod(axis=0)).mean())
    return Evidence(slope, saturated, gates, carry, kept, span)


def _saved(tape: Tape, gate: int) -> np.ndarray:
    """A gate's values, which backward reads: of what forward kept, what follows from x[gate] and from no gate behind it."""
    graph, kept = tape.job.cell.trace.forward, [symbol.index for symbol in tape.job.cell.trace.saved]
    names = [[graph.nodes[i].value for i in graph.reachable([k]) if graph.nodes[i].op == "input"] for k in kept]
    (place,) = [k for k, of in enumerate(names) if max((n for kind, n in of if kind == "x"), default=-1) == gate]
    return np.stack([backend.to_numpy(saved[place]) for _, _, saved, _, _ in tape.steps])


def _gate(values: np.ndarray) -> GateValues:
    return GateValues(float(values.mean()), float((values < SHUT).mean()), float((values > 1 - SHUT).mean()))


def _slope(tape: Tape, step: tuple) -> np.ndarray:
    """|f'|, (N, H)."""
    _, dr, _, _ = _elementwise(tape, step, 0)
    return abs(backend.to_numpy(dr[0]))


def _carried(tape: Tape, step: tuple, s: int) -> np.ndarray:
    """d(next state s)/d(state s) by the direct path, (N, H)."""
    _, _, direct, _ = _elementwise(tape, step, s)
    shape, value = step[3][s].shape, direct[s]
    value = backend.to_numpy(value) if hasattr(value, "shape") else value  # a cell may answer with a number
    return np.broadcast_to(np.asarray(value, np.float64), shape)


def _elementwise(tape: Tape, step: tuple, s: int) -> Any:
    """The cell's own backward for a gradient of 1 at every unit of state s."""
    _, _, saved, before, after = step
    xp = backend.xp
    dnext = tuple((xp.ones_like if k == s else xp.zeros_like)(part) for k, part in enumerate(after))
    return tape.derivative(dnext, saved, before, after, tape.job.weights.params)
