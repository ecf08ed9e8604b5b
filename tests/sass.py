"""The machine code of a kernel, as NVIDIA's disassembler shows it: its instructions in order, and the loop over time.

The disassembler comes from its wheel or from a CUDA toolkit; it needs no GPU.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

PLACES = ("nvidia/cu13/bin", "nvidia/cuda_nvdisasm/bin")  # of wheels
LABEL = re.compile(r"^\s*(\.L_x_\d+):")
LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*);")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Instruction(NamedTuple):
    """opcode: with its suffixes.  operands: as printed.  target: the index that a branch goes to, or None."""

    opcode: str
    operands: str
    target: int | None


def tool(name: str) -> str | None:
    """One of NVIDIA's command-line tools, or None."""
    for folder in (Path(path) for path in sys.path):
        for place in PLACES:
            if (folder / place / name).exists():
                return str(folder / place / name)
    return shutil.which(name)


def listing(cubin: bytes, folder: Path) -> list[Instruction]:
    """Raises AssertionError where there is next to nothing: an empty listing would pass every check."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run(
        [tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    found, labels = [], {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label.group(1)] = len(found)
        elif match := LINE.match(line):
            target = TARGET.search(match.group(3))
            found.append((match.group(2), match.group(3).strip(), target and target.group(1)))
    assert len(found) > 20, "an empty disassembly would pass every check"
    return [Instruction(code, operands, labels.get(target)) for code, operands, target in found]


def step_loop(code: list[Instruction]) -> list[Instruction]:
    """The body of the loop over time: among those with products in them, the one with the most instructions."""
    bodies = [code[i.target : k + 1] for k, i in enumerate(code) if i.target is not None and i.target <= k]
    multiplying = [body for body in bodies if any(i.opcode.startswith(("HMMA", "FFMA")) for i in body)]
    assert multiplying, "no loop with products in it"
    return max(multiplying, key=len)
