"""A verdict on each layer: whether its gradient vanishes, holds or explodes, how fast, why, and what helps."""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import whole
from gpurnn.diagnose.advice import advice, reasons
from gpurnn.diagnose.evidence import Evidence, evidence
from gpurnn.diagnose.flow import Flow, factor_per_step, measured_flow, raise_where_flow_is_not_finite
from gpurnn.diagnose.jacobians import exponents_of
from gpurnn.diagnose.spectrum import recurrent_spectrum
from gpurnn.diagnose.subject import Loss, at_every_step, recurrent_part, run_steps, undisturbed

VANISHED, EXPLODED = 0.01, 100.0
WIDTH = 110  # of a line of text
CLIPPED = 0.1  # share of steps that a clip at `clip_threshold` would touch


@dataclass(frozen=True)
class Verdict:
    """What happens to the gradient of a loss on its way back through one layer.

    layer, cell     l0, l0_reverse, l1, ...; the cell's name.
    kind            "vanishes" or "explodes" where the horizon is within reach, else "holds".
    rate            the factor by which the norm of dL/dstate changes with every step back, a fit over the sequence.
    horizon         steps back from which on the norm is under 1%, or at which it first exceeds 100 times, what it is at the
                    loss; beyond the sequence it is extrapolated from the rate, inf where that is 1.
    reach           the steps back that count.
    lyapunov        the leading exponent of the layer's own Jacobians, in nats per step, the mean over rows.
    bound           max|f'| * sigma_max for a vanilla RNN, else None.
    radius, sigma_max  of weight_hh, the largest of its gates; None for a cell that has no such matrix.
    evidence        what units and gates did.
    clip_threshold  the 90th percentile of the gradient norms that were given, else None.
    reasons, advice sentences.
    """

    layer: str
    cell: str
    kind: str
    rate: float
    horizon: float
    reach: int
    lyapunov: float
    bound: float | None
    radius: float | None
    sigma_max: float | None
    evidence: Evidence
    clip_threshold: float | None
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    def to_mapping(self) -> dict[str, Any]:
        """Everything as dictionaries, lists, numbers and texts."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.layer} ({self.cell}): the gradient {self.kind}, {_pace(self)}"]
        for word, sentences in (("why", self.reasons), ("do", self.advice)):
            for k, sentence in enumerate(sentences):
                begin = f"  {word if k == 0 else '':4} - "
                lines += textwrap.wrap(sentence, WIDTH, initial_indent=begin, subsequent_indent=" " * len(begin))
        return "\n".join(lines)


def verdicts(
    model: Any,
    x: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    state: Any = None,
    reach: int | None = None,
    grad_norms: Sequence[float] | None = None,
) -> tuple[Verdict, ...]:
    """A verdict on each layer and direction, in the order l0, l0_reverse, l1, ...

    model, x, targets, loss, state: as for `gradient_flow`.  What is followed is the loss of the last step (in a reverse
    direction, of step 0), the norm over all states and rows together.
    reach: how many steps back the task needs; None: as many as the sequence has.
    grad_norms: norms of whole gradients seen in training, from which a limit for clipping follows.
    Costs a forward and backward pass, for each layer and direction a backward product of one vector per row at every step,
    and the decompositions of `recurrent_spectrum`.
    Raises ValueError for sequences of fewer than 4 steps and as `gradient_flow` does; FloatingPointError where states or
    gradients are not finite, unless the gradient is seen to explode before.
    """
    layer = recurrent_part(at_every_step(model))
    flows = [measured_flow(model, x, targets, loss, state, None, step) for step in (-1, 0)[: layer.directions]]
    T = flows[0].norms.shape[2]
    if T < 4:
        raise ValueError(f"x: expected at least 4 steps to see a gradient change, got {T}")
    reach = T - 1 if reach is None else whole("reach", reach)
    threshold = clip_threshold(grad_norms) if grad_norms is not None else None
    with undisturbed(model):
        tapes, _ = run_steps(model, x, state)
    found = []
    for at, name in enumerate(flows[0].layers):
        kind, rate, horizon = judge(flows[at % layer.directions], name, reach)
        spectrum = recurrent_spectrum(model, name) if layer.cell.recurrent else None
        seen = evidence(tapes[at], reach)
        exponent = float(exponents_of(tapes[at], 1).mean())
        why = reasons(layer.cell, spectrum, seen, exponent)
        what = advice(layer.cell, kind, horizon, reach, spectrum, seen, threshold)
        of_matrix: tuple[float | None, float | None, float | None] = (None, None, None)
        if spectrum is not None:
            of_matrix = spectrum.bound, float(spectrum.radius.max()), float(spectrum.sigma_max.max())
        found.append(
            Verdict(name, layer.cell.name, kind, rate, horizon, reach, exponent, *of_matrix, seen, threshold, why, what)
        )
    return tuple(found)


def clip_threshold(grad_norms: Sequence[float]) -> float:
    """The 90th percentile of gradient norms seen in training: clipping there touches one step in ten.

    Norms that are not finite are left out.  Raises ValueError where none is left.
    """
    given = backend.to_numpy(backend.asarray(grad_norms, np.float64, "grad_norms")).ravel()
    norms = given[np.isfinite(given)]
    if not norms.size:
        raise ValueError(f"grad_norms: expected at least one finite norm, got {given.size} of which none is")
    return float(np.quantile(norms, 1 - CLIPPED))


def judge(flow: Flow, layer: str, reach: int) -> tuple[str, float, float]:
    """kind, rate and horizon of one layer (see `Verdict`), from the flow of one step's loss.

    FloatingPointError where it is not finite, unless it is seen to explode before.
    """
    norms = np.hypot.reduce(flow.by_lag(layer), axis=0)
    finite = np.isfinite(norms)
    known = norms if finite.all() else norms[: int(np.argmin(finite))]
    exploded = len(known) and known.max() > EXPLODED * known[0]
    if not finite.all() and not exploded:
        raise_where_flow_is_not_finite(flow)
    if not known[0]:  # dead units: nothing leaves the loss's own step
        return "vanishes", 0.0, 0.0
    ratios = known / known[0]
    rate = factor_per_step(known)
    rate = 0.0 if math.isnan(rate) else rate  # fewer than three positive norms in at least four steps
    over, above = np.flatnonzero(ratios > EXPLODED), np.flatnonzero(ratios >= VANISHED)
    if len(over):
        horizon, falls = float(over[0]), False
    elif above[-1] + 1 < len(ratios):
        horizon, falls = float(above[-1] + 1), True
    else:
        horizon, falls = max(float(len(ratios)), _extrapolated(rate)), rate < 1
    if horizon > reach:
        return "holds", rate, horizon
    return "vanishes" if falls else "explodes", rate, horizon


def _extrapolated(rate: float) -> float:
    """Steps until `rate` alone makes 1% or 100 times of a gradient."""
    return math.inf if rate == 1 else abs(math.log(EXPLODED) / math.log(rate))


def _pace(verdict: Verdict) -> str:
    """The first line's second half."""
    if verdict.horizon == 0:
        return "nothing leaves the step of the loss"
    pace = f"x {verdict.rate:.3g} per step back"
    if math.isinf(verdict.horizon):
        return f"{pace}, and {verdict.reach:,} steps count"
    falls = verdict.kind == "vanishes" or (verdict.kind == "holds" and verdict.rate < 1)
    level = "under 1%" if falls else "above 100 times"
    where = f"beyond the {verdict.reach:,} that count" if verdict.kind == "holds" else f"{verdict.reach:,} count"
    return f"{pace}: {level} after {verdict.horizon:,.0f} step{'s' * (verdict.horizon != 1)}, {where}"
