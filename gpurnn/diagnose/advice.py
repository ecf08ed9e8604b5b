"""Sentences: why the gradient of a layer changes as it does, and what would help."""

import math

from gpurnn.cells import GRU_CELL, LSTM_CELL, RNN_CELLS, Cell
from gpurnn.diagnose.evidence import Evidence
from gpurnn.diagnose.spectrum import Spectrum

MANY = 0.2  # share of saturated units that is worth a word
NEAR_1 = 0.1  # spectral radii this far from 1 are
MOST_BIAS = 3.0


def reasons(cell: Cell, spectrum: Spectrum | None, seen: Evidence, exponent: float) -> tuple[str, ...]:
    """What was measured, in sentences."""
    found = [f"its own Jacobians give x {math.exp(exponent):.3g} per step (leading Lyapunov exponent {exponent:.3f})"]
    for name, word in (("f", "forget"), ("z", "update")):
        if name in seen.gates:
            gate = seen.gates[name]
            shares = f"{_percent(gate.open)} above 0.95 and {_percent(gate.closed)} below 0.05"
            found.append(f"the {word} gate is {gate.mean:.3f} on average, {shares}")
    if any(seen.carry.values()):
        kept = ", ".join(f"{seen.kept[name]:.2g} of {name}" for name, part in seen.carry.items() if part)
        way = "by the direct path, the only one," if spectrum is None else "past weight_hh, by the direct path alone,"
        found.append(f"{way} {seen.span} steps keep {kept} (mean over units)")
    if spectrum is None:
        return tuple(found)
    if spectrum.bound is not None:
        found.append(
            f"weight_hh has spectral radius {spectrum.radius[0]:.3f} and largest singular value "
            f"{spectrum.sigma_max[0]:.3f}; times max|f'|: no step can multiply by more than {spectrum.bound:.3f}"
        )
        found.append(f"|f'| is {seen.slope:.3f} on average, and {_percent(seen.saturated)} of the units are saturated")
    else:
        radii = ", ".join(f"{radius:.2f}" for radius in spectrum.radius)
        found.append(f"weight_hh has spectral radius {radii}" + (" (gate by gate)" if cell.gates > 1 else ""))
        if seen.saturated is not None:
            found.append(f"{_percent(seen.saturated)} of the candidate values are saturated")
    return tuple(found)


def advice(
    cell: Cell,
    kind: str,
    horizon: float,
    reach: int,
    spectrum: Spectrum | None,
    seen: Evidence,
    threshold: float | None,
) -> tuple[str, ...]:
    """What to do about it, the most effective first."""
    if kind == "holds":
        return (f"nothing over these {reach} steps", *_clipping(threshold, "against rare peaks, "))
    limit = max(1, math.ceil(horizon))
    if kind == "explodes":
        return (
            *(
                _clipping(threshold)
                or ("clip the gradient's norm (gpurnn.clip_grad_norm), at what is usual in training",)
            ),
            *_softer(cell, spectrum),
            f"until then, truncate: k2 = {limit} steps stay below 100 times",
        )
    return (
        *_longer(cell, reach, spectrum, seen),
        f"as it is, each step beyond k2 = {limit} costs time and adds under 1%",
    )


def _clipping(threshold: float | None, when: str = "") -> tuple[str, ...]:
    """Nothing where no norms are known."""
    return (
        () if threshold is None else (f"{when}clip the gradient's norm at {threshold:.2g} (one step in ten is above)",)
    )


def _softer(cell: Cell, spectrum: Spectrum | None) -> list[str]:
    found = []
    if spectrum is not None and max(spectrum.radius.max(), spectrum.sigma_max.max()) > 1 + NEAR_1:
        found.append(
            'start weight_hh orthogonal (init={"weight_hh": "orthogonal"}) or scale it down: no step grows then'
        )
    if cell in (RNN_CELLS["relu"], RNN_CELLS["identity"]):
        found.append("tanh in place of it: its slope falls where units grow")
    return found


def _longer(cell: Cell, reach: int, spectrum: Spectrum | None, seen: Evidence) -> list[str]:
    if cell in (LSTM_CELL, GRU_CELL):
        place = "LSTM(forget_bias={:.1f})" if cell == LSTM_CELL else "GRU(update_bias={:.1f})"
        return [f"start with gates that stay open longer: {place.format(_gate_bias(reach))}"]
    if spectrum is None or cell not in RNN_CELLS.values():
        return ["let a state keep more of itself: a direct path with a factor near 1, as the LSTM's c has"]
    found = [f"an LSTM, or a GRU, whose states keep themselves: LSTM(forget_bias={_gate_bias(reach):.1f})"]
    if spectrum.radius.max() < 1 - NEAR_1:
        found.append('start weight_hh orthogonal (init={"weight_hh": "orthogonal"}): every singular value is 1 then')
    if cell == RNN_CELLS["sigmoid"]:
        found.append("tanh in place of sigmoid, whose slope is at most 0.25")
    if seen.saturated is not None and seen.saturated > MANY:
        found.append("smaller weights or inputs: saturated units pass nothing back")
    return found


def _gate_bias(reach: int) -> float:
    """That of a gate of 1 - 1/reach (Tallec & Ollivier 2018), but at most 3: gates that begin open wider hardly learn."""
    return min(MOST_BIAS, math.log(max(2, reach) - 1))


def _percent(share: float | None) -> str:
    return "?" if share is None else f"{100 * share:.0f}%"
