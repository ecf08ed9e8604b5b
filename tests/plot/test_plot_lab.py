"""The laboratory's figures: both formats, what they say, and what they refuse."""

import struct

import numpy as np
import pytest

from gpurnn import plot
from gpurnn.plot import style


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def assert_both(path):
    png, svg = path.with_suffix(".png").read_bytes(), path.with_suffix(".svg").read_bytes()
    width, height = struct.unpack(">II", png[16:24])
    assert png[:8] == b"\x89PNG\r\n\x1a\n" and width >= 700 and height >= 500
    assert b"<svg" in svg and len(svg) < 400_000
    assert not list(path.parent.glob(".tmp-*"))


def text(figure):
    from matplotlib.text import Text

    return "\n".join(found.get_text() for found in figure.findobj(Text))


def test_curves_in_panels(tmp_path, drawn):
    panels = [
        plot.Panel("T (steps)", "error", {"RNN": ([10, 20], [0.2, 0.1]), "LSTM": ([10, 20], [1e-3, np.nan])},
                   {"always\nanswering": 0.17}, log_x=True, log_y=True, marked=True),
        plot.Panel("step", "loss", {"GRU": (range(3), [3.0, 2.0, 1.0])}),
    ]  # fmt: skip
    plot.curves(panels, tmp_path / "curves.png", title="two")
    assert_both(tmp_path / "curves")
    left, right = drawn[0].axes
    assert left.get_xscale() == left.get_yscale() == "log" and right.get_yscale() == "linear"
    assert left.lines[0].get_color() == style.COLOUR_OF["RNN"] and left.lines[2].get_color() == style.COLOUR_OF["LSTM"]
    assert all(expected in text(drawn[0]) for expected in ("two", "always\nanswering", "T (steps)", "error", "loss"))


def test_a_curve_without_a_name_has_no_legend(tmp_path, drawn):
    plot.curves([plot.Panel("x", "y", {"": ([0, 1], [1, 2])})], tmp_path / "one.png")
    assert not drawn[0].axes[0].get_legend()


def test_curves_of_one_cell_are_told_apart(tmp_path, drawn):
    lines = {label: ([0, 1], [1, 2]) for label in ("GRU", "GRU, biased", "GRU, twice", "RNN")}
    plot.curves([plot.Panel("x", "y", lines)], tmp_path / "cells.png")
    styles = [(line.get_color(), line.get_linestyle()) for line in drawn[0].axes[0].lines[::2]]
    assert len(set(styles)) == 4 and len({colour for colour, _ in styles[:3]}) == 1


def test_a_label_looks_the_same_in_every_panel_and_what_no_log_axis_shows_is_a_gap(tmp_path, drawn):
    some = plot.Panel("x", "y", {"a": (range(3), [1, 2, 3]), "b": (range(3), [1.0, 0.0, -1.0])}, log_y=True)
    plot.curves([some, plot.Panel("x", "y", {"b": (range(3), [3, 2, 1])})], tmp_path / "curves.png")
    lines = [{line.get_label(): line for line in axes.lines} for axes in drawn[0].axes]
    np.testing.assert_array_equal(lines[0]["b"].get_ydata(), [1, np.nan, np.nan])
    assert lines[0]["b"].get_color() == lines[1]["b"].get_color() != lines[0]["a"].get_color()


def test_a_lonely_explosion_hides_nobody(tmp_path, drawn):
    lags = np.arange(100)
    plot.by_lag(
        {"holds": 0.99**lags, "vanishes": 0.1**lags, "explodes": 3.0**lags}, tmp_path / "lag.png", quantity="norm"
    )
    assert_both(tmp_path / "lag")
    low, high = drawn[0].axes[0].get_ylim()
    assert high > 3.0**99 and 1e-20 < low < 1e-10
    labels = [entry.get_text() for entry in drawn[0].axes[0].get_legend().get_texts()]
    assert labels == ["holds:  ×0.990", "vanishes:  ×0.100", "explodes:  ×3.00"]


def test_degenerate_curves_are_drawn(tmp_path):
    for number, values in enumerate(([0.0, 0.0], [np.nan, np.nan, np.nan], [1.0], [1e300, 1e-300, 0.0])):
        plot.by_lag({"a": values}, tmp_path / f"{number}.png")
        assert_both(tmp_path / f"{number}")
    plot.curves([plot.Panel("x", "y", {})], tmp_path / "none.png")
    assert_both(tmp_path / "none")


