"""Gated recurrent unit (Cho et al. 2014) in the variant of cuDNN and PyTorch: the reset gate acts after the matrix
product, n = tanh(x_n + reset * (W_hn h + b_hn)); gates r, z, n.

    h_t = (1 - z) * n + z * h_{t-1}
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import candidate, sigmoid, tanh


def forward(x, r, state, params):
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = candidate(tanh(x[2] + reset * r[2]))
    return (n + z * (state[0] - n),)


GRU_CELL = Cell("gru", gates=3, states=1, forward=forward)
