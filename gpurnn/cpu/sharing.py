"""How the work on one layer is shared between threads: a time loop by rows of the batch or by units, a sum by columns.

Rows are independent: each thread runs through time by itself, and reads all weights.  Units need every unit of the step
before: the threads meet after each step, but each reads its own part of the weights alone.  So units are shared where
rows are few.  Heads are independent as rows are and have weights of their own: where all threads can have as many of
them, they are shared.  The limits (`costs`) were measured, two threads against one, on layers of 32 to 1024 units and batches
of 1 to 32.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np

from gpurnn.cells import Cell
from gpurnn.cpu import costs, crew
from gpurnn.cpu.packing import panel_columns
from gpurnn.cpu.products import packing_pays
from gpurnn.cpu.simd import host
from gpurnn.cpu.threads import shares
from gpurnn.environment import cpu_threads
from gpurnn.executors.layout import is_ragged, lengths_of


class Share(NamedTuple):
    """One thread's part of the forward loop and of the backward loop, where it also has some columns of dx."""

    rows: slice
    units: slice
    inputs: slice


class Plan(NamedTuple):
    """by_units: the shares are of units.  meets: they have units of one head, and so meet after each step."""

    shares: list[Share]
    by_units: bool = False
    meets: bool = False

    def packing(self, part: int) -> tuple[int, int]:
        """Which part of its weights a thread has to pack, of how many: with rows of their own, all threads read the same."""
        return (0, 1) if self.by_units else (part, len(self.shares))


def plan_loop(cell: Cell, rows: np.ndarray, T: int, N: int, I: int, H: int, dtype: np.dtype, heads: int = 1) -> Plan:
    """Who does what in a pass through time: as many threads as pay, and can be had."""
    head = H // heads
    weights = cell.gates * H * ((head if cell.recurrent else costs.UNITWISE_COLUMNS) + I)
    flops = 2 * max(T * N, costs.FEWEST_ROWS) * weights
    with_packing = flops + (costs.PACKING_FLOPS * weights if packing_pays(T, N, head) else 0)
    whole = Share(slice(0, N), slice(0, H), slice(0, I))
    if with_packing < costs.LOOP_FLOPS:
        return Plan([whole])
    plan = _shared(cell, rows, whole, head, flops, dtype, cpu_threads())
    had = crew.hands(len(plan.shares))
    return plan if had >= len(plan.shares) else _shared(cell, rows, whole, head, flops, dtype, had)


def _shared(cell: Cell, rows: np.ndarray, whole: Share, head: int, flops: int, dtype: np.dtype, most: int) -> Plan:
    """The whole, cut for at most so many threads."""
    N, H, I = (cut.stop for cut in whole)
    if most > 1 and H // head % most == 0:  # nobody waits, and nobody reads another's weights
        parts = shares(H // head, most)
        units = [slice(part.start * head, part.stop * head) for part in parts]
        return Plan(_by_units(whole, units, I, dtype), by_units=True)
    recurrent = cell.gates * H * head
    cached = recurrent * dtype.itemsize <= costs.CACHED_BYTES
    enough = costs.ENOUGH_ROWS_CACHED if cached else costs.ENOUGH_ROWS
    by_rows = min(most, int(N / enough))
    by_units = min(most, H // host().width(dtype))
    if cell.recurrent:
        by_units = min(by_units, 2 * N * recurrent // costs.UNITS_FLOPS)  # else they do not meet
    if by_rows < most and by_units > 1:
        units = _between_vectors(H, by_units, dtype)
        meets = cell.recurrent and any(cut.start % head for cut in units)
        return Plan(_by_units(whole, units, I, dtype), by_units=True, meets=meets)
    if by_rows < 2:  # slow products, but two threads for them
        by_rows, flops = min(most, N // 2), flops // 2
    if by_rows < 2 or flops < costs.LOOP_FLOPS:
        return Plan([whole])
    cuts = _of_equal_work(lengths_of(rows, N).tolist(), 1, by_rows) if is_ragged(rows, N) else shares(N, by_rows)
    return Plan([whole._replace(rows=cut) for cut in cuts])


def _by_units(whole: Share, units: list[slice], I: int, dtype: np.dtype) -> list[Share]:
    columns = _between_vectors(I, len(units), dtype)
    return [Share(whole.rows, *both) for both in zip(units, columns, strict=True)]


def plan_reduction(cell: Cell, K: int, I: int, H: int, head: int, after: Plan) -> list[slice]:
    """The columns, of those slots that hold gradients, for each thread that sums K rows: those awake from the loop, or more."""
    slots, parts = cell.trace.x_start + cell.gates, len(after.shares)
    back = head if cell.recurrent else 0
    work = [back * (slot < cell.gates) + I * (slot >= cell.trace.x_start) for slot in range(slots)]
    if parts == 1 and 2 * K * cell.gates * H * (back + I) >= costs.SUM_FLOPS:
        return crew.cut(lambda parts: _of_equal_work(work, H, parts))
    return _of_equal_work(work, H, parts)


def _of_equal_work(work: list[int], each: int, parts: int) -> list[slice]:
    """Items, `each` of any amount of work, cut into at most `parts` slices of about equal work, none of them empty."""
    total, count = each * sum(work), each * len(work)
    edges, place, before = {0, count}, 0, 0
    for part in range(1, parts if total else 1):
        wanted = total * part / parts - before
        while wanted > work[place] * each:
            wanted, before, place = wanted - work[place] * each, before + work[place] * each, place + 1
        edges.add(min(count, place * each + math.ceil(wanted / work[place])))
    return [slice(a, b) for a, b in itertools.pairwise(sorted(edges))]


def _between_vectors(count: int, parts: int, dtype: np.dtype) -> list[slice]:
    """0..count cut into `parts` slices, between whole panels of columns where there are many, else between vectors."""
    grain = panel_columns(dtype) if count >= 2 * parts * panel_columns(dtype) else host().width(dtype)
    edges = [min(count, round(count * part / parts / grain) * grain) for part in range(parts)] + [count]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
