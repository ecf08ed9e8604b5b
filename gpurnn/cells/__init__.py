"""Recurrent cells: one file each.  A new cell that ships takes a row in CELLS; tests and benchmarks run over it."""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import abs, exp, log, maximum, minimum, relu, sigmoid, sqrt, tanh, where
from gpurnn.cells.gru import GRU_CELL
from gpurnn.cells.indrnn import INDRNN_CELL
from gpurnn.cells.lstm import LSTM_CELL
from gpurnn.cells.mingru import MINGRU_CELL
from gpurnn.cells.minlstm import MINLSTM_CELL
from gpurnn.cells.rnn import RNN_CELLS

UNITWISE_CELLS = (INDRNN_CELL, MINGRU_CELL, MINLSTM_CELL)  # without a recurrent matrix
CELLS = {cell.name: cell for cell in (*RNN_CELLS.values(), LSTM_CELL, GRU_CELL, *UNITWISE_CELLS)}

__all__ = [
    "CELLS",
    "GRU_CELL",
    "INDRNN_CELL",
    "LSTM_CELL",
    "MINGRU_CELL",
    "MINLSTM_CELL",
    "RNN_CELLS",
    "UNITWISE_CELLS",
    "Cell",
    "abs",
    "exp",
    "log",
    "maximum",
    "minimum",
    "relu",
    "sigmoid",
    "sqrt",
    "tanh",
    "where",
]
