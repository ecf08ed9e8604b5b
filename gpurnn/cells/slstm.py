"""sLSTM of xLSTM (Beck et al., "xLSTM: Extended Long Short-Term Memory", NeurIPS 2024): an exponential input gate.

Gates i, f, z, o of a = x + r.  The gates that write and keep are held as logarithms, next to the largest of them, m, so
that no exponential overflows; n adds up what was written, and c / n is the mean of what was, weighted by them:

    m_t = max(log f + m_{t-1}, a_i)      i = exp(a_i - m_t)      f' = exp(log f + m_{t-1} - m_t)      log f = log sigmoid(a_f)
    c_t = f' c_{t-1} + i tanh(a_z)       n_t = f' n_{t-1} + i    h_t = sigmoid(a_o) c_t / n_t

States h, c, n, m, all 0 at the start; of n, which no step leaves below 0, the magnitude counts.  Its units are meant to
stand in heads: `Recurrent("slstm", I, H, heads=4)`.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import abs, exp, maximum, sigmoid, softplus, tanh

TINY = 1e-30  # where all that was written has underflowed h is 0, not 0 / 0


def forward(x, r, state, params):
    i, f, z, o = (a + b for a, b in zip(x, r, strict=True))
    _, c, n, m = state
    kept = m - softplus(-f)  # log f + m
    largest = maximum(kept, i)
    writes, keeps = exp(i - largest), exp(kept - largest)
    c, n = keeps * c + writes * tanh(z), keeps * abs(n) + writes
    return sigmoid(o) * c / (n + TINY), c, n, largest


SLSTM_CELL = Cell("slstm", gates=4, states=4, forward=forward)
