"""docs/cells.md: its tables are those that the code gives, and these say what is so."""

from argparse import Namespace

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import cells
from bench.cells import FEATURES, Feature, operations, source, tried
from gpurnn import backend, sigmoid, tanh
from gpurnn.cells import CELLS, Cell
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name != "numpy", reason="both machines are tried from the NumPy backend")


def test_the_page_is_up_to_date(capsys):
    assert cells.main(Namespace(root=ROOT, check=True)) == 0, "python -m bench cells writes it"
    assert "up to date" in capsys.readouterr().out


def test_a_stale_page_is_seen_and_written_anew(tmp_path, monkeypatch):
    monkeypatch.setitem(cells.TABLES, "executors", lambda: "tried")
    page = tmp_path / cells.PAGE
    page.parent.mkdir()
    empty = "".join(f"<!-- bench:{name} {edge} -->\n" for name in cells.TABLES for edge in ("begin", "end"))
    page.write_text(f"before\n{empty}behind\n")
    assert cells.main(Namespace(root=tmp_path, check=True)) == 1
    assert cells.main(Namespace(root=tmp_path, check=False)) == 0
    assert cells.main(Namespace(root=tmp_path, check=True)) == 0
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "behind") and "tried" in lines
    assert sum("gpurnn/cells/" in line for line in lines) == len(CELLS)


def test_operations_are_counted_once_and_dead_ones_not():
    def forward(x, r, state, params):
        tanh(state[0])
        return (tanh(x[0] + r[0]) * tanh(x[0] + r[0]) + sigmoid(x[0] + r[0]),)

    trace = Cell("counted", 1, 1, forward).trace
    outputs = [symbol.index for symbol in trace.next_state]
    assert operations(trace.forward, outputs) == "8: 2 tanh"  # x + r, tanh, its square, sigmoid's four, the sum


def test_a_cell_without_a_source_is_named():
    with pytest.raises(ValueError, match="cell nameless: expected authors and year"):
        source(Cell("nameless", 1, 1, lambda x, r, state, params: (x[0],)))


@pytest.mark.parametrize(
    ("executor", "kind", "feature", "answer"),
    [
        ("resident", "float64", Feature(), "no"),
        ("resident", "float32", FEATURES["flow"], "back: step"),
        ("persistent", "bfloat16", FEATURES["resets"], "yes"),
        ("persistent", "float32", FEATURES["no weight_hh"], "no"),
        ("step", "float64", FEATURES["captured"], "yes"),
    ],
)
def test_what_is_tried_is_what_happens(executor, kind, feature, answer):
    assert tried("CUDA", executor, kind, feature) == answer


def test_a_layer_that_makes_no_sense_is_not_taken_for_one_that_is_refused():
    with pytest.raises(ValueError, match="heads"):
        tried("CUDA", "step", "float32", Feature({"heads": 3}))


def test_on_a_cpu_nothing_is_captured():
    assert tried("CPU", "numpy", "float32", FEATURES["captured"]) == "no"
    assert tried("CPU", "compiled", "float64", FEATURES["all_states"]) == "yes"
