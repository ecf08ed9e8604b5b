"""Recurrent layers of any cell: several of them, both directions, one executor below."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np

from gpurnn import backend
from gpurnn.arguments import (
    Turn,
    flow_array,
    generator,
    one_of,
    positive,
    probability,
    supported,
    switch,
    whole,
)
from gpurnn.cells import CELLS, Cell, noisy
from gpurnn.cpu.threads import one_blas_thread
from gpurnn.executors import PRECISIONS, check
from gpurnn.executors.contract import Weights
from gpurnn.executors.heads import checked_heads
from gpurnn.executors.random import Masks
from gpurnn.initializers import Initializer, chosen, drawn, glorot_uniform, orthogonal, zeros
from gpurnn.recurrent.states import Stateful
from gpurnn.sequence import checked_resets, prepare_lengths, run
from gpurnn.types import Array, RecurrentBackward


class Recurrent(Stateful):
    """Layers of any cell over a sequence, time-major: T steps, N batch rows, I inputs, H hidden units.

    cell            a `gpurnn.Cell`, or the name of one that ships: indrnn, mingru, ... (`gpurnn.cells.CELLS`).
    num_layers      L; layer k reads what layer k-1 wrote.
    bias            False: no bias_ih and bias_hh.
    bidirectional   D = 2 directions, each starting at a row's own end; outputs stand side by side.
    batch_first     x is (N, T, I) and y (N, T, D*H), their gradients alike, resets (N, T); states and lengths are as ever.
    dropout         between layers, not behind the last; see `Dropout`.  With one layer it means nothing, and warns.
    weight_dropout  in training entries of weight_hh are 0 with this probability, the others divided by 1 - it: one mask a
                    call, the same at all its steps (DropConnect, as Merity et al. 2018 have it).
    residual        each layer but the first adds its input to its output, as it was before dropout; with `all_states` to
                    the first of them.
    zoneout         the probability in [0, 1) with which a unit's state stays as it was (Krueger et al. 2017); for a cell of
                    several states one for each, (0.05, 0.5) or {"c": 0.5}.
    recurrent_dropout   of what a cell adds to its memory, at each step anew (Semeniuta et al. 2016): lstm, gru, mingru,
                    minlstm, and cells that mark it by `cells.candidate`.
    noise           the standard deviation of a normal number added to each gate before its nonlinearity, at each step.
                    These three are functions of a number's place, as `cells.bernoulli` says, and their means without
                    training; see `cells.noisy`.
    trainable_h0    initial states are parameters (L*D, H): h_0, c_0, used where no state is given.
    heads           K: each unit meets the H/K units of its own head alone, of which K stand side by side.  weight_hh is
                    (G*H, H/K) then, block-diagonal: row g*H + u is unit u's of gate g, as with one head, and its columns
                    are the units of u's head, k*H/K to (k+1)*H/K for k = u // (H/K).  K times fewer weights and products.
    clip_in_time    the largest magnitude of the gradient that a step passes back to the step before (as Graves 2013
                    clips within LSTM; here elementwise, for every state); None: no limit.
    init            initialisers by parameter, e.g. {"weight_hh": "identity"}: functions or names in `gpurnn.initializers`.
                    Default: weight_ih Glorot uniform, weight_hh orthogonal, each per gate (and head); `cell.init`; everything else 0.
    dtype           float32 or float64.
    precision       of the matrix products on CUDA: float32, exact, or tf32, bfloat16 or float16, both factors rounded to
                    it (and tanh good to 2^-11).  Sums, states and parameters are float32 in all of them.  In float16
                    gradients under 6e-8 become 0 on their way through time, and what is beyond 65504 becomes inf: scale
                    the loss, or use bfloat16.  On a CPU all is always exact.
    executor        forces one: compiled or numpy on a CPU; resident, persistent, step or numpy on CUDA.  None:
                    GPURNN_EXECUTOR, or the best.

    Parameters have PyTorch's names, shapes and gate order: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H/K), bias_ih_l0,
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
        batch_first: bool = False,
        dropout: float = 0.0,
        weight_dropout: float = 0.0,
        residual: bool = False,
        zoneout: float | Sequence[float] | Mapping[str, float] = 0.0,
        recurrent_dropout: float = 0.0,
        noise: float = 0.0,
        trainable_h0: bool = False,
        heads: int = 1,
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
        self.plain_cell = cell  # as it was given
        self.cell = cell = noisy(cell, zoneout=zoneout, recurrent_dropout=recurrent_dropout, noise=noise)
        self.zoneout, self.recurrent_dropout, self.noise = _own(zoneout), recurrent_dropout, noise
        self.input_size, self.hidden_size = whole("input_size", input_size), whole("hidden_size", hidden_size)
        self.num_layers, self.heads = whole("num_layers", num_layers), checked_heads(heads, self.hidden_size, cell)
        self.bidirectional = switch("bidirectional", bidirectional)
        self.directions = 1 + self.bidirectional
        self.batch_first = switch("batch_first", batch_first)
        self.bias, self.trainable_h0 = switch("bias", bias), switch("trainable_h0", trainable_h0)
        self.clip_in_time = None if clip_in_time is None else positive("clip_in_time", clip_in_time)
        self.dropout, self.executor = probability("dropout", dropout), executor
        self.weight_dropout, self.residual = probability("weight_dropout", weight_dropout), switch("residual", residual)
        if self.weight_dropout and not cell.recurrent:
            raise ValueError(f"weight_dropout: it drops entries of weight_hh, and {cell.name} has none; expected 0")
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
                own["weight_hh"] = (
                    (G * H, H // self.heads),
                    f"({wide}, {'H' if self.heads == 1 else f'H/{self.heads}'})",
                )
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
            of = self.cell.gates if kind in gated else 1
            blocks = of * (self.heads if kind == "weight_hh" else 1)
            self._set(name, drawn(kinds[kind], f"init[{kind!r}]", self.rng, blocks, shape))

    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        all_states: bool = ...,
        training: Literal[True] = ...,
        copy: bool = ...,
    ) -> tuple[Array, Any, RecurrentBackward]: ...
    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        all_states: bool = ...,
        training: Literal[False],
        copy: bool = ...,
    ) -> tuple[Array, Any, None]: ...
    @overload
    def __call__(
        self,
        x: Array,
        state: Any = ...,
        *,
        lengths: Any = ...,
        resets: Any = ...,
        all_states: bool = ...,
        training: bool,
        copy: bool = ...,
    ) -> tuple[Array, Any, RecurrentBackward | None]: ...
    def __call__(
        self,
        x: Array,
        state: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        all_states: bool = False,
        training: bool = True,
        copy: bool = True,
    ) -> tuple[Any, Any, RecurrentBackward | None]:
        """Runs over a sequence: `y, state, backward = layer(x)`.

        x        (T, N, I).  It is copied for backward; with copy=False it is kept, and must not change before.  The
                 parameters are kept in any case: change them behind backward.
        state    initial states (L*D, N, H): one array, or a tuple where the cell has several, (h, c) for an LSTM;
                 None, for all or one of the tuple: zeros, or the trained initial state.
        lengths  N whole numbers in 0..T: each row's own length.  Behind it y = 0, and x and dy are not read.
        resets  (T, N) of bool: before step t the state of row n is set back to the one that a new sequence begins with,
                zeros or what was trained (h_0, c_0), also where `state` was given: that goes into a row's first segment
                alone, and into none where resets[0, n].  In reverse each segment begins at its own last step, `state` at
                the row's.  No gradient passes a reset; trained initial states get the sum over all of them.  Behind a
                row's length resets are not read.
        all_states  y becomes every state behind every step, of the last layer: one array (T, N, D*H) for a cell with one
                state, else a tuple of such, (h, c) for an LSTM, and dy is of the same form, with None for zeros.  Without
                it y is h alone.  Where a row is reset, a state is what the step before the reset left.
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
            lead = "N, T" if self.batch_first else "T, N"
            raise ValueError(f"x: expected ({lead}, I) = ({lead}, {self.input_size}), got {x.shape}")
        x = self._turned(x)
        T, N, _ = x.shape
        initial = self.unpacked(state, N, "state", self.trainable_h0)
        prepared, resets = prepare_lengths(lengths, T, N), checked_resets(resets, T, N, self.batch_first)
        all_states = switch("all_states", all_states)
        if training and copy and prepared is None:  # else the engine is given a copy in any case
            x = x.copy()
        y, final, back = run(self, x, initial, prepared, training, resets, all_states)
        if self.batch_first:
            y = tuple(map(self._turned, y))
        if back is None:
            return self._packed(y) if all_states else y[0], self._packed(final), None
        y = tuple(map(backend.ops.protected, y))
        states = self.cell.states if all_states else 1
        returned = self._backward(back, T, N, self._given(state), states)
        return self._packed(y) if all_states else y[0], self._packed(final), returned

    def _backward(self, back: Callable, T: int, N: int, given: tuple[bool, ...], states: int) -> RecurrentBackward:
        """states: how many of them y has."""
        turn = Turn()

        def backward(dy: Any, dstate: Any = None, keep: bool = False, flow: Array | None = None) -> tuple[Array, Any]:
            with turn:
                keep = switch("keep", keep)
                dy = self._above(dy, states, (T, N, self.directions * self.hidden_size))
                dfinal = self.check_backward(dstate, flow, T, N)
                turn.gone = not keep
                dx, dinitial, dfresh = back(dy, dfinal, keep, flow)
                if self.trainable_h0:
                    self._add_to_initial(dinitial, given, dfresh)
                return self._turned(dx), self._packed(dinitial)

        return backward

    def _given_as(self, name: str, default: Any) -> Any:
        return self.plain_cell if name == "cell" else super()._given_as(name, default)

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

    def add_to_gate(self, gate: int, draw: Initializer, what: str, against: int | None = None) -> None:
        """Adds to bias_ih of one gate, in every layer and direction, and the negative to that of the gate `against`.

        what: the option that says so.
        """
        H = self.hidden_size
        for name in [name for name in self.params if name.startswith("bias_ih")]:
            value = self.params[name].copy()
            added = backend.asarray(drawn(draw, what, self.rng, 1, (H,)), self.dtype, name)
            value[gate * H : (gate + 1) * H] += added
            if against is not None:
                value[against * H : (against + 1) * H] -= added
            self._set(name, value)


def _own(value: Any) -> Any:
    """`value`, or what nobody else can change where it is a list or a mapping."""
    return dict(value) if isinstance(value, Mapping) else tuple(value) if isinstance(value, list) else value


def _outside() -> int:
    """The stacklevel, for a warning of the caller's, of the first frame that is not in this folder."""
    frame, level, here = inspect.currentframe(), 0, Path(__file__).parent
    while frame is not None and Path(frame.f_code.co_filename).parent == here:
        frame, level = frame.f_back, level + 1
    return level


def _precision(given: Any, dtype: np.dtype) -> str:
    one_of("precision", given, PRECISIONS)
    if given != "float32" and dtype != np.float32:
        raise ValueError(f"precision: expected float32 for a layer of {dtype}, got {given!r}")
    return given


def _suffix(layer: int, direction: int) -> str:
    return f"_l{layer}" + ("_reverse" if direction else "")
