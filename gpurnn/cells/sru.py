"""Simple recurrent unit (Lei et al. 2018): its gates look at the cell state through a weight of each unit, v.

c_t = f * c_{t-1} + (1 - f) * (W x_t)        f, r = sigmoid(W_f x_t + v_f * c_{t-1} + b_f) and so for r
h_t = r * c_t + (1 - r) * (W_s x_t)          gates f, r, and the two projections; W_s is there for any input size
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid


def forward(x, r, state, params):
    v_f, v_r = params
    f, reset = sigmoid(x[0] + v_f * state[1]), sigmoid(x[1] + v_r * state[1])
    c = x[2] + f * (state[1] - x[2])
    return x[3] + reset * (c - x[3]), c


SRU_CELL = Cell("sru", gates=4, states=2, forward=forward, params=("v_f", "v_r"))
