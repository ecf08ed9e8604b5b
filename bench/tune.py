"""`python -m bench tune`: on a GPU, the plan's candidates for each case measured, the fastest kept for later processes.

What the model predicted stands beside each time; see `gpurnn.cuda.tuning`.
"""

import argparse
import itertools

from bench import cases
from bench.cases import Case
from gpurnn import backend
from gpurnn.cells import CELLS
from gpurnn.cuda import device, tuning


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group", action="append", choices=sorted(cases.GROUPS), help="cases of this group; repeatable"
    )
    parser.add_argument("--case", help="cases whose names match this pattern, as in a shell")
    parser.add_argument("--rank", type=int, metavar="N", help="cases up to that rank, see `bench run`")


def main(options: argparse.Namespace) -> int:
    if backend.name != "cuda":
        raise ValueError(f"expected the cuda backend, got {backend.name}: {backend.reason}")
    chip = device.chip()
    print("| case | direction | how | predicted us | measured us |")
    print("|---" * 5 + "|")
    for case in cases.select(options.group, options.case, "cuda", rank=options.rank):
        for alone, transposed in itertools.product((True, False), (False, True)):
            asked = question(case, alone, transposed)
            measured = tuning.tune(asked, chip) if tuning.choices(asked, chip) else []
            for choice, microseconds in measured:
                how = f"{choice.blocks} SMs a group, {choice.tile}, {choice.exchange}"
                predicted = 1e6 * choice.cost.cycles / chip.clock
                direction = "backward" if transposed else "forward"
                print(f"| {case.name} | {direction} | {how} | {predicted:.2f} | {microseconds:.2f} |", flush=True)
    return 0


def question(case: Case, alone: bool, transposed: bool) -> tuning.Question:
    """What there is to choose for a direction of a case."""
    cell = CELLS["rnn_tanh" if case.cell == "rnn" else case.cell]
    return tuning.Question(cell, case.H, case.N, case.dtype, transposed, alone, case.heads)
