"""Options of the command line that people try: what they do, what is meant, and why there is none."""

import io
import subprocess
import sys

import numpy as np
import pytest

import gpurnn
from gpurnn import cli
from gpurnn.app.character_model import _draw
from gpurnn.app.config import TrainConfig

SMALL = [
    "--hidden-size",
    "9",
    "--embedding-size",
    "5",
    "--batch",
    "3",
    "--k1",
    "6",
    "--steps",
    "2",
    "--validation",
    "0",
]


def refused(capsys, *arguments):
    with pytest.raises(SystemExit):
        cli.main(list(arguments))
    return capsys.readouterr().err.removeprefix("gpurnn: error: ").strip()


@pytest.mark.parametrize(
    ("command", "given", "meant"),
    [
        ("train", "--learning-rate", "did you mean --lr?"), ("train", "--out", "did you mean --run?"),
        ("train", "--batch-size=3", "did you mean --batch?"), ("train", "--temp", "--temp (see gpurnn --help)"),
        ("train", "--gpu", ": the device is chosen at import, as `gpurnn info` says"),
        ("sample", "--device", ": the device is chosen at import"),
        ("train", "--epochs", ": a budget is --steps or --minutes"),
        ("train", "--bidirectional", ": a character model predicts the next character, which a backward"),
        ("train", "--hiden-size", "did you mean --hidden-size?"),
    ],
)  # fmt: skip
def test_what_was_meant(command, given, meant, capsys):
    said = refused(capsys, command, *(["RUN"] if command == "sample" else []), given)
    assert said.startswith(f"unknown option {given}") and meant in said


@pytest.mark.parametrize(("cell", "option", "gate"), [("lstm", "--forget-bias", 1), ("gru", "--update-bias", 1)])
def test_biases_of_gates(cell, option, gate, tmp_path, capsys):
    (tmp_path / "text").write_text("abcabcbca" * 20)
    common = ["train", "--data", str(tmp_path / "text"), *SMALL, "--cell", cell, "--lr", "1e-9"]
    assert cli.main([*common, option, "-1.5", "--run", str(tmp_path / "run")]) == 0
    model, _, config = gpurnn.load_run(tmp_path / "run")
    bias = model.state_dict()["recurrent.bias_ih_l0"].reshape(-1, 9)
    assert np.allclose(bias[gate], -1.5, atol=1e-6) and np.allclose(np.delete(bias, gate, 0), 0, atol=1e-6)
    assert -1.5 in (config.forget_bias, config.update_bias)
    capsys.readouterr()
    assert cli.main(["train", "--cell", "rnn", option, "1"]) == 2
    assert f"only the cell {cell} has such a gate, got 1.0 for rnn" in capsys.readouterr().err


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bias_is_finite(value):
    with pytest.raises(ValueError, match="forget_bias: expected a finite number, got"):
        TrainConfig(forget_bias=value)


def test_a_text_on_standard_input(tmp_path, capsys, monkeypatch):
    text = "to be or not to be " * 20
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    run = tmp_path / "new" / "run"
    assert cli.main(["train", "--data", "-", *SMALL, "--run", str(run)]) == 0
    assert (tmp_path / "new" / "run.txt").read_text() == text
    assert cli.main(["train", "--resume", str(run), "--steps", "3"]) == 0
    assert "from step 2" in capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    (tmp_path / "other.txt").write_text("mine")
    assert cli.main(["train", "--data", "-", *SMALL, "--run", str(tmp_path / "other")]) == 2
    assert "other.txt: the text on standard input would be kept there" in capsys.readouterr().err
    assert (tmp_path / "other.txt").read_text() == "mine"


def test_a_pipe_as_text(tmp_path):
    command = [sys.executable, "-m", "gpurnn", "train", "--data", "-", *SMALL, "--run", "run"]
    done = subprocess.run(command, input=b"abcabd" * 40, capture_output=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0 and b"240 characters" in done.stdout, done.stderr


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05])).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {0, 1, 2, 3, 4}), ({"top_k": 1}, {1}), ({"top_k": 3}, {1, 3, 2}), ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.3}, {1}), ({"top_p": 0.6}, {1, 3}), ({"top_p": 0.7}, {1, 3, 2}), ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.7}, {1, 3}), ({"top_k": 2, "temperature": 0}, {1}),
    ],
)  # fmt: skip
def test_the_likeliest_alone(options, expected):
    rng = np.random.default_rng(0)
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    drawn = [_draw(LOGITS, rng=rng, **settings) for _ in range(600)]
    assert set(drawn) == expected
    if len(expected) > 1:  # in the ratios of the model
        ratio = drawn.count(1) / drawn.count(3)
        assert 1.2 < ratio < 2.2


def test_the_sampler_s_options(tmp_path, capsys):
    (tmp_path / "text").write_text("abcabcbca" * 20)
    assert cli.main(["train", "--data", str(tmp_path / "text"), *SMALL, "--run", str(tmp_path / "run")]) == 0
    capsys.readouterr()
    sample = ["sample", str(tmp_path / "run"), "--length", "20", "--prompt", "a"]
    texts = []
    for options in (["--top-k", "1"], ["--top-p", "1e-9"], ["--temperature", "0"]):
        assert cli.main([*sample, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2]
    for options, said in (
        (["--top-k", "0"], "top_k: expected a whole number from 1, got 0"),
        (["--top-p", "1.5"], "top_p: expected a finite number in (0, 1], got 1.5"),
        (["--best"], "there is no best.safetensors: the run had no validation yet"),
    ):
        assert cli.main([*sample, *options]) == 2
        assert said in capsys.readouterr().err
