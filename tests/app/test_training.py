"""A training run: resumed it goes on bit for bit, killed it resumes, and it learns."""

import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import gpurnn
from gpurnn import backend, cli
from gpurnn.app import checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.app.metrics import MetricsLog, read_metrics
from gpurnn.app.training import Training, train

SMALL = TrainConfig(
    hidden_size=9, embedding_size=5, batch=3, k1=6, steps=8, validation=0.2, validate_every=4, save_every=3, log_every=2
)
VARIANTS = {
    "lstm": {},
    "gru, k2 > k1": {"cell": "gru", "k2": 15},
    "rnn, dropout": {"cell": "rnn", "dropout": 0.3, "nonlinearity": "relu"},
    "layers, trained h0": {"num_layers": 2, "trainable_h0": True, "dropout": 0.2, "k2": 7},
    "sgd": {"optimizer": "sgd", "momentum": 0.9, "clip_value": 0.01, "clip_in_time": 0.01},
    "rmsprop, float64": {"optimizer": "rmsprop", "dtype": "float64", "schedule": "linear", "lr": 1e-3},
    "adamw, constant": {"optimizer": "adamw", "weight_decay": 0.1, "schedule": "constant", "clip_norm": 0.0},
}

on_the_host = pytest.mark.skipif(backend.name == "cuda", reason="on a device a step tells later what it came to")


@pytest.fixture
def text(tmp_path) -> Path:
    """Words in some order, long enough for the epochs to begin anew within a test."""
    rng = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join(rng.choice(["red", "green", "blue", "grün", "Ünten\n"]) for _ in range(30)), "utf-8")
    return path


def quietly(line):
    """A report that nobody reads."""


def go(config: TrainConfig, corpus, run: Path, steps: int) -> Training:
    """Begins the run, or goes on with it, as another process would, and stops after `steps` steps in all."""
    training = Training(config, corpus)
    if run.exists():
        assert training.restore(checkpoint.load(run / checkpoint.MODEL)) == []
    else:
        checkpoint.create_run(run, config.to_mapping(), training.checkpoint())
    train(training, run, stop=lambda: training.steps_done >= steps, report=quietly)
    return training


def tensors_of(run: Path) -> dict[str, bytes]:
    saved = checkpoint.load(run / checkpoint.MODEL)
    groups = {"": saved.tensors, "optimizer/": saved.optimizer, "state/": saved.state}
    return {prefix + name: value.tobytes() for prefix, group in groups.items() for name, value in group.items()}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_resumed_run_is_the_same_bit_for_bit(options, text, tmp_path):
    config, corpus = replace(SMALL, **options), load_corpus(text)
    assert len(Training(config, corpus).windows) < 8, "the run crosses the end of an epoch"
    go(config, corpus, tmp_path / "whole", 8)
    for steps in (1, 4, 5, 8):
        go(config, corpus, tmp_path / "pieces", steps)
    assert tensors_of(tmp_path / "pieces") == tensors_of(tmp_path / "whole")
    for run in ("whole", "pieces"):
        steps = [line["step"] for line in read_metrics(tmp_path / run / checkpoint.METRICS)]
        assert steps == [1, 2, 4, 6, 8]


def test_metrics_are_cut_back_to_the_checkpoint(text, tmp_path):
    config, corpus, run = replace(SMALL, save_every=100), load_corpus(text), tmp_path / "run"
    go(config, corpus, run, 3)
    training = Training(config, corpus)
    training.restore(checkpoint.load(run / checkpoint.MODEL))
    with pytest.raises(KeyboardInterrupt):  # the process dies at step 6; nothing was saved since step 3
        train(training, run, stop=lambda: False, report=lambda line: die_at(6, line))
    assert [line["step"] for line in read_metrics(run / checkpoint.METRICS)][-1] == 6
    go(config, corpus, run, 8)
    go(config, corpus, tmp_path / "whole", 8)
    assert tensors_of(run) == tensors_of(tmp_path / "whole")
    assert [line["step"] for line in read_metrics(run / checkpoint.METRICS)] == [1, 2, 4, 6, 8]


