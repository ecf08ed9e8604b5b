"""Modules in torch.nn's place: its constructors, call forms, errors, names and state dicts, on this engine."""

import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from gpurnn.cells import GRU_CELL, LSTM_CELL, RNN_CELLS, Cell
from gpurnn.environment import at_most_threads
from gpurnn.executors.contract import full_rows
from gpurnn.torch import composite
from gpurnn.torch.ops import name_of
from gpurnn.torch.stack import ENGINE_DTYPES, Stack
from gpurnn.torch.sweep import Sweep, run

Fallback = Literal["allow", "warn", "raise"]


class Call(NamedTuple):
    """A sequence as the engine wants it.

    x        (T, N, I), zero behind each row's end.
    state    S tensors (L*D, N, H), in the order of the rows of x.
    lengths  (N,) of a packed sequence, longest first; None: all are T.
    """

    x: Tensor
    state: tuple[Tensor, ...]
    lengths: Tensor | None

    @property
    def live(self) -> Tensor | None:
        """(T, N): whether a row lives at a step; None: all do."""
        return None if self.lengths is None else self.lengths > torch.arange(len(self.x))[:, None]

    @property
    def rows(self) -> np.ndarray:
        """(T,): how many rows live at each step."""
        live = self.live
        return full_rows(*self.x.shape[:2]) if live is None else live.sum(1).numpy()

    def noises(self, stack: Stack) -> list[Tensor]:
        """What the output of each layer but the last is multiplied by, (T, N, D*H): torch.nn's own masks for the same seed.

        Of a packed sequence torch.nn draws for the rows that live alone.
        """
        if not stack.dropout:
            return []
        (T, N), live, like = self.x.shape[:2], self.live, self.state[0]
        width = stack.directions * like.shape[2]
        drawn = []
        for _ in range(stack.layers - 1):
            values = like.new_empty((T, N, width) if live is None else (int(live.sum()), width))
            if stack.dropout < 1:
                values.bernoulli_(1 - stack.dropout).div_(1 - stack.dropout)
            else:
                values.zero_()
            drawn.append(
                values if live is None else like.new_zeros((T, N, width)).masked_scatter_(live[..., None], values)
            )
        return drawn


