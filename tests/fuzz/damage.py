"""Damage to the files of a run: a checkpoint (safetensors), its configuration (TOML), its log (JSON lines)."""

import copy
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig

DTYPES = {"F32": "<f4", "F64": "<f8", "I64": "<i8", "I32": "<i4"}
# A whole number in a place for one, text in a place for text: what a damaged header may say.
VALUES: list[Any] = [None, True, -1, 0, 1, 2**63, 10**30, 1.5, float("nan"), float("inf"), "", "x", "../../etc/passwd"]
VALUES += [[], [1], {}, {"a": 1}, "\ud800", "1", [[]] * 3]
DEEP = 10**5


class Run(NamedTuple):
    """A run's folder, what trains in it, its checkpoint undamaged, and its parameters at the end."""

    folder: Path
    config: TrainConfig
    corpus: Any
    good: bytes
    end: bytes

    @property
    def start(self) -> int:
        """Where the tensors' bytes begin."""
        return 8 + struct.unpack("<Q", self.good[:8])[0]

    @property
    def header(self) -> dict[str, Any]:
        return json.loads(self.good[8 : self.start])

    def packed(self, header: Any) -> bytes:
        """With this header, a mapping or bytes, in place of its own."""
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text + self.good[self.start :]


def _drawn(rng: np.random.Generator, items: Any) -> Any:
    items = list(items)
    return items[rng.integers(len(items))]


def _cut(rng: np.random.Generator, run: Run) -> bytes:
    return run.good[: rng.integers(len(run.good))]


def _flipped(rng: np.random.Generator, run: Run) -> bytes:
    """A few bits, in all of it or in its header."""
    damaged = bytearray(run.good)
    until = len(damaged) if rng.random() < 0.5 else run.start
    for _ in range(_drawn(rng, [1, 1, 1, 2, 8])):
        damaged[rng.integers(until)] ^= 1 << int(rng.integers(8))
    return bytes(damaged)


def _values(rng: np.random.Generator, run: Run) -> bytes:
    """Values of a tensor, its digest as it was."""
    entry = _drawn(rng, [entry for name, entry in run.header.items() if name != "__metadata__"])
    first, last = (run.start + offset for offset in entry["data_offsets"])
    values = np.frombuffer(run.good[first:last], DTYPES[entry["dtype"]]).copy()
    others = [-1, 2**31 - 1, 10**6] if values.dtype.kind == "i" else [np.nan, np.inf, -1.0, -1e-30, 1e30, 1e-45]
    values[rng.integers(values.size) if rng.random() < 0.5 else slice(None)] = _drawn(rng, others)
    return run.good[:first] + values.tobytes() + run.good[last:]


def _meta(rng: np.random.Generator, run: Run) -> bytes:
    """A field of what gpurnn keeps beside the tensors, changed or gone."""
    header = run.header
    whole = json.loads(header["__metadata__"]["gpurnn"])
    inside, name = whole, _drawn(rng, whole)
    while isinstance(inside[name], dict) and inside[name] and rng.random() < 0.8:
        inside = inside[name]
        name = _drawn(rng, inside)
    if rng.random() < 0.2:
        del inside[name]
    else:
        inside[name] = _drawn(rng, VALUES)
    header["__metadata__"]["gpurnn"] = json.dumps(whole)
    return run.packed(header)


def _header(rng: np.random.Generator, run: Run) -> bytes:
    """A field of the format itself."""
    header, size = run.header, len(run.good) - run.start
    name, bad = (
        _drawn(rng, header),
        {"gpurnn": _drawn(rng, ["[" * DEEP, "1" * 10000, "NaN", '{"format":1}', "", 1, None])},
    )
    if name == "__metadata__":
        header[name] = _drawn(rng, [None, [], {}, "x", {"other": "x"}, bad, bad, bad])
        return run.packed(header)
    shape = header[name]["shape"]
    fields = {
        "dtype": ["F64", "F16", "BF16", "BOOL", "F8_E4M3", "F4", "", "f32", "X" * 1000, None, 1],
        "shape": [[], [0], [-1], [2**63], [2**32, 2**32], [1.5], None, "x", [1] * 1000, shape[::-1], [*shape, 1]],
        "data_offsets": [[0, 0], [0, 2**63], [2**64 - 1, 0], [-1, 4], [4, 0], None, [0], [0, 4, 8], [0, size]],
    }
    field = _drawn(rng, fields)
    header[name][field] = _drawn(rng, fields[field])
    return run.packed(header)


