"""Executors: ways to run one layer in one direction over T steps, forward and backward.  They share one interface.

    states, tape = forward(cell, x, weights, state, rows, reverse, training)
    dx, dstate = backward(tape, dy, dstate, grads, options)

`numpy_loop` says what the arguments are; it is the oracle that the others are compared with.  A module is imported when
it is first chosen, so that a program pays only for the executor it uses.
"""

import importlib
import os
from types import ModuleType

from gpurnn import backend

MODULES = {"numpy": "numpy_loop", "compiled": "compiled"}
DEVICE_ONLY = ("resident", "persistent", "step")


def choose(asked: str | None) -> ModuleType:
    """The executor to use: `asked` (a layer's `executor`), or GPURNN_EXECUTOR, or the best for the backend.

    Raises ValueError where the name is unknown or the executor cannot run here.
    """
    name = asked or os.environ.get("GPURNN_EXECUTOR") or ("numpy" if backend.name == "cuda" else "compiled")
    if name in DEVICE_ONLY:
        raise ValueError(f"executor {name!r} is not available: expected one of {', '.join(MODULES)} on {backend.name}")
    if name not in MODULES:
        raise ValueError(f"executor: expected one of {', '.join(MODULES)}, got {name!r}")
    if name == "compiled" and backend.name == "cuda":
        raise ValueError("executor 'compiled' runs on the CPU: set GPURNN_BACKEND=numpy to use it")
    return importlib.import_module(f"gpurnn.executors.{MODULES[name]}")
