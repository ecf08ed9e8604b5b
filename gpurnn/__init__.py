"""Recurrent networks trained by backpropagation through time, from one cell definition, on NVIDIA GPUs and CPUs."""

import importlib as _importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from gpurnn import startup  # noqa: F401 (first: it says what is wrong with the environment)

# isort: split
from gpurnn import backend, initializers
from gpurnn import locks as _locks
from gpurnn._version import __version__
from gpurnn.bptt import TruncatedBPTT, full_bptt
from gpurnn.cells import Cell, abs, exp, log, maximum, minimum, relu, sigmoid, sqrt, tanh, where
from gpurnn.cuda.capture import captured
from gpurnn.cuda.faults import synchronize
from gpurnn.environment import set_num_threads
from gpurnn.layers import Dropout, Embedding, Linear, Pool
from gpurnn.losses import (
    accuracy,
    binary_cross_entropy,
    huber,
    mean_squared_error,
    perplexity,
    softmax,
    softmax_cross_entropy,
)
from gpurnn.model import Model, SequenceModel
from gpurnn.optim import SGD, Adam, AdamW, RMSprop, schedules
from gpurnn.optim.clipping import clip_grad_norm, clip_grad_value, grad_norm, zero_grad
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent
from gpurnn.saving import load, save

if _TYPE_CHECKING:
    from gpurnn.app.character_model import load_run
    from gpurnn.diagnose.check import GradientError, check_gradients
    from gpurnn.diagnose.monitor import GradientWarning, Monitor

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "SGD",
    "Adam",
    "AdamW",
    "Cell",
    "Dropout",
    "Embedding",
    "GradientError",
    "GradientWarning",
    "Linear",
    "Model",
    "Monitor",
    "Pool",
    "RMSprop",
    "Recurrent",
    "SequenceModel",
    "TruncatedBPTT",
    "__version__",
    "abs",
    "accuracy",
    "backend",
    "binary_cross_entropy",
    "captured",
    "check_gradients",
    "clip_grad_norm",
    "clip_grad_value",
    "exp",
    "full_bptt",
    "grad_norm",
    "huber",
    "initializers",
    "load",
    "load_run",
    "log",
    "maximum",
    "mean_squared_error",
    "minimum",
    "perplexity",
    "relu",
    "save",
    "schedules",
    "set_num_threads",
    "sigmoid",
    "softmax",
    "softmax_cross_entropy",
    "sqrt",
    "synchronize",
    "tanh",
    "where",
    "zero_grad",
]

# Imported when asked for: rooms, and names in them.
_ROOMS = {"checkpoint": "gpurnn.app.checkpoint"} | {
    room: f"gpurnn.{room}" for room in ("diagnose", "lab", "plot", "torch")
}
_NAMES = {
    "GradientError": "gpurnn.diagnose.check",
    "GradientWarning": "gpurnn.diagnose.monitor",
    "Monitor": "gpurnn.diagnose.monitor",
    "check_gradients": "gpurnn.diagnose.check",
    "load_run": "gpurnn.app.character_model",
}


def __getattr__(name: str) -> _Any:
    if name in _ROOMS or name in _NAMES:
        with _locks.building:  # no fork meanwhile, whose child would wait for this import
            if name in _ROOMS:
                return _importlib.import_module(_ROOMS[name])
            return getattr(_importlib.import_module(_NAMES[name]), name)
    raise AttributeError(f"module 'gpurnn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_ROOMS})
