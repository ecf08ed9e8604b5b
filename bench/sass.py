"""`python -m bench sass CASE`: a case's machine code: instructions by pipe, and how long a step may take.

The kernels that the plan chooses are built, for a chip that need not be here, and disassembled.  Of the loop over time
are counted the instructions of a usual step: without the fence and the emptying of one step in four, polls looking
once.  They are replayed as the warps of one of an SM's four schedulers issue them: in order, by their stall counts,
scoreboards and the pipes' rates.  The way of mail from SM to SM, and memory where it shows, are not in it and are taken
from the plan.  Beside the sum stand the plan's figure and the floor (`bench.floors`).  Against what an H200 took
(tests/kernels/test_plan.py) the sum is good to about 20 %, most often too much.
"""

import argparse
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import cases, floors
from bench.cases import Case
from bench.disassembly import FENCES, Instruction, listing, loop_bounds
from bench.model import CELL, GPUS, Gpu, chosen
from gpurnn.cuda.tuning import registers
from gpurnn.kernels import build, persistent, plan
from gpurnn.kernels.tiles import Shape

PIPES = {  # by the beginnings of opcodes, the first that fits
    "HMMA": ("HMMA",),
    "FFMA": ("FFMA", "FADD", "FMUL"),
    "MUFU": ("MUFU",),
    "LDS": ("LDS",),
    "STS": ("STS",),
    "LDG": ("LDG", "LD."),
    "STG": ("STG", "ST.", "STAS", "RED", "ATOM"),
    "SHFL": ("SHFL",),
    "BAR": ("BAR", "SYNCS", "WARPSYNC", "UCGABAR", "BARRIER"),
    "FENCE": (*FENCES, "FENCE"),
    "SEL": ("SEL", "FSEL", "ISETP", "FSETP", "PLOP3", "P2R", "R2P", "VOTE", "FMNMX", "VIMNMX", "FSET"),
    "BRA": ("BRA", "BSSY", "BSYNC", "EXIT", "CALL", "RET", "BREAK", "NOP", "YIELD", "NANOSLEEP"),
    "UNI": ("U",),
}
OTHER = "INT"
# RATE: cycles for which one warp's instruction has a scheduler's share of a pipe; an access of 16 bytes takes 4 times
# as long.  LATENCY: cycles until a scoreboard is released; OTHERS: of any other instruction.
RATE = {"HMMA": 6.3, "MUFU": 8, "LDS": 4, "STS": 4, "LDG": 4, "STG": 4, "SHFL": 4, "INT": 2, "SEL": 2}
LATENCY, OTHERS = {"LDS": 30, "LDG": 280, "MUFU": 22, "SHFL": 25, "BAR": 22}, 20


class Estimate(NamedTuple):
    """Of one direction: a step's instructions by pipe, its cycles as replayed, microseconds with mail and memory."""

    instructions: Counter[str]
    cycles: float
    microseconds: float
    planned: float
    registers: int
    spilled: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", help="cases whose names match this pattern, as in a shell")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h200", help="for which chip (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    gpu, names = GPUS[options.gpu], [*PIPES, OTHER]
    print(f"{options.gpu}, one step; estimated, nothing here was measured")
    print(f"| case | direction | {' | '.join(names)} | all | registers | replay, us | with mail | plan | floor |")
    print("|---" * (len(names) + 8) + "|")
    for case in cases.select(None, options.case, "cuda"):
        for transposed, direction in enumerate(("forward", "backward")):
            found = estimate(case, bool(transposed), gpu)
            if found is None:
                print(f"| {case.name} | {direction} | by cuBLAS and a kernel: no loop over time |")
                continue
            counts = " | ".join(str(found.instructions[name]) for name in names)
            floor = 1e6 * floors.floor(case, "inference", "recurrence", gpu.machine, case.T * case.N)
            print(
                f"| {case.name} | {direction} | {counts} | {found.instructions.total()} | {found.registers} | "
                f"{1e6 * found.cycles / gpu.chip.clock:.2f} | {found.microseconds:.2f} | {found.planned:.2f} | "
                f"{floor:.2f} |"
            )
    return 0


