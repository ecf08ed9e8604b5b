"""What the compiled executors, on either device, do in the same way around their loops: orders, biases, states in memory.

They share one memory layout, `gpurnn.cells.traced.Trace`, and one set of arrays: slots (T, N, slots*H), h (T+1, N, H), and
the other states as `rest` (S-1, T+1, N, H).  Going forward, state t stands at t and its successor at t+1; in reverse
state t stands at t+1 and its successor at t.
"""

from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.executors.contract import Job, Weights
from gpurnn.types import Array


class Tape(NamedTuple):
    """What backward needs of any compiled executor: those of one device may go back over what another of them wrote.

    `slots` is overwritten by the gradients, unless a backward is told to keep it.
    """

    job: Job
    slots: Array
    h: Array
    rest: Array
    lengths: Array | None = None  # (N,) int64 on the device, for its kernels


class Ends(NamedTuple):
    """Where a job's initial states stand in states (T+1, N, H), and its final ones: an index each.

    lengths  (N,) int64 where rows end at different steps: nothing but zeros may stand behind their ends.  Else None.
    """

    first: Any
    last: Any
    lengths: Array | None

    @classmethod
    def of(cls, job: Job, xp: Any) -> "Ends":
        T, N = job.x.shape[:2]
        lengths = xp.asarray(lengths_of(job.rows, N)) if is_ragged(job.rows, N) else None
        end = T if lengths is None else (lengths, xp.arange(N))
        return cls(end, 0, lengths) if job.reverse else cls(0, end, lengths)

    def visible(self, states: Array) -> Array:
        """(..., T+1, N, H) with zeros behind rows' ends: in reverse their initial states stand there."""
        if isinstance(self.first, tuple):
            states = states.copy()
            states[..., *self.first, :] = 0
        return states


def lengths_of(rows: np.ndarray, N: int) -> np.ndarray:
    """Each row's length: where its last state stands going forward, its initial state going in reverse."""
    return (rows[:, None] > np.arange(N)).sum(0)


def is_ragged(rows: np.ndarray, N: int) -> bool:
    return bool(len(rows)) and rows[-1] < N


def ordered(matrix: Array, order: tuple[int, ...], H: int) -> Array:
    """The rows of the gates in `order`; a view of them where they follow one another."""
    first, count = order[0] if order else 0, len(order)
    if order == tuple(range(first, first + count)):
        return matrix[first * H : (first + count) * H]
    # an index would be copied to the device
    return backend.joined([matrix[gate * H : (gate + 1) * H] for gate in order])


def add_ordered(gradient: Array, value: Array, order: tuple[int, ...], H: int) -> None:
    """Adds to `gradient` what stands in `value` with its gates in `order`."""
    if order == tuple(range(len(order))):
        gradient += value
        return
    for k, gate in enumerate(order):
        gradient[gate * H : (gate + 1) * H] += value[k * H : (k + 1) * H]


def biases(cell: Cell, weights: Weights, H: int, xp) -> Array:
    """(slots, H): what the cell adds to each slot, as it reads it."""
    trace, gates, dtype = cell.trace, cell.gates, weights.weight_ih.dtype
    if weights.bias_ih is None:
        return xp.zeros((trace.slots, H), dtype)
    sums = gates == trace.slots and trace.r_order == trace.x_order  # every slot is the sum of both
    if sums and weights.bias_hh is not None:
        return ordered(weights.bias_ih + weights.bias_hh, trace.x_order, H).reshape(gates, H)
    bias, start = xp.zeros((trace.slots, H), dtype), trace.x_start
    if weights.bias_hh is not None:
        bias[:gates] += ordered(weights.bias_hh, trace.r_order, H).reshape(gates, H)
    bias[start : start + gates] += ordered(weights.bias_ih, trace.x_order, H).reshape(gates, H)
    return bias


def params(weights: Weights, H: int, xp) -> Array:
    """(P, H)"""
    return backend.stacked(weights.params) if weights.params else xp.empty((0, H), weights.weight_ih.dtype)
