"""Bugs planted in the CPU side, one at a time, each of which the tests have to see: what says that they can fail.

A mutant is one edit in a copy of this checkout (`cpu_mutants`: a table for each room).  The tests that its row names run
on that copy in a process of their own, and one of them has to fail.  The copy without an edit goes the same way and passes.
Compiled code is shared with the copies: its key covers the sources that it was made of.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gpurnn import backend
from tests import ROOT
from tests.cpu_mutants import ROOMS, SURVIVORS

PARTS = ("gpurnn", "kernels", "bench", "tests", "pyproject.toml", "README.md")
LIMIT = 300  # s: of one mutant's tests, which take seconds; who takes that long hangs, and is not called caught
FILES = {path.stem: path for path in (ROOT / "tests").rglob("test_*.py")}  # a row names one, in whatever folder
ROWS = {f"{room}, {name}": row for room, table in ROOMS.items() for name, row in table.items()}

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU other code runs")


def test_each_text_stands_once_in_its_file():
    for name, (place, old, new, *_) in ROWS.items():
        found = (ROOT / f"{place}.py").read_text().count(old)
        assert found == 1 and new != old, f"{name}: {found} times in {place}.py: {old!r}"


def test_the_tests_that_are_named_are_there():
    for name, (_, _, _, *tests) in ROWS.items():
        assert tests, name
        for test in tests:
            file, function = re.fullmatch(r"(\w+)::(\w+)(?:\[.*\])?", test).groups()
            assert f"def test_{function}(" in FILES[f"test_{file}"].read_text(), f"{name}: {test}"


def test_the_table_is_large_and_few_survive():
    assert len(ROWS) >= 100
    assert set(SURVIVORS) <= set(ROWS)
    assert len(SURVIVORS) <= 0.05 * len(ROWS)


@pytest.fixture
def checkout():
    """A copy with a short name, since some tests look at lines that show it."""
    with tempfile.TemporaryDirectory() as folder:
        copy(Path(folder))
        yield Path(folder)


def marked(name):
    survives = [pytest.mark.xfail(strict=True, reason=SURVIVORS[name])] if name in SURVIVORS else []
    return pytest.param(name, marks=survives)


@pytest.mark.slow
@pytest.mark.parametrize("name", [marked(name) for name in ROWS])
def test_a_planted_bug_is_caught(name, checkout):
    place, old, new, *tests = ROWS[name]
    file = checkout / f"{place}.py"
    file.write_text(file.read_text().replace(old, new))
    status, output = outcome(checkout, tests, LIMIT)
    assert status == 1 or status < 0, f"exit status {status}, 1 is wanted: some test fails\n{output}"


@pytest.mark.slow
@pytest.mark.parametrize("room", ROOMS)
def test_the_copy_as_it_is(room, checkout):
    tests = dict.fromkeys(test for _, _, _, *tests in ROOMS[room].values() for test in tests)
    status, output = outcome(checkout, list(tests), 3 * LIMIT)
    assert status == 0, output


def copy(folder):
    for part in PARTS:
        if (ROOT / part).is_dir():
            left_out = shutil.ignore_patterns("__pycache__", "results")
            shutil.copytree(ROOT / part, folder / part, symlinks=True, ignore=left_out)
        else:
            shutil.copy2(ROOT / part, folder / part)


def outcome(folder, tests, limit):
    """Exit status of the tests, as pytest gives it (1: some failed; negative: the process died), and what they printed."""
    named = [test.split("::", 1) for test in tests]
    nodes = [f"{FILES[f'test_{file}'].relative_to(ROOT)}::test_{function}" for file, function in named]
    command = [sys.executable, "-m", "pytest", "-n0", "-xq", "--tb=short", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        [*command, f"--basetemp={folder}/temporary", *nodes], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    finally:
        if process.poll() is None:  # with whatever it has started
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate(timeout=10)
    return process.returncode, output[-3000:]
