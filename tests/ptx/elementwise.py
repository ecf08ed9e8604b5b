"""What elementwise instructions share.

A builder takes an instruction's modifiers (those that it does not know stay, and are an error) and its operands, and
returns what the instruction does to the threads that execute it: Active -> None.
"""

import numpy as np

from tests.ptx import numbers
from tests.ptx.registers import Modifiers, Operands

f64 = np.float64

INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
BITS = ("b16", "b32", "b64")
PACKED = ("f16x2", "bf16x2")
HALVES = ("f16", "bf16", *PACKED)
ROUNDINGS = ("rn", "rz", "rm", "rp")


def elementwise(x: Operands, kind: str, function, operands, result: str | None = None):
    """result = function(operands), all of one type but perhaps the result."""
    destination, *sources = operands
    reads = [x.read(source, kind) for source in sources]
    write = x.write(destination, result or kind)
    return lambda active: write(active, function(*[read(active) for read in reads]))


def floating(m: Modifiers, x: Operands, kind: str, function, operands):
    """Elementwise, with .ftz on what goes in and comes out, .sat, and NaN as the hardware writes it."""
    ftz, sat = m.flag("ftz"), m.flag("sat")
    destination, *sources = operands
    reads = [x.read(source, kind) for source in sources]
    write = x.write(destination, kind)

    def execute(active):
        values = [read(active) for read in reads]
        result = function(*[numbers.flush(v) for v in values] if ftz else values)
        result = numbers.flush(result) if ftz else result
        write(active, numbers.canonical(numbers.saturate(result) if sat else result))

    return execute


def halfway(m: Modifiers, x: Operands, kind: str, function, operands):
    """On f16 and bf16, alone or in pairs: `function` works in float64 and returns it rounded to odd."""
    destination, *sources = operands
    base = "b32" if kind in PACKED else "b16"
    reads = [x.read(source, base) for source in sources]
    write = x.write(destination, base)
    widen = numbers.from_f16 if kind == "f16" else numbers.from_bf16

    def execute(active):
        if kind in PACKED:
            values = [numbers.halves(active.full(read(active)), kind) for read in reads]
            write(active, numbers.pack(function(*values), kind))
        else:
            values = [widen(read(active)).astype(f64) for read in reads]
            write(active, numbers.half_bits(function(*values), kind))

    return execute
