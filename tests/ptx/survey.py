"""What a kernel uses, and which of it the interpreter does not know: all of it, where a run stops at the first."""

from collections import Counter
from typing import NamedTuple

import numpy as np

from tests.ptx.errors import UnknownInstruction
from tests.ptx.instructions import FILE_OF
from tests.ptx.launch import Launch
from tests.ptx.memory import Memory
from tests.ptx.parse import Instruction, parse
from tests.ptx.program import PLAIN, Program, Step


class Survey(NamedTuple):
    """forms: of each opcode, how often with which modifiers.  lacking: a line each, as a run would refuse it."""

    entry: str
    params: list[str]
    threads: int | None
    static_shared: int
    forms: dict[str, Counter[str]]
    lacking: list[str]

    @property
    def text(self) -> str:
        """A table, opcodes in the order of their files."""
        most = "" if self.threads is None else f", at most {self.threads} threads in a block"
        head = f"{self.entry}({', '.join(self.params)}){most}, {self.static_shared} bytes of static shared memory"
        rows = [("opcode", "count", "file", "forms")]
        for opcode, forms in sorted(self.forms.items(), key=lambda row: (FILE_OF.get(row[0], "~"), row[0])):
            told = ", ".join(f"{form} {count}" for form, count in forms.most_common())
            rows.append((opcode, str(forms.total()), FILE_OF.get(opcode, "none"), told))
        table = aligned(rows)
        lacking = self.lacking or ["nothing"]
        return "\n".join([head, *table, "the interpreter does not know:", *(f"    {line}" for line in lacking)])


class _Lenient(Program):
    """Notes what it does not know, and goes on."""

    def __init__(self, *given):
        self.lacking: list[str] = []
        super().__init__(*given)

    def _step(self, instruction: Instruction, *given) -> Step:
        try:
            return super()._step(instruction, *given)
        except UnknownInstruction as error:
            self.lacking.append(str(error))
            return Step(instruction, PLAIN, None)


def survey(text: str) -> Survey:
    """Of PTX text with one entry.  Raises UnknownInstruction where it cannot be read at all."""
    module = parse(text)
    entry = module.functions[module.entry]
    forms: dict[str, Counter[str]] = {}
    for function in module.functions.values():
        for i in function.instructions:
            forms.setdefault(i.opcode, Counter())[".".join((i.opcode, *i.modifiers))] += 1
    with np.errstate(all="ignore"):
        launch = Launch(module, 1, entry.most_threads or 32, [0] * len(entry.params), Memory(), 0, 1)
        program = _Lenient(module, launch.x)
    params = [kind for kind, _ in module.params]
    return Survey(module.entry, params, entry.most_threads, module.static_shared, forms, program.lacking)


def aligned(rows: list[tuple[str, ...]]) -> list[str]:
    """Lines in columns, the last of any width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