def die_at(step, line):
    if line["step"] == step:
        raise KeyboardInterrupt


def test_looking_changes_nothing(text, tmp_path):
    """Validation, gradient flow and the reach of the last loss are looked at as often as one likes."""
    corpus = load_corpus(text)
    rarely = replace(SMALL, dropout=0.4, log_every=100, validate_every=100)
    often = replace(rarely, log_every=1, validate_every=1)
    for name, config in (("rarely", rarely), ("often", often)):
        go(config, corpus, tmp_path / name, 8)
    assert tensors_of(tmp_path / "rarely") == tensors_of(tmp_path / "often")


def test_flow_and_reach_are_those_of_the_run(text):
    config = replace(SMALL, num_layers=2, k2=15, dtype="float64")
    training = Training(config, load_corpus(text))
    for _ in range(3):
        training.step(flow=True)
    assert training.flow.shape == (2, 2, 6) and (training.flow[:, 0] > 0).all()
    reach = training.reach()
    assert reach.norms.shape == (2, 2, 15) and (reach.total[:, -1] > reach.total[:, 0]).all()


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(text, tmp_path):
    config, corpus = replace(SMALL, steps=50, clip_norm=0.0, save_every=2), load_corpus(text)
    training = Training(config, corpus)
    checkpoint.create_run(tmp_path / "run", config.to_mapping(), training.checkpoint())

    def poison(line):
        if line["step"] == 5:
            training.model.params["head.weight"][0, 0] = np.nan

    with pytest.raises(FloatingPointError, match=r"step 6: .*lower --lr") as caught:
        train(training, tmp_path / "run", stop=lambda: False, report=poison)
    assert caught.value.__notes__ == ["the checkpoint of step 4 stands"]
    saved = checkpoint.load(tmp_path / "run" / checkpoint.MODEL)
    assert saved.meta["step"] == 4 and all(np.isfinite(value).all() for value in saved.tensors.values())


@on_the_host
def test_a_loss_of_inf_with_a_finite_gradient_changes_nothing(text):
    training = Training(SMALL, load_corpus(text))
    _, targets, _ = training.windows.at(0)
    training.model.params["head.bias"][targets[0, 0]] = -np.inf  # of what comes: no chance at all
    before = training.model.params.flat.copy()
    with pytest.raises(FloatingPointError, match=r"head\.bias"):
        training.step()
    np.testing.assert_array_equal(training.model.params.flat, before)


@on_the_host
def test_an_epoch_begins_with_the_models_own_state(text):
    training = Training(replace(SMALL, steps=100), load_corpus(text))
    for at in range(2 * len(training.windows) + 1):
        x, targets, first = training.windows.at(at)
        loss, _ = gpurnn.softmax_cross_entropy(training.model(x, training=False)[0], targets)
        from_the_beginning = training.step()[0] == pytest.approx(float(loss) / math.log(2), rel=1e-6)
        assert from_the_beginning == first == (at % len(training.windows) == 0)


@on_the_host
@pytest.mark.parametrize("clip", [{"clip_norm": 1e-3}, {"clip_norm": 1e-3, "clip_value": 1e-4}, {"clip_value": 1e-4}])
def test_the_norm_that_is_told_is_that_before_clipping(text, clip):
    corpus, none = load_corpus(text), {"clip_norm": 0.0, "clip_value": 0.0}
    clipped, free = (Training(replace(SMALL, **options), corpus) for options in (none | clip, none))
    assert clipped.step()[1] == pytest.approx(free.step()[1], rel=1e-6)


def test_a_full_disk_leaves_the_last_checkpoint(text, tmp_path, monkeypatch):
    config, corpus = SMALL, load_corpus(text)
    go(config, corpus, tmp_path / "run", 3)
    before = tensors_of(tmp_path / "run")

    def full(*_):
        raise OSError(28, "No space left on device")

    training = Training(config, corpus)
    training.restore(checkpoint.load(tmp_path / "run" / checkpoint.MODEL))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        train(training, tmp_path / "run", stop=lambda: False, report=quietly)
    monkeypatch.undo()
    assert tensors_of(tmp_path / "run") == before


