"""`gpurnn lab` as people meet it."""

import re
import subprocess
import sys

import pytest

from gpurnn.cli import main
from gpurnn.lab import tour, weight
from gpurnn.lab.page import Page
from tests import ROOT

FIGURES = {
    "one-weight", "activations", "neuron", "by-lag", "initialisers", "cliff", "clipping", "memory", "flow-map-rnn",
    "flow-map-gru", "flow-map-lstm", "eigenvalues", "truncation", "initial-state",
}  # fmt: skip


def test_the_quick_tour(tmp_path, capsys, blank_figures):
    """All of it but the figures' rendering, which `tests/plot` shows."""
    folder = tmp_path / "new" / "lab"
    assert main(["lab", "--quick", "--out", str(folder)]) == 0
    screen, page = capsys.readouterr().out, (folder / "summary.md").read_text()
    assert {path.name for path in folder.iterdir()} == {"summary.md"} | {
        f"{name}{suffix}" for name in FIGURES for suffix in (".png", ".svg")
    }
    assert re.findall(r"!\[[^]]+\]\(([\w-]+)\.png\)", page) and set(re.findall(r"\]\(([\w-]+)\.png\)", page)) == FIGURES
    assert page.startswith("# A tour of vanishing and exploding gradients\n") and page.count("\n## ") == 7
    flat = " ".join(page.split())
    assert "w = 0.1 leaves 0.0001 of it, w = 2 makes it 16." in flat
    assert "steps back is 1 times that 1 step back" in flat, "the carousel, to 17 digits"
    assert "the gradient vanishes" in flat and "nan" not in flat.lower()
    assert f"all of it is in {folder / 'summary.md'}" in screen
    assert max(map(len, screen.splitlines())) <= 130
    with pytest.raises(SystemExit):
        main(["lab", "--fast"])
    assert "did you mean" not in capsys.readouterr().out


def test_an_interrupted_tour_leaves_what_is_done(tmp_path, monkeypatch, capsys):
    module = type(
        "Interrupted", (), {"experiment": staticmethod(lambda page: (_ for _ in ()).throw(KeyboardInterrupt))}
    )
    monkeypatch.setattr(tour_module(), "EXPERIMENTS", (weight, module))
    assert main(["lab", "--quick", "--out", str(tmp_path / "lab")]) == 130
    screen = capsys.readouterr()
    assert "interrupted" in screen.err and f"what is done is in {tmp_path / 'lab'}" in screen.out
    page = (tmp_path / "lab" / "summary.md").read_text()
    assert "## 1. One weight" in page and (tmp_path / "lab" / "one-weight.png").exists()
    monkeypatch.setattr(tour_module(), "EXPERIMENTS", (weight,))
    assert main(["lab", "--out", str(tmp_path / "lab")]) == 0, "an earlier tour's folder is taken again"


def tour_module():
    return sys.modules["gpurnn.lab.tour"]


def test_other_peoples_folders_are_left_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tour_module(), "EXPERIMENTS", ())
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["lab", "--out", str(tmp_path)]) == 2
    assert "expected a new folder or an earlier tour's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(FileExistsError):
        tour(tmp_path)
    for arguments, message in ((["--out", ""], "--out"), (["--out", str(tmp_path / "x"), "--seed", "-1"], "--seed")):
        assert main(["lab", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_page_says_the_same_on_screen_and_on_paper(tmp_path, capsys):
    page = Page(tmp_path)
    page.title("Title")
    page.section("First")
    page.say("One sentence.")
    page.quote("a verdict\n  as it stands")
    page.table(["cell", "error"], [["RNN", "0.1"], ["a longer one", "2"]])
    assert page.figure("name", "What it shows") == tmp_path / "name.png"
    page.progress("only on the screen")
    page.section("Second")
    page.save()
    screen, paper = capsys.readouterr().out, (tmp_path / "summary.md").read_text()
    assert (
        "| cell         | error |\n| ------------ | ----- |\n| RNN          | 0.1   |\n| a longer one | 2     |"
        in paper
    )
    assert "![What it shows](name.png)" in paper and "only" not in paper and "only on the screen" in screen
    for part in ("1. First", "2. Second", "One sentence.", "a verdict\n", "a longer one"):
        assert part in paper and part in screen


def test_help_is_quick_and_imports_no_figures():
    program = "import sys; from gpurnn.cli import _parser; _parser(); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=120)
