"""The GPU's own tests run where there is no GPU, so that a fault of theirs shows before they meet one."""

import subprocess
import sys

import pytest

from gpurnn import backend
from tests import ROOT

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="they run by themselves here")

SOME = [
    "tests/gpu/test_gpu.py::test_a_captured_graph",
    "tests/gpu/test_gpu.py::test_another_stream[step-float32]",
    "tests/gpu/test_gpu.py::test_a_new_thread[step]",
    "tests/gpu/test_gpu.py::test_out_of_memory_is_an_error_and_the_next_call_works",
    "tests/gpu/test_gpu_training.py::test_rows_that_are_not_finite",
    "tests/gpu/test_gpu_training.py::test_windows_arrive_in_time",
]
ALL = ["tests/gpu/test_gpu.py", "tests/gpu/test_gpu_training.py"]


def run(tests, processes, seconds):
    command = [sys.executable, "-m", "pytest", "-p", "tests.stand_in", "-m", "gpu", "-n", processes, *tests]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "no GPU: stand-in" in done.stdout
    return done.stdout


def test_some():
    output = run(SOME, "0", 300)
    assert "5 passed, 1 skipped" in output and "needs a chip: its memory has an end" in output


@pytest.mark.slow
def test_all():
    output = run(ALL, "auto", 3600)
    assert "needs a GPU" not in output