def test_the_log_is_on_the_disk_before_the_checkpoint_is(text, tmp_path, monkeypatch):
    done, sync, save = [], MetricsLog.sync, checkpoint.save
    monkeypatch.setattr(MetricsLog, "sync", lambda log: (done.append("log"), sync(log)))
    monkeypatch.setattr(checkpoint, "save", lambda path, saved: (done.append(path.name), save(path, saved)))
    go(SMALL, load_corpus(text), tmp_path / "run", 8)
    last = ["log", checkpoint.MODEL]
    assert done == [checkpoint.BEST, *last, checkpoint.BEST, *last, checkpoint.BEST, *last], "at steps 1, 3, 4, 6, 8, 8"


def test_what_differs_is_told_or_refused(text, tmp_path):
    corpus = load_corpus(text)
    go(SMALL, corpus, tmp_path / "run", 3)
    saved = checkpoint.load(tmp_path / "run" / checkpoint.MODEL)
    elsewhere = saved.meta["environment"] | {"threads": "99"}
    (line,) = Training(SMALL, corpus).restore(saved._replace(meta=saved.meta | {"environment": elsewhere}))
    assert line.startswith("threads: recorded 99, now ")
    text.write_text("another text " * 20, "utf-8")
    with pytest.raises(ValueError, match="expected the text that this run began with"):
        Training(SMALL, load_corpus(text)).restore(saved)
    for name in ("step", "seconds", "dropout", "data", "alphabet", "environment"):
        damaged = saved._replace(meta={key: value for key, value in saved.meta.items() if key != name})
        with pytest.raises(ValueError, match=name):
            Training(SMALL, corpus).restore(damaged)
    for calls in ({}, {"recurrent": -1}, {"recurrent": 1.5}, {"recurrent": 1 << 63}, {"recurrent": 3, "dropout": 3}):
        with pytest.raises(ValueError, match="dropout: expected the calls of recurrent, numbers from 0, got"):
            Training(SMALL, corpus).restore(saved._replace(meta=saved.meta | {"dropout": calls}))
    with pytest.raises(KeyError, match="missing"):
        Training(SMALL, corpus).restore(saved._replace(tensors={}))


def test_too_short_a_text_says_what_is_needed(tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ValueError, match="batch 3 and steps 6 need 19"):
        Training(SMALL, load_corpus(tmp_path / "short.txt"))


