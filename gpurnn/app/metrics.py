"""metrics.jsonl: one JSON object a line, each with its step; cut back to a checkpoint when a run resumes."""

import json
import math
import operator
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np

from gpurnn.files import StrPath, named, parse_json, write_atomically


class MetricsLog:
    """Appends to a file of one JSON object a line, each with its step.

    Numbers that are not finite become null, so that every line is valid JSON for every reader.
    """

    def __init__(self, path: StrPath):
        if os.path.exists(path) and _lines(path)[1]:
            raise ValueError(f"{path}: expected whole lines, got half a line at its end: open it with resume()")
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115 (it stays open as long as the log)

    @classmethod
    def resume(cls, path: StrPath, step: int) -> Self:
        """Cuts the file back to the lines up to and including `step`, atomically, and opens it; it may be missing.

        Lines that a kill or a power loss spoilt are dropped.  Raises ValueError where a good line up to `step` follows
        one that cannot be read: a log that was synced before each save is never left like that by a crash.
        """
        whole, half = _lines(path) if os.path.exists(path) else ([], b"")
        spoilt, kept = "", []
        for number, line in enumerate([*whole, half] if half else whole, start=1):
            try:
                wanted = _metrics_line(line)["step"] <= step
            except ValueError as error:
                spoilt = spoilt or f"{path}: line {number}: {error}; without that line, or the file, the run resumes"
                continue
            if wanted and spoilt:
                raise ValueError(spoilt)
            if wanted:
                kept.append(line + b"\n")
        write_atomically(path, b"".join(kept))
        return cls(path)

    def write(self, step: int, **values: Any) -> None:
        """Appends one line, and hands it to the operating system.  Values: JSON, NumPy scalars, NumPy arrays."""
        line = json.dumps(plain({"step": operator.index(step), **values}), allow_nan=False)
        with named(self._path):
            self._file.write(line.encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Forces the lines to the disk: before a checkpoint is saved, so that the log never lags behind it."""
        with named(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with named(self._path):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: StrPath) -> list[dict[str, Any]]:
    """Reads a metrics file, line by line; a last line that is only half there is left out.

    Raises ValueError with the file and the line where another line is wrong.
    """
    whole, half = _lines(path)
    metrics = []
    for number, line in enumerate(whole, start=1):
        try:
            metrics.append(_metrics_line(line))
        except ValueError as error:
            raise ValueError(f"{path}: line {number}: {error}") from None
    with suppress(ValueError):
        metrics.append(_metrics_line(half))
    return metrics


def _lines(path: StrPath) -> tuple[list[bytes], bytes]:
    """The whole lines of a file, and what stands after its last newline."""
    *whole, half = Path(path).read_bytes().split(b"\n")
    return whole, half


def _metrics_line(line: bytes) -> dict[str, Any]:
    record = parse_json(line)
    if type(record.get("step")) is not int:
        raise ValueError(f"expected an integer step, got {record.get('step')!r}")
    return record


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NumPy's arrays as lists, numbers that are not finite as None."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, np.generic | np.ndarray):
        return plain(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
