"""The figure of us per time step of training, over H for each N and over N for each H."""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from bench import plot_style
from bench.plot_style import BLUE, INK, VERMILLION
from bench.standings import CELL_NAMES, Section, Standing

SERIES = 3  # points that make a curve


def draw(section: Section) -> Any:
    found = curves(section.standings)
    rows = list(dict.fromkeys((along, kind) for along, _, kind, _ in found))
    cells = [c for c in CELL_NAMES if any(cell == c for _, cell, _, _ in found)]
    figure = plot_style.figure(1.5 + 3.6 * len(cells), 1.0 + 2.9 * len(rows))
    grid = figure.subplots(len(rows), len(cells), sharey=True, squeeze=False)
    for (along, kind), line in zip(rows, grid, strict=True):
        for cell, axes in zip(cells, line, strict=True):
            wanted = {key[3]: points for key, points in sorted(found.items()) if key[:3] == (along, cell, kind)}
            _draw_curves(axes, along, wanted)
            axes.set_title(f"{cell.upper()}, training{kind}", fontsize=10, color=INK)
        line[0].set_ylabel("us per time step", color=INK)
    for (along, kind), line in zip(rows, grid, strict=True):  # all limits are known by now
        for cell, axes in zip(cells, line, strict=True):
            ends = {key[3]: points[-1] for key, points in found.items() if key[:3] == (along, cell, kind)}
            _label_ends(axes, along, ends)
    plot_style.key(figure, [("o-", BLUE, "ours"), ("s--", VERMILLION, "torch's best"), (":", "black", "floor")])
    plot_style.credit(figure, section)
    return figure


def _draw_curves(axes: Any, along: str, wanted: dict[int, list[Standing]]) -> None:
    from matplotlib.ticker import NullLocator

    for place, points in enumerate(wanted.values(), start=1):
        x, alpha = [getattr(s.row, along) for s in points], 0.35 + 0.65 * place / len(wanted)
        for which, colour, style in (("torch", VERMILLION, "s--"), ("ours", BLUE, "o-")):
            y = [getattr(s, which)["us_per_step"] if getattr(s, which) else math.nan for s in points]
            axes.plot(x, y, style, color=colour, alpha=alpha, markersize=4)
        axes.plot(x, [s.floor or math.nan for s in points], ":", color="black", alpha=alpha)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({getattr(s.row, along) for points in wanted.values() for s in points})
    axes.set_xticks(ticks, map(str, ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    plot_style.log_ticks(
        axes.yaxis, [record["us_per_step"] for p in wanted.values() for s in p for record in s.timed.values()]
    )
    axes.margins(x=0.18)
    axes.set_xlabel(along, color=INK)
    plot_style.plain(axes)


def _label_ends(axes: Any, along: str, ends: dict[int, Standing]) -> None:
    """The other size at the end of each curve of ours; labels that would meet move apart."""
    lowest, highest = axes.get_ylim()
    placed = []
    for value, s in ends.items():
        record = s.ours or s.torch
        if record:
            height = math.log(record["us_per_step"] / lowest) / math.log(highest / lowest)
            placed.append((height, getattr(s.row, along), f"{'N' if along == 'H' else 'H'} {value}"))
    last = -1.0
    for height, x, text in sorted(placed):
        last = max(height, last + 0.07)
        style = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": 8, "color": INK}
        axes.annotate(text, (x, last), xycoords=("data", "axes fraction"), **style)


def curves(standings: Sequence[Standing]) -> dict[tuple[str, str, str, int], list[Standing]]:
    """(H or N, cell, what else tells the rows apart, value of the other) -> points of a training curve, in order."""
    found = defaultdict(list)
    rows = [s.row for s in standings]
    several = len({row.T for row in rows}) > 1
    for s in standings:
        if s.timed and s.phase == "training":
            kind = s.row.label(rows).removeprefix(s.row.shape) + (f" T {s.row.T}" if several else "")
            found["H", s.cell, kind, s.row.N].append(s)
            found["N", s.cell, kind, s.row.H].append(s)
    ordered = {key: sorted(points, key=lambda s: getattr(s.row, key[0])) for key, points in found.items()}
    return {key: points for key, points in ordered.items() if len({getattr(s.row, key[0]) for s in points}) >= SERIES}
