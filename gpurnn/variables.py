"""The environment variables of gpurnn, one table: what each may be.  An empty one counts as unset.

Each is read where it is used, whenever it is used; `check` looks at all of them at import, so that a slip is told at once.
"""

import os
from collections.abc import Callable

MAX_THREADS = 1024  # a slip of the finger must not start a million threads


def given(name: str) -> str | None:
    """The value of a variable of the table, None where it is unset or empty.  ValueError where it makes no sense."""
    value = os.environ.get(name) or None
    if value is not None:
        fits, expected = _TABLE[name]
        if not fits(value):
            raise ValueError(f"{name}: expected {expected}, got {value!r:.80}")
    return value


def check() -> None:
    """Raises ValueError for the first variable whose value makes no sense."""
    for name in _TABLE:
        given(name)


def _one_of(*choices: str) -> tuple[Callable[[str], bool], str]:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def _counts_threads(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) <= 9 and 1 <= int(value) <= MAX_THREADS


# name: what a value has to fulfil, and that in words
_TABLE: dict[str, tuple[Callable[[str], bool], str]] = {
    "GPURNN_BACKEND": _one_of("auto", "cuda", "numpy"),
    "GPURNN_EXECUTOR": _one_of("compiled", "numpy", "resident", "persistent", "step"),
    "GPURNN_NUM_THREADS": (_counts_threads, f"a whole number from 1 to {MAX_THREADS}"),
    "GPURNN_VECTOR_BYTES": (("16", "32", "64").__contains__, "16, 32 or 64"),
    "GPURNN_TUNE": _one_of("0", "1"),
    "GPURNN_CACHE_DIR": (lambda value: os.path.isdir(value) or not os.path.exists(value), "a folder"),
}
