"""What the tour's page says, against what was measured."""

import math

import numpy as np
import pytest

import gpurnn
from gpurnn import backend, plot
from gpurnn.lab import cliff, lags, letters, memory, truncation
from gpurnn.lab.page import Page
from gpurnn.lab.tasks import with_head


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page without figures; its tables, header and rows, are in `tables`."""
    for name in ("curves", "by_lag", "unrolled"):
        monkeypatch.setattr(plot, name, lambda *_, **__: None)
    made, tables = Page(tmp_path, quick=True), []
    monkeypatch.setattr(
        Page, "table", lambda self, header, rows: tables.append((list(header), [list(row) for row in rows]))
    )
    made.tables = tables
    return made


def test_a_chance_is_that_of_the_letter_that_comes():
    names, x, targets = letters.one_hot("neuron")
    rng = np.random.default_rng(0)
    model = with_head(gpurnn.RNN(len(names), 4, dtype="float64", rng=rng, executor="numpy"), len(names), rng)
    model.params["head.bias"][...] = np.arange(len(names))
    logits = backend.to_numpy(model(x, training=False)[0])[:, 0]
    found = letters.chances(model, x, targets)
    for step, letter in enumerate("euron"):
        mine = math.exp(logits[step, names.index(letter)]) / np.exp(logits[step]).sum()
        assert found[step] == pytest.approx(mine, rel=1e-12)


def test_chances_grow_by_training(page):
    letters.experiment(page)
    ((header, rows),) = page.tables
    assert header[:4] == ["read", "to come", "chance before", "after"]
    assert [(row[0], row[1]) for row in rows] == list(zip("neuro", "euron", strict=True))
    assert all(float(before) < 0.7 < float(after) for _, _, before, after, *_ in rows)


def test_what_is_left_by_lag(page):
    halves, kept = 3 * 0.5 ** np.arange(60), np.full(60, 2.0)
    lags._table(page, {"half": halves, "all": kept}, 60, {"half": "0.50", "all": "1.00"})
    ((header, rows),) = page.tables
    assert header == ["network", "radius of W_hh", "left at lag 10", "left at lag 50", "under 1% from lag"]
    assert rows == [["half", "0.50", f"{0.5**10:.2g}", f"{0.5**50:.2g}", "7"], ["all", "1.00", "1", "1", "never"]]


def test_the_cliffs_worst_step_is_told(page, monkeypatch):
    path = np.zeros((cliff.UPDATES, 4))
    path[4:, 0], path[3, 3] = 9, 77  # w leaves behind update 4, where the gradient is largest
    monkeypatch.setattr(cliff, "descend", lambda **_: path)
    monkeypatch.setattr(cliff, "_surface", lambda *_: None)
    cliff.experiment(page)
    assert "becomes 77 at update 4," in " ".join(" ".join(page._lines).split())


def test_what_the_copy_task_loses_is_a_share(monkeypatch):
    monkeypatch.setattr(memory, "fit", lambda *_, **__: (7, 0.5 * math.log(memory.ALPHABET)))
    lost = memory.copy("RNN", 2, 0, 10)
    assert (lost.updates, lost.error) == (7, pytest.approx(0.5))


@pytest.mark.parametrize(
    ("arrives", "since"), [("1111", 0), ("0111", 25), ("0101", 75), ("1100", 80), ("0011", 50), ("1011", 50)]
)
def test_a_gradient_arrives_from_its_last_absence_on(arrives, since):
    flows = [np.array([0.02 if there == "1" else 0.01, 1.0]) for there in arrives]
    done = memory.Trained(None, updates=80, looks=[0, 25, 50, 75], flows=flows)
    assert memory._arrives(done) == since


def test_truncation_errs_by_what_it_came_to(monkeypatch):
    errors = iter(range(20))
    monkeypatch.setattr(truncation.TruncatedBPTT, "step", lambda *_: next(errors))
    assert truncation.trained(0, 5, 20)[1] == 18.5
