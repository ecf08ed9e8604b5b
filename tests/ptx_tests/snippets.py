"""Wraps a few lines of PTX into a kernel, for the tests of the interpreter."""

from fractions import Fraction

import numpy as np

from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
REGISTERS = """
    .reg .pred %p<20>; .reg .b16 %h<20>; .reg .b32 %r<60>; .reg .f32 %f<40>; .reg .f64 %fd<20>; .reg .b64 %rd<40>;
"""


def kernel(body: str, params: int = 2, module: str = "", before: str = "") -> str:
    """An entry with `params` pointers in %ptr0, %ptr1, ...; %tid is the thread, %own its byte offset in words."""
    names = [f"p{k}" for k in range(params)]
    declared = ",\n".join(f"    .param .u64 {name}" for name in names)
    loads = "\n".join(f"    .reg .b64 %ptr{k};\n    ld.param.u64 %ptr{k}, [{name}];" for k, name in enumerate(names))
    return f"""{HEADER}{module}
.visible .entry k(
{declared}
)
{{{REGISTERS}{before}
    .reg .b32 %thread;
    .reg .b64 %own;
{loads}
    mov.u32 %thread, %tid.x;
    mul.wide.u32 %own, %thread, 4;
{body}
    ret;
}}
"""


def launch(
    body: str, *arrays, grid=1, block=32, module="", seed=None, dynamic_shared=0, before="", report=False, cluster=1
):
    """Runs the body with the arrays as its pointers, and returns them as they are afterwards.

    An array that is a dtype and a length, as in ("u4", 32), has never been written.
    """
    memory, addresses, like = Memory(), [], []
    for k, array in enumerate(arrays):
        blank = isinstance(array, tuple)
        array = np.zeros(array[1], array[0]) if blank else np.asarray(array)
        addresses.append(memory.put(array, name=f"array{k}", initialised=not blank))
        like.append(array)
    text = kernel(body, len(arrays), module, before)
    told = run(parse(text), grid, block, addresses, memory, dynamic_shared=dynamic_shared, seed=seed, cluster=cluster)
    results = [memory.get(address, array) for address, array in zip(addresses, like, strict=True)]
    return (*results, told) if report else results


def compute(body: str, *inputs, out: str):
    """One thread for each element: the body makes %o of %a, %b, %c, %d.  `out` is the result's NumPy type."""
    inputs = [np.ascontiguousarray(array) for array in inputs]
    count, size = inputs[0].size, np.dtype(out).itemsize
    assert count <= 1024
    declared = [f".reg .b{8 * size} %o;"] + [
        f".reg .b{8 * a.itemsize} %{name};" for name, a in zip("abcd", inputs, strict=False)
    ]
    loads = [
        f"mul.wide.u32 %rd39, %thread, {a.itemsize}; add.u64 %rd39, %rd39, %ptr{k}; ld.global.b{8 * a.itemsize} %{name}, [%rd39];"
        for k, (name, a) in enumerate(zip("abcd", inputs, strict=False))
    ]
    store = f"mul.wide.u32 %rd39, %thread, {size}; add.u64 %rd39, %rd39, %ptr{len(inputs)}; st.global.b{8 * size} [%rd39], %o;"
    lines = "\n".join([*loads, body, store])
    return launch(lines, *inputs, (out, count), block=count, before="\n".join(declared))[-1]


def pairs(values, dtype):
    """Every pair of the values, as two arrays."""
    a, b = np.meshgrid(np.array(values, dtype), np.array(values, dtype))
    return a.ravel(), b.ravel()


SIGNED = {16: "i2", 32: "i4", 64: "i8"}
UNSIGNED = {16: "u2", 32: "u4", 64: "u8"}


def wrap(value: int, kind: str) -> int:
    """An integer as a PTX type keeps it."""
    bits = int(kind[1:])
    value %= 1 << bits
    return value - (1 << bits) if kind[0] == "s" and value >> bits - 1 else value


def edges(kind: str) -> np.ndarray:
    """Integers of a PTX type at which something may go wrong."""
    bits = int(kind[1:])
    values = [
        0,
        1,
        2,
        3,
        5,
        7,
        100,
        (1 << bits - 1) - 1,
        (1 << bits) - 1,
        1 << bits - 1,
        1 << bits // 2,
        0x5A5A % (1 << bits),
    ]
    return np.array([wrap(v, kind) for v in [*values, -7, -100]], {"s": SIGNED, "u": UNSIGNED}[kind[0]][bits])


def rounded(exact: Fraction, digits: int, least: int, mode: str = "rn") -> Fraction:
    """To `digits` binary digits, no finer than 2^least."""
    if exact == 0:
        return exact
    size = abs(exact)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    exponent -= size < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - digits + 1, least)
    low, rest = divmod(exact, unit)
    up = {"rm": False, "rp": rest > 0, "rz": rest > 0 and exact < 0}.get(mode)
    if up is None:
        up = rest * 2 > unit or (rest * 2 == unit and low % 2 == 1)
    return (low + up) * unit


def same(got: np.ndarray, expected) -> None:
    """Bit for bit, but for NaN, whose sign and payload are open."""
    expected = np.asarray(expected, got.dtype)
    both = np.isnan(got) & np.isnan(expected)
    bits = f"u{got.dtype.itemsize}"
    wrong = ~both & (got.view(bits) != expected.view(bits))
    assert not wrong.any(), (np.flatnonzero(wrong)[:5], got[wrong][:5], expected[wrong][:5])
