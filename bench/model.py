"""`python -m bench model`: what the kernels' own model predicts for a GPU, case by case, without one.

For each direction of time: which executor and exchange the plan picks, the work of one step (flop, bytes from the L2
cache, exchanges between SMs), the predicted time of a step and the part of the floor (`bench.floors`) that this is.
Whole passes are predicted as both directions and the products around them at the peak of a large product.  Where a
results file of that chip is given, what was measured stands beside it: the difference is what the model has to learn.
It needs the kernels' tools, which come with the `test` extra.

The chips' figures are nominal ones, of NVIDIA's data sheets (dense, without sparsity).
"""

import argparse
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import cases, floors, results
from bench.cases import Case
from gpurnn.cells import CELLS
from gpurnn.cuda.sweeps import PROJECTED, RETURNED
from gpurnn.cuda.tuning import registers
from gpurnn.kernels import plan
from gpurnn.kernels.tiles import Shape, layout

ROUNDING = 6  # bytes of a float32 value that is read and written as 16 bits
CELL = {"rnn": CELLS["rnn_tanh"], "gru": CELLS["gru"], "lstm": CELLS["lstm"]}  # of a case


class Gpu(NamedTuple):
    chip: plan.Chip
    machine: floors.Machine


def _gpu(
    capability: tuple[int, int], sms: int, shared: int, clock: float, flops: Sequence[float], *memory: float
) -> Gpu:
    """flops: of float32, tf32, and both half precisions.  memory: bytes/s and bytes of L2."""
    bandwidth, cache = memory
    peaks = dict(zip(cases.DTYPES, (*flops, flops[-1]), strict=True))
    return Gpu(plan.Chip(0, capability, sms, shared), floors.Machine("cuda", peaks, bandwidth, int(cache), sms, clock))


GPUS = {
    "h200": _gpu((9, 0), 132, 227 << 10, 1.98e9, (67e12, 494e12, 989e12), 4.8e12, 50 << 20),
    "h100": _gpu((9, 0), 132, 227 << 10, 1.98e9, (67e12, 494e12, 989e12), 3.35e12, 50 << 20),
    "a100": _gpu((8, 0), 108, 163 << 10, 1.41e9, (19.5e12, 156e12, 312e12), 2.0e12, 40 << 20),
}


class Prediction(NamedTuple):
    """One direction of time.  flops, moved: of a step; moved: bytes that all SMs together read from L2."""

    executor: str
    how: str
    flops: float
    moved: float
    exchanges: int
    microseconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="of which chip (default: %(default)s)")
    parser.add_argument(
        "--group", action="append", choices=sorted(cases.GROUPS), help="cases of this group; repeatable"
    )
    parser.add_argument("--case", help="cases whose names match this pattern, as in a shell")
    parser.add_argument("--results", type=Path, help="a results file measured on that chip, to stand beside")


def main(options: argparse.Namespace) -> int:
    gpu = GPUS[options.gpu]
    measured = _measured(options.results) if options.results else {}
    chosen = cases.select(options.group, options.case, "cuda")
    print(f"{options.gpu}, one step, forward and backward; predicted, nothing here was measured")
    print(
        "| case | direction | executor | how | flop | L2 bytes | exchanges | us "
        "| pass, us (part of the floor) | measured |"
    )
    print("|---" * 10 + "|")
    for case in chosen:
        for line in _lines(case, gpu, measured):
            print(line)
    return 0


def _lines(case: Case, gpu: Gpu, measured: dict[tuple[str, str], float]) -> Iterator[str]:
    for way, direction, phase in zip(
        directions(case, gpu), ("forward", "backward"), ("inference", "training"), strict=True
    ):
        whole = predicted(case, phase, gpu)
        floor = 1e6 * floors.floor(case, phase, "layer", gpu.machine, case.T * case.N)
        found = measured.get((case.name, phase))
        yield (
            f"| {case.name} | {direction} | {way.executor} | {way.how} | {way.flops / 1e6:.1f} M | "
            f"{way.moved / 1e3:.0f} K | {way.exchanges} | {way.microseconds:.2f} | "
            f"{phase} {whole:.2f} ({floor / whole:.0%}) | "
            f"{f'{found:.2f} us, {found / whole:.2f} x' if found else ''} |"
        )


