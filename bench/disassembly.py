"""The machine code of a kernel, as NVIDIA's disassembler shows it: its instructions in order, and the loop over time.

The disassembler comes from its wheel or from a CUDA toolkit; it needs no GPU.  What an instruction waits for is in its
upper bits (found out and published by others for Volta and later, e.g. Jia et al. 2018): cycles until the next one may
issue, the scoreboard (0 to 5) that its result or its read operands release, and the scoreboards that it waits for.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PLACES = ("nvidia/cu13/bin", "nvidia/cuda_nvdisasm/bin")  # of wheels
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
BITS = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/\s*$")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")
NONE = 7  # no scoreboard
FENCES = ("MEMBAR", "ERRBAR", "CGAERRBAR", "CCTL")


class Instruction(NamedTuple):
    """opcode: with its suffixes.  operands: as printed.  target: the index that a branch goes to, or None.

    always: whether it has no predicate.  stall: cycles.  sets, reads: the scoreboards that its result and its read
    operands release, or NONE.  waits: those that it waits for.
    """

    opcode: str
    operands: str
    target: int | None
    always: bool = True
    stall: int = 1
    sets: int = NONE
    reads: int = NONE
    waits: tuple[int, ...] = ()

    @property
    def polls(self) -> bool:
        """Whether it looks for what another SM has sent."""
        return (self.opcode.startswith("LDG") and "STRONG" in self.opcode) or "TRYWAIT" in self.opcode

    @property
    def fetches(self) -> bool:
        """Whether it loads what a step reads from memory: nobody else writes that meanwhile."""
        return self.opcode.startswith("LDG") and not self.polls

    @property
    def multiplies(self) -> bool:
        return self.opcode.startswith(("HMMA", "FFMA"))


def tool(name: str) -> str | None:
    """One of NVIDIA's command-line tools, or None."""
    for folder in (Path(path) for path in sys.path):
        for place in PLACES:
            if (folder / place / name).exists():
                return str(folder / place / name)
    return shutil.which(name)


def listing(cubin: bytes, folder: Path) -> list[Instruction]:
    """Raises AssertionError where there is next to nothing: an empty listing would pass every check."""
    path, disassembler = folder / "kernel.cubin", tool("nvdisasm")
    if disassembler is None:
        raise ModuleNotFoundError("NVIDIA's disassembler nvdisasm was not found: pip install 'gpurnn[test]'")
    path.write_bytes(cubin)
    text = subprocess.run([disassembler, "-c", "-hex", path], capture_output=True, text=True, check=True).stdout
    found: list[tuple[str, str, str | None, bool]] = []
    labels: dict[str, int] = {}
    bits: list[int] = []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif match := LINE.match(line):
            target = TARGET.search(match.group(4))
            found.append((match.group(3), match.group(4).strip(), target and target.group(1), match.group(2) is None))
        elif (match := BITS.match(line)) and len(bits) < len(found):
            bits.append(int(match.group(1), 16) >> 41)
    assert len(found) == len(bits) > 20, "an empty disassembly would pass every check"
    return [
        Instruction(opcode, operands, labels.get(target) if target else None, always, *_control(word))
        for (opcode, operands, target, always), word in zip(found, bits, strict=True)
    ]


def _control(word: int) -> tuple[int, int, int, tuple[int, ...]]:
    waits = tuple(board for board in range(6) if word >> 11 + board & 1)
    return word & 15, word >> 5 & 7, word >> 8 & 7, waits


def step_loop(code: list[Instruction]) -> list[Instruction]:
    """The body of the loop over time: among those with products in them, the one with the most instructions."""
    first, last = loop_bounds(code)
    return code[first : last + 1]


def loop_bounds(code: list[Instruction]) -> tuple[int, int]:
    bounds = [(i.target, k) for k, i in enumerate(code) if i.target is not None and i.target <= k]
    multiplying = [(a, b) for a, b in bounds if any(i.multiplies for i in code[a : b + 1])]
    assert multiplying, "no loop with products in it"
    return max(multiplying, key=lambda ends: ends[1] - ends[0])


def waits_for_fetches(body: list[Instruction], until: Callable[[Instruction], bool]) -> Instruction | None:
    """The first of a step's instructions that waits for what the step loads, between the loads and the next one `until`
    says; None where none does, or there is nothing of the kind.

    body: of the loop.  Scoreboards are few: who waits for another load's may wait for these as well.  Fences do.
    """
    loads = [k for k, i in enumerate(body) if i.fetches]
    ends = [k for k, i in enumerate(body) if until(i)]
    if not loads or not ends:
        return None
    end = next((k for k in ends if k > loads[-1]), ends[0] + len(body))  # in this step or in the one behind
    boards = {body[k].sets for k in loads}
    between = (body[k % len(body)] for k in range(loads[-1] + 1, end + 1))
    return next((i for i in between if boards & set(i.waits) and not i.opcode.startswith(FENCES)), None)
