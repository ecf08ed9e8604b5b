"""The engine as operations that torch.compile and torch.export take into their graphs: gpurnn::sweep and its backward.

A graph holds tensors and plain values.  So a cell is known there by name, and what backward needs is a list of tensors
that the first operation gives and the second one takes.
"""

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpurnn.cells import CELLS, Cell
from gpurnn.environment import at_most_threads
from gpurnn.executors.contract import full_rows
from gpurnn.torch.stack import Stack
from gpurnn.torch.sweep import EMPTY, buffers_of, filled, go_back, run

_cells: dict[str, Cell] = dict(CELLS)


def name_of(cell: Cell) -> str:
    """The name of a cell in graphs: its own where it ships, else with a digest of its mathematics behind it."""
    if CELLS.get(cell.name) is cell:
        return cell.name
    name = f"{cell.name}-{sha256(cell.trace.text.encode()).hexdigest()[:16]}"
    _cells.setdefault(name, cell)
    return name


def _stack(cell: str, layers: int, directions: int, bias: bool) -> Stack:
    if cell not in _cells:
        raise ValueError(
            f"gpurnn::sweep: no cell {cell!r} is known in this process; of a cell of your own, first make a "
            "gpurnn.torch.Recurrent, then load the graph"
        )
    return Stack(_cells[cell], layers, directions, bias, 0.0, None)


def _rows(rows: Tensor | None, x: Tensor) -> np.ndarray:
    return full_rows(x.shape[0], x.shape[1]) if rows is None else rows.numpy()


@torch.library.custom_op("gpurnn::sweep", mutates_args=(), device_types="cpu")
def sweep(
    cell: str,
    layers: int,
    directions: int,
    bias: bool,
    training: bool,
    rows: Tensor | None,
    noises: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, final states, and with training what backward needs; see `gpurnn.torch.sweep.run`.  No two of them share memory."""
    stack = _stack(cell, layers, directions, bias)
    with at_most_threads(torch.get_num_threads()):
        y, final, tapes, read = run(stack, _rows(rows, x), noises, x, (*state, *weights), training)
    if not training:
        return y.clone(), final, []
    return y.clone(), final, [*(part.clone() for part in read), *buffers_of(tapes)]  # y and read show parts of buffers


@sweep.register_fake
def _(
    cell: str,
    layers: int,
    directions: int,
    bias: bool,
    training: bool,
    rows: Tensor | None,
    noises: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    own, (T, N, _), H = _stack(cell, layers, directions, bias).cell, x.shape, state[0].shape[2]
    kept = []
    if training:
        kept += [x.new_empty((T, N, directions * H)) for _ in range(layers - 1)]
        for _ in range(layers * directions):
            kept += [x.new_empty((T, N, own.trace.slots * H)), x.new_empty((T + 1, N, H))]
            kept.append(x.new_empty((own.states - 1, T + 1, N, H)))
    return x.new_empty((T, N, directions * H)), [torch.empty_like(part) for part in state], kept


@torch.library.custom_op("gpurnn::sweep_backward", mutates_args=(), device_types="cpu")
def sweep_backward(
    cell: str,
    layers: int,
    directions: int,
    bias: bool,
    rows: Tensor | None,
    noises: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    dy: Tensor,
    dfinal: Sequence[Tensor],
) -> list[Tensor]:
    """The gradients of x, of the initial states and of the weights."""
    stack, read = _stack(cell, layers, directions, bias), [x, *kept[: layers - 1]]
    tapes = filled([EMPTY] * (layers * directions), kept[layers - 1 :])
    with at_most_threads(torch.get_num_threads()):
        return go_back(stack, _rows(rows, x), noises, read, (*state, *weights), tapes, dy, dfinal, keep=True)


@sweep_backward.register_fake
def _(
    cell: str,
    layers: int,
    directions: int,
    bias: bool,
    rows: Tensor | None,
    noises: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
    kept: Sequence[Tensor],
    dy: Tensor,
    dfinal: Sequence[Tensor],
) -> list[Tensor]:
    return [torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, *state, *weights)]


def _set_up(ctx: Any, inputs: tuple, output: tuple) -> None:
    cell, layers, directions, bias, training, rows, noises, x, state, weights = inputs
    kept = output[2]
    ctx.training = training
    ctx.static = cell, layers, directions, bias
    ctx.counts = len(noises), len(state), len(weights)
    ctx.save_for_backward(rows, x, *noises, *state, *weights, *kept)


def _backward(ctx: Any, dy: Tensor | None, dfinal: list[Tensor | None], _: Any) -> tuple:
    if not ctx.training:
        raise RuntimeError("gpurnn::sweep: this graph was traced for inference, and kept nothing for a backward pass")
    rows, x, *saved = ctx.saved_tensors
    parts = []
    for count in ctx.counts:
        parts.append(saved[:count])
        saved = saved[count:]
    noises, state, weights = parts
    dy = x.new_zeros((*x.shape[:2], ctx.static[2] * state[0].shape[2])) if dy is None else dy
    ends = [torch.zeros_like(part) if d is None else d for d, part in zip(dfinal, state, strict=True)]
    found = torch.ops.gpurnn.sweep_backward(*ctx.static, rows, noises, x, state, weights, saved, dy, ends)
    dstate, dweights = found[1 : 1 + len(state)], found[1 + len(state) :]
    return None, None, None, None, None, None, [None] * len(noises), found[0], dstate, dweights


sweep.register_autograd(_backward, setup_context=_set_up)
