"""Gated recurrent unit (Cho et al. 2014) in the variant of cuDNN and PyTorch: the reset gate acts after the matrix
product, n = tanh(x_n + reset * (W_hn h + b_hn)); gates r, z, n.

    h_t = (1 - z) * n + z * h_{t-1}
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def forward(x, r, state, params):
    reset, z = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    n = tanh(x[2] + reset * r[2])
    return (n + z * (state[0] - n),), (reset, z, n, r[2])


def backward(dnext, saved, state, next_state, params):
    reset, z, n, rn = saved
    dh = dnext[0]
    dz = dh * (state[0] - n) * z * (1 - z)
    dn = dh * (1 - z) * (1 - n * n)
    dreset = dn * rn * reset * (1 - reset)
    return (dreset, dz, dn), (dreset, dz, dn * reset), (dh * z,), ()


GRU_CELL = Cell("gru", gates=3, states=1, forward=forward, backward=backward)
