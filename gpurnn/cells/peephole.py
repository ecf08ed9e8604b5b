"""Long short-term memory with peepholes (Gers & Schmidhuber 2000): its gates look at the cell state, each unit at its own.

    i, f = sigmoid(x + r + p * c_{t-1})     o = sigmoid(x_o + r_o + p_o * c_t)
    c_t = f * c_{t-1} + i * g               h_t = o * tanh(c_t)

Gates i, f, g, o as in the plain one, which it is where the peepholes are 0, as they are at the start.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def forward(x, r, state, params):
    p_i, p_f, p_o = params
    i, f = sigmoid(x[0] + r[0] + p_i * state[1]), sigmoid(x[1] + r[1] + p_f * state[1])
    c = f * state[1] + i * tanh(x[2] + r[2])
    return sigmoid(x[3] + r[3] + p_o * c) * tanh(c), c


PEEPHOLE_CELL = Cell("peephole", gates=4, states=2, forward=forward, params=("peephole_i", "peephole_f", "peephole_o"))
