"""Figures are the same whatever matplotlib a user has set up, and never cost a result."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gpurnn import plot
from gpurnn.cli import main
from gpurnn.plot import style
from tests import ROOT

METRICS = [{"step": 10 * n, "loss": 2 + 4 / (n + 1), "grad_norm": 1 / (n + 1)} for n in range(9)]
NAMES = ("loss.png", "loss.svg")
CODE = f"from gpurnn import plot; [plot.loss_curve({METRICS}, name) for name in {NAMES}]"
DARK = "figure.facecolor: black\naxes.prop_cycle: cycler('color', ['red'])\nlines.linewidth: 9\nsavefig.dpi: 7\n"
SETUPS = [
    ("text.usetex: True\nfont.family: serif\n" + DARK, "module://matplotlib_inline.backend_inline"),
    pytest.param("", "TkAgg", marks=pytest.mark.slow),
    pytest.param("", "no_such_backend", marks=pytest.mark.slow),
    pytest.param("\xff\xfe", "", marks=pytest.mark.slow),  # no UTF-8: matplotlib does not load
]
SMALL = [
    "--hidden-size", "5", "--embedding-size", "3", "--batch", "2", "--k1", "6",
    "--steps", "3", "--validation", "0.3", "--validate-every", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("figures")
    for name in NAMES:
        plot.loss_curve(METRICS, folder / name)
    return [(folder / name).read_bytes() for name in NAMES]


@pytest.mark.parametrize(("file", "variable"), SETUPS)
def test_variables_and_files_of_the_user_change_no_figure(file, variable, expected, tmp_path):
    (tmp_path / "matplotlibrc").write_text(file, "latin-1")
    given = {"PYTHONPATH": str(ROOT), "MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLBACKEND": variable}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=os.environ | given, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / name).read_bytes() for name in NAMES] == expected


def test_a_users_settings_are_as_before():
    import matplotlib

    with matplotlib.rc_context({"text.usetex": True, "lines.linewidth": 7.0}):
        before = dict(matplotlib.rcParams)
        with style.own():
            assert not matplotlib.rcParams["text.usetex"] and matplotlib.rcParams["lines.linewidth"] == 1.5
        assert dict(matplotlib.rcParams) == before


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 30)
    return tmp_path / "text.txt"


def test_a_figure_that_fails_costs_no_result(text, tmp_path, capsys, monkeypatch, blank_figures):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        for name in ("loss_curve", "by_lag"):
            patch.setattr(plot, name, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("no LaTeX here")))
        assert main(["train", "--data", str(text), *SMALL, "--run", str(run)]) == 0
        output = capsys.readouterr().out
        assert "bits/char on all" in output and "sample " in output
        assert f"figures   none: drawing failed: no LaTeX here; with that mended, gpurnn train --resume {run}" in output
        assert main(["flow", str(run), "--steps", "9"]) == 0
        assert "figures   none: drawing failed: no LaTeX here; all numbers in" in capsys.readouterr().out
        assert (run / "flow.json").exists()
    assert main(["train", "--resume", str(run)]) == 0 and (run / "loss.png").exists()


def test_a_matplotlib_that_does_not_load_is_said(text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(style, "_matplotlib", lambda: (_ for _ in ()).throw(ImportError("libpng is broken")))
    assert main(["train", "--data", str(text), *SMALL, "--run", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert (
        "figures   none: matplotlib does not load: libpng is broken; with it, " in output and "bits/char on" in output
    )
