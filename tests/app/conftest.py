"""A text, and a small run that was trained on it."""

import os
import sys
from pathlib import Path

import pytest

from gpurnn.cli import main
from tests import ROOT

SMALL = [
    "--hidden-size", "9", "--embedding-size", "5", "--batch", "3", "--k1", "6", "--steps", "8", "--validation", "0.2",
    "--log-every", "2", "--validate-every", "4", "--save-every", "3",
]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "gpurnn.cli"]


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox, die schnelle Füchsin.\n" * 30, "utf-8")
    return path


@pytest.fixture
def run(text, tmp_path, capsys) -> Path:
    """A finished run."""
    assert main(["train", "--data", str(text), *SMALL, "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    return tmp_path / "run"
