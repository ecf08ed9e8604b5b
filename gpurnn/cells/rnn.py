"""The vanilla recurrent network (Elman 1990): h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh).

Its Jacobian dh_t/dh_{t-1} = diag(f') W_hh is what gradients are multiplied by at every step back in time; f' is at most
1 for tanh and 1/4 for sigmoid.  Each f below has a derivative that its own output h determines, so nothing is saved.
"""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import relu, sigmoid, tanh


def _elman(name, activation):
    def forward(x, r, state, params):
        return (activation(x[0] + r[0]),)

    return Cell(name, gates=1, states=1, forward=forward)


RNN_CELLS = {
    "tanh": _elman("rnn_tanh", tanh),
    "relu": _elman("rnn_relu", relu),
    "sigmoid": _elman("rnn_sigmoid", sigmoid),
    "identity": _elman("rnn_identity", lambda a: a),
}
