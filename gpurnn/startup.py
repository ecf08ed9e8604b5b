"""The first of `import gpurnn`: the variables are checked and the backend is chosen.

What is wrong there is raised.  Within the command `gpurnn` it is one sentence and exit code 2, as every other mistake is:
Python imports the package before the command itself, which could not catch it.
"""

import os
import sys
from contextlib import suppress
from pathlib import Path

from gpurnn import variables


def _is_command() -> bool:
    """Whether this process is `gpurnn ...`, or `python -m gpurnn.cli ...`, whose argv[0] is "-m" until it is found."""
    program = (getattr(sys, "argv", None) or [""])[0]
    as_module = program == "-m" and any(word.endswith("gpurnn.cli") for word in sys.orig_argv)
    return as_module or Path(program).stem in ("gpurnn", "gpurnn-script")


def _open_standard_descriptors() -> None:
    """Where stdin, stdout or stderr is closed, the null device takes its place, so that no file of ours gets its number."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # the lowest number that is free


if _is_command():
    _open_standard_descriptors()
try:
    variables.check()
    from gpurnn import backend  # noqa: F401
    from gpurnn.executors import check

    check(None)
except (ValueError, RuntimeError) as error:
    if not _is_command():
        raise
    print(f"gpurnn: error: {error}", file=sys.stderr)
    sys.exit(2)
