"""How the work on one layer is shared between threads: a time loop by rows of the batch or by units, a sum by columns.

Rows are independent: each thread runs through time by itself, and reads all weights.  Units need every unit of the step
before: the threads meet after each step, but each reads its own part of the weights alone.  So units are shared where
rows are few.  The limits were measured, two threads against one, on layers of 32 to 1024 units and batches of 1 to 32.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.environment import cpu_threads
from gpurnn.executors.barrier import Barrier
from gpurnn.executors.layout import is_ragged, lengths_of
from gpurnn.executors.packing import panel_columns
from gpurnn.executors.simd import host

PARALLEL_FLOPS = 30_000_000  # of a pass through time; below it is shorter than what a second thread costs
PARALLEL_SUM_FLOPS = 15_000_000
PACKING_FLOPS = 25  # so many are done in the time in which one weight is packed
UNITS_FLOPS = 250_000  # of a step, for each thread; below it meeting costs more than a second thread gains
ENOUGH_ROWS = 4  # for each thread: of fewer the products are slow


class Share(NamedTuple):
    """One thread's part of the forward loop and of the backward loop, where it also has some columns of dx."""

    rows: slice
    units: slice
    inputs: slice


class Plan(NamedTuple):
    """barrier: where the shares meet when they have ended, and those `by_units` after each step; None for one share."""

    shares: list[Any]
    barrier: Barrier | None
    by_units: bool = False

    @property
    def meeting(self) -> tuple[int, int]:
        """For compiled code: how many meet, and where."""
        return (self.barrier.parties, self.barrier.address) if self.barrier else (1, 0)


def plan_loop(cell: Cell, rows: np.ndarray, T: int, N: int, I: int, H: int, dtype: np.dtype) -> Plan:
    """Of `Share`s."""
    weights, most, whole = cell.gates * H * (H + I), cpu_threads(), Share(slice(0, N), slice(0, H), slice(0, I))
    flops, by_rows = 2 * T * N * weights, min(most, N // ENOUGH_ROWS)
    by_units = min(most, 2 * N * cell.gates * H * H // UNITS_FLOPS, H // host().width(dtype))
    if by_rows < most and by_units > 1 and flops + PACKING_FLOPS * weights >= PARALLEL_FLOPS:
        cuts = (_between_vectors(count, by_units, dtype) for count in (H, I))
        return _plan([Share(whole.rows, *both) for both in zip(*cuts, strict=True)], by_units=True)
    if by_rows < 2:  # slow products, but two threads for them
        by_rows, flops = min(most, N // 2), flops // 2
    if by_rows < 2 or flops < PARALLEL_FLOPS:
        return _plan([whole])
    living = lengths_of(rows, N) if is_ragged(rows, N) else np.ones(N)
    return _plan([whole._replace(rows=part) for part in _of_equal_work(living, by_rows)])


def plan_reduction(cell: Cell, K: int, I: int, H: int) -> Plan:
    """Of slices of the columns of those slots that hold gradients.  K: rows of all time steps."""
    trace, parts = cell.trace, cpu_threads()
    slots = trace.x_start + cell.gates
    if parts < 2 or 2 * K * cell.gates * H * (H + I) < PARALLEL_SUM_FLOPS:
        return _plan([slice(0, slots * H)])
    work = [H * (slot < cell.gates) + I * (slot >= trace.x_start) for slot in range(slots)]
    return _plan(_of_equal_work(np.repeat(work, H), parts))


def _plan(shares: list[Any], by_units: bool = False) -> Plan:
    return Plan(shares, Barrier(len(shares)) if len(shares) > 1 else None, by_units)


def _of_equal_work(work: np.ndarray, parts: int) -> list[slice]:
    """Items cut into at most `parts` slices of about equal work, none of them empty."""
    done = np.cumsum(work)
    edges = np.searchsorted(done, done[-1] * np.arange(1, parts) / parts, side="left") + 1
    edges = np.unique(np.concatenate([[0], np.minimum(edges, len(work)), [len(work)]]))
    return [slice(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _between_vectors(count: int, parts: int, dtype: np.dtype) -> list[slice]:
    """0..count cut into `parts` slices, between whole panels of columns where there are many, else between vectors."""
    grain = panel_columns(dtype) if count >= 2 * parts * panel_columns(dtype) else host().width(dtype)
    edges = [min(count, round(count * part / parts / grain) * grain) for part in range(parts)] + [count]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
