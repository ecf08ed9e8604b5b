"""Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gate (Gers et al. 2000), PyTorch's gates i, f, g, o.

    c_t = f * c_{t-1} + i * g        h_t = o * tanh(c_t)

The cell state is the constant error carousel: dc_t/dc_{t-1} = f, with no matrix and no squashing on the way.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def forward(x, r, state, params):
    i, f = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    g, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c = f * state[1] + i * g
    return (o * tanh(c), c), (i, f, g, o)


def backward(dnext, saved, state, next_state, params):
    i, f, g, o = saved
    tanh_c = tanh(next_state[1])  # recomputed: cheaper than keeping it
    dh, dc = dnext
    dc = dc + dh * o * (1 - tanh_c * tanh_c)
    da = (dc * g * i * (1 - i), dc * state[1] * f * (1 - f), dc * i * (1 - g * g), dh * tanh_c * o * (1 - o))
    return da, da, (0, dc * f), ()


LSTM_CELL = Cell("lstm", gates=4, states=2, forward=forward, backward=backward)
