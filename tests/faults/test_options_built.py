"""From each option of a command to what was built of it: an option that is read and then forgotten fails here."""

import importlib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from gpurnn import diagnose, plot
from gpurnn.app import character_model, checkpoint, data, train_command, training
from gpurnn.app.config import TrainConfig
from gpurnn.app.metrics import read_metrics
from gpurnn.cli import main
from gpurnn.optim import clipping, schedules

BASE = ["--hidden-size", "6", "--embedding-size", "3", "--batch", "2", "--k1", "4", "--steps", "8"]


class Seen(Exception):
    """What a command had built when it was stopped."""


class Row(NamedTuple):
    arguments: str
    look: Callable[[training.Training], Any]
    expected: Any


def after_a_step(look: Callable[[training.Training], Any]) -> Callable[[training.Training], Any]:
    return lambda run: (run.step(), look(run))[1]


def begun(run: training.Training) -> bytes:
    return run.model.params.flat.tobytes()


def begun_with(seed: int) -> Callable[[training.Training], bytes]:
    def parameters(run: training.Training) -> bytes:
        model = character_model.build(run.config, len(run.corpus.alphabet), np.random.default_rng(seed))
        return model.params.flat.tobytes()

    return parameters


def half_way(run: training.Training) -> float:
    run.seconds = 15.0
    return run.progress


def whole_run(name: str) -> Callable[[training.Training], Any]:
    """Trains, and gives the steps that were logged, validated or saved, or the reach that was looked at."""

    def go(run: training.Training) -> Any:
        seen: dict[str, Any] = {checkpoint.MODEL: [], checkpoint.BEST: [], "reach": set()}
        folder = Path(run.config.data).parent / "trained"
        folder.mkdir(exist_ok=True)
        with pytest.MonkeyPatch.context() as patch:
            look_at = training.look_at
            patch.setattr(checkpoint, "save", lambda path, saved: seen[path.name].append(saved.meta["step"]))
            patch.setattr(training, "look_at", lambda *all: (seen["reach"].add(all[2]), look_at(*all))[1])
            REAL_TRAIN(run, folder, stop=lambda: False, report=lambda line: None)
        lines = read_metrics(folder / checkpoint.METRICS)
        seen["logged"] = [line["step"] for line in lines if "loss" in line]
        seen["validated"] = [line["step"] for line in lines if "validation" in line]
        return seen[name]

    return go


