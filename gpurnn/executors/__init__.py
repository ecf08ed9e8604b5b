"""Executors: ways to run one layer in one direction over T steps, forward and backward, all as `contract.Executor` says.

`numpy_loop` is the oracle that the others are compared with.  A module is imported when it is first chosen, so that a
program pays only for the executor it uses.
"""

import functools
import importlib
from typing import Any

import numpy as np

from gpurnn import backend, locks, variables
from gpurnn.cells import Cell
from gpurnn.environment import compiles
from gpurnn.executors.contract import Executor

MODULES = {"numpy": "executors.numpy_loop", "compiled": "cpu.compiled", "step": "cuda.step"}
ON_CHIP = ("resident", "persistent")
AVAILABLE = {"numpy": ("compiled", "numpy"), "cuda": (*ON_CHIP, "step", "numpy")}
PRECISIONS = ("float32", "tf32", "bfloat16", "float16")  # of the products on CUDA; sums, states, parameters are float32


def check(asked: str | None) -> str | None:
    """The executor that is forced: `asked` (a layer's `executor`), or GPURNN_EXECUTOR, or None.

    Raises ValueError where the name is unknown or the executor cannot run on this backend.
    """
    name = variables.given("GPURNN_EXECUTOR") if asked is None else asked
    if name is not None and (not isinstance(name, str) or name not in AVAILABLE[backend.name]):
        choices = ", ".join(AVAILABLE[backend.name])
        source = "GPURNN_EXECUTOR" if asked is None else "executor"
        raise ValueError(f"{source}: expected one of {choices} on the {backend.name} backend, got {name!r:.80}")
    return name


def choose(
    asked: str | None,
    cell: Cell,
    H: int,
    N: int,
    dtype: np.dtype,
    precision: str,
    *,
    training: bool | None = None,
    clip: bool = False,
) -> Executor:
    """The executor for a cell of H units and a batch of N rows: the one that is forced, or the fastest that runs it.

    On a CPU that is `compiled`.  On CUDA the cheapest by the model of `kernels.plan`: `resident` where weight_hh fits one
    SM, `persistent` where it fits a group of them, `step`, which runs everything.
    training, clip: of the passes to come, so that what this GPU turns out not to run is passed over; None: not tried.
    """
    name = check(asked)
    if name == "compiled" and not compiles():
        raise ValueError("executor: compiled needs Numba's compiler, which NUMBA_DISABLE_JIT turns off here")
    if name in ON_CHIP and not cell.recurrent:
        raise ValueError(f"executor: {name} keeps weight_hh on chip, and {cell.name} has none; expected step or numpy")
    if name is not None:
        return executor(name)
    return backend.ops.fastest(cell, H, N, dtype, precision, training, clip)


@functools.cache
def executor(name: str) -> Any:  # an Executor, the ones on chip with more
    with locks.building:
        if name in ON_CHIP:
            return getattr(importlib.import_module("gpurnn.cuda.on_chip"), name.upper())
        return importlib.import_module(f"gpurnn.{MODULES[name]}")
