"""Recurrent cells: one file each.  A new cell that ships takes a row in CELLS; tests and benchmarks run over it."""

from gpurnn.cells.cell import Cell
from gpurnn.cells.cifg import CIFG_CELL
from gpurnn.cells.functions import (
    abs,
    bernoulli,
    candidate,
    exp,
    log,
    maximum,
    minimum,
    normal,
    relu,
    sigmoid,
    sqrt,
    tanh,
    where,
)
from gpurnn.cells.gru import GRU_CELL
from gpurnn.cells.indrnn import INDRNN_CELL
from gpurnn.cells.lru import LRU_CELL
from gpurnn.cells.lstm import LSTM_CELL
from gpurnn.cells.mgu import MGU_CELL
from gpurnn.cells.mingru import MINGRU_CELL
from gpurnn.cells.minlstm import MINLSTM_CELL
from gpurnn.cells.noisy import noisy
from gpurnn.cells.para import PARAGRU_CELL, PARALSTM_CELL
from gpurnn.cells.peephole import PEEPHOLE_CELL
from gpurnn.cells.rate import RATE_CELLS, rate
from gpurnn.cells.rglru import RGLRU_CELL
from gpurnn.cells.rnn import RNN_CELLS
from gpurnn.cells.slstm import SLSTM_CELL
from gpurnn.cells.sru import SRU_CELL

UNITWISE_CELLS = (  # without a recurrent matrix
    INDRNN_CELL,
    MINGRU_CELL,
    MINLSTM_CELL,
    SRU_CELL,
    RGLRU_CELL,
    LRU_CELL,
    PARAGRU_CELL,
    PARALSTM_CELL,
)
GATED_CELLS = (LSTM_CELL, GRU_CELL, PEEPHOLE_CELL, CIFG_CELL, MGU_CELL, SLSTM_CELL)
CELLS = {cell.name: cell for cell in (*RNN_CELLS.values(), *GATED_CELLS, *RATE_CELLS.values(), *UNITWISE_CELLS)}

__all__ = [
    "CELLS",
    "CIFG_CELL",
    "GRU_CELL",
    "INDRNN_CELL",
    "LRU_CELL",
    "LSTM_CELL",
    "MGU_CELL",
    "MINGRU_CELL",
    "MINLSTM_CELL",
    "PARAGRU_CELL",
    "PARALSTM_CELL",
    "PEEPHOLE_CELL",
    "RATE_CELLS",
    "RGLRU_CELL",
    "RNN_CELLS",
    "SLSTM_CELL",
    "SRU_CELL",
    "UNITWISE_CELLS",
    "Cell",
    "abs",
    "bernoulli",
    "candidate",
    "exp",
    "log",
    "maximum",
    "minimum",
    "noisy",
    "normal",
    "rate",
    "relu",
    "sigmoid",
    "sqrt",
    "tanh",
    "where",
]
