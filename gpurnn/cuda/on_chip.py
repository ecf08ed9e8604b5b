"""The CUDA executors that keep weight_hh on chip: one kernel runs all T steps (`kernels.persistent`).

    resident     weight_hh fits one SM; each block has a few rows of the batch and waits for nobody
    persistent   weight_hh is spread over a group of SMs, which exchange a step's vector; each group has some rows

What fits, and which is faster, is `kernels.plan`'s to say, or that of `tuning`, where somebody has measured it.  Where
the chip knows better, as a slice of one does that has no room for a cluster, the next choice is taken.
"""

import functools
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.cuda import device, step, sweeps, tuning
from gpurnn.cuda.passes import Pass, fitted
from gpurnn.executors.contract import Backward, Job, States, Weights
from gpurnn.executors.layout import Tape
from gpurnn.kernels import persistent, plan
from gpurnn.kernels.launch import DoesNotFit
from gpurnn.kernels.plan import Chip, Choice
from gpurnn.types import Array


class OnChip(NamedTuple):
    """An executor.  alone: one block to a group."""

    name: str
    alone: bool

    def choice(self, cell: Cell, H: int, N: int, precision: str, transposed: bool, heads: int = 1) -> Choice | None:
        """How one direction runs; None where it does not fit.  A group of one block where units are too few to share."""
        chip = device.chip()
        shared = None if self.alone else _choice(cell, H, N, precision, transposed, False, chip, heads)
        return shared or _choice(cell, H, N, precision, transposed, True, chip, heads)

    def cycles(self, cell: Cell, H: int, N: int, dtype: np.dtype, precision: str, heads: int = 1) -> float | None:
        """Of a step forward and back, by the plan's model; None where either does not fit: they are chosen together."""
        if dtype != np.float32:
            return None
        both = [self.choice(cell, H, N, precision, transposed, heads) for transposed in (False, True)]
        return sum(choice.cost.cycles for choice in both if choice) if all(both) else None

    def forward(self, job: Job) -> tuple[States, Tape | None]:
        """See `contract.Executor.forward`.  Raises ValueError where the dtype is not float32, or weight_hh does not fit."""
        if job.x.dtype != np.float32:
            raise ValueError(
                f"executor {self.name!r} computes in float32, got {job.x.dtype}: 'step' computes in float64 as well"
            )
        sweep, training = sweeps.begin(job), job.training
        tape, carried, again, xp = sweep.tape, sweep.initial, sweep.again, backend.xp
        constants = {"training": sweep.whole, **sweeps.if_any(resets=again)}
        run = self._pass(FORWARD, tape, sweep.weight_hh, **constants)
        rest_state, draws = tape.rest.strides[0] // job.x.itemsize, sweeps.draws(tape)
        for t0, t1, slots in sweeps.pieces(sweep):
            rest = tape.rest[:, t0:] if sweep.whole else tape.rest
            if again and (t1 < len(job.x) if job.reverse else t0):  # a piece knows nothing of the one before
                first = again.before[t1 - 1 if job.reverse else t0][:, None] != 0
                carried = xp.where(first, again.fresh[:, None], carried)
            whole = training and sweep.ends.lengths is None  # else rows that have ended keep their states
            final = xp.empty_like(carried) if whole else carried.copy()
            arrays = (slots, sweep.bias, tape.h[t0:], rest, sweep.params, carried, final, tape.lengths, draws)
            run(arrays, again.pointers(t0), (t1 - t0, t0), (tape.h.shape[1], int(job.reverse), rest_state))
            carried = final  # blocks may still read the initial states when others have come to their end
        return sweeps.finish(sweep, tuple(carried))

    def backward(
        self, tape: Tape, dy: Array, dstate: tuple[Array, ...] | None, grads: Weights, options: Backward
    ) -> tuple[Array, tuple[Array, ...]]:
        """See `contract.Executor.backward`.  Where the flow of gradients is asked for, or gradients of all
        states come in, `step` goes back, which can stop for them."""
        if options.flow is not None or options.drest is not None:
            return step.backward(tape, dy, dstate, grads, options)
        way = sweeps.begin_back(tape, dy, dstate, options)
        constants = {"clip": options.clip is not None, **sweeps.if_any(resets=way.again)}
        run = self._pass(BACKWARD, tape, way.weight_hh, **constants)
        run((*way.arrays, tape.lengths, sweeps.draws(tape)), way.reset_pointers, (), (tape.h.shape[1], *way.numbers))
        return sweeps.finish_back(way, tape, grads)

    def runs(self, cell: Cell, H: int, N: int, precision: str, training: bool, clip: bool, heads: int = 1) -> bool:
        """Whether the chip runs what is chosen for the passes to come; if not, it is not chosen again."""
        try:
            _load(self, cell, H, N, precision, training, clip, device.chip(), heads)
        except DoesNotFit:
            return False
        return True

    def _pass(self, way: "Way", tape: Tape, weight_hh: Array, **constants: bool) -> Pass:
        """The cheapest that the chip runs."""
        cell, precision, (N, H), heads = tape.job.cell, tape.job.precision, tape.h.shape[1:], tape.job.heads
        while (choice := self.choice(cell, H, N, precision, way.transposed, heads)) is not None:
            try:
                return Pass.prepare(choice, way.factory, tape, weight_hh, way.transposed, **constants)
            except DoesNotFit as error:
                _rule_out(cell, H, N, precision, way.transposed, choice, error, heads)
        where, apart = "one SM" if self.alone else "this GPU", f" in {heads} heads" if heads > 1 else ""
        raise ValueError(
            f"executor {self.name!r}: weight_hh of {cell.name} with {H} units{apart} does not fit {where} in "
            f"{precision}; 'step' runs every size"
        )


