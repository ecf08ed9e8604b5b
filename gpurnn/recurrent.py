"""Recurrent layers: RNN, LSTM, GRU, and Recurrent for any cell.  Several layers, both directions, one executor below."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import numpy as np

from gpurnn import backend
from gpurnn.arguments import (
    Turn,
    checked,
    fitting,
    flow_array,
    generator,
    number,
    one_of,
    positive,
    probability,
    supported,
    switch,
    whole,
)
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL, RNN_CELLS, Cell, noisy
from gpurnn.cpu.threads import one_blas_thread
from gpurnn.executors import PRECISIONS, check
from gpurnn.executors.contract import Weights
from gpurnn.executors.random import Masks
from gpurnn.initializers import Initializer, chosen, drawn, glorot_uniform, orthogonal, zeros
from gpurnn.layers import Layer
from gpurnn.sequence import prepare_lengths, run
from gpurnn.types import Array, RecurrentBackward


class Options(TypedDict, total=False):
    """What every recurrent layer takes by name; see `Recurrent`."""

    bias: bool
    bidirectional: bool
    dropout: float
    zoneout: float | Sequence[float] | Mapping[str, float]
    recurrent_dropout: float
    noise: float
    trainable_h0: bool
    clip_in_time: float | None
    init: Mapping[str, str | Initializer] | None
    dtype: Any
    precision: str
    executor: str | None
    rng: Any


class Recurrent(Layer):
    """Layers of any cell over a sequence, time-major: T steps, N batch rows, I inputs, H hidden units.

    cell            a `gpurnn.Cell`, or the name of one that ships: indrnn, mingru, ... (`gpurnn.cells.CELLS`).
    num_layers      L; layer k reads what layer k-1 wrote.
    bias            False: no bias_ih and bias_hh.
    bidirectional   D = 2 directions, each starting at a row's own end; outputs stand side by side.
    dropout         between layers, not behind the last; see `Dropout`.  With one layer it means nothing, and warns.
    zoneout         the probability in [0, 1) with which a unit's state stays as it was (Krueger et al. 2017); for a cell of
                    several states one for each, (0.05, 0.5) or {"c": 0.5}.
    recurrent_dropout   of what a cell adds to its memory, at each step anew (Semeniuta et al. 2016): lstm, gru, mingru,
                    minlstm, and cells that mark it by `cells.candidate`.
    noise           the standard deviation of a normal number added to each gate before its nonlinearity, at each step.
                    These three are functions of a number's place, as `cells.bernoulli` says, and their means without
                    training; see `cells.noisy`.
    trainable_h0    initial states are parameters (L*D, H): h_0, c_0, used where no state is given.
    clip_in_time    the largest magnitude of the gradient that a step passes back to the step before (as Graves 2013
                    clips within LSTM; here elementwise, for every state); None: no limit.
    init            initialisers by parameter, e.g. {"weight_hh": "identity"}: functions or names in `gpurnn.initializers`.
                    Default: weight_ih Glorot uniform, weight_hh orthogonal, each per gate; `cell.init`; everything else 0.
    dtype           float32 or float64.
    precision       of the matrix products on CUDA: float32, exact, or tf32, bfloat16 or float16, both factors rounded to
                    it (and tanh good to 2^-11).  Sums, states and parameters are float32 in all of them.  In float16
                    gradients under 6e-8 become 0 on their way through time, and what is beyond 65504 becomes inf: scale
                    the loss, or use bfloat16.  On a CPU all is always exact.
    executor        forces one: compiled or numpy on a CPU; resident, persistent, step or numpy on CUDA.  None:
                    GPURNN_EXECUTOR, or the best.

    Parameters have PyTorch's names, shapes and gate order: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H), bias_ih_l0,
    bias_hh_l0 (G*H,), with _reverse for the second direction; a cell's own are `<name>_l0` (H,).  A cell that never reads
    r has no weight_hh and no bias_hh.
    """

    def __init__(
        self,
        cell: Cell | str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        bias: bool = True,
        bidirectional: bool = False,
        dropout: float = 0.0,
        zoneout: float | Sequence[float] | Mapping[str, float] = 0.0,
        recurrent_dropout: float = 0.0,
        noise: float = 0.0,
        trainable_h0: bool = False,
        clip_in_time: float | None = None,
        init: Mapping[str, str | Initializer] | None = None,
        dtype: Any = "float32",
        precision: str = "float32",
        executor: str | None = None,
        rng: Any = None,
    ):
        if isinstance(cell, str) and cell in CELLS:
            cell = CELLS[cell]
        if not isinstance(cell, Cell):
            came = repr(cell) if isinstance(cell, str) else type(cell).__name__
            raise TypeError(f"cell: expected a gpurnn.Cell or one of {', '.join(CELLS)}, got {came}")
        if executor is not None:
            check(executor)
        cell = noisy(cell, zoneout=zoneout, recurrent_dropout=recurrent_dropout, noise=noise)
        self.cell = cell
        self.input_size, self.hidden_size = whole("input_size", input_size), whole("hidden_size", hidden_size)
        self.num_layers = whole("num_layers", num_layers)
        self.directions = 1 + switch("bidirectional", bidirectional)
        self.bias, self.trainable_h0 = switch("bias", bias), switch("trainable_h0", trainable_h0)
        self.clip_in_time = None if clip_in_time is None else positive("clip_in_time", clip_in_time)
        self.dropout, self.executor = probability("dropout", dropout), executor
        if self.dropout and self.num_layers == 1:
            warnings.warn(
                f"dropout: it acts between layers, and of one layer {dropout} means nothing", stacklevel=_outside()
            )
        self.precision = _precision(precision, supported(dtype))
        self.rng = generator(rng)
        self.masks = Masks(self.rng)
        matrices = ("weight_ih", "weight_hh") if cell.recurrent else ("weight_ih",)
        self._biases = tuple(name.replace("weight", "bias") for name in matrices) if bias else ()
        kinds = matrices, self._biases, cell.params
        self._names = [  # of each layer in each direction
            [tuple(name + _suffix(layer, direction) for name in names) for names in kinds]
            for layer, direction in itertools.product(range(self.num_layers), range(self.directions))
        ]
        shapes, symbols = self._shapes()
        super().__init__(shapes, dtype, symbols)
        with one_blas_thread:  # of orthogonal's QR, whose threads would go on spinning for a while
            self._initialise({} if init is None else init)

    def _shapes(self) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
        G, H, D = self.cell.gates, self.hidden_size, self.directions
        shapes: dict[str, tuple[int, ...]] = {}
        symbols: dict[str, str] = {}
        wide = f"{G}*H"
        for layer, direction in itertools.product(range(self.num_layers), range(D)):
            inputs, letter = (self.input_size, "I") if layer == 0 else (D * H, f"{D}*H" if D > 1 else "H")
            own: dict[str, tuple[tuple[int, ...], str]]
            own = {"weight_ih": ((G * H, inputs), f"({wide}, {letter})")}
            if self.cell.recurrent:
                own["weight_hh"] = (G * H, H), f"({wide}, H)"
            own |= {name: ((G * H,), f"({wide},)") for name in self._biases}
            own |= {name: ((H,), "(H,)") for name in self.cell.params}
            for name, (shape, symbol) in own.items():
                full = name + _suffix(layer, direction)
                shapes[full], symbols[full] = shape, symbol
        if self.trainable_h0:
            for name in self.cell.state_names:
                shapes[f"{name}_0"], symbols[f"{name}_0"] = (self.num_layers * D, H), "(L*D, H)"
        return shapes, symbols

    def _initialise(self, init: Mapping[str, str | Initializer]) -> None:
        gated: dict[str, Initializer] = {"weight_ih": glorot_uniform}
        if self.cell.recurrent:
            gated["weight_hh"] = orthogonal
        gated |= dict.fromkeys(self._biases, zeros)
        initial = [f"{name}_0" for name in self.cell.state_names] if self.trainable_h0 else []
        kinds = chosen(gated | dict.fromkeys((*self.cell.params, *initial), zeros) | dict(self.cell.init), init)
        for name, shape in self.params.shapes.items():
            kind = name if name in initial else name.removesuffix("_reverse").rsplit("_l", 1)[0]
            self._set(name, drawn(kinds[kind], kind, self.rng, self.cell.gates if kind in gated else 1, shape))

    @overload
    def __call__(
        self, x: Array, state: Any = ..., *, lengths: Any = ..., training: Literal[True] = ..., copy: bool = ...
    ) -> tuple[Array, Any, RecurrentBackward]: ...
    @overload
    def __call__(
        self, x: Array, state: Any = ..., *, lengths: Any = ..., training: Literal[False], copy: bool = ...
    ) -> tuple[Array, Any, None]: ...
    @overload
    def __call__(
        self, x: Array, state: Any = ..., *, lengths: Any = ..., training: bool, copy: bool = ...
    ) -> tuple[Array, Any, RecurrentBackward | None]: ...
    def __call__(
        self, x: Array, state: Any = None, *, lengths: Any = None, training: bool = True, copy: bool = True
    ) -> tuple[Array, Any, RecurrentBackward | None]:
        """Runs over a sequence: `y, state, backward = layer(x)`.

        x        (T, N, I).  It is copied for backward; with copy=False it is kept, and must not change before.  The
                 parameters are kept in any case: change them behind backward.
        state    initial states (L*D, N, H): one array, or a tuple where the cell has several, (h, c) for an LSTM;
                 None, for all or one of the tuple: zeros, or the trained initial state.
        lengths  N whole numbers in 0..T: each row's own length.  Behind it y = 0, and x and dy are not read.
        Returns y (T, N, D*H), the states behind each row's last step (L*D, N, H), and
        `dx, dstate0 = backward(dy, dstate=None, keep=False, flow=None)`, None without training.  It adds to `grads`.
        dy may be None, for a loss of the final state alone; `keep` lets it be called again; `flow`, a float64 array
        (L*D, S, T), is filled with the L2 norms of dL/dstate_t over batch and units, the states taken as they are
        carried: for an LSTM h_t and c_t side by side, dL/dc_t without its way through h_t.
        Raises ValueError where a shape is wrong, RuntimeError where backward is called again without keep,
        or by a second thread while the first is in it.
        """
        training, copy = switch("training", training), switch("copy", copy)
        x = backend.asarray(x, self.dtype, "x")
        if x.ndim != 3 or x.shape[2] != self.input_size:
            raise ValueError(f"x: expected (T, N, I) = (T, N, {self.input_size}), got {x.shape}")
        T, N, _ = x.shape
        initial = self.unpacked(state, N, "state", self.trainable_h0)
        prepared = prepare_lengths(lengths, T, N)
        if training and copy and prepared is None:  # else the engine is given a copy in any case
            x = x.copy()
        y, final, back = run(self, x, initial, prepared, training)
        if back is None:
            return y, self._packed(final), None
        return backend.ops.protected(y), self._packed(final), self._backward(back, T, N, self._given(state))

    def _backward(self, back: Callable, T: int, N: int, given: tuple[bool, ...]) -> RecurrentBackward:
        turn = Turn()

        def backward(dy: Array, dstate: Any = None, keep: bool = False, flow: Array | None = None) -> tuple[Array, Any]:
            with turn:
                keep, shape = switch("keep", keep), (T, N, self.directions * self.hidden_size)
                if dy is None:
                    dy = backend.xp.broadcast_to(backend.xp.zeros((), self.dtype), shape)
                dy = checked(dy, self.dtype, "dy", shape, "(T, N, D*H)")
                dfinal = self.check_backward(dstate, flow, T, N)
                turn.gone = not keep
                dx, dinitial = back(dy, dfinal, keep, flow)
                for name, part, was_given in zip(self.cell.state_names, dinitial, given, strict=True):
                    if self.trainable_h0 and not was_given:
                        self.grads[f"{name}_0"][...] += part.sum(1, dtype="float64").astype(self.dtype)
                return dx, self._packed(dinitial)

        return backward

    def check_backward(self, dstate: Any, flow: Array | None, T: int, N: int) -> tuple[Array, ...] | None:
        """dL/d(final state), one array per state of the cell, or None; ValueError where `dstate` or `flow` do not fit."""
        flow_array(flow, (self.num_layers * self.directions, self.cell.states, T))
        return None if dstate is None else self.unpacked(dstate, N, "dstate")

    def weights(self, values: Mapping[str, Array], layer: int, direction: int) -> Weights:
        """What one layer in one direction has in `values`, which are `params` or `grads`."""
        matrices, biases, params = self._names[layer * self.directions + direction]
        weight_ih, weight_hh, *_ = *(values[name] for name in matrices), None
        bias_ih, bias_hh, *_ = *(values[name] for name in biases), None, None
        return Weights(weight_ih, weight_hh, bias_ih, bias_hh, tuple(values[name] for name in params))

    def _add_to_gate(self, gate: int, value: float) -> None:
        """Adds to bias_ih of one gate, in every layer and direction."""
        H = self.hidden_size
        for name in self.params:
            if name.startswith("bias_ih"):
                self.params[name][gate * H : (gate + 1) * H] += value

    def unpacked(self, state: Any, N: int, what: str, trained: bool = False) -> tuple[Array, ...]:
        """One array (L*D, N, H) per state of the cell; for None, of the whole or of a part, zeros or what was trained."""
        S, shape = self.cell.states, (self.num_layers * self.directions, N, self.hidden_size)
        if state is None:
            state = (None,) * S
        elif S == 1:
            state = (state,)
        if not isinstance(state, tuple | list) or len(state) != S:
            came = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
            names = ", ".join(self.cell.state_names)
            raise ValueError(
                f"{what}: expected a tuple of {S} arrays ({names}) of shape (L*D, N, H) = {shape}, got {came}"
            )
        parts = []
        for name, part in zip(self.cell.state_names, state, strict=True):
            if part is not None:
                parts.append(checked(part, self.dtype, f"{what} {name}", shape, "(L*D, N, H)"))
            elif trained:
                parts.append(backend.xp.broadcast_to(self.params[f"{name}_0"][:, None, :], shape))
            else:
                parts.append(backend.xp.zeros(shape, self.dtype))
        return tuple(parts)

    def _given(self, state: Any) -> tuple[bool, ...]:
        """Of each state of the cell, whether the caller gave it."""
        if self.cell.states == 1 or state is None:
            return (state is not None,) * self.cell.states
        return tuple(part is not None for part in state)

    def _packed(self, states: tuple[Array, ...]) -> Any:
        return states[0] if self.cell.states == 1 else states


class RNN(Recurrent):
    """The vanilla recurrent network of Elman 1990, h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh); see `Recurrent`.

    nonlinearity: tanh, relu, sigmoid or identity.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        nonlinearity: str = "tanh",
        **options: Unpack[Options],
    ):
        if not isinstance(nonlinearity, str) or nonlinearity not in RNN_CELLS:
            raise ValueError(f"nonlinearity: expected one of {', '.join(RNN_CELLS)}, got {nonlinearity!r}")
        super().__init__(RNN_CELLS[nonlinearity], input_size, hidden_size, num_layers, **options)


