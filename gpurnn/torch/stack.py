"""What a module's layers are to the engine, and how PyTorch's tensors become its arrays, without a copy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from gpurnn import backend, variables
from gpurnn.cells import Cell
from gpurnn.environment import compiles
from gpurnn.executors import executor
from gpurnn.executors.contract import Executor, Weights

ENGINE_DTYPES = (torch.float32, torch.float64)
EXECUTORS = ("compiled", "numpy")


class Stack(NamedTuple):
    """Layers of one cell: what a pass is, beside its tensors.

    dropout   between layers, 0 outside training.
    executor  compiled or numpy, or None: GPURNN_EXECUTOR, or what this machine has.
    """

    cell: Cell
    layers: int
    directions: int
    bias: bool
    dropout: float
    executor: str | None

    def engine(self) -> Executor:
        """For tensors on the CPU, whatever the backend is; the oracle runs on the backend's own arrays."""
        choices = EXECUTORS if backend.xp is np else EXECUTORS[:1]
        if self.executor is not None and self.executor not in choices:
            expected = f"executor: expected one of {', '.join(choices)} for tensors on the CPU"
            raise ValueError(f"{expected}, got {self.executor!r:.80}")
        name = self.executor or variables.given("GPURNN_EXECUTOR")
        return executor(name if name in choices else "compiled" if compiles() else "numpy")

    def weights(self, arrays: Sequence, at: int) -> Weights:
        """What the engine calls the arrays of one layer in one direction, in the order of `torch.nn.RNNBase.all_weights`."""
        each = len(arrays) // (self.layers * self.directions)
        own, recurrent = arrays[at * each : (at + 1) * each], int(self.cell.recurrent)
        biases = own[1 + recurrent : 2 + 2 * recurrent] if self.bias else ()
        bias_ih, bias_hh = (*biases, None, None)[:2]
        params = own[len(own) - len(self.cell.params) :]
        return Weights(own[0], own[1] if recurrent else None, bias_ih, bias_hh, tuple(params))


def parameters_of(cell: Cell, bias: bool) -> tuple[str, ...]:
    """The kinds of parameters that a layer of this cell has: without a recurrent matrix, no bias_hh either."""
    recurrent = ("weight_hh", "bias_hh") if cell.recurrent else ()
    every = ("weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if bias else ()))
    return (*(kind for kind in every if kind.endswith("_ih") or kind in recurrent), *cell.params)


def array(tensor: Tensor) -> np.ndarray:
    """A tensor's memory, contiguous; of a tensor that is not, a copy."""
    tensor = tensor.detach()
    if tensor.is_neg() or not tensor.is_contiguous():
        tensor = tensor.resolve_neg().contiguous()
    return tensor.numpy()
