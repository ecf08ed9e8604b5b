"""gpurnn on the stand-in for CuPy and its kernels in the interpreter, for a whole process: as on a GPU, without one.

    python -m pytest -p tests.stand_in -m gpu tests/gpu/test_gpu.py tests/gpu/test_gpu_training.py

runs the GPU's own tests so.  What only a chip has is skipped by its marker, `chip(reason)`; what would take hours is
smaller by `size`.  A program that is no test calls `start()` before it makes arrays.
"""

from typing import Any

import pytest

running: Any = None  # what would be undone if nobody kept it


def start() -> None:
    """From now on the backend is "cuda", until the process ends."""
    global running
    from tests.interpreted import interpreted

    if running is None:
        running = interpreted()
        running.__enter__()


def size(of_chip: Any, of_stand_in: Any) -> Any:
    """The first on a GPU, the second where each instruction of each thread is interpreted."""
    return of_chip if running is None else of_stand_in


def pytest_configure(config: pytest.Config) -> None:
    """As a plugin."""
    start()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for marker in item.iter_markers("chip"):
            item.add_marker(pytest.mark.skip(reason=f"needs a chip: {marker.args[0]}"))


def pytest_report_header() -> str:
    return "no GPU: stand-in"