REAL_TRAIN = training.train
COSINE, LINEAR = schedules.warmup_cosine, schedules.linear_decay
TABLE = {
    "data": [Row("--data {other}", lambda run: run.corpus.tokens.size, 180)],
    "unit": [Row("--unit bytes", lambda run: run.corpus.alphabet.unit, "bytes")],
    "encoding": [Row("--encoding latin-1", lambda run: "Ã" in run.corpus.alphabet.symbols, True)],
    "pattern": [Row("--data {folder} --pattern o*.txt", lambda run: run.corpus.tokens.size, 180)],
    "max_alphabet": [Row("--max-alphabet 5", lambda run: len(run.corpus.alphabet), 5)],
    "validation": [Row("--validation 0.4", lambda run: run.validation.size / run.corpus.tokens.size, pytest.approx(0.4, abs=0.01))],
    "cell": [Row("--cell gru", lambda run: run.model.recurrent.cell.name, "gru")],
    "nonlinearity": [
        Row(f"--cell rnn --nonlinearity {name}", lambda run: run.model.recurrent.cell.name, f"rnn_{name}")
        for name in ("relu", "sigmoid", "identity")
    ],
    "forget_bias": [Row("--forget-bias 3.5", lambda run: float(run.model.params["recurrent.bias_ih_l0"].max()), 3.5)],
    "update_bias": [
        Row("--cell gru --update-bias 3.5", lambda run: float(run.model.params["recurrent.bias_ih_l0"].max()), 3.5)
    ],
    "hidden_size": [Row("--hidden-size 9", lambda run: (run.model.recurrent.hidden_size, run.model.head.in_features), (9, 9))],
    "num_layers": [Row("--num-layers 3", lambda run: run.model.recurrent.num_layers, 3)],
    "embedding_size": [Row("--embedding-size 7", lambda run: run.model.embedding.embedding_dim, 7)],
    "dropout": [
        Row("--dropout 0.3 --num-layers 2", lambda run: (run.model.recurrent.dropout, run.model.dropout and run.model.dropout.p), (0.3, 0.3)),
        Row("--dropout 0.3", lambda run: run.model.dropout and run.model.dropout.p, 0.3),
    ],
    "trainable_h0": [Row("--trainable-h0", lambda run: "recurrent.h_0" in run.model.params, True)],
    "dtype": [Row("--dtype float64", lambda run: str(run.model.dtype), "float64")],
    "precision": [Row("--precision bfloat16", lambda run: run.model.recurrent.precision, "bfloat16")],
    "k1": [Row("--k1 5", lambda run: (run.bptt.k1, run.windows.steps), (5, 5))],
    "k2": [Row("--k2 11", lambda run: run.bptt.k2, 11)],
    "batch": [Row("--batch 3", lambda run: run.windows.batch, 3)],
    "optimizer": [
        Row(f"--optimizer {name.lower()}", lambda run: type(run.optimizer).__name__, name)
        for name in ("AdamW", "RMSprop", "SGD")
    ],
    "lr": [Row("--lr 0.25 --schedule constant", after_a_step(lambda run: run.optimizer.lr), 0.25)],
    "momentum": [
        Row(f"--optimizer {name} --momentum 0.7", lambda run: getattr(run.optimizer, "momentum", 0.0), 0.7)
        for name in ("sgd", "rmsprop")
    ],
    "weight_decay": [
        Row(f"--optimizer {name} --weight-decay 0.3", lambda run: run.optimizer.weight_decay, 0.3)
        for name in ("adam", "adamw", "sgd", "rmsprop")
    ],
    "schedule": [
        Row("--schedule linear", lambda run: run.schedule, LINEAR(10_000, 200, floor=0.02)),
        Row("--schedule constant", lambda run: run.schedule, schedules.constant()),
    ],
    "warmup": [
        Row("--warmup 0.5", lambda run: run.schedule, COSINE(10_000, 5_000, floor=0.02)),
        Row("--warmup 0.5 --schedule linear", lambda run: run.schedule, LINEAR(10_000, 5_000, floor=0.02)),
    ],
    "clip_norm": [
        Row("--clip-norm 1e-3", after_a_step(lambda run: clipping.grad_norm(run.model)), pytest.approx(1e-3, rel=1e-5)),
        Row("--clip-norm 1e-4 --clip-value 1e-4", after_a_step(lambda run: clipping.grad_norm(run.model)), pytest.approx(1e-4, rel=1e-5)),
    ],
    "clip_value": [Row("--clip-value 1e-4", after_a_step(lambda run: float(abs(run.model.grads.flat).max())), pytest.approx(1e-4, rel=1e-5))],
    "clip_in_time": [Row("--clip-in-time 0.5", lambda run: run.model.recurrent.clip_in_time, 0.5)],
    "steps": [Row("--steps 5", after_a_step(lambda run: run.progress), 0.2)],
    "minutes": [Row("--minutes 0.5", half_way, 0.5)],
    "seed": [Row("--seed 3", begun, begun_with(3))],
    "log_every": [Row("--log-every 3", whole_run("logged"), [1, 3, 6, 8])],
    "validate_every": [Row("--validate-every 3", whole_run("validated"), [1, 3, 6, 8])],
    "save_every": [Row("--save-every 3", whole_run(checkpoint.MODEL), [3, 6, 8])],
    "reach": [Row("--reach 4", whole_run("reach"), {4})],
}  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "text.txt").write_text("the quick brown fox, die schnelle Füchsin.\n" * 20, "utf-8")
    (folder / "other.txt").write_text("another" * 25 + "texts")
    return {"text": folder / "text.txt", "other": folder / "other.txt", "folder": folder}


@pytest.fixture
def built(texts, tmp_path, monkeypatch) -> Callable[..., training.Training]:
    """What `gpurnn train` has built when it begins to train."""
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")

    def stop(run: training.Training, folder: Path, **_: Any) -> None:
        raise Seen(run)

    def built(arguments: list[str]) -> training.Training:
        folder = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        with monkeypatch.context() as patch, pytest.raises(Seen) as seen:
            patch.setattr(training, "train", stop)
            given = [word.format(**texts) for word in arguments]
            main(["train", "--data", str(texts["text"]), *BASE, *given, "--run", str(folder)])
        assert (folder / checkpoint.MODEL).is_file()
        return seen.value.args[0]

    return built


def test_the_table_has_every_option_of_train():
    assert set(TABLE) == {option.name for option in fields(TrainConfig)}
    assert all("--" + name.replace("_", "-") in row.arguments for name, rows in TABLE.items() for row in rows)