def test_flow_map(tmp_path, drawn):
    norms = np.stack([0.5 ** np.arange(30)[::-1], np.ones(30), np.zeros(30), 2.0 ** np.arange(30)[::-1]])
    plot.flow_map(norms, tmp_path / "map.png", rows=[0, 100, 200, 300], title="RNN")
    assert_both(tmp_path / "map")
    shown = drawn[0].axes[0].images[0].get_array()
    assert shown[0, 0] == -6 and shown[0, -1] == 0 and (shown[1] == 0).all() and np.ma.getmaskarray(shown)[2].all()
    assert shown[3, 0] == pytest.approx(6) and "training step" in text(drawn[0])


def test_eigenvalues(tmp_path, drawn):
    plot.eigenvalues({"before": [0.5, 1j], "after": [2.5 + 0j, -0.1]}, tmp_path / "eigen.png", title="W_hh")
    assert_both(tmp_path / "eigen")
    assert "before\nspectral radius 1, 0 outside" in text(drawn[0])
    assert "after\nspectral radius 2.5, 1 outside" in text(drawn[0])
    left, right = drawn[0].axes
    assert left.get_xlim() == right.get_xlim() and left.get_xlim()[1] > 2.5 and left.get_aspect() == 1


def test_activations(tmp_path, drawn):
    plot.activations(tmp_path / "activations.png")
    assert_both(tmp_path / "activations")
    derivatives = drawn[0].axes[1].lines
    assert [line.get_ydata().max() for line in derivatives[:2]] == [1.0, 0.25]
    ends = [line.get_ydata()[-1] for line in drawn[0].axes[2].lines]
    assert len(ends) == 5 and ends == sorted(ends, reverse=True), "flatter with every application"


def test_unrolled(tmp_path, drawn):
    plot.unrolled(["n", "e"], ["e: 0.2", "u: 0.1"], [0.0, 1.5], tmp_path / "net.png", title="neuron")
    assert_both(tmp_path / "net")
    assert all(expected in text(drawn[0]) for expected in ("e: 0.2", "1.5", "h$_{2}$", "neuron"))
    plot.unrolled(list("abc"), list("bcd"), [0.1, 0.2, 0.3], tmp_path / "net.png")
    places = {written.get_text(): written.get_position()[0] for written in drawn[-1].axes[0].texts}
    assert (places["0.1"], places["0.2"]) == (0.5, 1.5) and 1.5 < places["0.3"] < 2.5, "each beside its step's arrow"


def test_surface(tmp_path, drawn):
    w, b = np.linspace(0, 1, 20), np.linspace(0, 2, 30)
    steps = {"long": ((0.2, 0.2), (0.9, 1.5)), "short": ((0.2, 0.2), (0.3, 0.4))}
    along = {"distance": np.linspace(-1, 2, 50), "loss": np.linspace(3, 0, 50), "long": 1.5, "short": 0.2}
    plot.surface(w, b, np.outer(b, w), steps, along, tmp_path / "surface.png")
    assert_both(tmp_path / "surface")
    assert "long: loss 0.500" in text(drawn[0]) and "short: loss 1.800" in text(drawn[0])


def test_svg_is_the_same_every_time(tmp_path):
    for name in ("one", "two"):
        plot.by_lag({"a": [1.0, 0.5, 0.2]}, tmp_path / f"{name}.png")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: plot.by_lag({"a": [[1.0]]}, path), r"a: expected norms by lag, \(lags,\), got \(1, 1\)"),
        (
            lambda path: plot.flow_map(np.ones((2, 3)), path, rows=[1]),
            r"expected \(rows, T\) with 1 rows.*got \(2, 3\)",
        ),
        (lambda path: plot.flow_map(np.ones(3), path, rows=[1, 2, 3]), r"got \(3,\)"),
        (
            lambda path: plot.curves([plot.Panel("x", "y", {"a": ([1], [1, 2])})], path),
            "a: expected x and y of one length",
        ),
        (lambda path: plot.unrolled(["a"], ["b"], [1.0, 2.0], path), "got 1 and 2"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "figure.png")
    assert not list(tmp_path.iterdir())
