"""The operations of a training step on NumPy.

`gpurnn.cuda.ops` has the same names and arguments, and `backend.ops` is the one that goes with the backend.  What needs
Numba is imported where it is used: a program of NumPy alone never pays for it.
"""

import functools
import importlib
import math
import os
import warnings
from typing import Any

import numpy as np

from gpurnn import executors, locks
from gpurnn.cells import Cell
from gpurnn.cpu import costs, threads
from gpurnn.cpu.cross_entropy import cross_entropy as cross_entropy
from gpurnn.cpu.cross_entropy import exponentials as exponentials
from gpurnn.cpu.sums import column_sums, segment_sums
from gpurnn.cpu.updates import Updates as Updates
from gpurnn.environment import compiles
from gpurnn.executors import random
from gpurnn.parameters import Parameters
from gpurnn.parameters.buffers import ALIGNMENT
from gpurnn.parameters.values import all_finite, raise_where_not_finite

LOOKING_WAITS = False  # whether the host, to look at a value, waits for work that was given away
GRAPHS = False  # whether a step can be recorded and given again as a whole


def zeros(size: int, dtype: np.dtype) -> np.ndarray:
    """Zeros (size,) that begin on a multiple of ALIGNMENT, of which NumPy promises 16 bytes."""
    memory = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size * dtype.itemsize].view(dtype)


def memory_bytes() -> int:
    """How much memory there is; of more, an allocation may seem to succeed, and its use then ends the process."""
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 1 << 62


def clear(buffer: np.ndarray) -> None:
    """buffer[...] = 0, for a buffer of `Parameters`."""
    if buffer.nbytes < costs.CLEAR_BYTES or not compiles():
        buffer[...] = 0
    else:
        _compiled("clear").clear(buffer)


def protected(value: np.ndarray) -> np.ndarray:
    """`value` as it is handed out: read-only, for backward reads the same memory, and a change must not go unseen."""
    value = value.view()
    value.flags.writeable = False
    return value


def kept(own: dict[str, Any], values: dict[str, Any], borrowed: tuple[str, ...]) -> dict[str, Any]:
    """`values` (arrays, tuples of arrays, None) for the next window; those named in `borrowed`, the caller's, are copied."""
    return {name: value.copy() if name in borrowed and value is not None else value for name, value in values.items()}


def restart(step: int) -> None:
    """Makes `step` the number of updates so far, for messages of what is found late; NumPy finds everything at once."""


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b for matrices, each with unit stride along one axis."""
    if a.shape[0] * a.shape[1] * b.shape[1] <= costs.BLAS_PRODUCT:
        return a @ b
    with threads.one_blas_thread:
        return threads.matmul(a, b)


def add_product(target: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """target += a b, as in `product`."""
    target += product(a, b)


def add_columns(target: np.ndarray, values: np.ndarray) -> None:
    """target (C,) += the sums of the columns of values (R, C)."""
    target += column_sums(values)


def gather(weight: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """weight (V, dim), tokens of any shape -> (*tokens.shape, dim).  ValueError for a token outside [0, V)."""
    last = len(weight) - 1
    if tokens.size and (tokens.min() < 0 or tokens.max() > last):
        raise ValueError(f"tokens: expected values from 0 to {last}, got {tokens.min()} to {tokens.max()}")
    return weight[tokens]


def add_rows(target: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """target[rows[k]] += values[k], rows repeated as they may be, always in the same order of additions."""
    if not rows.size:
        return
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    target[ordered[starts]] += segment_sums(values[order], starts)


def norm(grads: Parameters) -> Any:
    """The L2 norm of all gradients together.  FloatingPointError with the name of one that is not finite."""
    squares = _sum_of_squares(grads.flat)
    if 1e-200 < squares < math.inf:
        return math.sqrt(squares)
    check_finite(grads)
    peak = max((float(abs(grad).max()) for grad in grads.values() if grad.size), default=0.0)
    return 0.0 if peak == 0 else peak * math.sqrt(_sum_of_squares(grads.flat, peak))


def clip_norm(grads: Parameters, max_norm: float) -> Any:
    """Scales all gradients so that their norm is at most `max_norm`; returns the norm before.  Raises as `norm` does."""
    found = norm(grads)
    if found > max_norm:
        flat = grads.flat
        with np.errstate(all="ignore"):  # what underflows is 0, whatever the caller wants to hear of
            flat *= max_norm / found
    return found


def check_finite(grads: Parameters, allow_inf: bool = False) -> None:
    """FloatingPointError with the name of the first gradient that has NaN in it, or without `allow_inf` an infinity."""
    if not all_finite(grads.flat):
        raise_where_not_finite(grads, allow_inf)


def advance(calls: np.ndarray) -> Any:
    """calls (1,) int64: one more than it was; returns what it was."""
    call = int(calls[0])
    calls += 1
    return call


def drop(x: np.ndarray, seed: int, call: Any, threshold: int, scale: np.floating) -> np.ndarray:
    """x times scale where a value stays, times 0 elsewhere.  call: its number, as `advance` gives it."""
    if compiles():
        return _compiled("dropout").drop(x, seed, call, threshold, scale)
    keeps = random.words(seed, call, x.size).reshape(x.shape) >= threshold
    return x * np.where(keeps, scale, x.dtype.type(0))


@functools.cache
def _compiled(name: str) -> Any:
    """A module of this room that needs Numba."""
    with locks.building:
        return importlib.import_module(f"gpurnn.cpu.{name}")


def _sum_of_squares(flat: np.ndarray, unit: float = 1.0) -> float:
    """Sum of (flat / unit)^2 in float64: not finite where a value is not, or where float64's squares overflow."""
    total = 0.0
    work: np.ndarray = np.empty(min(flat.size, costs.BLAS_SUM))
    with np.errstate(all="ignore"):
        for start in range(0, flat.size, costs.BLAS_SUM):
            block = flat[start : start + costs.BLAS_SUM]
            wide = work[: block.size]
            wide[...] = block
            if unit != 1.0:
                wide /= unit
            total += float(wide.dot(wide))
    return total


def fastest(
    cell: Cell, H: int, N: int, dtype: np.dtype, precision: str, training: bool | None, clip: bool, heads: int
) -> Any:
    """The executor for such passes where none is forced: see `executors.choose`."""
    return executors.executor(_usual())


@functools.cache
def _usual() -> str:
    """What runs on a CPU where nothing is forced.  Warns, once, where that is the slow one."""
    if compiles():
        return "compiled"
    warnings.warn("NUMBA_DISABLE_JIT is set: layers run on NumPy alone, many times slower", stacklevel=2)
    return "numpy"