@pytest.mark.parametrize("name", TABLE)
def test_an_option_of_train_is_built(name, built):
    for row in TABLE[name]:
        run = built(row.arguments.split())
        expected = row.expected(run) if callable(row.expected) and name == "seed" else row.expected
        assert row.look(built([])) != expected, "the option makes a difference"
        assert row.look(run) == expected, row.arguments


@pytest.fixture(scope="module")
def trained(texts, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GPURNN_EXECUTOR", "numpy")
        for figure in ("loss_curve", "gradient_flow"):  # they would take most of the time
            patch.setattr(plot, figure, lambda *_, **__: None)
        assert main(["train", "--data", str(texts["text"]), *BASE, "--steps", "2", "--run", str(folder)]) == 0
    return folder


@pytest.fixture
def run(trained, monkeypatch, capsys) -> Path:
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")
    capsys.readouterr()
    return trained


@pytest.mark.parametrize(
    ("option", "value", "look"),
    [
        ("--prompt", "the", lambda prompt, length, temperature, rng: prompt),
        ("--length", "7", lambda prompt, length, temperature, rng: str(length)),
        ("--temperature", "0.3", lambda prompt, length, temperature, rng: str(temperature)),
        (
            "--seed",
            "5",
            lambda prompt, length, temperature, rng: str(rng == np.random.default_rng(5).bit_generator.state),
        ),
    ],
)
def test_an_option_of_sample_is_used(option, value, look, run, monkeypatch):
    seen = []

    def sample(model, alphabet, prompt, length, temperature, rng, **_):
        seen.append((prompt, length, temperature, rng.bit_generator.state))
        return iter(())

    monkeypatch.setattr(character_model, "sample", sample)
    assert main(["sample", str(run), option, value]) == 0 and main(["sample", str(run)]) == 0
    expected = "True" if option == "--seed" else value
    assert look(*seen[0]) == expected != look(*seen[1])


@pytest.mark.parametrize(
    ("arguments", "expected"), [("--steps 23", (23, 16)), ("--batch 5", (42, 5)), ("--steps 9 --batch 2", (9, 2))]
)
def test_an_option_of_flow_is_used(arguments, expected, run, monkeypatch):
    def verdicts(model, x, *_, **__):
        raise Seen(x.shape)

    monkeypatch.setattr(diagnose, "verdicts", verdicts)
    with pytest.raises(Seen) as seen:
        main(["flow", str(run), *arguments.split()])
    assert seen.value.args[0] == expected


def test_the_targets_of_flow_are_what_follows(run, monkeypatch):
    def verdicts(model, x, targets, *_, **__):
        raise Seen(x, targets)

    monkeypatch.setattr(diagnose, "verdicts", verdicts)
    with pytest.raises(Seen) as seen:
        main(["flow", str(run)])
    x, targets = seen.value.args
    np.testing.assert_array_equal(x[1:], targets[:-1])
    assert (x != targets).any()


def test_the_command_line_comes_before_the_file(tmp_path, monkeypatch):
    def prepared(config):
        raise Seen(config.hidden_size, config.k1)

    monkeypatch.setattr(train_command, "_prepared", prepared)
    (tmp_path / "c.toml").write_text("hidden_size = 5\nk1 = 3\n")
    with pytest.raises(Seen) as seen:
        main(["train", "--config", str(tmp_path / "c.toml"), "--hidden-size", "7", "--run", str(tmp_path / "r")])
    assert seen.value.args == (7, 3)


def test_a_name_that_is_taken_is_told_before_the_text_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_command, "_prepared", lambda config: (_ for _ in ()).throw(Seen))
    assert main(["train", "--run", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err


def test_flow_reads_the_text_that_is_given(run, texts, monkeypatch):
    def load_corpus(path, **_):
        raise Seen(Path(path))

    monkeypatch.setattr(data, "load_corpus", load_corpus)
    for given, expected in (["--data", str(texts["other"])], texts["other"]), ([], texts["text"]):
        with pytest.raises(Seen) as seen:
            main(["flow", str(run), *given])
        assert seen.value.args[0] == expected


def test_the_options_of_lab_reach_its_experiments(tmp_path, monkeypatch):
    pages = []
    module = type("Experiment", (), {"experiment": staticmethod(pages.append)})
    monkeypatch.setattr(importlib.import_module("gpurnn.lab.tour"), "EXPERIMENTS", (module,))
    assert main(["lab", "--out", str(tmp_path / "a"), "--quick", "--seed", "5"]) == 0
    assert main(["lab", "--out", str(tmp_path / "b")]) == 0
    assert [(page.folder, page.quick, page.seed) for page in pages] == [
        (tmp_path / "a", True, 5),
        (tmp_path / "b", False, 0),
    ]
