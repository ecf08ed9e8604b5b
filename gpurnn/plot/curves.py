"""Curves over lag, over training steps, over anything: panels below one another or side by side."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.files import StrPath
from gpurnn.plot import style

DEEPEST = 1e-12  # of the lowest curve's peak: what is below is out of view
MANY = 5  # curves, of which a legend would hide some


@dataclass(frozen=True)
class Panel:
    """Curves in one pair of axes.

    xlabel, ylabel  what the axes show, with units.
    curves          label (may be empty) -> x and y, of one length; NaN leaves a gap, as what is not positive does on a logarithmic axis.
    levels          label -> y of a horizontal line, such as what guessing would give.
    log_x, log_y    logarithmic axes.
    marked          a dot at every point.
    legend          its title.
    """

    xlabel: str
    ylabel: str
    curves: Mapping[str, tuple[Any, Any]]
    levels: Mapping[str, float] = field(default_factory=dict)
    log_x: bool = False
    log_y: bool = False
    marked: bool = False
    legend: str = ""


@style.own()
def curves(panels: Sequence[Panel], path: StrPath, *, title: str | None = None) -> None:
    """Draws the panels side by side, as PNG and as SVG; curves of one label look the same in all of them.

    A label that begins with RNN, GRU or LSTM has that cell's colour.  Raises ValueError where x and y of a curve differ
    in length.
    """
    figure = style.figure(max(8.0, 5.2 * len(panels)), 4.8)
    looks = _looks(list(dict.fromkeys(label for panel in panels for label in panel.curves)))
    (row,) = figure.subplots(1, len(panels), squeeze=False)
    for axes, panel in zip(row, panels, strict=True):
        _panel(axes, panel, looks)
    if title:
        figure.suptitle(title, color=style.INK, fontsize=12, x=0.01, ha="left")
    style.save_both(figure, path)


def by_lag(
    norms: Mapping[str, Any], path: StrPath, *, quantity: str = "L2 norm of dL/dh", title: str | None = None
) -> None:
    """Draws norms of gradients over the lag, in steps back from the loss, as PNG and as SVG.

    norms: label -> norms, lag 0 first.  Beside each label stands the factor by which the norm changes with every step
    back, from a least-squares line through the logarithms.  Raises ValueError for norms that are not 1-d.
    """
    lines = {}
    for label, given in norms.items():
        values = np.asarray(backend.to_numpy(given), float)
        if values.ndim != 1 or not len(values):
            raise ValueError(f"{label}: expected norms by lag, (lags,), got {values.shape}")
        positive = np.where((values > 0) & np.isfinite(values), values, np.nan)
        lines[f"{label}:  {style.rate(positive[::-1])}"] = (range(len(values)), positive)
    panel = Panel("lag (steps back from the loss)", quantity, lines, log_y=True, legend="factor per step back (fit)")
    curves([panel], path, title=title)


def _looks(labels: list[str]) -> dict[str, tuple[str, str]]:
    """A colour and a line style for each label; where all are cells', the cell's colour, dashed from its second curve on."""
    cells = [next((cell for cell in style.COLOUR_OF if label.startswith(cell)), "") for label in labels]
    if "" in cells:
        return {label: style.CURVES[place % len(style.CURVES)] for place, label in enumerate(labels)}
    earlier = [cells[:place].count(cell) for place, cell in enumerate(cells)]
    return {
        label: (style.COLOUR_OF[cell], ("-", "--", ":")[count % 3])
        for label, cell, count in zip(labels, cells, earlier, strict=True)
    }


def _panel(axes: Any, panel: Panel, looks: Mapping[str, tuple[str, str]]) -> None:
    from matplotlib.ticker import MaxNLocator

    shown = []
    for label, (x, y) in panel.curves.items():
        xs, ys = np.asarray(x, float), np.asarray(y, float)
        if xs.shape != ys.shape:
            raise ValueError(f"{label}: expected x and y of one length, got {xs.shape} and {ys.shape}")
        if panel.log_y:
            ys = np.where(ys > 0, ys, np.nan)
        colour, dashes = looks[label]
        style.draw(axes, xs, ys, marked=panel.marked, label=label, color=colour, linestyle=dashes)
        shown.append(ys)
    for label, level in panel.levels.items():
        axes.axhline(level, color=style.PALE, linestyle=(0, (2, 3)), linewidth=1.2)
        beside = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "va": "center"}
        axes.annotate(label, (1.0, level), (4, 0), color=style.PALE, fontsize=9, **beside)
    values = np.concatenate([*shown, list(panel.levels.values())])
    if panel.log_y:
        heights = [np.nanmax(ys) for ys in shown if np.isfinite(ys).any()]
        style.log_axis(axes, values[values >= DEEPEST * min(heights, default=0.0)])
    places = sorted({float(x) for xs, _ in panel.curves.values() for x in xs})
    if panel.log_x:
        _log_x(axes, places)
    elif all(place.is_integer() for place in places):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=style.TICKS))
    style.finish(axes, panel.ylabel, values)
    style.plain(axes, panel.xlabel)
    if any(panel.curves):
        aside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if len(panel.curves) > MANY else {}
        style.legend(axes, title=panel.legend or None, **aside)


def _log_x(axes: Any, places: list[float]) -> None:
    """A logarithmic x axis with a tick at each of (at most eight) places."""
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(places[:: math.ceil(len(places) / 8)]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
