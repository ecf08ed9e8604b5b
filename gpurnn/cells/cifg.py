"""LSTM with coupled input and forget gates (CIFG, Greff et al. 2017): what is forgotten makes room for what is new.

    c_t = f * c_{t-1} + (1 - f) * g        h_t = o * tanh(c_t)

Gates f, g, o: a quarter fewer weights than LSTM has, and as good in that study.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def forward(x, r, state, params):
    f, g = sigmoid(x[0] + r[0]), tanh(x[1] + r[1])
    c = g + f * (state[1] - g)
    return sigmoid(x[2] + r[2]) * tanh(c), c


CIFG_CELL = Cell("cifg", gates=3, states=2, forward=forward)
