"""The README's Python runs as it stands, each example by itself, and does what the text around it says."""

import re

import pytest

from tests import ROOT
from tests.package.examples import examples

README = (ROOT / "README.md").read_text()
EXAMPLES = examples("README.md")


def run(marker: str) -> dict:
    (source,) = [example for example in EXAMPLES if marker in example]
    names: dict = {}
    exec(compile(source, f"README.md ({marker})", "exec"), names)
    return names


def test_layers_and_lengths(capsys):
    names = run("layer.grads[")
    assert capsys.readouterr().out.strip() == "(128, 32)"
    assert names["y"].shape == (50, 8, 64) and not names["y"][3:, 6].any()


def test_from_torch(capsys):
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")
    names = run("from_torch(")
    assert capsys.readouterr().out.strip() == "None"
    model = names["model"]
    assert type(model.lstm) is names["gpurnn"].torch.LSTM and model.lstm.weight_hh_l1_reverse.grad.any()


def test_forecast():
    names = run("forecast = []")
    assert names["error"] < 0.1 * names["future"].var()


def test_truncated_bptt():
    names = run("k2=60")
    assert 0 < float(names["loss"]) < 4


def test_parts_groups_frozen_and_tied(capsys):
    names = run("words.tie(")
    assert capsys.readouterr().out.strip() == "6928 head.bias"
    assert names["words"].num_params == 32000 + 1000 + names["words"].recurrent.num_params


def test_save_and_load(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("gpurnn.save(")
    assert (names["again"].params.flat == names["model"].params.flat).all()


def test_own_cell():
    names = run("minimal_gated_unit")
    assert max(names["gpurnn"].check_gradients(names["cell"]).values()) < 1e-6


def test_vanishing(capsys):
    run("flow=flow")
    rnn, lstm = capsys.readouterr().out.splitlines()
    last, first = (float(value) for value in re.findall(r"\d\.\de[+-]\d+", rnn))
    assert first < 1e-20 * last, "the sigmoid RNN's gradient vanishes"
    last, first = (float(value) for value in re.findall(r"\d\.\de[+-]\d+", lstm))
    assert first > 1e-12 * last, "the LSTM's does not"


def test_laboratory(capsys):
    run("diagnose.verdicts")
    shown = capsys.readouterr().out
    assert "vanishes" in shown and "holds" in shown


def test_captured(capsys):
    names = run("gpurnn.captured(")
    assert 0 < float(names["loss"]) < 4
    shown = "captured: NumPy has no graphs" in capsys.readouterr().out
    assert shown == (names["gpurnn"].backend.name == "numpy")


def test_every_example_is_covered():
    assert len(EXAMPLES) == 10


@pytest.mark.parametrize("command", ["gpurnn train", "pip install -e '.[test]' && .venv/bin/python -m pytest"])
def test_the_two_commands_are_there(command):
    assert command in README
