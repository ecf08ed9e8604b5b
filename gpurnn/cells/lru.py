"""Linear recurrent unit (Orvieto et al. 2023): a complex diagonal recurrence, of magnitude below 1 however it is trained.

    s_t = m e^(i phase) s_{t-1} + sqrt(1 - m^2) (W x_t)        m = exp(-exp(nu)); gates: the real and the imaginary part of W x_t

States: h, the real part of s, and the imaginary one.  The phase is that of the complex number (real, imag), of any length
but 0, so that no sine is needed.
"""

import numpy as np

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import exp, sqrt


def forward(x, r, state, params):
    nu, real, imag = params
    m = exp(-exp(nu))
    turn, gain = m / sqrt(real * real + imag * imag), sqrt((1 - m) * (1 + m))
    a, b = turn * real, turn * imag
    return a * state[0] - b * state[1] + gain * x[0], b * state[0] + a * state[1] + gain * x[1]


def slow(rng, rows, columns):
    """nu for which m is between 0.9 and 0.999, m^2 uniform: a ring of the complex plane, evenly filled."""
    return np.log(-0.5 * np.log(rng.uniform(0.9**2, 0.999**2, (rows, columns))))


def any_phase(rng, rows, columns):
    return rng.standard_normal((rows, columns))


INIT = {"nu": slow, "real": any_phase, "imag": any_phase}
LRU_CELL = Cell("lru", gates=2, states=2, forward=forward, params=("nu", "real", "imag"), init=INIT)
