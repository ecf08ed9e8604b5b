"""Recurrent layers: RNN, LSTM, GRU, and Recurrent for any cell."""

from gpurnn.recurrent.kinds import GRU, LSTM, RNN
from gpurnn.recurrent.layer import Recurrent
from gpurnn.recurrent.options import Options

__all__ = ["GRU", "LSTM", "RNN", "Options", "Recurrent"]
