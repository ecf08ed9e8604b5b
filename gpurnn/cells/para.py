"""GRU and LSTM with diagonal recurrent weights (Danieli et al. 2025, ParaRNN): nonlinear in h, but unit by unit.

ParaGRU    z, r = sigmoid(x + a * h)    n = tanh(x_n + a_n * r * h)    h_t = (1 - z) * h + z * n
ParaLSTM   f = sigmoid(x_f + a_f * h + p_f * c)    c_t = f * c + (1 - f) * tanh(x_z + a_z * h)
           o = sigmoid(x_o + a_o * h + p_o * c_t)    h_t = o * tanh(c_t)
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import sigmoid, tanh


def gru(x, r, state, params):
    (h,), (a_z, a_r, a_n) = state, params
    z, reset = sigmoid(x[0] + a_z * h), sigmoid(x[1] + a_r * h)
    return (h + z * (tanh(x[2] + a_n * reset * h) - h),)


def lstm(x, r, state, params):
    (h, c), (a_f, a_z, a_o, p_f, p_o) = state, params
    f, z = sigmoid(x[0] + a_f * h + p_f * c), tanh(x[1] + a_z * h)
    c = z + f * (c - z)
    return sigmoid(x[2] + a_o * h + p_o * c) * tanh(c), c


PARAGRU_CELL = Cell("paragru", gates=3, states=1, forward=gru, params=("a_z", "a_r", "a_n"))
PARALSTM_CELL = Cell("paralstm", gates=3, states=2, forward=lstm, params=("a_f", "a_z", "a_o", "p_f", "p_o"))