def _tensors(rng: np.random.Generator, run: Run) -> bytes:
    """Tensors that are missing, too many, or of another shape or kind, as the library's own writer would write them."""
    path = run.folder / checkpoint.MODEL
    path.write_bytes(run.good)
    saved = checkpoint.load(path)
    groups = copy.deepcopy([saved.tensors, saved.optimizer, saved.state])
    group = groups[_drawn(rng, [0, 1, 2, 2, 2])]
    name = _drawn(rng, group)
    value = group.pop(name)
    changes: dict[str, Callable[[], dict[str, Any]]] = {
        "gone": lambda: {},
        "another": lambda: {name: value, _drawn(rng, ["x", "begin7", "carried2", "../x", "", "stretch2"]): value},
        "renamed": lambda: {name + "x": value},
        "flat": lambda: {name: value.reshape(-1) if value.ndim != 1 else value[None]},
        "wider": lambda: {name: value.astype("f8")},
        "twice as long": lambda: {name: np.concatenate([np.atleast_1d(value)] * 2)},
        "one number": lambda: {name: np.zeros((), value.dtype)},
        "empty": lambda: {name: np.zeros((0, *value.shape[1:]), value.dtype)},
    }
    group |= _drawn(rng, changes.values())()
    checkpoint.save(path, checkpoint.Checkpoint(*groups, saved.meta))
    return path.read_bytes()


def _rubbish(rng: np.random.Generator, run: Run) -> bytes:
    one = b'"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    headers = [b"", b"[" * 10, b"[" * DEEP, b'{"a":' * DEEP, b"{%b,%b}" % (one, one), b"{}", b"\xff\xfe{}"]
    headers += [b'{"__metadata__":{"gpurnn":"{\\"format\\":1}"}}']
    lengths = [struct.pack("<Q", size) + b"{}" + run.good[:50] for size in (0, 1, 2**32, 2**63, 2**64 - 1, 10**8)]
    return _drawn(rng, [b"", b"\0" * 1000, rng.bytes(200), *lengths, *map(run.packed, headers)])


CHECKPOINTS: dict[str, Callable[[np.random.Generator, Run], bytes]] = {
    "cut": _cut,
    "flipped bits": _flipped,
    "values": _values,
    "metadata": _meta,
    "header": _header,
    "tensors": _tensors,
    "rubbish": _rubbish,
}


def config(rng: np.random.Generator) -> bytes:
    good = ["hidden_size = 4", "embedding_size = 3", "k1 = 5", "batch = 2"]
    bad = [
        "hidden_size = 2**3", "hidden_size = 1e400", "hidden_size = true", "hidden_size = " + "9" * 5000, "steps = -1",
        "steps = 9223372036854775807", "minutes = nan", "minutes = inf", "lr = inf", "lr=1e-400", "lr = '1'", "lr = 0x10",
        "data = '\\0'", 'data = "\\u0000"', 'data = "\\ud800"', "data = '''\n'''", "pattern = 3", "cell = 'eval'",
        "cell = ['lstm']", "dropout = 1.0", "a.b.c = 1", "[data]\nx=1", "[[steps]]", "seed = 9223372036854775808",
        "encoding = 'hex'", "x" * DEEP, "a = " + "[" * DEEP, "a = {" * 20000, "dtype = 'object'", "clip_norm = nan",
        "k2 = 1", "validation = -0.0", "'__class__' = 1", '"" = 1', "num_layers = 1979-05-27", "\ufeff", "\r", "\xff",
    ]  # fmt: skip
    return "\n".join([*rng.permutation(good)[:3], _drawn(rng, bad)]).encode(_drawn(rng, ["utf-8", "utf-8", "utf-16"]))


def log(rng: np.random.Generator) -> tuple[bytes, int]:
    """Lines, and the step of the checkpoint beside them."""
    lines = [json.dumps({"step": step, "loss": 1.0}).encode() for step in range(1, 9)]
    whole = b"\n".join(lines) + b"\n"
    flipped = bytearray(whole)
    flipped[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
    odd = [
        b"",
        b"null",
        b"[]",
        b"1",
        b'{"step":true}',
        b'{"step":1.5}',
        b'{"step":"1"}',
        b'{"step":' + b"9" * 5000 + b"}",
    ]
    odd += [b"[" * DEEP, b"\xff\xff", b'{"step":1,"step":2}', b'{"step":NaN}']
    beside = list(lines)
    beside.insert(rng.integers(9), _drawn(rng, odd))
    shuffled = [lines[i] for i in rng.permutation(8)]
    logs = [whole[: rng.integers(200)], bytes(flipped), whole + b"\0" * 4000, b"\n".join(beside) + b"\n"]
    logs += [b"\n".join(shuffled) + b"\n", rng.bytes(300), b"\r\n".join(lines), b""]
    return _drawn(rng, logs), int(rng.integers(10))
