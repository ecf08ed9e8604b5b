"""The gradient by lag: of the cells, and of the beginnings that decide it for a vanilla RNN."""

import functools
from typing import Any

import numpy as np

from gpurnn import diagnose, plot
from gpurnn.initializers import glorot_uniform, orthogonal, scaled
from gpurnn.lab.page import Page
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

HIDDEN, INPUTS, ROWS = 32, 4, 8
CAROUSEL = 100.0  # a forget bias: sigmoid(100) rounds to 1 and its derivative to 0, so that the gate is 1 for good


def cells(seed: int) -> dict[str, Recurrent]:
    common: dict[str, Any] = {
        "input_size": INPUTS,
        "hidden_size": HIDDEN,
        "dtype": "float64",
        "executor": "numpy",
        "rng": seed,
    }
    return {
        "RNN, sigmoid": RNN(nonlinearity="sigmoid", **common),
        "RNN, tanh": RNN(**common),
        "GRU": GRU(**common),
        "GRU, update bias 3": GRU(update_bias=3.0, **common),
        "LSTM": LSTM(forget_bias=0.0, **common),
        "LSTM, forget bias 3": LSTM(forget_bias=3.0, **common),
        "LSTM, carousel": carousel(INPUTS, HIDDEN, seed),
    }


def carousel(inputs: int, hidden: int, seed: int) -> LSTM:
    """The constant error carousel alone: forget gates of exactly 1, and no way from h back into the gates.

    dc_t/dc_k is then exactly 1 over any number of steps (Hochreiter & Schmidhuber 1997, without the truncated gradient
    by which they got the same for a whole network).
    """
    options: dict[str, Any] = {"init": {"weight_hh": "zeros"}, "dtype": "float64", "executor": "numpy", "rng": seed}
    return LSTM(inputs, hidden, forget_bias=CAROUSEL, **options)


def beginnings(seed: int) -> dict[str, RNN]:
    make = functools.partial(RNN, INPUTS, HIDDEN, dtype="float64", executor="numpy", rng=seed)
    return {
        "half of Glorot's": make(init={"weight_hh": scaled(glorot_uniform, 0.5)}),
        "Glorot": make(init={"weight_hh": glorot_uniform}),
        "orthogonal": make(init={"weight_hh": orthogonal}),
        "identity, relu": make(init={"weight_hh": "identity"}, nonlinearity="relu"),
        "3 × Glorot's": make(init={"weight_hh": scaled(glorot_uniform, 3.0)}),
    }


def experiment(page: Page) -> None:
    page.section("RNN, GRU and LSTM: the gradient by lag")
    T = 50 if page.quick else 200
    # Small inputs: what saturates a unit here is its own recurrence.
    x = 0.3 * np.random.default_rng(page.seed).standard_normal((T, ROWS, INPUTS))
    page.say(
        f"Untrained networks of {HIDDEN} units read {T} steps of weak noise. How much of the gradient of the last output "
        "is left, at the states of earlier steps? The RNNs' W_hh is orthogonal, which keeps every norm; what they lose, "
        "the derivative of the squashing function takes. A gate that stands open passes the gradient on."
    )
    flows = {label: by_lag(layer, x) for label, layer in cells(page.seed).items()}
    _table(page, flows, T)
    error = diagnose.gradient_flow(cells(page.seed)["LSTM, carousel"], x, step=-1).by_lag("l0")[1]
    page.say(
        "The constant error carousel is an LSTM whose forget gate is fixed at 1, here by a forget bias of "
        f"{CAROUSEL:g} and without recurrent weights. The gradient at its cell state {T - 1} steps back is "
        f"{error[-1] / error[1]:.17g} times that 1 step back, and so it would be after any number of steps."
    )
    shown = ("RNN, sigmoid", "RNN, tanh", "GRU", "GRU, update bias 3", "LSTM", "LSTM, forget bias 3", "LSTM, carousel")
    plot.by_lag(
        {label: flows[label] / flows[label][0] for label in shown},
        page.figure("by-lag", "What is left of the gradient, by lag: RNN, GRU, LSTM"),
        quantity="norm of dL/dstate, relative to lag 0",
    )
    page.say("For the vanilla RNN everything hangs on how W_hh begins:")
    layers = beginnings(page.seed)
    flows = {label: by_lag(layer, x) for label, layer in layers.items()}
    _table(
        page,
        flows,
        T,
        {label: f"{diagnose.recurrent_spectrum(layer).radius[0]:.2f}" for label, layer in layers.items()},
    )
    plot.by_lag(
        {label: norms / norms[0] for label, norms in flows.items()},
        page.figure("initialisers", "What is left of an RNN's gradient, by lag and by the beginning of W_hh"),
        quantity="norm of dL/dh, relative to lag 0",
    )


def by_lag(layer: Recurrent, x: np.ndarray) -> np.ndarray:
    """(T,) norms of the gradient of the last step's outputs, over all states, lag 0 first."""
    return diagnose.gradient_flow(layer, x, step=-1).total[0, ::-1]


def _table(page: Page, flows: dict[str, np.ndarray], T: int, radii: dict[str, str] | None = None) -> None:
    lags = [lag for lag in (10, 50, 100, 199) if lag < T]
    header = [
        "network",
        *(["radius of W_hh"] if radii else []),
        *(f"left at lag {lag}" for lag in lags),
        "under 1% from lag",
    ]
    rows = []
    for label, norms in flows.items():
        left = norms / norms[0]
        last = int(np.flatnonzero(left >= 0.01)[-1])  # lag 0 is
        known = [radii[label]] if radii else []
        rows.append([label, *known, *(f"{left[lag]:.2g}" for lag in lags), f"{last + 1}" if last + 1 < T else "never"])
    page.table(header, rows)
