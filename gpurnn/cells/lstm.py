"""Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gate (Gers et al. 2000), PyTorch's gates i, f, g, o.

    c_t = f * c_{t-1} + i * g        h_t = o * tanh(c_t)

The cell state is the constant error carousel: dc_t/dc_{t-1} = f, with no matrix and no squashing on the way.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import candidate, sigmoid, tanh


def forward(x, r, state, params):
    i, f = sigmoid(x[0] + r[0]), sigmoid(x[1] + r[1])
    g, o = candidate(tanh(x[2] + r[2])), sigmoid(x[3] + r[3])
    c = f * state[1] + i * g
    return o * tanh(c), c


LSTM_CELL = Cell("lstm", gates=4, states=2, forward=forward)
