"""Minimal gated unit (Zhou et al. 2016): one gate both resets and updates.

    f = sigmoid(x_f + r_f)     n = tanh(x_n + f * r_n)     h_t = (1 - f) * h_{t-1} + f * n

Gates f, n.  In the paper the gate acts on h before the matrix, here behind it, as in the GRU of cuDNN.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def forward(x, r, state, params):
    f = sigmoid(x[0] + r[0])
    n = tanh(x[1] + f * r[1])
    return (state[0] + f * (n - state[0]),)


MGU_CELL = Cell("mgu", gates=2, states=1, forward=forward)
