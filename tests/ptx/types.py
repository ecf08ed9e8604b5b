"""PTX's types in NumPy's terms, and literals."""

import re
import struct

import numpy as np

DTYPE = {
    **{f"{kind}{8 * size}": np.dtype(f"u{size}") for kind in "ub" for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{"f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?"), "f16": np.dtype("f2")},
    **{"bf16": np.dtype("u2"), "f16x2": np.dtype("u4"), "bf16x2": np.dtype("u4"), "tf32": np.dtype("u4")},
}
UNSIGNED = {size: np.dtype(f"u{size}") for size in (1, 2, 4, 8)}
SIGNED = {size: np.dtype(f"i{size}") for size in (1, 2, 4, 8)}

NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+U?|0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|\d+U?|\d*\.\d+([eE][-+]?\d+)?)")


def literal(text: str, kind: str) -> np.generic:
    """A literal as a scalar of a PTX type: integers wrap, a float's bits may stand for an integer of its width."""
    dtype = DTYPE[kind]
    sign = -1 if text.startswith("-") else 1
    bare = text.lstrip("-")
    if bare[:2] in ("0f", "0F"):
        value = sign * struct.unpack("<f", struct.pack("<I", int(bare[2:], 16)))[0]
    elif bare[:2] in ("0d", "0D"):
        value = sign * struct.unpack("<d", struct.pack("<Q", int(bare[2:], 16)))[0]
    elif "." in bare:
        value = float(text)
    elif dtype.kind == "b":
        return np.bool_(int(bare, 0))
    elif dtype.kind == "f":
        value = float(int(text.rstrip("U"), 0))
    else:
        octal = re.fullmatch(r"0[0-7]+", bare)
        wrapped = sign * int(bare.rstrip("U"), 8 if octal else 0) % (1 << 8 * dtype.itemsize)
        return UNSIGNED[dtype.itemsize].type(wrapped).view(dtype)
    if dtype.kind != "f":  # `mov.b32 %r1, 0f3F800000`: the bits
        return np.dtype(f"f{len(bare) // 2 - 1}").type(value).view(dtype)
    return dtype.type(value)