def estimate(case: Case, transposed: bool, gpu: Gpu) -> Estimate | None:
    """None where the plan goes by cuBLAS.  Raises ModuleNotFoundError where there is no disassembler."""
    choice = chosen(case, transposed, gpu)
    if choice is None:
        return None
    cell, chip = CELL[case.cell], gpu.chip
    shape = Shape(case.H // case.heads, case.gates, transposed, choice.blocks)
    return estimated(cell, shape, choice, case.N, chip, case.heads)


def estimated(cell: Any, shape: Shape, choice: plan.Choice, N: int, chip: plan.Chip, heads: int = 1) -> Estimate:
    """Of the first tile that spills nothing, as the executor takes it; of the last, where all do."""
    factory = persistent.backward if shape.transposed else persistent.forward
    constant = {"clip": False} if shape.transposed else {"training": True}
    for tile in plan.relaxed(shape, choice.tile, choice.exchange, chip):
        options = {"H": heads * shape.H, "heads": heads, "tile": tile, "blocks": shape.blocks, **constant}
        source = factory(cell.trace, newer=chip.capability >= (9, 0), exchange=choice.exchange, **options)
        cubin, usage = build.assemble(build.ptx(source, "kernel", chip.capability), chip.capability)
        if not usage["spilled"]:
            break
    with tempfile.TemporaryDirectory() as folder:
        code = listing(cubin, Path(folder))
    step = usual_step(code)
    counts, warps = Counter(pipe(i) for i in step), -(-source.threads // 128)
    cycles = choice.cost.rounds * replayed(step, warps)
    cost = plan.predicted(shape, tile, choice.exchange, registers(cell, shape.transposed), N, chip, heads)
    rest = cost.rounds * (cost.exchange + cost.loads)
    microseconds = 1e6 * (cycles + rest) / chip.clock
    return Estimate(counts, cycles, microseconds, 1e6 * cost.cycles / chip.clock, usage["registers"], usage["spilled"])


def pipe(instruction: Instruction) -> str:
    return next((name for name, begins in PIPES.items() if instruction.opcode.startswith(begins)), OTHER)


def usual_step(code: Sequence[Instruction]) -> list[Instruction]:
    """What a warp executes in most steps: branches are not taken, but for those over a fence, which one step in four
    has, those that leave an inner loop, and those that have no condition."""
    first, last = loop_bounds(list(code))
    inner = [
        (i.target, k) for k, i in enumerate(code[: last + 1]) if i.target is not None and first < i.target <= k < last
    ]
    step, k = [], first
    while k <= last:
        i, k = code[k], k + 1
        step.append(i)
        if i.target is None or not i.opcode.startswith("BRA") or not k <= i.target <= last:
            continue
        over = code[k : i.target]
        leaves = any(begin < k <= end < i.target for begin, end in inner)
        if i.always or leaves or any(other.opcode.startswith("MEMBAR") for other in over):
            k = i.target
    return step


def replayed(step: Sequence[Instruction], warps: int, times: int = 3) -> float:
    """Cycles of a step, by the last of `times`, for so many warps of one scheduler."""
    at, round_of, ready = [0] * warps, [0] * warps, [0.0] * warps
    boards = [[0.0] * 8 for _ in range(warps)]
    free: dict[str, float] = {}
    waiting: set[int] = set()
    begun, now = [0.0] * (times + 1), 0.0
    while min(round_of) < times:
        able = {}
        for w in set(range(warps)) - waiting:
            if round_of[w] < times:
                i = step[at[w]]
                able[w] = max(
                    ready[w], free.get(pipe(i), 0.0), *(boards[w][board] for board in (*i.waits, NONE_WAITED))
                )
        w = min(able, key=lambda w: (max(able[w], now), round_of[w], at[w]))
        now, i = max(able[w], now), step[at[w]]
        kind, size = pipe(i), 4 if ".128" in i.opcode else 2 if ".64" in i.opcode else 1
        busy = RATE.get(kind, 1) * (size if kind in ("LDS", "STS") else 1)
        free[kind] = now + busy
        done = now + (0 if i.polls else LATENCY.get(kind, OTHERS)) + (busy if kind in ("LDS", "STS") else 0)
        for board in (i.sets, i.reads):
            if board < NONE_WAITED:
                boards[w][board] = max(boards[w][board], done)
        ready[w], at[w] = now + max(1, i.stall), at[w] + 1
        now += 1
        if i.opcode.startswith("BAR"):
            waiting.add(w)
            if len(waiting) == warps:
                ready = [max(time, now + LATENCY["BAR"]) for time in ready]
                waiting.clear()
        if at[w] == len(step):
            at[w], round_of[w] = 0, round_of[w] + 1
            begun[round_of[w]] = max(begun[round_of[w]], ready[w])
    return begun[times] - begun[times - 1]


NONE_WAITED = 6  # a scoreboard that nothing ever sets