class LSTM(Recurrent):
    """Long short-term memory, gates i, f, g, o as in PyTorch; the state is the pair (h, c).  See `Recurrent`.

    forget_bias: added to bias_ih of the forget gate at the start (Gers et al. 2000; 1 after Jozefowicz et al. 2015), so
    that the cell remembers until it learns to forget.  At 100 the gate is exactly 1 and stays so, the constant error
    carousel of 1997.  Without biases it has no place and is left out.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        forget_bias: float = 1.0,
        **options: Unpack[Options],
    ):
        forget_bias = fitting(
            "forget_bias", number("forget_bias", forget_bias), supported(options.get("dtype", "float32"))
        )
        super().__init__(LSTM_CELL, input_size, hidden_size, num_layers, **options)
        self._add_to_gate(1, forget_bias)


class GRU(Recurrent):
    """Gated recurrent unit, gates r, z, n, reset after the matrix product as in PyTorch and cuDNN.  See `Recurrent`.

    update_bias: added to bias_ih of the update gate z at the start, so that above 0 a unit keeps its state until it
    learns to change it: what forget_bias is to an LSTM.  Without biases it has no place and is left out.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        update_bias: float = 0.0,
        **options: Unpack[Options],
    ):
        update_bias = fitting(
            "update_bias", number("update_bias", update_bias), supported(options.get("dtype", "float32"))
        )
        super().__init__(GRU_CELL, input_size, hidden_size, num_layers, **options)
        self._add_to_gate(1, update_bias)


def _outside() -> int:
    """The stacklevel, for a warning of the caller's, of the first frame that is not in this file."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_code.co_filename == __file__:
        frame, level = frame.f_back, level + 1
    return level


def _precision(given: Any, dtype: np.dtype) -> str:
    one_of("precision", given, PRECISIONS)
    if given != "float32" and dtype != np.float32:
        raise ValueError(f"precision: expected float32 for a layer of {dtype}, got {given!r}")
    return given


def _suffix(layer: int, direction: int) -> str:
    return f"_l{layer}" + ("_reverse" if direction else "")