class OnEngine(nn.RNNBase):
    """What all modules here have in common.

    executor  compiled or numpy (the slow oracle); None: GPURNN_EXECUTOR, or compiled.
    fallback  where the engine does not run a call (see `reason`): "allow" PyTorch's own, "warn" once, or "raise".
    """

    cell: Cell
    _all_weights: list[list[str]]
    executor: str | None = None
    fallback: Fallback = "allow"

    def reason(self, input: Tensor | PackedSequence) -> str | None:
        """Why PyTorch's own operations would run this call and not the engine; None where the engine does."""
        return self._foreign(input) or _transform()

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """y, state = module(input, hx), as torch.nn's layers are called."""
        if torch.compiler.is_compiling():
            return _outside(self, hx, *input) if isinstance(input, PackedSequence) else self._in_a_graph(input, hx)
        if _dynamo_watches() is not None:
            return _outside(self, hx, *(input if isinstance(input, PackedSequence) else [input]))
        self._update_flat_weights()
        foreign = self._foreign(input)
        if foreign is not None:
            return self._elsewhere(input, hx, foreign)
        call = self._call(input, hx)
        if call is None:  # PyTorch itself says what does not fit
            return self._elsewhere(input, hx, None)
        y, final = self._run(call)
        return self._answer(input, call, y, final)

    def _foreign(self, input: Tensor | PackedSequence) -> str | None:
        """Why this call is none that the engine could run, whatever is asked of its results."""
        data, weights = input[0] if isinstance(input, PackedSequence) else input, self._flat_weights
        if torch.jit.is_scripting() or torch.jit.is_tracing():
            return "TorchScript knows PyTorch's own operations only"
        if torch.onnx.is_in_onnx_export():
            return "ONNX export knows PyTorch's own operations only"
        if self.proj_size:
            return "proj_size: the engine has no projections"
        if data.device.type != "cpu":
            return f"device: the engine runs tensors on the CPU here, got one on {data.device.type}"
        if data.dtype not in ENGINE_DTYPES:
            return f"dtype: on a CPU the engine runs float32 and float64, got {data.dtype}"
        if torch.is_autocast_enabled("cpu"):
            return "autocast: on a CPU the engine runs float32 and float64"
        if not torch.compiler.is_compiling() and any(type(part) not in _PLAIN for part in (data, *weights)):
            return "a tensor of a class of its own, whose memory the engine does not know"
        if any(weight.dtype != data.dtype or weight.device != data.device for weight in weights):
            return f"input and parameters differ in dtype or device: {data.dtype} on {data.device}"
        return None

    def _call(self, input: Tensor | PackedSequence, hx: Any) -> Call | None:
        """None where a shape, a dtype or a type is not what torch.nn takes."""
        lengths, order = None, None
        if isinstance(input, PackedSequence):
            if input.data.dim() != 2:
                return None
            x, lengths = pad_packed_sequence(PackedSequence(input.data, input.batch_sizes))
            order = input.sorted_indices
        elif input.dim() == 2:
            x = input.unsqueeze(1)
        elif input.dim() == 3:
            x = input.transpose(0, 1) if self.batch_first else input
        else:
            return None
        if x.shape[2] != self.input_size or 0 in x.shape:
            return None
        S, shape = self.cell.states, (self.num_layers * (1 + self.bidirectional), x.shape[1], self.hidden_size)
        if hx is None:
            return Call(x, (x.new_zeros(shape),) * S, lengths)
        state = (hx,) if S == 1 else hx
        if (
            not isinstance(state, tuple | list)
            or len(state) != S
            or not all(isinstance(part, Tensor) for part in state)
        ):
            return None
        if lengths is None and input.dim() == 2:
            state = [part.unsqueeze(1) for part in state if part.dim() == 2]
        as_x = (shape, x.dtype, x.device)
        if len(state) != S or any((part.shape, part.dtype, part.device) != as_x for part in state):
            return None
        return Call(x, tuple(state if order is None else (part.index_select(1, order) for part in state)), lengths)

    def _stack(self) -> Stack:
        dropout = self.dropout if self.training else 0.0
        return Stack(self.cell, self.num_layers, 1 + self.bidirectional, self.bias, dropout, self.executor)

    def _composite(self, call: Call) -> tuple[Tensor, Sequence[Tensor]]:
        stack = self._stack()
        return composite.run(stack, call.rows, call.noises(stack), call.x, call.state, self._flat_weights)

    def _run(self, call: Call) -> tuple[Tensor, Sequence[Tensor]]:
        x, state, weights, rows = call.x, call.state, self._flat_weights, call.rows
        transform = _transform()
        if transform is not None:
            self._tell(transform)
            return self._composite(call)
        stack = self._stack()
        noise = call.noises(stack)
        with at_most_threads(torch.get_num_threads()):
            if torch.is_grad_enabled() and any(part.requires_grad for part in (x, *state, *weights)):
                y, *final = Sweep.apply(stack, rows, noise, x, *state, *weights)
            else:
                y, final, _, _ = run(stack, rows, noise, x, (*state, *weights), False)
        return y, final

    def _in_a_graph(self, input: Tensor, hx: Any) -> tuple[Any, Any]:
        """For torch.compile and torch.export: what runs is decided while they trace."""
        call = None if self._foreign(input) else self._call(input, hx)
        if call is None:
            return self._elsewhere(input, hx, None)
        x, state, weights, stack = call.x, call.state, self._flat_weights, self._stack()
        wanted = torch.is_grad_enabled() and any(part.requires_grad for part in (x, *state, *weights))
        training = self.training if torch.compiler.is_exporting() else wanted
        y, final, _ = torch.ops.gpurnn.sweep(
            name_of(stack.cell),
            *stack[1:4],
            training,
            None,
            call.noises(stack),
            x.contiguous(),
            list(state),
            list(weights),
        )
        return self._answer(input, call, y, final)

    def _answer(
        self, input: Tensor | PackedSequence, call: Call, y: Tensor, final: Sequence[Tensor]
    ) -> tuple[Tensor | PackedSequence, Any]:
        """y and the final states in the form in which input and states came."""
        out: Tensor | PackedSequence
        if isinstance(input, PackedSequence):
            out = PackedSequence(pack_padded_sequence(y, call.lengths).data, *input[1:])
            if input.unsorted_indices is not None:
                final = [part.index_select(1, input.unsorted_indices) for part in final]
        elif input.dim() == 2:
            out, final = y.squeeze(1), [part.squeeze(1) for part in final]
        else:
            out = y.transpose(0, 1) if self.batch_first else y
        return out, final[0] if self.cell.states == 1 else tuple(final)

    def _elsewhere(self, input: Tensor | PackedSequence, hx: Any, reason: str | None) -> tuple[Any, Any]:
        self._tell(reason)
        return super().forward(input, hx)  # torch.nn's own

    def _tell(self, reason: str | None) -> None:
        if reason is None or self.fallback == "allow":
            return
        text = f"{type(self).__name__} runs on PyTorch's own operations: {reason}"
        if self.fallback == "raise":
            raise RuntimeError(text)
        if self.fallback != "warn":
            raise ValueError(f"fallback: expected allow, warn or raise, got {self.fallback!r}")
        if reason not in _told:
            _told.add(reason)
            warnings.warn(text, stacklevel=4)


class LSTM(OnEngine, nn.LSTM):
    """`torch.nn.LSTM`, on this engine; see `OnEngine` for what is more."""

    cell = LSTM_CELL


class GRU(OnEngine, nn.GRU):
    """`torch.nn.GRU`, on this engine; see `OnEngine` for what is more."""

    cell = GRU_CELL


class RNN(OnEngine, nn.RNN):
    """`torch.nn.RNN`, tanh or relu, on this engine; see `OnEngine` for what is more."""

    @property
    def cell(self) -> Cell:  # type: ignore[override]
        return RNN_CELLS[self.nonlinearity]


def _transform() -> str | None:
    """What is asked of the results beyond their values and gradients, if anything."""
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms are made of PyTorch's own operations"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are made of PyTorch's own operations"
    return None


@torch.compiler.disable
def _outside(module: OnEngine, hx: Any, *parts: Any) -> tuple[Any, Any]:
    """The call out of Dynamo's sight, which would look into every function of the engine.

    Into torch.nn's LSTM, GRU and RNN it does not look either.  How many numbers a packed sequence has, no graph knows.
    """
    return module.forward(parts[0] if len(parts) == 1 else PackedSequence(*parts), hx)


def _never() -> None:
    return None


# What Dynamo has been told to do with the next function of this thread; None: nothing.
_dynamo_watches = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", _never)
_PLAIN = (Tensor, nn.Parameter, nn.Buffer)
_told: set[str] = set()

torch.serialization.add_safe_globals([LSTM, GRU, RNN])  # torch.load takes whole modules that torch.save has pickled
