"""The operations of a training step on CUDA: the names and arguments of `gpurnn.cpu.ops`.

Nothing here waits for the device or copies from the host, so all of it can be captured.  What is wrong with the values
goes to the record of `faults`.  It imports Numba.
"""

from typing import Any

import numpy as np

from gpurnn import backend, executors
from gpurnn.cells import Cell
from gpurnn.cuda import device, faults, launches, on_chip
from gpurnn.cuda.launches import add_rows as add_rows
from gpurnn.cuda.launches import advance as advance
from gpurnn.cuda.launches import drop as drop
from gpurnn.cuda.launches import gather as gather
from gpurnn.cuda.moves import Moves
from gpurnn.cuda.updates import Updates as Updates
from gpurnn.parameters import Parameters
from gpurnn.types import Array

LOOKING_WAITS = True
GRAPHS = True


def zeros(size: int, dtype: np.dtype) -> Array:
    return backend.xp.zeros(size, dtype)  # CuPy promises 512 bytes


def memory_bytes() -> int:
    """No limit of ours: CuPy says at once what does not fit."""
    return 1 << 62


def clear(buffer: Array) -> None:
    buffer[...] = 0


def protected(value: Array) -> Array:
    return value


def kept(own: dict[str, Any], values: dict[str, Any], borrowed: tuple[str, ...]) -> dict[str, Any]:
    """Copies in memory of `own`, always the same, where a captured step finds them."""
    moves = Moves()
    found = {name: _kept(own, name, value, moves) for name, value in values.items()}
    moves.run()
    return found


def _kept(own: dict[str, Any], name: str, value: Any, moves: Moves) -> Any:
    if value is None:
        return value
    if isinstance(value, tuple):
        return tuple(_kept(own, f"{name}{s}", part, moves) for s, part in enumerate(value))
    kind = f"{name} {value.shape} {value.dtype}"
    if kind not in own:
        own[kind] = backend.xp.empty(value.shape, value.dtype)
    if own[kind] is not value:
        moves.copy(own[kind], value)
    return own[kind]


def restart(step: int) -> None:
    faults.restart(step)


def product(a: Array, b: Array) -> Array:
    return device.product(a, b, backend.xp.empty((a.shape[0], b.shape[1]), a.dtype), _exact(a))


def add_product(target: Array, a: Array, b: Array) -> None:
    device.product(a, b, target, _exact(a), add=True)


def _exact(a: Array) -> str:
    return "float64" if a.dtype == np.float64 else "float32"


def add_columns(target: Array, values: Array) -> None:
    contiguous = backend.xp.ascontiguousarray(values)
    device.add_columns(contiguous, values.shape[1], target, first=(0,), second=(), start=0)


def cross_entropy(logits: Array, targets: Array, ignore: int | None, reduction: str) -> tuple[Array, Array]:
    count: Any = 1
    if reduction == "mean":
        count = max(targets.size, 1) if ignore is None else backend.xp.maximum((targets != ignore).sum(), 1)
    return launches.cross_entropy(logits, targets, ignore, count, reduction != "none")


def exponentials(logits: Array, axis: int) -> tuple[Array, Array]:
    xp = backend.xp
    dtype = xp.promote_types(logits.dtype, xp.float32)
    shift = logits.max(axis=axis, keepdims=True)
    work = xp.subtract(logits, shift, dtype=dtype)
    return xp.exp(work, out=work), shift.astype(xp.float64)


def norm(grads: Parameters) -> Any:
    return launches.norm(grads)[0]


def clip_norm(grads: Parameters, max_norm: float) -> Any:
    found = launches.norm(grads, max_norm)
    launches.scale(grads, found)
    return found[0]


def check_finite(grads: Parameters, allow_inf: bool = False) -> None:
    """By `gpurnn.synchronize`; where infinities are allowed, NaN stays for the optimiser to find."""
    if not allow_inf:
        launches.norm(grads)


def fastest(cell: Cell, H: int, N: int, dtype: np.dtype, precision: str, training: bool | None, clip: bool) -> Any:
    if not cell.recurrent:
        return executors.executor("step")
    while True:
        name = on_chip.fastest(cell, H, N, dtype, precision)
        engine = executors.executor(name)
        if training is None or name == "step" or engine.runs(cell, H, N, precision, training, clip):
            return engine