def test_it_learns(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefgh " * 400)
    config = replace(SMALL, hidden_size=24, steps=150, lr=0.02)
    training = go(config, load_corpus(tmp_path / "text.txt"), tmp_path / "run", 150)
    assert training.validate() < 0.05


def test_a_budget_in_minutes_ends_and_resumes(text, tmp_path):
    config, corpus = replace(SMALL, steps=None, minutes=1.5 / 60), load_corpus(text)
    first = go(config, corpus, tmp_path / "run", 5)
    assert 0 < first.progress < 1 and first.optimizer.lr > 0.02 * config.lr
    resumed = Training(config, corpus)
    resumed.restore(checkpoint.load(tmp_path / "run" / checkpoint.MODEL))
    assert resumed.seconds == first.seconds
    second = go(config, corpus, tmp_path / "run", 10**9)
    assert second.progress == 1 and second.seconds >= 1.5
    assert second.optimizer.lr == pytest.approx(0.02 * config.lr, rel=0.5), "the schedule ran out with the time"


COMMAND = [sys.executable, "-m", "gpurnn.cli", "train"]
OPTIONS = [
    "--hidden-size", "9", "--embedding-size", "5", "--batch", "3", "--k1", "6", "--k2", "8", "--dropout", "0.2",
    "--save-every", "1", "--log-every", "5", "--validate-every", "50", "--validation", "0.2",
]  # fmt: skip


def test_kill_9_while_the_folder_is_made_and_while_a_step_is_saved(text, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = ["train", "--data", str(text), *OPTIONS, "--steps", "60"]
    assert cli.main([*begin, "--run", str(whole)]) == 0
    for calls, expected in ((2, "creating the run folder"), (66, "saving")):
        process = start([sys.executable, "-c", STRUCK, str(calls), *begin, "--run", str(killed)], tmp_path)
        output, _ = process.communicate(timeout=60)
        assert moment_of(killed, output, process.returncode) == expected, output
    assert cli.main(["train", "--resume", str(killed)]) == 0
    assert tensors_of(killed) == tensors_of(whole) and not list(killed.glob(".tmp-*"))


@pytest.mark.slow
def test_kill_9_fifty_times(text, tmp_path):
    """Prints at which moments the processes were killed."""
    moments = kill_at_random(50, 8000, text, tmp_path)
    print(moments)
    assert "had ended" not in moments and {"creating the run folder", "saving", "starting up"} <= moments.keys()


# Kills itself instead of the n-th of the calls that make a file or a folder, or force one to the disk.
STRUCK = """
import os, signal, sys
left = int(sys.argv.pop(1))

def struck(call):
    def wrapped(target, *arguments, **options):
        global left
        if isinstance(target, int) or os.path.abspath(target).startswith(os.getcwd()):  # not those of the compile cache
            left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(target, *arguments, **options)
    return wrapped

os.fsync, os.replace, os.rename, os.mkdir = map(struck, (os.fsync, os.replace, os.rename, os.mkdir))
from gpurnn.cli import main
main(sys.argv[1:])
"""


def start(arguments: list[str], folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(Path(gpurnn.__file__).parent.parent)}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, cwd=folder, text=True
    )


def kill_at_random(kills: int, steps: int, text: Path, tmp_path: Path) -> dict[str, int]:
    """Kills one run again and again; then lets it end, and compares it with one that was never killed.

    Every other kill comes from outside, at some time; the others from within, while the run folder is made or a
    checkpoint saved, which happens after every step.  Returns how many kills met the run at which moment.
    """
    rng = random.Random(1)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    begin = [*COMMAND, "--data", str(text), *OPTIONS, "--steps", str(steps)]
    process = start([*begin, "--run", str(whole)], tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    began = time.monotonic()
    assert start([*COMMAND, "--resume", str(whole)], tmp_path).communicate(timeout=600) and process.returncode == 0
    start_up = time.monotonic() - began
    moments: dict[str, int] = {}
    for kill in range(kills):
        arguments = [*COMMAND, "--resume", str(killed)] if killed.exists() else [*begin, "--run", str(killed)]
        if kill % 2 == 0:
            calls = rng.randint(1, 200) if killed.exists() else 2 + kill // 2  # making a run folder takes 8
            process = start([sys.executable, "-c", STRUCK, str(calls), *arguments[len(COMMAND) - 1 :]], tmp_path)
        else:
            process = start(arguments, tmp_path)
            early = killed.exists() and rng.random() < 0.3
            time.sleep(rng.uniform(0, start_up) if early else start_up + rng.uniform(0, 0.6))
            process.send_signal(signal.SIGKILL)
        output, _ = process.communicate(timeout=600)
        moment = moment_of(killed, output, process.returncode)
        for leftover in tmp_path.glob(".tmp-*"):  # another process's for an hour, as far as anybody can tell
            shutil.rmtree(leftover)
        moments[moment] = moments.get(moment, 0) + 1
        if killed.exists():
            checkpoint.load(killed / checkpoint.MODEL)
            TrainConfig.from_mapping(checkpoint.read_config(killed / checkpoint.CONFIG), "config")
    arguments = [*COMMAND, "--resume", str(killed)] if killed.exists() else [*begin, "--run", str(killed)]
    process = start(arguments, tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert tensors_of(killed) == tensors_of(whole)
    assert not list(killed.glob(".tmp-*"))
    steps = [line["step"] for line in read_metrics(killed / checkpoint.METRICS)]
    assert steps == sorted(steps)
    return moments


def moment_of(run: Path, output: str, code: int) -> str:
    if code != -signal.SIGKILL:
        return "had ended"
    if not run.exists():
        return "creating the run folder" if list(run.parent.glob(".tmp-*")) else "before the run folder"
    if "run  " not in output:
        return "starting up"
    return "saving" if list(run.glob(".tmp-*")) else "in a step or between"
