"""Layers of any cell in PyTorch's own operations, from the cell's trace: slow, and right wherever PyTorch is.

It stands in where the engine does not run: gradients of gradients, torch.func, forward-mode derivatives, 16-bit numbers on
a CPU, autocast, ONNX export, and other devices.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from gpurnn.cells import Cell
from gpurnn.torch.stack import Stack

ON_TENSORS = SimpleNamespace(
    add=torch.add,
    sub=torch.sub,
    mul=torch.mul,
    div=torch.div,
    maximum=torch.maximum,
    minimum=torch.minimum,
    less=torch.lt,
    less_equal=torch.le,
    where=torch.where,
    neg=torch.neg,
    abs=torch.abs,
    exp=torch.exp,
    log=torch.log,
    sqrt=torch.sqrt,
    tanh=torch.tanh,
)


def run(
    stack: Stack,
    rows: np.ndarray,
    noises: Sequence[Tensor],
    x: Tensor,
    state: Sequence[Tensor],
    weights: Sequence[Tensor],
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y (T, N, D*H) and S final states (L*D, N, H); see `sweep.run`."""
    finals = []
    for layer in range(stack.layers):
        outputs = []
        for direction in range(stack.directions):
            at = layer * stack.directions + direction
            y, final = _one(stack, rows, x, [part[at] for part in state], weights, at)
            outputs.append(y)
            finals.append(final)
        x = torch.cat(outputs, 2)
        if noises and layer < stack.layers - 1:
            x = x * noises[layer]
    return x, tuple(torch.stack(parts) for parts in zip(*finals, strict=True))


def _one(
    stack: Stack, rows: np.ndarray, x: Tensor, state: list[Tensor], weights: Sequence[Tensor], at: int
) -> tuple[Tensor, list[Tensor]]:
    """One layer in one direction."""
    given, gates = stack.weights(weights, at), stack.cell.gates
    (T, N), reverse = x.shape[:2], at % stack.directions == 1
    gates_x = linear(x, given.weight_ih, given.bias_ih)
    outputs: list[Tensor] = [x] * T
    for t in reversed(range(T)) if reverse else range(T):
        living = int(rows[t])
        before = [part[:living] for part in state]
        x_of, r_of = gates_x[t, :living].chunk(gates, -1), ()
        if given.weight_hh is not None:
            r_of = _recurrent(before[0], given.weight_hh, given.bias_hh).chunk(gates, -1)
        after = _step(stack.cell, x_of, r_of, before, given.params)
        outputs[t] = after[0]
        if living < N:
            outputs[t] = torch.cat([after[0], after[0].new_zeros(N - living, after[0].shape[1])])
            after = [torch.cat([new, old[living:]]) for new, old in zip(after, state, strict=True)]
        state = after
    return torch.stack(outputs), state


def _recurrent(h: Tensor, weight_hh: Tensor, bias_hh: Tensor | None) -> Tensor:
    """h (rows, H) -> r (rows, G*H), in heads each unit by its own head's units: see `gpurnn.executors.heads`."""
    (rows, H), width = h.shape, weight_hh.shape[1]
    if width == H:
        return linear(h, weight_hh, bias_hh)
    blocks = weight_hh.reshape(-1, H // width, width, width)
    r = torch.einsum("nkj,gkij->ngki", h.reshape(rows, H // width, width), blocks).reshape(rows, len(weight_hh))
    return r if bias_hh is None else r + bias_hh


def _step(cell: Cell, x: Sequence, r: Sequence, state: Sequence, params: Sequence) -> list[Tensor]:
    """The cell's forward, S arrays (rows, H)."""
    graph, like = cell.trace.forward, state[0]
    given = {"x": x, "r": r, "state": state, "param": params}

    def value_of(index: int) -> Tensor | None:
        op, _, name = graph.nodes[index]
        return given[name[0]][name[1]] if op == "input" else None

    def constant(value: float) -> Tensor:
        return torch.full((), value, dtype=like.dtype, device=like.device)

    operations = SimpleNamespace(**vars(ON_TENSORS), constant=constant)
    outputs = graph.evaluate(operations, [symbol.index for symbol in cell.trace.next_state], value_of)
    return [value.expand_as(like) for value in outputs]
