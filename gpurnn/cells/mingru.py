"""minGRU (Feng et al. 2024, "Were RNNs all we needed?"): a GRU whose gates see x alone, so that its units are independent.

    h_t = (1 - z) * h_{t-1} + z * g(n)        z = sigmoid(W_z x_t + b_z), n = W_n x_t + b_n

g keeps the candidate positive, as in their implementation in log space: n + 1/2 where n is at least 0, else sigmoid(n).
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import candidate, sigmoid, where


def positive(n):
    return where(n >= 0, n + 0.5, sigmoid(n))


def forward(x, r, state, params):
    return (state[0] + sigmoid(x[0]) * (candidate(positive(x[1])) - state[0]),)


MINGRU_CELL = Cell("mingru", gates=2, states=1, forward=forward)
