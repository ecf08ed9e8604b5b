"""Who is timed when, and what becomes of a sample that other processes disturbed."""

import math
from dataclasses import replace

import pytest

from bench import harness, quiet
from tests.bench.test_bench_run import FAST, MACHINE, SMALL, STAMP, Fake, _fake


def test_rounds_begin_with_another_each_time(monkeypatch):
    timed = []
    monkeypatch.setattr(harness, "_sample", lambda entrant, *_: timed.append(entrant.implementation.name))
    entrants = [harness.Entrant(_fake(name), "layer", Fake(None)) for name in "abc"]
    harness._interleave(entrants, replace(FAST, rounds=4), "cpu")
    assert "".join(timed) == "abcbcacababc"


@pytest.mark.parametrize(
    ("told", "deadline", "attempts", "disturbed"),
    [
        ([False], math.inf, 1, 0),
        ([True, True, False], math.inf, 3, 0),
        ([True, True, True], math.inf, 3, 1),
        ([True], 0.0, 1, 1),
    ],
    ids=["quiet", "quiet at last", "never quiet", "no time left"],
)
def test_a_disturbed_sample_is_tried_again(monkeypatch, told, deadline, attempts, disturbed):
    answers = iter(told)
    monkeypatch.setattr(quiet, "settle", lambda: None)
    monkeypatch.setattr(quiet, "disturbed", lambda before, after: next(answers))
    workload = Fake(None, seconds=0.25)
    entrant = harness.Entrant(_fake("a"), "layer", workload, steps=4)
    harness._sample(entrant, replace(FAST, retries=2), "cpu", deadline)
    assert workload.calls == 2 * attempts, "a warm-up and a sample each time"
    assert entrant.samples == [0.25] and entrant.disturbed == disturbed and len(entrant.spans) == 1


@pytest.mark.parametrize("disturbed", [True, False])
def test_lines_of_disturbed_samples_are_noisy(monkeypatch, disturbed):
    monkeypatch.setattr(quiet, "disturbed", lambda before, after: disturbed)
    peer = _fake("peer", seconds=1e-3)
    (record,) = harness.run(SMALL, "inference", [peer], replace(FAST, retries=0), MACHINE, STAMP)
    assert record["flags"] == ["by hand", "noisy"][: 1 + disturbed]


def test_stolen_time_is_busy_and_waiting_is_not(monkeypatch, tmp_path):
    monkeypatch.setattr(quiet, "_cpus", lambda: {1})
    (tmp_path / "stat").write_text(
        "cpu  9 9 9 9 9 9 9 9 0 0\ncpu1 10 20 30 1000 500 1 2 4 0 0\ncpu11 7 7 7 7 7 7 7 7 0 0\n"
    )
    assert quiet._busy(tmp_path / "stat") == (10 + 20 + 30 + 1 + 2 + 4) / quiet.TICKS
