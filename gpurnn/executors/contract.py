"""What executors are given and what they give: one layer in one direction over T steps, forward and backward."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from gpurnn.cells import Cell
from gpurnn.executors.random import Draws
from gpurnn.types import Array


class Weights(NamedTuple):
    """The parameters of one layer in one direction, or their gradients.

    weight_ih (G*H, I), weight_hh (G*H, H), bias_ih and bias_hh (G*H,) or None, params: per-unit (H,), one per cell.params.
    A cell without r has neither weight_hh nor bias_hh.
    """

    weight_ih: Array
    weight_hh: Array | None
    bias_ih: Array | None
    bias_hh: Array | None
    params: tuple[Array, ...]


class Job(NamedTuple):
    """What an executor runs: a cell over x, from a state on.

    x      (T, N, I), zero behind each row's end.
    state  S arrays (N, H), copied.
    rows   (T,): at step t the batch rows 0..rows[t]-1 live; never increasing.
    training   whether backward will follow.
    precision  of the products on CUDA; on every CPU, and in `numpy_loop`, they are exact in the dtype of x.
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
    draws: Draws | None = None


class Backward(NamedTuple):
    """Options of a backward pass.

    clip  the largest magnitude that a gradient may carry from one step to the one before; None: no limit.
    flow  (S, T) float64 that receives the sums of squares of dL/dstate_t; None: not asked for.
    keep  the tape must survive, for another backward.
    """

    clip: float | None = None
    flow: Array | None = None
    keep: bool = False


class States(NamedTuple):
    """h (T+1, N, H): y_t is h[t+1], in reverse h[t], and zero where a row has ended.  final: S arrays (N, H)."""

    h: Array
    final: tuple[Array, ...]


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
