"""How far back a trained network remembers: the adding problem and the copy task, by lag, for RNN, GRU and LSTM."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpurnn import diagnose, plot
from gpurnn.lab.page import Page
from gpurnn.lab.tasks import ALWAYS_ONE, Draw, adding_problem, copy_task, cross_entropy, fit, squared_error, with_head
from gpurnn.model import SequenceModel
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

HIDDEN = 32
LAYERS: dict[str, Callable[..., Recurrent]] = {
    "RNN": RNN,
    "GRU": functools.partial(GRU, update_bias=1.0),
    "LSTM": LSTM,
    "LSTM, forget bias 3": functools.partial(LSTM, forget_bias=3.0),
}
ADDERS = ("RNN", "GRU", "LSTM")
ADDING_SOLVED, COPY_SOLVED = 0.01, 0.05  # mean squared error; share of the information that is missing
SYMBOLS, ALPHABET = 3, 4
BATCH, EVERY = 32, 25  # sequences; updates between two looks


@dataclass
class Trained:
    """One training: its model, how long it took and what it reached; the flow that was seen at each look."""

    model: SequenceModel
    updates: int = 0
    error: float = math.inf
    looks: list[int] = field(default_factory=list)
    flows: list[np.ndarray] = field(default_factory=list)
    spectra: list[np.ndarray] = field(default_factory=list)


def add(cell: str, T: int, seed: int, updates: int, watch: bool = False) -> Trained:
    """Trains on the adding problem over T steps until a test batch errs by less than 0.005."""
    draw = functools.partial(_swapped, adding_problem, T)
    return _trained(cell, 2, 1, draw, squared_error, ADDING_SOLVED / 2, seed, updates, watch)


def copy(cell: str, lag: int, seed: int, updates: int) -> Trained:
    """Trains on the copy task over `lag` blanks until under 4% of the symbols' information is missing; error: that share."""
    draw = functools.partial(_swapped, copy_task, lag)
    trained = _trained(cell, ALPHABET + 2, ALPHABET, draw, cross_entropy, 0.04 * math.log(ALPHABET), seed, updates)
    trained.error /= math.log(ALPHABET)
    return trained


def _swapped(task: Callable[..., Any], length: int, rng: np.random.Generator, N: int) -> Any:
    return task(rng, length, N)


def _trained(
    cell: str,
    inputs: int,
    outputs: int,
    draw: Draw,
    loss: Any,
    enough: float,
    seed: int,
    updates: int,
    watch: bool = False,
) -> Trained:
    rng = np.random.default_rng(seed)
    found = Trained(with_head(LAYERS[cell](inputs, HIDDEN, rng=rng), outputs, rng))
    x, targets = draw(np.random.default_rng(seed), BATCH)

    def look(update: int) -> None:
        found.looks.append(update)
        found.flows.append(diagnose.gradient_flow(found.model, x, targets, loss, step=-1).total[0])
        found.spectra.append(diagnose.recurrent_spectrum(found.model).eigenvalues[0])

    options: dict[str, Any] = {
        "updates": updates,
        "enough": enough,
        "batch": BATCH,
        "every": EVERY,
        "look": look if watch else None,
    }
    found.updates, found.error = fit(found.model, draw, loss, rng, **options)
    return found


