"""The laboratory's tasks: what is asked, what guessing gives, and that they can be learnt."""

import numpy as np
import pytest

import gpurnn
from gpurnn.lab import tasks


def test_adding_problem():
    x, targets = tasks.adding_problem(np.random.default_rng(0), 13, 4000)
    assert x.shape == (13, 4000, 2) and x.dtype == np.float32 and targets.shape == (1, 4000, 1)
    numbers, marks = x[..., 0], x[..., 1]
    assert ((marks == 0) | (marks == 1)).all()
    assert (marks[:6].sum(0) == 1).all() and (marks[6:].sum(0) == 1).all()
    np.testing.assert_allclose((numbers * marks).sum(0), targets[0, :, 0], rtol=1e-6)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert np.mean((targets - 1) ** 2) == pytest.approx(tasks.ALWAYS_ONE, rel=0.05)
    with pytest.raises(ValueError, match="T: expected a whole number from 2, got 1"):
        tasks.adding_problem(np.random.default_rng(0), 1, 4)


def test_copy_task():
    x, targets = tasks.copy_task(np.random.default_rng(0), 7, 5, symbols=3, alphabet=4)
    assert x.shape == (13, 5, 6) and targets.shape == (3, 5) and (x.sum(2) == 1).all()
    tokens = x.argmax(2)
    np.testing.assert_array_equal(tokens[:3], targets)
    assert (tokens[3:10] == 4).all() and (tokens[10:] == 5).all()
    assert len(tasks.copy_task(np.random.default_rng(0), 0, 2)[0]) == 6


def test_echo():
    x, targets = tasks.echo(np.random.default_rng(0), 20, 3, lag=4)
    assert x.shape == targets.shape == (20, 3, 1) and (abs(x) == 1).all()
    np.testing.assert_array_equal(targets[4:], x[:-4])


def test_a_loss_at_the_end_sends_nothing_back_from_before():
    rng = np.random.default_rng(0)
    out, targets = rng.standard_normal((7, 3, 2)), rng.standard_normal((2, 3, 2))
    value, dout = tasks.squared_error(out, targets)
    expected, dlast = gpurnn.mean_squared_error(out[-2:], targets)
    assert float(value) == float(expected) and not dout[:-2].any()
    np.testing.assert_array_equal(dout[-2:], dlast)


def test_fit_stops_where_it_is_good_enough():
    rng, looks = np.random.default_rng(0), []
    model = tasks.with_head(gpurnn.GRU(2, 16, rng=rng, executor="numpy"), 1, rng)

    def draw(rng, N):
        return tasks.adding_problem(rng, 6, N)

    updates, error = tasks.fit(
        model, draw, tasks.squared_error, rng, updates=1000, enough=0.01, every=20, look=looks.append
    )
    assert error < 0.01 and updates < 1000 and looks == list(range(0, updates + 1, 20))
    assert tasks.fit(model, draw, tasks.squared_error, rng, updates=5, enough=0.0)[0] == 5
