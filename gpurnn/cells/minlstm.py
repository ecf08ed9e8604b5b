"""minLSTM (Feng et al. 2024, "Were RNNs all we needed?"): forget and input gates that see x alone and sum to 1.

    h_t = (f * h_{t-1} + i * g(n)) / (f + i)        f, i = sigmoid of gates 0 and 1, n = gate 2, g as in `mingru`

The weight of the past is (1 + e^-i) / ((1 + e^-f) + (1 + e^-i)), i and f before the sigmoid: where both gates are shut this
is no 0/0.  Below -80 they count as -80, whose exponential float32 still holds.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import candidate, exp, maximum
from gpurnn.cells.mingru import positive


def forward(x, r, state, params):
    f, i = (1 + exp(-maximum(gate, -80)) for gate in x[:2])
    n = candidate(positive(x[2]))
    return (n + i / (f + i) * (state[0] - n),)


MINLSTM_CELL = Cell("minlstm", gates=3, states=1, forward=forward)
