"""Leaky rate networks of computational neuroscience, dx/dt = -x + W r + input + noise with r = f(x), by Euler's method.

    h_t = (1 - alpha) * h_{t-1} + alpha * f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh + sigma * sqrt(2 / alpha) * xi_t)

Song, Yang & Wang, "Training excitatory-inhibitory recurrent neural networks for cognitive tasks", PLoS Comput. Biol. 2016,
with the firing rate itself as the state, as in Yang et al., "Task representations in neural networks trained to perform
many cognitive tasks", Nat. Neurosci. 2019.  alpha = dt / tau; xi_t is a normal number for each unit and step, 0 without
training.  The cells that ship, rate_tanh and rate_relu, have alpha 0.2 and no noise: a layer's `noise=` adds it, and
`rate` makes others.
"""

import functools
import math
from collections.abc import Callable

from gpurnn.arguments import at_least_0, number, one_of
from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import normal, relu, tanh

ACTIVATIONS: dict[str, Callable] = {"tanh": tanh, "relu": relu}


def rate(alpha: float = 0.2, noise: float = 0.0, nonlinearity: str = "relu") -> Cell:
    """A leaky rate network.  alpha: dt / tau in (0, 1]; noise: sigma, from 0; nonlinearity: tanh or relu."""
    alpha = number("alpha", alpha, lambda value: 0 < value <= 1, "in (0, 1]")
    noise = at_least_0("noise", noise)
    one_of("nonlinearity", nonlinearity, tuple(ACTIVATIONS))
    told = "" if alpha == 0.2 and not noise else f" with alpha {alpha:g}, noise {noise:g}"
    made = functools.partial(forward, alpha, noise, nonlinearity)
    return Cell(f"rate_{nonlinearity}{told}", gates=1, states=1, forward=made)


def forward(alpha, noise, nonlinearity, x, r, state, params):
    drive = x[0] + r[0]
    if noise:
        drive = drive + noise * math.sqrt(2 / alpha) * normal()
    return (state[0] + alpha * (ACTIVATIONS[nonlinearity](drive) - state[0]),)


RATE_CELLS = {name: rate(nonlinearity=name) for name in ACTIVATIONS}
