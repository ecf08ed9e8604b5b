"""Executors: ways to run one layer in one direction over T steps, forward and backward.  They share one interface.

    states, tape = forward(cell, x, weights, state, rows, reverse, training, precision)
    dx, dstate = backward(tape, dy, dstate, grads, options)

`numpy_loop` says what the arguments are; it is the oracle that the others are compared with.  A module is imported when
it is first chosen, so that a program pays only for the executor it uses.
"""

import importlib
import os
from types import ModuleType

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell

MODULES = {"numpy": "numpy_loop", "compiled": "compiled", "step": "step", "resident": "resident"}
AVAILABLE = {"numpy": ("compiled", "numpy"), "cuda": ("resident", "step", "numpy")}
PRECISIONS = ("float32", "bfloat16")  # of the products on CUDA; sums, states and parameters are float32


def check(asked: str | None) -> str | None:
    """The executor that is forced: `asked` (a layer's `executor`), or GPURNN_EXECUTOR, or None.

    Raises ValueError where the name is unknown or the executor cannot run on this backend.
    """
    name = asked or os.environ.get("GPURNN_EXECUTOR") or None
    if name is not None and name not in AVAILABLE[backend.name]:
        choices = ", ".join(AVAILABLE[backend.name])
        raise ValueError(f"executor: expected one of {choices} on the {backend.name} backend, got {name!r}")
    return name


def choose(asked: str | None, cell: Cell, H: int, N: int, dtype: np.dtype, precision: str) -> ModuleType:
    """The executor for a cell of H units and a batch of N rows: the one that is forced, or the fastest that runs it.

    On a CPU that is `compiled`.  On CUDA `resident`, which waits for nothing between steps, where weight_hh fits one SM
    (in float32 about H <= 256 for an RNN and 128 for an LSTM), else `step`, which runs everything.
    """
    name = check(asked)
    if name is None and backend.name == "cuda":
        resident = importlib.import_module("gpurnn.executors.resident")
        name = "resident" if resident.fits(cell, H, N, dtype, precision) else "step"
    return importlib.import_module(f"gpurnn.executors.{MODULES[name or 'compiled']}")