def predicted(case: Case, phase: str, gpu: Gpu) -> float:
    """Us per step of a layer's whole pass: the recurrence, and the products around it at the peak of a large one."""
    both = [way.microseconds for way in directions(case, gpu)]
    recurrent = sum(both) if phase == "training" else both[0]
    return recurrent + 1e6 * _products(case, phase == "training", gpu.machine)


def directions(case: Case, gpu: Gpu) -> list[Prediction]:
    """Forward and backward, by the executor whose two directions together are predicted to be fastest."""
    found = [
        [_on_chip(case, transposed, gpu.chip, alone) for transposed in (False, True)] for alone in (True, False)
    ] + [[_by_step(case, transposed, gpu.chip) for transposed in (False, True)]]
    whole = [[way for way in both if way] for both in found if all(both)]
    return min(whole, key=lambda both: sum(way.microseconds for way in both))


def _on_chip(case: Case, transposed: bool, chip: plan.Chip, alone: bool) -> Prediction | None:
    choice = _of(case, transposed, chip, alone)
    if choice is None:
        return None
    shape = Shape(case.H // case.heads, case.gates, transposed, choice.blocks)
    groups = case.heads * -(-case.N // choice.tile.rows)
    moved = 0 if choice.exchange in ("alone", "clustered") else 4 * choice.tile.rows * layout(shape, choice.tile).words
    rounds = f", {choice.cost.rounds} rounds" if choice.cost.rounds > 1 else ""
    how = f"{groups} x {choice.blocks} SMs, {choice.tile.rows} rows, {choice.exchange}{rounds}"
    return Prediction(
        "resident" if alone else "persistent",
        how,
        _flops(case),
        moved * choice.blocks * groups,
        0 if alone else 1,
        1e6 * choice.cost.cycles / chip.clock,
    )


@functools.cache
def _choice(*question: Any) -> plan.Choice | None:
    """As `plan.choices` asks it: chips that differ in their memory alone, and both phases, have one answer."""
    return plan.best(plan.choices(*question))


def chosen(case: Case, transposed: bool, gpu: Gpu) -> plan.Choice | None:
    """How a direction runs on chip, by the executor that `directions` takes; None where that is the step's."""
    executor = directions(case, gpu)[0].executor
    return None if executor == "step" else _of(case, transposed, gpu.chip, executor == "resident")


def _of(case: Case, transposed: bool, chip: plan.Chip, alone: bool) -> plan.Choice | None:
    pair = registers(CELL[case.cell], transposed)
    head = case.H // case.heads
    return _choice(head, case.gates, transposed, case.N, case.dtype, pair, chip, alone, case.heads)


def _by_step(case: Case, transposed: bool, chip: plan.Chip) -> Prediction:
    cycles = plan.step_cycles(case.H, case.gates, case.N, case.dtype, chip, case.heads)
    weights = case.gates * case.H * (case.H // case.heads) * floors.BYTES[case.dtype]
    return Prediction("step", "cuBLAS and a kernel", _flops(case), weights, 2, 1e6 * cycles / chip.clock)


def _flops(case: Case) -> float:
    return 2.0 * case.N * case.gates * case.H * (case.H // case.heads)


def _products(case: Case, training: bool, machine: floors.Machine) -> float:
    """Seconds a step of the products around the recurrence: x W_ih^T, and in training dx and both dW.

    Before those with factors of 16 bits the factors are rounded: x, and in training again x, h and the gradients.
    Weights are rounded once in a pass, which is next to nothing a step.
    """
    forward, gradients = 2.0 * case.N * case.gates * case.H * case.I, CELL[case.cell].trace.slots * case.H
    back = 2 * forward + _flops(case) if training else 0.0
    back_in_tf32 = case.dtype in PROJECTED and case.dtype not in RETURNED
    kind = "tf32" if back_in_tf32 else case.dtype
    values = case.I if case.dtype in PROJECTED else 0
    values += case.I + case.H + gradients if training and case.dtype in RETURNED else 0
    rounding = ROUNDING * case.N * values / machine.bandwidth
    return forward / machine.flops[case.dtype] + back / machine.flops[kind] + rounding


def _measured(path: Path) -> dict[tuple[str, str], float]:
    """Us per step of our fastest executor, by case and phase."""
    best: dict[tuple[str, str], float] = {}
    for record in results.latest(results.read(path)):
        if record["implementation"].startswith("gpurnn-") and record["part"] == "layer" and not record.get("failure"):
            place = record["case"], record["phase"]
            best[place] = min(best.get(place, float("inf")), record["us_per_step"])
    return best
