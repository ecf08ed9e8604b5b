"""What the tests share: one compile cache for the session, marks that skip visibly, and the cells of users."""

import gc
import os
from pathlib import Path

import pytest

from gpurnn import backend
from gpurnn.cells import (
    CELLS,
    RATE_CELLS,
    UNITWISE_CELLS,
    Cell,
    abs,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    sqrt,
    tanh,
    where,
)

ON_A_GPU = 4  # processes: each keeps a context and a memory pool of its own


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory, worker_id):
    """Each cell compiles once per session, in a folder that its processes share, unless GPURNN_CACHE_DIR names one."""
    with pytest.MonkeyPatch.context() as patch:
        if "GPURNN_CACHE_DIR" not in os.environ:
            own = tmp_path_factory.getbasetemp()
            folder = (own if worker_id == "master" else own.parent) / "compiled"
            folder.mkdir(mode=0o700, exist_ok=True)
            patch.setenv("GPURNN_CACHE_DIR", str(folder))
        yield


@pytest.fixture(autouse=True)
def same_backend():
    """What a test puts in the backend's place it takes away again."""
    before = backend.name, backend.xp
    yield
    assert (backend.name, backend.xp) == before


@pytest.fixture
def blank_figures(monkeypatch):
    """Figures are made as always and then not rendered, which takes most of a small run's time."""
    monkeypatch.setattr("gpurnn.plot.style.save", lambda figure, path: Path(path).write_bytes(b"a figure"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """`-n auto`: a process for each CPU, but a GPU is shared by ON_A_GPU of them, whatever the number of its CPUs."""
    return ON_A_GPU if backend.name == "cuda" else None


def pytest_configure(config):
    config.user_cells = USER_CELLS  # for tests that want one of them by name


def pytest_collection_finish():
    """What was collected stays to the end, so Python's own collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    if backend.name != "cuda":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {backend.reason}"))


def pytest_generate_tests(metafunc):
    """`any_cell` is each shipped cell and each of the cells below in turn, `user_cell` each of those below.

    `some_cell` is any of them, but all save SOME are marked slow; so are, in `any_cell`, most of those without a recurrent
    matrix, all of which `test_unitwise` runs, and rate networks, which `test_noisy` does.
    """
    every = CELLS | USER_CELLS
    alike = {cell.name for cell in (*UNITWISE_CELLS, *RATE_CELLS.values())} - {"mingru", "lru"}
    alike |= {"peephole", "cifg", "mgu"}
    most = [pytest.param(cell, marks=pytest.mark.slow if name in alike else ()) for name, cell in every.items()]
    some = [pytest.param(cell, marks=() if name in SOME else pytest.mark.slow) for name, cell in every.items()]
    for fixture, cells, names in (
        ("any_cell", most, every),
        ("user_cell", USER_CELLS.values(), USER_CELLS),
        ("some_cell", some, every),
    ):
        if fixture in metafunc.fixturenames:
            metafunc.parametrize(fixture, cells, ids=names)


def _tanh_indrnn():
    """Li et al. 2018: a recurrent vector in place of the matrix, so r is not used at all."""

    def forward(x, r, state, params):
        return (tanh(x[0] + params[0] * state[0]),), ()

    def backward(dnext, saved, state, next_state, params):
        da = dnext[0] * (1 - next_state[0] ** 2)
        return (da,), (0,), (da * params[0],), (da * state[0],)

    return Cell("tanh_indrnn", gates=1, states=1, forward=forward, backward=backward, params=("u",))


def _minimal_gated_unit():
    """Zhou et al. 2016, with the candidate first: a split gate stands before a joint one."""

    def forward(x, r, state, params):
        f = sigmoid(x[1] + r[1])
        n = tanh(x[0] + f * r[0])
        return ((1 - f) * state[0] + f * n,), (f, n, r[0])

    def backward(dnext, saved, state, next_state, params):
        f, n, rn = saved
        dn = dnext[0] * f * (1 - n * n)
        df = (dnext[0] * (n - state[0]) + dn * rn) * f * (1 - f)
        return (dn, df), (dn * f, df), (dnext[0] * (1 - f),), ()

    return Cell("minimal_gated_unit", gates=2, states=1, forward=forward, backward=backward)


def _peephole_lstm():
    """Gers & Schmidhuber 2000: three per-unit parameters."""

    def forward(x, r, state, params):
        i, f = (sigmoid(x[g] + r[g] + params[g] * state[1]) for g in (0, 1))
        g = tanh(x[2] + r[2])
        c = f * state[1] + i * g
        o = sigmoid(x[3] + r[3] + params[2] * c)
        return (o * tanh(c), c), (i, f, g, o)

    def backward(dnext, saved, state, next_state, params):
        i, f, g, o = saved
        c = next_state[1]
        t = tanh(c)
        do = dnext[0] * t * o * (1 - o)
        dc = dnext[1] + dnext[0] * o * (1 - t * t) + do * params[2]
        di, df = dc * g * i * (1 - i), dc * state[1] * f * (1 - f)
        da = (di, df, dc * i * (1 - g * g), do)
        return da, da, (0, dc * f + di * params[0] + df * params[1]), (di * state[1], df * state[1], do * c)

    return Cell("peephole_lstm", 4, 2, forward, backward, params=("peephole_i", "peephole_f", "peephole_o"))


def _three_states():
    """h, c, and a slow average of c; a split gate between two joint ones."""

    def forward(x, r, state, params):
        f, o = sigmoid(x[0] + r[0]), sigmoid(x[2] + r[2])
        g = tanh(x[1] + f * r[1])
        c = f * state[1] + (1 - f) * g
        slow = 0.9 * state[2] + 0.1 * c
        return (o * tanh(c + slow), c, slow), (f, g, o, r[1])

    def backward(dnext, saved, state, next_state, params):
        f, g, o, rg = saved
        dh, dc, dslow = dnext
        t = tanh(next_state[1] + next_state[2])
        dsum = dh * o * (1 - t * t)
        dslow = dslow + dsum
        dc = dc + dsum + 0.1 * dslow
        dg = dc * (1 - f) * (1 - g * g)
        df = (dc * (state[1] - g) + dg * rg) * f * (1 - f)
        do = dh * t * o * (1 - o)
        return (df, dg, do), (df, dg * f, do), (0, dc * f, 0.9 * dslow), ()

    return Cell("three_states", gates=3, states=3, forward=forward, backward=backward)


def _hoarder():
    """Saves a state, a parameter, a constant, the next state, duplicates, gates, and more values than it has gates."""

    def forward(x, r, state, params):
        a = tanh(x[0] + params[0] * r[0])
        h = a + 0.5 * state[0] * params[0]
        return (h,), (state[0], params[0], 0.5, h, a, a, x[0], r[0], a * a)

    def backward(dnext, saved, state, next_state, params):
        h_before, u, half, h, a, a_again, x, r, a_squared = saved
        da = dnext[0] * (1 - 0.5 * a_squared - 0.5 * a * a_again) + (h - next_state[0]) + (x - x)
        return (da,), (da * u,), (dnext[0] * half * u,), (da * r + dnext[0] * half * h_before,)

    return Cell("hoarder", gates=1, states=1, forward=forward, backward=backward, params=("u",))


def _every_function():
    """Every function and operator that a cell may use; gate 1 meets its recurrent part in a difference."""

    def forward(x, r, state, params):
        a, b = x[0] + r[0], x[1] - r[1]
        q = sqrt(1 + b**2)
        m = maximum(a, minimum(b, 0.5 * state[0]))
        w = where(a < b, relu(a), a / q)
        return ((log(1 + exp(-abs(a))) + m + w) / (1 + q),), (a, b, q)

    def backward(dnext, saved, state, next_state, params):
        a, b, q = saved
        e, half = exp(-abs(a)), 0.5 * state[0]
        dtop, dbottom = dnext[0] / (1 + q), -dnext[0] * next_state[0] / (1 + q)
        dm_a = where(a >= minimum(b, half), dtop, 0)
        dm = dtop - dm_a
        dq = dbottom + where(a < b, 0, -dtop * a / (q * q))
        da = dm_a + where(a < b, where(a > 0, dtop, 0), dtop / q) - dtop * where(a > 0, 1, -1) * e / (1 + e)
        db = where(b <= half, dm, 0) + dq * b / q
        return (da, db), (da, -db), (where(b <= half, 0, 0.5 * dm),), ()

    return Cell("every_function", gates=2, states=1, forward=forward, backward=backward)


def _delay_line():
    """The second state is the h of the step before: a next state that is a state by another name."""

    def forward(x, r, state, params):
        return (tanh(x[0] + r[0] + state[1]), state[0]), ()

    def backward(dnext, saved, state, next_state, params):
        da = dnext[0] * (1 - next_state[0] * next_state[0])
        return (da,), (da,), (dnext[1], da), ()

    return Cell("delay_line", gates=1, states=2, forward=forward, backward=backward)


USER_CELLS = {
    cell.name: cell
    for cell in (
        _tanh_indrnn(),
        _minimal_gated_unit(),
        _peephole_lstm(),
        _three_states(),
        _hoarder(),
        _every_function(),
        _delay_line(),
    )
}

SOME = ("lstm", "gru", "three_states")
