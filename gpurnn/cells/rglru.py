"""Real-gated linear recurrent unit (De et al. 2024, Griffin): a diagonal recurrence whose decay the input gates.

    a = exp(-8 softplus(lambda) * r)        h_t = a * h_{t-1} + sqrt(1 - a^2) * (i * W x_t)        r, i = sigmoid of gates 0, 1

lambda, `decay`, is the unit's own.  At a = 1 the root's gradient counts as 0.
"""

import numpy as np

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import exp, sigmoid, softplus, sqrt


def forward(x, r, state, params):
    a = exp(-8 * softplus(params[0]) * sigmoid(x[0]))
    return (a * state[0] + sqrt((1 - a) * (1 + a)) * (sigmoid(x[1]) * x[2]),)


def slow(rng, rows, columns):
    """lambda for which a, with r = 1, is between 0.9 and 0.999, a^2 uniform: as in Griffin."""
    a = np.sqrt(rng.uniform(0.9**2, 0.999**2, (rows, columns)))
    return np.log(np.expm1(-np.log(a) / 8))


RGLRU_CELL = Cell("rglru", gates=3, states=1, forward=forward, params=("decay",), init={"decay": slow})
