"""A trained initial state against one of zeros."""

from typing import Any

import numpy as np

from gpurnn import backend, losses, optim, plot
from gpurnn.bptt import full_bptt
from gpurnn.lab.page import Page
from gpurnn.layers import Linear
from gpurnn.model import SequenceModel
from gpurnn.optim import clipping
from gpurnn.recurrent import RNN

T, ROWS, UNITS, UPDATES = 20, 32, 4, 300
LEVEL, KEPT = 3.0, 0.8


def cooling(rng: np.random.Generator, N: int) -> tuple[np.ndarray, np.ndarray]:
    """x (T, N, 1), noise, and targets (T, N, 1): a level that begins at 3, keeps 0.8 of itself, and adds what comes."""
    x = rng.normal(0, 0.3, (T, N, 1))
    level, levels = np.full((N, 1), LEVEL), []
    for step in x:
        level = KEPT * level + step
        levels.append(level)
    return x, np.stack(levels)


def trained(trainable_h0: bool, seed: int) -> np.ndarray:
    """(T,) the mean squared error of each step after training."""
    rng = np.random.default_rng(seed)
    options: dict[str, Any] = {
        "bias": False,
        "nonlinearity": "identity",
        "trainable_h0": trainable_h0,
        "dtype": "float64",
    }
    layer = RNN(1, UNITS, rng=rng, executor="numpy", **options)
    model = SequenceModel(None, layer, Linear(UNITS, 1, bias=False, dtype="float64", rng=rng))
    optimizer = optim.Adam(model, lr=0.01)
    for _ in range(UPDATES):
        model.zero_grad()
        full_bptt(model, *cooling(rng, ROWS), losses.mean_squared_error)
        clipping.clip_grad_norm(model, 1.0)
        optimizer.step()
    x, targets = cooling(np.random.default_rng(seed + 1), 1000)
    return ((backend.to_numpy(model(x, training=False)[0]) - targets) ** 2).mean((1, 2))


def experiment(page: Page) -> None:
    page.section("Trained against zero initial state")
    zero, learnt = trained(False, page.seed), trained(True, page.seed)
    page.say(
        f"A level begins at {LEVEL:g}, loses a fifth with every step and adds what comes in. A linear network without biases "
        f"that begins at h_0 = 0 cannot know that: its squared error is {zero[0]:.2f} at the first step and "
        f"{zero.mean():.2g} on average. With trainable_h0=True the initial state is a parameter like any other, its "
        f"gradient the last that BPTT reaches, and the errors are {learnt[0]:.2g} and {learnt.mean():.2g}. (Biases can stand "
        "in for a part of it, as they do in the networks above.)"
    )
    lines = {"h_0 = 0": (range(1, T + 1), zero), "h_0 trained": (range(1, T + 1), learnt)}
    panel = plot.Panel("time step", "mean squared error", lines, log_y=True, marked=True)
    plot.curves(
        [panel], page.figure("initial-state", "The error of each step, with a zero and with a trained initial state")
    )
