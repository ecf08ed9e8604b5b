"""The layers that everybody knows by name, with the one option that each has of its own."""

from typing import Unpack

from gpurnn.arguments import supported
from gpurnn.cells import GRU_CELL, LSTM_CELL, RNN_CELLS
from gpurnn.initializers import Chrono, Initializer, gate_bias
from gpurnn.recurrent.layer import Recurrent
from gpurnn.recurrent.options import Options


class RNN(Recurrent):
    """The vanilla recurrent network of Elman 1990, h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh); see `Recurrent`.

    nonlinearity: tanh, relu, sigmoid or identity.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        **options: Unpack[Options],
    ):
        if not isinstance(nonlinearity, str) or nonlinearity not in RNN_CELLS:
            raise ValueError(f"nonlinearity: expected one of {', '.join(RNN_CELLS)}, got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(RNN_CELLS[nonlinearity], input_size, hidden_size, num_layers, **options)


class LSTM(Recurrent):
    """Long short-term memory, gates i, f, g, o as in PyTorch; the state is the pair (h, c).  See `Recurrent`.

    forget_bias: added to bias_ih of the forget gate at the start (Gers et al. 2000; 1 after Jozefowicz et al. 2015), so
    that the cell remembers until it learns to forget.  At 100 the gate is exactly 1 and stays so, the constant error
    carousel of 1997.  Without biases it has no place and is left out.  A range (low, high) draws each unit's uniformly;
    `initializers.chrono(T)` those of units that remember up to T steps, the input gate's their negative.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        forget_bias: float | tuple[float, float] | Initializer = 1.0,
        **options: Unpack[Options],
    ):
        bias = gate_bias("forget_bias", forget_bias, supported(options.get("dtype", "float32")))
        super().__init__(LSTM_CELL, input_size, hidden_size, num_layers, **options)
        self.add_to_gate(1, bias, "forget_bias", against=0 if isinstance(bias, Chrono) else None)


class GRU(Recurrent):
    """Gated recurrent unit, gates r, z, n, reset after the matrix product as in PyTorch and cuDNN.  See `Recurrent`.

    update_bias: added to bias_ih of the update gate z at the start, so that above 0 a unit keeps its state until it
    learns to change it: what forget_bias is to an LSTM, ranges and `initializers.chrono` included.  Without biases it has no
    place and is left out.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        update_bias: float | tuple[float, float] | Initializer = 0.0,
        **options: Unpack[Options],
    ):
        bias = gate_bias("update_bias", update_bias, supported(options.get("dtype", "float32")))
        super().__init__(GRU_CELL, input_size, hidden_size, num_layers, **options)
        self.add_to_gate(1, bias, "update_bias")
