"""Independently recurrent network (Li et al. 2018): h_t = f(W x_t + b + u * h_{t-1}), a recurrent weight u for each unit.

Their f is relu; |u| at most 2^(1/T) keeps gradients over T steps from exploding.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import relu


def forward(x, r, state, params):
    return (relu(x[0] + params[0] * state[0]),)


def between_0_and_1(rng, rows, columns):
    return rng.uniform(0, 1, (rows, columns))


INDRNN_CELL = Cell("indrnn", gates=1, states=1, forward=forward, params=("u",), init={"u": between_0_and_1})
