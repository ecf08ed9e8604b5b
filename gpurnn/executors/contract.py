"""What executors are given and what they give: one layer in one direction over T steps, forward and backward."""

import functools
from typing import Any, NamedTuple, Protocol

import numpy as np

from gpurnn.cells import Cell
from gpurnn.executors.heads import heads_of
from gpurnn.executors.random import Draws
from gpurnn.types import Array


class Weights(NamedTuple):
    """The parameters of one layer in one direction, or their gradients.

    weight_ih (G*H, I), weight_hh (G*H, H/K) with K heads (`heads`), bias_ih and bias_hh (G*H,) or None, params: per-unit
    (H,), one per cell.params.
    A cell without r has neither weight_hh nor bias_hh.
    """

    weight_ih: Array
    weight_hh: Array | None
    bias_ih: Array | None
    bias_hh: Array | None
    params: tuple[Array, ...]


class Resets(NamedTuple):
    """Where rows begin again.

    before  (T, N) bool, contiguous: before that step, on the job's own way through time, the row's states are set back.
            False at a row's first step, whose state is `Job.state`, and where the row does not live.
    state   what they are set back to, S arrays (H,), the same for all rows.
    """

    before: Array
    state: tuple[Array, ...]


class Job(NamedTuple):
    """What an executor runs: a cell over x, from a state on.

    x      (T, N, I), zero behind each row's end.
    state  S arrays (N, H), copied.
    rows   (T,): at step t the batch rows 0..rows[t]-1 live; never increasing.
    training   whether backward will follow.
    precision  of the products on CUDA; on every CPU, and in `numpy_loop`, they are exact in the dtype of x.
    resets     None: rows run through.
    all_states whether `States.rest` is asked for.
    draws  the random numbers of a cell that asks for them.
    """

    cell: Cell
    x: Array
    weights: Weights
    state: tuple[Array, ...]
    rows: np.ndarray
    reverse: bool
    training: bool
    precision: str = "float32"
    resets: Resets | None = None
    all_states: bool = False
    draws: Draws | None = None

    @property
    def heads(self) -> int:
        weight_hh = self.weights.weight_hh
        return 1 if weight_hh is None else heads_of(weight_hh, len(weight_hh) // self.cell.gates)


@functools.lru_cache(maxsize=64)
def full_rows(T: int, N: int) -> np.ndarray:
    """(T,): N rows live at every step."""
    rows = np.full(T, N)
    rows.flags.writeable = False
    return rows


class Backward(NamedTuple):
    """Options of a backward pass.

    clip  the largest magnitude that a gradient may carry from one step to the one before; None: no limit.
    flow  (S, T) float64 that receives the sums of squares of dL/dstate_t; None: not asked for.
    keep  the tape must survive, for another backward.
    dfresh  (S, N, H) float64 to which dL/d(the state that a reset sets a row back to) is added; given with `Job.resets`.
    drest   dL/d(`States.rest` behind each step), S-1 arrays (T, N, H), not read behind a row's end; None: zeros.
    """

    clip: float | None = None
    flow: Array | None = None
    keep: bool = False
    dfresh: Array = None
    drest: tuple[Array, ...] | None = None


class States(NamedTuple):
    """h (T+1, N, H): y_t is h[t+1], in reverse h[t], and zero where a row has ended.  final: S arrays (N, H).

    rest: the states but for h alike, (S-1, T+1, N, H), where the job wants `all_states`.
    """

    h: Array
    final: tuple[Array, ...]
    rest: Array = None


class Executor(Protocol):
    """A module or an object with these two."""

    def forward(self, job: Job) -> tuple[States, Any]:
        """Runs the job; returns the states, and a tape if it is `training`, else None.

        A tape holds the job, x and weights as they are, and what the executor wrote down for backward.
        """
        ...

    def backward(
        self, tape: Any, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
    ) -> tuple[Array, tuple[Array, ...]]:
        """Goes back along a tape, which is gone then unless `options.keep`; adds to `grads`, returns dx and dL/d(state).

        dy      (T, N, H), not read behind a row's end.
        dstate  dL/d(final state), S arrays (N, H), or None for zeros.
        """
        ...
