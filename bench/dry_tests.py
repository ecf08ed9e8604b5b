"""A pytest plugin that runs the GPU tests dry, see `python -m bench build --tests`: they ask for their kernels, which are
built, and whatever they assert is let pass, so that each test comes to its end.

GPURNN_DRY_TESTS: the chip and its device's name, as JSON.  Run with PYTHONOPTIMIZE=1 and --assert=plain, which leave out
`assert`; NumPy's own assertions are replaced here.
"""

import contextlib
import json
import os

import numpy as np

from bench import dry
from gpurnn.kernels.plan import Chip

_chip, _name = json.loads(os.environ["GPURNN_DRY_TESTS"])
_number, _capability, *_sizes = _chip
_held = contextlib.ExitStack()
_kernels = _held.enter_context(dry.dry(dry.Target(Chip(_number, tuple(_capability), *_sizes), _name)))

for _assertion in ("assert_allclose", "assert_array_equal", "assert_equal"):
    setattr(np.testing, _assertion, lambda *arguments, **options: None)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(_kernels.asked)} kernels asked for here, {len(_kernels.built)} of them built")
