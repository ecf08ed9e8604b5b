"""Files of tensors: safetensors, with metadata as JSON and a digest of all of it.  Nothing is unpickled or executed.

A checkpoint of a run (`app.checkpoint`) and a model (`saving`) are two kinds of them.  safetensors is imported where tensors
are read or written: who keeps none does without.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gpurnn.files import StrPath, parse_json

FORMAT = 1
CHECKPOINT, MODEL = "gpurnn", "gpurnn-model"
KINDS = {CHECKPOINT: "checkpoint", MODEL: "model"}  # each entry of a file's metadata, and in words
DTYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1",
    "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?",
}  # fmt: skip

Tensors = dict[str, np.ndarray]


def _digest(meta: str, arrays: Tensors) -> str:
    """Of all that a checkpoint holds: safetensors sees to the file's form, not to a bit that flipped in its values."""
    found = hashlib.sha256(meta.encode())
    for name, array in sorted(arrays.items()):
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        found.update(f"\n{name} {little.dtype.str} {little.shape}\n".encode())
        found.update(little.tobytes())
    return found.hexdigest()


def tensor_bytes(tensors: Mapping[str, np.ndarray], kind: str | None = None, meta: str = "") -> bytes:
    """A safetensors file; meta: of its kind, as JSON, with the entry "format"."""
    arrays = {}
    for name, tensor in tensors.items():
        # safetensors writes the memory behind an array and ignores its strides; asarray, unlike
        # ascontiguousarray, leaves 0-d arrays 0-d.
        arrays[name] = array = np.asarray(tensor, order="C")
        if array.dtype.newbyteorder("<") not in DTYPES.values() or name == "__metadata__":
            raise ValueError(f"{name}: expected a tensor of type {', '.join(DTYPES)}, got {array.dtype}")
    from safetensors.numpy import save as saved

    return saved(arrays, None if kind is None else {kind: meta, "sha256": _digest(meta, arrays)})


def read_tensors(path: StrPath) -> tuple[Tensors, str | None, dict[str, Any]]:
    """The tensors, the file's kind, None where it is not one of ours, and its metadata.  One read: it may be replaced.

    ValueError says what is wrong with a broken or newer file.
    """
    import safetensors

    data = Path(path).read_bytes()
    meta: dict[str, Any] = {}
    try:
        tensors = {name: _array(name, **entry) for name, entry in safetensors.deserialize(data)}
        # The package keeps the last of several entries of one name; a file that has them is not to be trusted.
        metadata = parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
        kind = next((kind for kind in KINDS if kind in metadata), None)
        if kind is not None:
            meta = parse_json(metadata[kind])
            if (version := meta.pop("format", None)) != FORMAT:
                raise ValueError(
                    f"expected {KINDS[kind]} format {FORMAT}, got {version!r}: a newer gpurnn may have written it"
                )
            if metadata.get("sha256") != _digest(metadata[kind], tensors):
                raise ValueError("its digest is not that of its contents: the file is damaged")
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: not a file that can be loaded: {error}") from None
    return tensors, kind, meta


def _array(name: str, dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    if dtype == "BF16":  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected a tensor of type BF16, {', '.join(DTYPES)}, got {dtype}")
    return np.frombuffer(data, DTYPES[dtype]).reshape(shape)
