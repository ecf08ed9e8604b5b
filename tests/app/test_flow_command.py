"""`gpurnn flow`: what it prints and leaves, and how it says no."""

import json
from pathlib import Path

import numpy as np
import pytest

from gpurnn import diagnose, plot
from gpurnn.app import character_model
from gpurnn.cli import main

pytestmark = pytest.mark.usefixtures("blank_figures")  # `tests/plot` draws them

SMALL = [
    "--hidden-size", "9", "--num-layers", "2", "--embedding-size", "5", "--batch", "3", "--k1", "6", "--steps", "8",
    "--validation", "0.2", "--log-every", "2", "--validate-every", "4", "--dropout", "0.2",
]  # fmt: skip


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox, die schnelle Füchsin.\n" * 30, "utf-8")
    return path


def trained(text: Path, *options: str) -> Path:
    folder = text.parent / "run"
    assert main(["train", "--data", str(text), *SMALL, *options, "--run", str(folder)]) == 0
    return folder


def refused(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["flow", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("gpurnn: error: ") and captured.err.count("\n") == 1, captured.err
    return captured.err.removeprefix("gpurnn: error: ").strip()


def test_it_prints_and_leaves_all_it_found(text, capsys):
    folder = trained(text)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    assert main(["flow", str(folder), "--steps", "20", "--batch", "4"]) == 0
    output = capsys.readouterr().out
    for expected in (
        "step 8: lstm 2 x 9",
        "4 windows of 20 symbols",
        "l0 (lstm): the gradient ",
        "l1 (lstm): the gradient ",
        "the forget gate is ",
        "dE/d(l1 c)",
        "weight_hh_l0",
        "truncation (k1 = 6, k2 = 6): ",
        "clipping (norm 1): ",
    ):
        assert expected in output, expected
    assert max(len(line) for line in output.splitlines() if str(folder) not in line) <= 110
    left = {path.name for path in folder.iterdir()} - set(before)
    figures = ("flow_by_lag", "flow_eigenvalues", "flow_over_training_l0", "flow_over_training_l1", "flow_terms")
    assert left == {"flow.json"} | {f"{name}.{kind}" for name in figures for kind in ("png", "svg")}
    assert all((folder / name).read_bytes() == content for name, content in before.items()), "it looks only"
    found = json.loads((folder / "flow.json").read_text())
    assert (found["step"], found["steps"], found["batch"]) == (8, 20, 4)
    assert [verdict["layer"] for verdict in found["verdicts"]] == ["l0", "l1"]
    assert found["verdicts"][0]["reach"] == 6 and found["verdicts"][0]["clip_threshold"] > 0
    assert len(found["norms_by_lag"]["l1 h"]) == len(found["terms_by_lag"]["weight_ih_l0"]) == 20
    assert found["norms_by_lag"]["l1 c"][0] == 0 and found["biases"]["truncation (k1 = 6, k2 = 6)"]["degrees"] > 0
    assert main(["flow", str(folder), "--steps", "20", "--batch", "4"]) == 0
    assert json.loads((folder / "flow.json").read_text()) == found, "the same again"


def test_the_first_eigenvalues_are_those_of_the_runs_beginning(text, monkeypatch):
    drawn = {}
    for name in ("loss_curve", "gradient_flow", "by_lag", "flow_map"):
        monkeypatch.setattr(plot, name, lambda *_, **__: None)
    monkeypatch.setattr(plot, "eigenvalues", lambda spectra, *_, **__: drawn.update(spectra))
    folder = trained(text, "--seed", "7")
    assert main(["flow", str(folder)]) == 0
    model, alphabet, config = character_model.load_run(folder)
    begun = character_model.build(config, len(alphabet), np.random.default_rng(7))
    for moment, each in (("before training", begun), ("now", model)):
        for layer in ("l0", "l1"):
            expected = diagnose.recurrent_spectrum(each, layer).eigenvalues
            np.testing.assert_array_equal(drawn[f"{layer} {moment}"], expected)


def test_a_run_without_validation_or_limits(text, capsys):
    folder = trained(text, "--validation", "0", "--clip-norm", "0", "--cell", "rnn", "--k2", "9")
    (folder / "metrics.jsonl").unlink()
    assert main(["flow", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "16 windows of 100 symbols" in output and "truncation (k1 = 6, k2 = 9)" in output
    assert "clipping" not in output and not list(folder.glob("flow_over_training*"))


def test_what_it_refuses(text, capsys):
    folder = trained(text)
    assert "config.toml is not there" in refused(capsys, text.parent / "nowhere")
    assert "--steps: expected a whole number from 4, got 3" in refused(capsys, folder, "--steps", 3)
    assert "--steps: expected a whole number from 4, got 0" in refused(capsys, folder, "--steps", 0)
    assert "--batch: expected a whole number from 1, got 0" in refused(capsys, folder, "--batch", 0)
    assert "--steps: expected fewer than the validation text's 258 symbols" in refused(capsys, folder, "--steps", 258)
    other = text.parent / "other.txt"
    other.write_text("another alphabet " * 50)
    assert "expected the text that the run was trained on" in refused(capsys, folder, "--data", other)
    text.rename(text.with_name("moved.txt"))
    assert "no such file or folder" in refused(capsys, folder)
    assert main(["flow", str(folder), "--steps", "8", "--data", str(text.with_name("moved.txt"))]) == 0
