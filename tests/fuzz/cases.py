"""What the fuzzers share: their seeds, the time that a case may take, and what an error raised on purpose is."""

import dis
import faulthandler
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import gpurnn

PACKAGE = Path(gpurnn.__file__).parent
FIRST, COUNT = int(os.environ.get("FUZZ_SEED", "0")), int(os.environ.get("FUZZ_CASES", "1000"))
BLOCK = 100  # seeds of one test
SECONDS = 60  # of one case, beyond which it hangs


def seeds(few: int, one_in: int = 1) -> list:
    """For `parametrize`: a few seeds by default; FUZZ_CASES of them, or one in so many, among the slow tests, in blocks."""
    last, size = FIRST + -(-COUNT // one_in), max(1, BLOCK // one_in)
    blocks = [range(start, min(start + size, last)) for start in range(FIRST, last, size)]
    slow = [pytest.param(block, marks=pytest.mark.slow, id=f"from {block.start}") for block in blocks]
    return [pytest.param(range(few), id=f"{few} of them"), *slow]


def each_case(case: Callable[[int], str | None], seeds: Iterable[int], folder: Path) -> None:
    """Runs `case` for each seed; fails with all that went wrong, by seed.  A case says in words what did, or None.

    A case that hangs ends the process, as a crash does.  Which one it was then stands in folder / "seed".
    """
    wrong = {}
    for seed in seeds:
        (folder / "seed").write_text(str(seed))
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = case(seed)
        finally:
            faulthandler.cancel_dump_traceback_later()
        if found:
            wrong[seed] = found
    assert not wrong, "\n".join(f"seed {seed}: {found}" for seed, found in wrong.items())


def not_on_purpose(error: BaseException, *allowed: Path) -> str | None:
    """None where a `raise` of gpurnn raised `error`, or code in one of the files `allowed`; else where it came from."""
    trace = error.__traceback__
    while trace.tb_next is not None:
        trace = trace.tb_next
    code, path = trace.tb_frame.f_code, Path(trace.tb_frame.f_code.co_filename)
    raised = dis.opname[code.co_code[trace.tb_lasti]] == "RAISE_VARARGS" and not isinstance(error, AssertionError)
    if path in allowed or (raised and path.is_relative_to(PACKAGE)):
        return None
    return f"{type(error).__name__}: {error!s:.200}, at {path}:{trace.tb_lineno}"
