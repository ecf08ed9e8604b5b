"""Choices that were measured go before the model's, and nothing in the file can hurt."""

import json

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench.__main__ import main
from gpurnn.cells import GRU_CELL, LSTM_CELL
from gpurnn.cuda import device, tuning
from gpurnn.cuda.on_chip import PERSISTENT
from gpurnn.cuda.tuning import Question
from tests.interpreted import Interpreted, interpreted


@pytest.fixture
def on_a_gpu(tmp_path, monkeypatch):
    """Yields the times that each exchange takes, in microseconds a step, and whatever is measured in order."""
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    asked = []
    times = {"flagged": 3.0, "counted": 1.0, "clustered": 2.0, "alone": 5.0}

    def microseconds(question, choice):
        asked.append(choice)
        return times[choice.exchange]

    with interpreted():
        monkeypatch.setattr(tuning, "microseconds", microseconds)
        yield asked
    tuning_cache_clear()


def tuning_cache_clear():
    from gpurnn.cuda import on_chip

    on_chip._choice.cache_clear()


def question(H=200, transposed=False):
    return Question(LSTM_CELL, H, 16, "bfloat16", transposed, False)


def test_the_fastest_measured_is_taken_from_then_on(on_a_gpu, tmp_path):
    chip = device.chip()
    predicted = tuning.choice(question(), chip)
    assert predicted == tuning.choices(question(), chip)[0] and predicted.exchange != "counted" and not on_a_gpu
    measured = tuning.tune(question(), chip)
    assert {choice.exchange for choice, _ in measured} == {"flagged", "counted", "clustered"}
    assert measured == sorted(measured, key=lambda pair: pair[1]) and len(on_a_gpu) == tuning.CANDIDATES
    assert tuning.choice(question(), chip) == measured[0][0] and measured[0][0].exchange == "counted"
    tuning_cache_clear()
    assert PERSISTENT.choice(LSTM_CELL, 200, 16, "bfloat16", False).exchange == "counted"
    assert tuning.choice(question(transposed=True), chip).exchange != "counted", "another question"
    assert tuning.choice(question(), chip._replace(multiprocessors=100)).exchange != "counted", "another chip"
    assert [path.name for path in tmp_path.glob("*tuned*")] == [tuning.FILE]


def test_measuring_on_first_use_has_to_be_asked_for(on_a_gpu, monkeypatch):
    chip = device.chip()
    tuning.choice(question(), chip)
    assert not on_a_gpu
    monkeypatch.setenv("GPURNN_TUNE", "1")
    with monkeypatch.context() as capturing:
        capturing.setattr("gpurnn.backend.thread.capturing", True)
        tuning.choice(question(), chip)
        assert not on_a_gpu, "nobody may wait while a stream is captured"
    assert tuning.choice(question(), chip).exchange == "counted"
    measured = len(on_a_gpu)
    assert tuning.choice(question(), chip).exchange == "counted" and len(on_a_gpu) == measured, "once"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"k": 3}', '{"k": {}}', '{"KEY": {"choice": "import os"}}', '{"KEY": {}}']
)
def test_a_file_that_makes_no_sense_is_no_file(on_a_gpu, tmp_path, text):
    chip = device.chip()
    (tmp_path / tuning.FILE).write_text(text.replace("KEY", tuning._key(question(), chip)))
    assert tuning.choice(question(), chip) == tuning.choices(question(), chip)[0]
    tuning.tune(question(), chip)
    assert tuning.choice(question(), chip).exchange == "counted"
    assert json.loads((tmp_path / tuning.FILE).read_text())[tuning._key(question(), chip)]["microseconds"] == 1.0


def test_what_does_not_fit_is_not_measured(on_a_gpu):
    assert tuning.choice(question(H=9000), device.chip()) is None
    with pytest.raises(ValueError, match="lstm with 9000 units does not fit this GPU"):
        tuning.tune(question(H=9000), device.chip())


def test_a_measurement_runs_the_kernel_alone(monkeypatch):
    """The real one, with the clock taken away."""
    monkeypatch.setattr(tuning, "MOST_STEPS", 3)
    monkeypatch.setattr(tuning, "_milliseconds", lambda run, given: run(*given) or 0.006)
    with interpreted():
        for transposed in (False, True):
            asked = Question(GRU_CELL, 12, 2, "float32", transposed, False)
            choice = tuning.choices(asked, device.chip())[0]
            before = Interpreted.launches
            assert tuning.microseconds(asked, choice) == pytest.approx(2.0)
            assert Interpreted.launches == before + 2 + tuning.REPEATS, "buffers begun, weights packed, and run"


def test_bench_tune(on_a_gpu, capsys):
    assert main(["tune", "--case", "gaps/lstm/T512-N16-I512-H512-bfloat16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * tuning.CANDIDATES and lines[2].endswith("| 1.00 |") and "counted" in lines[2]


def test_bench_tune_away_from_a_gpu(capsys, monkeypatch):
    monkeypatch.setattr("gpurnn.backend.name", "numpy")
    assert main(["tune"]) == 2
    assert "expected the cuda backend, got numpy" in capsys.readouterr().err
