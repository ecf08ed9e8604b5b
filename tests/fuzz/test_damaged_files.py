"""Damaged files of a run: each is refused by name, or the run goes on to the same bits; a log loses no good line."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from gpurnn.app import checkpoint, metrics
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import load_corpus
from gpurnn.app.training import Training
from tests.fuzz import damage
from tests.fuzz.cases import each_case, not_on_purpose, seeds

STEPS = 6, 9  # of the checkpoint that is damaged, and of the run's end


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> damage.Run:
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog.\n" * 60)
    options = {"hidden_size": 4, "embedding_size": 3, "k1": 5, "k2": 8, "batch": 2, "steps": 50}
    config = TrainConfig(data=str(folder / "text.txt"), **options)
    training = Training(config, load_corpus(config.data))
    for _ in range(STEPS[0]):
        training.step()
    checkpoint.create_run(folder / "run", config.to_mapping(), training.checkpoint())
    good = (folder / "run" / checkpoint.MODEL).read_bytes()
    for _ in range(STEPS[1] - STEPS[0]):
        training.step()
    return damage.Run(folder / "run", config, training.corpus, good, training.model.params.flat.tobytes())


def test_the_undamaged_goes_on(run):
    assert _goes_on(run, run.good) is None


@pytest.mark.parametrize("seeds", seeds(24))
def test_damaged_files(seeds, run, tmp_path):
    each_case(functools.partial(case, run), seeds, tmp_path)


def case(run: damage.Run, seed: int) -> str | None:
    rng = np.random.default_rng(seed)
    kind = seed % 8
    if kind == 6:
        return _config(run, damage.config(rng))
    if kind == 7:
        return _log(run.folder / checkpoint.METRICS, *damage.log(rng))
    what = list(damage.CHECKPOINTS)[seed // 8 % len(damage.CHECKPOINTS)]
    wrong = _goes_on(run, damage.CHECKPOINTS[what](rng, run))
    left = [path.name for path in run.folder.iterdir() if path.name.startswith(".tmp")]
    return f"{what}: {wrong or left}" if wrong or left else None


def _goes_on(run: damage.Run, data: bytes) -> str | None:
    path = run.folder / checkpoint.MODEL
    path.write_bytes(data)
    try:
        saved = checkpoint.load(path)
    except Exception as error:
        named = isinstance(error, ValueError) and str(path) in str(error)
        return not_on_purpose(error) or (None if named else f"{type(error).__name__} without the file: {error}")
    training = Training(run.config, run.corpus)
    try:
        training.restore(saved)
    except Exception as error:
        return not_on_purpose(error)
    while training.steps_done < STEPS[1]:
        training.step()
    return (
        None
        if training.model.params.flat.tobytes() == run.end
        else f"it goes on differently from {training.steps_done}"
    )


def _config(run: damage.Run, data: bytes) -> str | None:
    path = run.folder / "damaged.toml"
    path.write_bytes(data)
    try:
        TrainConfig.from_mapping(checkpoint.read_config(path), path.name)
    except Exception as error:
        named = isinstance(error, ValueError) and path.name in str(error)
        return not_on_purpose(error) or (None if named else f"{data[-60:]!r}: {type(error).__name__}: {error}")
    return None


def _log(path: Path, data: bytes, step: int) -> str | None:
    """A log resumed at `step` is refused by name, or keeps every good line up to there."""
    path.write_bytes(data)
    try:
        with metrics.MetricsLog.resume(path, step) as log:
            log.write(step + 1, loss=2.0)
        kept = [line["step"] for line in metrics.read_metrics(path)][:-1]
    except Exception as error:
        named = isinstance(error, ValueError) and path.name in str(error)
        return not_on_purpose(error) or (None if named else f"{data[:60]!r}: {type(error).__name__}: {error}")
    good = [number for line in data.split(b"\n") if (number := _step(line)) is not None and number <= step]
    kept, good = (list(dict.fromkeys(steps)) for steps in (kept, good))  # one that is written twice counts once
    return None if kept == good else f"{data[:60]!r}: of the steps {good}, {kept} were kept"


def _step(line: bytes) -> int | None:
    try:
        number = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return number if type(number) is int else None