class Way(NamedTuple):
    """Through time: the kernel's factory, and whether it multiplies by the transposed weight_hh."""

    factory: Any
    transposed: bool


FORWARD, BACKWARD = Way(persistent.forward, False), Way(persistent.backward, True)
RESIDENT, PERSISTENT = OnChip("resident", True), OnChip("persistent", False)


def fastest(cell: Cell, H: int, N: int, dtype: np.dtype, precision: str, heads: int = 1) -> str:
    """The name of the executor that the plan's model thinks is fastest, forward and back together."""
    costs = {engine.name: engine.cycles(cell, H, N, dtype, precision, heads) for engine in (RESIDENT, PERSISTENT)}
    costs["step"] = 2 * plan.step_cycles(H, cell.gates, N, precision, device.chip(), heads)
    return min((cycles, name) for name, cycles in costs.items() if cycles is not None)[1]


@functools.lru_cache(maxsize=4096)
def _load(
    engine: OnChip, cell: Cell, H: int, N: int, precision: str, training: bool, clip: bool, chip: Chip, heads: int
) -> None:
    """Builds and loads the kernels of the passes to come.  Raises DoesNotFit where one is ruled out."""
    for way, constant in ((FORWARD, ("training", training)), *([(BACKWARD, ("clip", clip))] if training else [])):
        choice = engine.choice(cell, H, N, precision, way.transposed, heads)
        if choice is None:
            raise DoesNotFit(f"{engine.name}: nothing is left for {cell.name} with {H} units")
        try:
            fitted(way.factory, cell, H, choice, way.transposed, chip, (constant,), heads)
        except DoesNotFit as error:
            _rule_out(cell, H, N, precision, way.transposed, choice, error, heads)
            raise


def _rule_out(
    cell: Cell, H: int, N: int, precision: str, transposed: bool, choice: Choice, error: DoesNotFit, heads: int
) -> None:
    question = tuning.Question(cell, H, N, precision, transposed, choice.exchange == "alone", heads)
    tuning.rule_out(question, device.chip(), choice, error)
    _choice.cache_clear()
    _load.cache_clear()


@functools.lru_cache(maxsize=4096)
def _choice(
    cell: Cell, H: int, N: int, precision: str, transposed: bool, alone: bool, chip: Chip, heads: int
) -> Choice | None:
    """The fastest that was measured on this GPU, or the cheapest by the plan's model."""
    return tuning.choice(tuning.Question(cell, H, N, precision, transposed, alone, heads), chip)
