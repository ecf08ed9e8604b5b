"""A block that never answers: the others give up once, all leave, and what is launched behind them runs empty.

The time a kernel waits is counted in executed instructions here, of all threads together.
"""

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn.cells import CELLS
from gpurnn.cuda import faults
from gpurnn.kernels import exchange
from gpurnn.kernels.faults import GAVE_UP, SITE
from gpurnn.kernels.tiles import Ffma
from tests.interpreted import Interpreted, interpreted
from tests.kernels.mutants import Case, check, plant, run
from tests.ptx.mbarriers import Mbarriers
from tests.ptx.races import Tracker

KINDS = ("flagged", "counted", "clustered")
GIVEN_UP = "a kernel gave up waiting for a block that did not run"
SILENT = ("for i in range(steps):", "for i in range(i64(0) if member == 1 else steps):")
NOBODY_LEAVES = ("if left(vector, i):", "if False:")
LIMIT = 5000


def case(kind, steps, back=False):
    """Two groups of two blocks."""
    tiles = (Ffma(units=1, lanes=8, rows=2, kept=1),) * 2
    return Case((steps, steps, steps), tiles, 2, kind, cell=CELLS["rnn_identity"], H=13, back=back)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(exchange, "LIMIT", LIMIT)
    for kind in KINDS:
        monkeypatch.setitem(exchange.LOOK, kind, 16)


@pytest.fixture
def lenient(monkeypatch):
    """A cluster's block reads what has not come before it leaves: a race, of numbers that nobody will see."""
    monkeypatch.setattr(Tracker, "_unordered", lambda *_: None)
    monkeypatch.setattr(Mbarriers, "leave", lambda *_: None)


def executed(case):
    before = Interpreted.executed
    run(case)
    return Interpreted.executed - before


@pytest.mark.parametrize("kind", ["flagged", pytest.param("counted", marks=pytest.mark.slow), "clustered"])
def test_all_blocks_leave_when_one_never_answers(kind, monkeypatch, impatient, lenient):
    """Of a thousand steps, forty million instructions, they run one or two."""
    stuck = case(kind, 1000)
    plant(monkeypatch, stuck, "persistent_forward.", [SILENT])
    with interpreted():
        assert executed(stuck) < 300_000
        with pytest.raises(RuntimeError, match=GIVEN_UP):
            gpurnn.synchronize()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_blocks_leave_on_the_way_back(kind, monkeypatch, impatient, lenient):
    forward, stuck = executed(case(kind, 100)), case(kind, 100, back=True)
    plant(monkeypatch, stuck, "persistent_backward.", [SILENT])
    assert executed(stuck) < forward + 300_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS[:2])
def test_who_stays_waits_at_every_step(kind, monkeypatch, impatient, lenient):
    """The tests above would see it.  In a cluster, mbarriers would count beyond what they can."""
    stuck = case(kind, 100)
    plant(monkeypatch, stuck, "persistent_forward.", [SILENT, NOBODY_LEAVES])
    assert executed(stuck) > 500_000


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[:2]), "clustered"])
def test_what_comes_behind_runs_empty(kind, monkeypatch):
    long = case(kind, 40)
    whole = executed(long)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "restart", lambda step: faults.record().__setitem__(SITE, GAVE_UP))
        assert executed(long) < whole / 4
        with interpreted(), pytest.raises(RuntimeError, match=GIVEN_UP):
            gpurnn.synchronize()
    check(long)  # somebody has read the fault: all is as before
