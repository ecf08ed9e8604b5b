"""The results file: JSON lines, one for each case, phase, part and implementation; appended to, never rewritten.

A record is a plain dict.  `format` is 1.  Times are in seconds where a name ends in _s, `us_per_step` is microseconds.
`error` is the check's largest error relative to the largest entry of the reference.  A record with `failure`, the
message of what went wrong, has None for every time.  Where a file holds a key twice, the later line counts (`latest`).
"""

import json
import math
import os
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT = 1
MOST_SAMPLES = 50  # kept in a record
PHASES = ("inference", "training")
PARTS = ("layer", "recurrence", "model")  # model: the whole character-model step of group `train`

Record = dict[str, Any]
Key = tuple[str, str, str, str]

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "format": int, "run": str, "date": str, "commit": str, "case": str, "group": str, "cell": str, "T": int, "N": int,
    "I": int, "H": int, "dtype": str, "heads": int, "phase": str, "part": str, "implementation": str,
    "flags": list, "environment": dict,
}  # fmt: skip
_TIMES = ("median_s", "p20_s", "p80_s", "us_per_step", "tokens_per_s")


def key(record: Record) -> Key:
    """What a record measures, and with what."""
    return record["case"], record["phase"], record["part"], record["implementation"]


def validate(record: Record) -> Record:
    """The record itself.  Raises ValueError with the first field that is missing or makes no sense."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a record, got {type(record).__name__}")
    if record.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT}, got {record.get('format')!r}")
    for name, kind in _REQUIRED.items():
        if not isinstance(record.get(name), kind):
            raise ValueError(f"{name}: expected {kind}, got {record.get(name)!r}")
    for name, choices in (("phase", PHASES), ("part", PARTS)):
        if record[name] not in choices:
            raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {record[name]!r}")
    if record.get("failure") is None:
        for name in _TIMES:
            value = record.get(name)
            if not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
        if not isinstance(record.get("samples_s"), list) or not record["samples_s"]:
            raise ValueError(f"samples_s: expected one or more times, got {record.get('samples_s')!r}")
    return record


def read(path: str | Path) -> list[Record]:
    """All records of a file, in its order.

    A last line that was cut off, by a run that was killed while writing, is left out.  Raises ValueError with file and
    line for anything else that is not a record.
    """
    lines = Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            records.append(validate(json.loads(line)))
        except ValueError as error:
            if number == len(lines):  # it does not end in a newline
                break
            raise ValueError(f"{path}, line {number}: {error}") from None
    return records


def append(path: str | Path, record: Record) -> None:
    """Adds one record, whole or not at all: a half-written last line is cut off first."""
    line = json.dumps(validate(record), allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+b") as file:
        file.seek(0)
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
        file.write(line)


def latest(records: Iterable[Record]) -> list[Record]:
    """One record for each key: the last one."""
    return list({key(record): record for record in records}.values())


def commit() -> str:
    """The checkout's short commit hash, with + where files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", os.fspath(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude,top)bench/results")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
