"""A module of PyTorch's for any cell."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from gpurnn.cells import CELLS, Cell
from gpurnn.executors.heads import checked_heads
from gpurnn.torch.modules import OnEngine
from gpurnn.torch.ops import name_of
from gpurnn.torch.stack import parameters_of


class Recurrent(OnEngine):
    """Layers of any cell, with the call forms, names and options of torch.nn.LSTM: y, state = module(x, state).

    cell     a `gpurnn.Cell`, or the name of one that ships.  The state is one tensor (L*D, N, H), or a tuple of S where the cell has several.
    heads    K, as for `gpurnn.Recurrent`: weight_hh is (G*H, H/K), each unit's weights from the units of its own head.
    fallback, executor   see `OnEngine`.

    Weights and biases begin uniform in +-1/sqrt(H), as torch.nn's; a cell's own parameters, (H,) each, where the cell says,
    else at 0.  A cell without a recurrent matrix has no weight_hh and no bias_hh.
    Where the engine does not run a call, PyTorch's operations run the cell's equations, step by step.
    """

    def __init__(
        self,
        cell: Cell | str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        heads: int = 1,
        device: Any = None,
        dtype: Any = None,
    ):
        if isinstance(cell, str) and cell in CELLS:
            cell = CELLS[cell]
        if not isinstance(cell, Cell):
            came = repr(cell) if isinstance(cell, str) else type(cell).__name__
            raise TypeError(f"cell: expected a gpurnn.Cell or one of {', '.join(CELLS)}, got {came}")
        if cell.random:
            raise ValueError(
                f"cell: expected one without random numbers, which modules of PyTorch have not, got {cell.name}"
            )
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta"
        )
        self.cell, self.mode, self.heads = cell, cell.name, checked_heads(heads, hidden_size, cell)
        name_of(cell)  # so that graphs know it
        self._all_weights = [self._made(names, bias, device, dtype) for names in self._all_weights]
        self._flat_weights_names = [name for names in self._all_weights for name in names]
        self._init_flat_weights()
        self.reset_parameters()

    def _made(self, names: list[str], bias: bool, device: Any, dtype: Any) -> list[str]:
        """The names of one layer in one direction, whose parameters stand in place of RNNBase's, which are of one gate."""
        suffix, (G, H) = names[0].removeprefix("weight_ih"), (self.cell.gates, self.hidden_size)
        shapes = {name: (G * H, *getattr(self, name).shape[1:]) for name in names}
        shapes["weight_hh" + suffix] = (G * H, H // self.heads)
        for name in names:
            delattr(self, name)
        own = [kind + suffix for kind in parameters_of(self.cell, bias)]
        for name in own:
            setattr(self, name, nn.Parameter(torch.empty(shapes.get(name, (H,)), device=device, dtype=dtype)))
        return own

    def reset_parameters(self) -> None:
        cell = getattr(self, "cell", None)
        if cell is None:  # RNNBase is at work
            return
        super().reset_parameters()
        rng = np.random.default_rng(int(torch.randint(2**62, ()))) if cell.init else None
        for name, weight in self.named_parameters():
            kind = name.removesuffix("_reverse").rpartition("_l")[0]
            if kind in cell.params:
                start = cell.init[kind](rng, len(weight), 1) if kind in cell.init else np.zeros(len(weight))
                with torch.no_grad():
                    weight.copy_(torch.from_numpy(np.asarray(start, np.float64).reshape(-1)))

    def flatten_parameters(self) -> None:
        """Nothing to do: cuDNN, which wants them in one piece, does not know the cell."""

    def extra_repr(self) -> str:
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"{self.cell.name}, {super().extra_repr()}{heads}"

    def _elsewhere(self, input: Tensor | PackedSequence, hx: Any, reason: str | None) -> tuple[Any, Any]:
        call = self._call(input, hx)
        if call is None:
            raise ValueError(self._expected(input, hx))
        self._tell(reason)
        y, final = self._composite(call)
        return self._answer(input, call, y, final)

    def _expected(self, input: Tensor | PackedSequence, hx: Any) -> str:
        data = input.data if isinstance(input, PackedSequence) else input
        D, S = 1 + self.bidirectional, self.cell.states
        shape = "(N, T, I)" if self.batch_first else "(T, N, I)"
        states = "one tensor" if S == 1 else f"a tuple of {S} tensors"
        came = "None" if hx is None else ", ".join(str(tuple(part.shape)) for part in ((hx,) if S == 1 else hx))
        return (
            f"{self.cell.name}: expected input {shape} with I = {self.input_size} and no dimension 0, and as state None or "
            f"{states} (L*D, N, H) = ({self.num_layers * D}, N, {self.hidden_size}) of the input's dtype; got input "
            f"{tuple(data.shape)} {data.dtype} and state {came}"
        )
