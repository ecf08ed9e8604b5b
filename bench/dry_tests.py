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
_here = _held.enter_context(dry.dry(dry.Target(Chip(_number, tuple(_capability), *_sizes), _name)))
_asked: set[str] = set()
_built: set[str] = set()

for _assertion in ("assert_allclose", "assert_array_equal", "assert_equal"):
    setattr(np.testing, _assertion, lambda *arguments, **options: None)


def pytest_sessionfinish(session):
    """What this process asked for; xdist's processes send theirs to the one that reports."""
    _asked.update(path.name for path in _here.asked)
    _built.update(path.name for path in _here.built)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["kernels"] = [sorted(_asked), sorted(_built)]


def pytest_configure(config):
    if config.pluginmanager.hasplugin("dsession"):
        config.pluginmanager.register(_Gathering())


class _Gathering:
    """Knows of xdist's hook, which pytest refuses where xdist is not."""

    def pytest_testnodedown(self, node, error):
        asked, built = getattr(node, "workeroutput", {}).get("kernels", ((), ()))
        _asked.update(asked)
        _built.update(built)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"{len(_asked)} kernels, {len(_built)} of them new")