def experiment(page: Page) -> None:
    page.section("Memory: the adding problem and the copy task")
    lengths, lags = ((10, 20), (2, 5)) if page.quick else ((25, 50, 100, 200), (5, 10, 20, 40, 80))
    updates = 300 if page.quick else 1500
    page.say(
        f"Adding: of T numbers two are marked; their sum is asked at the end. Always answering 1 errs by {ALWAYS_ONE:.3f}; "
        f"under {ADDING_SOLVED} it is solved. Copying: {SYMBOLS} symbols, a lag of blanks, then the symbols again. Networks "
        f"of {HIDDEN} units, Adam, at most {updates} updates of {BATCH} sequences; the GRU begins with an update bias of 1, "
        "the LSTM with its default, a forget bias of 1."
    )
    adding, copying = {}, {}
    for cell in LAYERS:
        for T in lengths if cell in ADDERS else ():
            adding[cell, T] = done = add(cell, T, page.seed, updates, watch=T in lengths[-1:])
            page.progress(f"adding, {cell}, T = {T}: error {done.error:.4f} after {done.updates} updates")
        for lag in lags:
            copying[cell, lag] = done = copy(cell, lag, page.seed, updates)
            page.progress(f"copying, {cell}, lag {lag}: {done.error:.1%} lost after {done.updates} updates")
    page.table(
        ["adding: squared error", *(f"T = {T}" for T in lengths)],
        [[cell, *(f"{adding[cell, T].error:.4f}" for T in lengths)] for cell in ADDERS],
    )
    page.table(
        ["copying: information lost", *(f"lag {lag}" for lag in lags)],
        [[cell, *(f"{copying[cell, lag].error:.1%}" for lag in lags)] for cell in LAYERS],
    )
    _curves(page, adding, copying, lengths, lags)
    _explain(page, {cell: adding[cell, max(lengths)] for cell in ADDERS}, max(lengths))


def _curves(page: Page, adding: dict, copying: dict, lengths: tuple[int, ...], lags: tuple[int, ...]) -> None:
    panels = [
        plot.Panel(
            "T (steps)", "adding: mean squared error",
            {cell: (lengths, [adding[cell, T].error for T in lengths]) for cell in ADDERS},
            {"always\nanswering 1": ALWAYS_ONE, "solved": ADDING_SOLVED}, log_x=True, log_y=True, marked=True,
        ),
        plot.Panel(
            "lag (steps)", "copying: share of the information lost",
            {cell: (lags, [copying[cell, lag].error for lag in lags]) for cell in LAYERS},
            {"guessing": 1.0, "solved": COPY_SOLVED}, log_x=True, log_y=True, marked=True,
        ),
    ]  # fmt: skip
    plot.curves(panels, page.figure("memory", "What is learnt, by lag: RNN, GRU, LSTM"))


def _explain(page: Page, watched: dict[str, Trained], T: int) -> None:
    """Why the longest adding problem was learnt or not: the gradient's reach, over the training."""
    x, targets = adding_problem(np.random.default_rng(page.seed), T, BATCH)
    page.say(f"The laboratory on the three networks behind their training on {T} steps:")
    horizons = {}
    for cell, done in watched.items():
        (verdict,) = diagnose.verdicts(done.model, x, targets, squared_error)
        page.quote(f"{cell}: {verdict}")
        horizons[cell] = verdict.horizon
    rnn = watched["RNN"]
    solved = [cell for cell, done in watched.items() if done.error < ADDING_SOLVED]
    if "RNN" not in solved and horizons["RNN"] < T // 2:
        page.say(
            f"The RNN errs by {rnn.error:.3f}. Its gradient falls under 1% within {horizons['RNN']:.0f} steps, and the first "
            f"mark lies between {T // 2} and {T} steps back: nothing tells it what to keep."
        )
    for cell in solved:
        since = _arrives(watched[cell])
        begin = f"from update {since} on; before, it had to learn to reach so far" if since else "from the beginning"
        page.say(
            f"The {cell} errs by {watched[cell].error:.4f}. More than 1% of its gradient arrives at the first step {begin}."
        )
    for cell, done in watched.items():
        caption = f"Adding, T = {T}: how much of the {cell}'s gradient is left at step t, over its training"
        plot.flow_map(
            done.flows,
            page.figure(f"flow-map-{cell.lower()}", caption),
            rows=done.looks,
            title=f"{cell}, adding over {T} steps",
        )
    plot.eigenvalues(
        {"before training": rnn.spectra[0], f"after {rnn.updates} updates": rnn.spectra[-1]},
        page.figure("eigenvalues", "Eigenvalues of the RNN's W_hh and the unit circle, before and after training"),
        title=f"W_hh of the RNN, adding over {T} steps",
    )


def _arrives(done: Trained) -> int:
    """The first look from which on more than 1% of the gradient reaches the first step."""
    lost = [look for look, flow in zip(done.looks, done.flows, strict=True) if not flow[0] > 0.01 * flow[-1]]
    return next((look for look in done.looks if not lost or look > lost[-1]), done.updates)
