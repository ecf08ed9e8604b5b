"""The vanilla recurrent network (Elman 1990): h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

Its Jacobian dh_t/dh_{t-1} = diag(f') W_hh is what gradients are multiplied by at every step back in time; f' is at most
1 for tanh and 1/4 for sigmoid.  Each f below has a derivative that its own output h determines, so nothing is saved.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import relu, sigmoid, tanh, where


def _elman(name, activation, derivative):
    def forward(x, r, state, params):
        return (activation(x[0] + r[0]),), ()

    def backward(dnext, saved, state, next_state, params):
        da = derivative(dnext[0], next_state[0])
        return (da,), (da,), (0,), ()

    return Cell(name, gates=1, states=1, forward=forward, backward=backward)


RNN_CELLS = {
    "tanh": _elman("rnn_tanh", tanh, lambda dh, h: dh * (1 - h * h)),
    "relu": _elman("rnn_relu", relu, lambda dh, h: where(h > 0, dh, 0)),
    "sigmoid": _elman("rnn_sigmoid", sigmoid, lambda dh, h: dh * h * (1 - h)),
    "identity": _elman("rnn_identity", lambda a: a, lambda dh, h: dh),
}
