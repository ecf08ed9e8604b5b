"""The pages of docs/: their Python runs, what they say is printed is printed, and their links lead somewhere."""

import importlib.util
import re

import pytest

from tests import ROOT
from tests.package.examples import examples

TORCH = importlib.util.find_spec("torch") is not None
PAGES = sorted((ROOT / "docs").glob("*.md"))


@pytest.fixture(scope="module")
def own_cell():
    """The names and the printed lines of docs/own-cell.md, whose blocks follow each other."""
    names, shown = {}, []
    names["print"] = lambda *values: shown.append(" ".join(map(str, values)))
    for number, source in enumerate(examples("docs/own-cell.md"), 1):
        if "import torch" in source and not TORCH:
            continue
        exec(compile(source, f"docs/own-cell.md, block {number}", "exec"), names)
    return names, shown


def test_own_cell_prints_what_it_says(own_cell):
    _, shown = own_cell
    text = (ROOT / "docs/own-cell.md").read_text(encoding="utf-8")
    said = re.findall(r"^print\(.*\)  +# (.*)$", text, re.MULTILINE)
    literal = [line for line in said if line[0] in "([TFt"]
    assert len(literal) >= 6
    for line in literal:
        if line.startswith("torch") and not TORCH:
            continue
        printed = re.split(r": (?=[a-z\d])", line)[0]  # what is explained behind a colon is not printed
        assert printed in shown, f"{printed} is not among {shown}"


def test_own_cell_names_the_errors_as_they_are(own_cell):
    _, shown = own_cell
    text = " ".join((ROOT / "docs/own-cell.md").read_text(encoding="utf-8").split())
    first, second = (line.split("  ")[0] for line in shown if "next_state" in line or "no `if`" in line)
    assert first in text and second in text


def test_own_cells_gradients(own_cell):
    names, _ = own_cell
    assert set(names["errors"]) == {"x", "h_0", "u_l0", *(f"{kind}_l0" for kind in names["gpurnn"].cells.cell.MATRICES)}
    with pytest.raises(names["gpurnn"].GradientError):
        names["gpurnn"].check_gradients(names["spiking"])
    u = names["leaky"].init["u"](names["np"].random.default_rng(0), 100, 1)
    assert u.shape == (100, 1) and 0 < u.min() < u.max() < 0.5
    assert {*names["np"].unique(names["spikes"])} <= {0, 1}


def test_the_measurement_of_cells(capsys):
    (source,) = examples("docs/cells.md")
    exec(compile(source.replace("(200, 32, 64)", "(4, 2, 64)").replace("range(8)", "range(1)"), "cells.md", "exec"), {})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["mingru", "indrnn", "lstm"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    links = [link for link in links if "://" not in link]
    assert links and [link for link in links if not (page.parent / link).exists()] == []
