"""Recurrent cells: one file each.  A new cell that ships takes a row in CELLS; tests and benchmarks run over it."""

from gpurnn.cells.cell import Cell
from gpurnn.cells.functions import abs, exp, log, maximum, minimum, relu, sigmoid, sqrt, tanh, where
from gpurnn.cells.gru import GRU_CELL
from gpurnn.cells.lstm import LSTM_CELL
from gpurnn.cells.rnn import RNN_CELLS

CELLS = {cell.name: cell for cell in (*RNN_CELLS.values(), LSTM_CELL, GRU_CELL)}

__all__ = [
    "CELLS",
    "GRU_CELL",
    "LSTM_CELL",
    "RNN_CELLS",
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
