"""`python -m bench plot RESULTS... --out DIR`: a results file as figures, one set for each group and machine.

ratio     torch's best time / ours as a heat map, colours centred at 1: blue where ours is faster, red where torch is.
time      us per time step of every case, ours and torch's best beside the floor.
sizes     us per time step of training over H and over N, for groups that hold such series; paler lines are smaller.
roofline  achieved GFLOP/s over the work of a time step, with each case's floor drawn as a line above it.  A recurrent
          step is bound by latency, by reading its weights or by arithmetic, in that order as it grows: work per step
          orders the cases from one to the next, which bytes moved (a model's guess where there are caches) would not.

matplotlib is imported by the functions, and never pyplot, which owns global state.
"""

import argparse
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import floors, plot_sizes, plot_style, results
from bench.cases import Case
from bench.plot_style import BLUE, COLOURS, DPI, INK, VERMILLION
from bench.standings import CELL_NAMES, PHASES, Row, Section, Standing, sections
from bench.tables import shown
from gpurnn.files import write_atomically
from gpurnn.plot.style import own

CLIP = 2.0  # ratios beyond take the last colour: what is near 1 must be told apart, a large win needs no shade
SMALL_SVG = 100_000  # bytes: larger ones stay away from the repository


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS", help="JSON lines")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the figures go")


def main(options: argparse.Namespace) -> int:
    """Draws every figure that the results have something for, and names the files."""
    options.out.mkdir(parents=True, exist_ok=True)
    groups = sections(record for path in options.results for record in results.read(path))
    drawn = [path for members in groups.values() for section in members for path in draw(section, options.out)]
    print("\n".join(map(str, drawn)) or "no figure: no record with a time")
    return 0


def paths(section: Section, folder: Path) -> list[Path]:
    """The figures of a section, in the order to show them in."""
    return [folder / f"{section.name}-{kind}.png" for kind, (_, chosen) in FIGURES.items() if chosen(section.standings)]


@own()
def draw(section: Section, folder: Path) -> list[Path]:
    """Draws the figures of `paths`, each with its source in its metadata, as SVG too where that is small."""
    from matplotlib import rc_context

    written = []
    about = {"Description": _digest(section)}
    for path in paths(section, folder):
        figure = FIGURES[path.stem.rsplit("-", 1)[1]][0](section)
        with rc_context({"svg.hashsalt": "bench"}):
            for form, metadata in (("png", about), ("svg", {**about, "Date": None})):
                picture = io.BytesIO()
                figure.savefig(picture, format=form, dpi=DPI, metadata=metadata)
                target = path.with_suffix(f".{form}")
                if form == "png" or picture.tell() <= SMALL_SVG:
                    write_atomically(target, picture.getvalue())
                    written.append(target)
                else:
                    target.unlink(missing_ok=True)  # of results that drew a smaller one
    return written


def is_of(path: Path, section: Section) -> bool:
    """Whether a figure is there and was drawn from these records."""
    return path.exists() and _digest(section).encode() in path.read_bytes()


def _digest(section: Section) -> str:
    return hashlib.sha256(json.dumps(section.records, sort_keys=True).encode()).hexdigest()


def _ratio(section: Section) -> Any:
    known = [s for s in section.standings if s.ratio]
    rows = list(dict.fromkeys(s.row for s in known))
    columns = [
        (phase, cell)
        for phase in PHASES
        for cell in CELL_NAMES
        if any((s.phase, s.cell) == (phase, cell) for s in known)
    ]
    figure = plot_style.figure(max(5.0, 2.2 + 1.05 * len(columns)), 1.7 + 0.34 * len(rows))
    axes = figure.subplots()
    values = [[math.nan] * len(columns) for _ in rows]
    for s in known:
        median, low, high = s.ratio or (math.nan,) * 3
        at = rows.index(s.row), columns.index((s.phase, s.cell))
        values[at[0]][at[1]] = math.log2(min(max(median, 1 / CLIP), CLIP))
        sure = low > 1 or high < 1
        colour = "white" if abs(math.log2(median)) > 0.7 else INK
        text = shown(median) if sure else f"({shown(median)})"
        axes.text(at[1], at[0], text, ha="center", va="center", color=colour, fontsize=10)
    reach = math.log2(CLIP)
    image = axes.imshow(values, cmap=plot_style.diverging(), vmin=-reach, vmax=reach, aspect="auto")
    for edge in range(1, len(columns)):
        wide = columns[edge][0] != columns[edge - 1][0]
        axes.axvline(edge - 0.5, color="white", linewidth=4 if wide else 1)
    for edge in range(1, len(rows)):
        axes.axhline(edge - 0.5, color="white", linewidth=1)
    axes.set_yticks(range(len(rows)), [row.label(rows) for row in rows])
    axes.set_xticks(range(len(columns)), [f"{cell.upper()}\n{phase}" for phase, cell in columns])
    axes.tick_params(length=0, labeltop=True, labelbottom=False, colors=INK)
    axes.set_ylabel("T, N, I, H", color=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, ticks=[-1, -0.5, 0, 0.5, 1], extend="both")
    bar.ax.set_yticklabels(["0.5", "0.71", "1", "1.41", "2"])
    bar.outline.set_visible(False)
    title = f"torch's best time / ours, {section.group}\nabove 1 ours is faster; in brackets: within noise"
    figure.suptitle(title, fontsize=11, color=INK)
    plot_style.credit(figure, section)
    return figure


def _time(section: Section) -> Any:
    known = [s for s in section.standings if s.timed]
    rows = list(dict.fromkeys(s.row for s in known))
    cells, phases = (
        [c for c in CELL_NAMES if any(s.cell == c for s in known)],
        [p for p in PHASES if any(s.phase == p for s in known)],
    )
    figure = plot_style.figure(2.0 + 3.3 * len(cells), 1.3 + len(phases) * (0.5 + 0.24 * len(rows)))
    grid = figure.subplots(len(phases), len(cells), sharex=True, sharey=True, squeeze=False)
    for s in known:
        axes, y = grid[phases.index(s.phase)][cells.index(s.cell)], rows.index(s.row)
        times = [record["us_per_step"] for record in (s.ours, s.torch) if record]
        axes.plot([min(times, default=math.nan), max(times, default=math.nan)], [y, y], color="#CCCCCC", zorder=1)
        for record, colour, marker in ((s.torch, VERMILLION, "s"), (s.ours, BLUE, "o")):
            if record:
                axes.plot(record["us_per_step"], y, marker, color=colour, markersize=6)
        if floor := s.floor:
            axes.plot(floor, y, "|", color="black", markersize=11, markeredgewidth=2)
    for phase, line in zip(phases, grid, strict=True):
        for cell, axes in zip(cells, line, strict=True):
            axes.set_title(f"{cell.upper()}, {phase}", fontsize=10, color=INK)
            axes.set_xscale("log")
            axes.set_yticks(range(len(rows)), [row.label(rows) for row in rows], fontsize=8)
            plot_style.plain(axes)
    grid[0][0].set_ylim(len(rows) - 0.5, -0.5)
    plot_style.log_ticks(grid[0][0].xaxis, [record["us_per_step"] for s in known for record in s.timed.values()])
    for axes in grid[-1]:
        axes.set_xlabel("us per time step", color=INK)
    plot_style.key(figure, [("o", BLUE, "ours"), ("s", VERMILLION, "torch's best"), ("|", "black", "floor")])
    plot_style.credit(figure, section)
    return figure


def _roofline(section: Section) -> Any:
    known = [s for s in section.standings if s.timed]
    phases = [phase for phase in PHASES if any(s.phase == phase for s in known)]
    figure = plot_style.figure(1.0 + 5.2 * len(phases), 5.4)
    (grid,) = figure.subplots(1, len(phases), sharey=True, squeeze=False)
    for s in known:
        axes, work, colour = grid[phases.index(s.phase)], _work(s), COLOURS[s.cell]
        reached = [work / record["us_per_step"] / 1e3 for record in (s.torch, s.ours) if record]
        axes.plot([work] * len(reached), reached, color=colour, linewidth=0.8, alpha=0.6, zorder=1)
        for record, face in ((s.torch, "white"), (s.ours, colour)):
            if record:
                axes.plot(
                    work, work / record["us_per_step"] / 1e3, "o", color=colour, markerfacecolor=face, markersize=6
                )
        if floor := s.floor:
            axes.plot(work, work / floor / 1e3, "_", color="black", markersize=13, markeredgewidth=2)
    for phase, axes in zip(phases, grid, strict=True):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(phase, fontsize=10, color=INK)
        axes.set_xlabel("floating-point operations per time step", color=INK)
        plot_style.plain(axes)
    grid[0].set_ylabel("GFLOP/s achieved", color=INK)
    entries = [
        ("o", COLOURS[cell], f"{cell.upper()}, ours") for cell in CELL_NAMES if any(s.cell == cell for s in known)
    ]
    plot_style.key(figure, [*entries, ("o", "white", "the same, torch's best"), ("_", "black", "floor")])
    plot_style.credit(figure, section)
    return figure


def _work(s: Standing) -> float:
    """Floating-point operations in one time step of the batch, by the floor's model."""
    row: Row = s.row
    lengths = None if row.lengths == "full" else row.lengths
    case = Case("", s.cell, row.T, row.N, row.I, row.H, row.dtype, lengths, row.heads)
    record = next(iter(s.timed.values()))
    rows = record["tokens_per_s"] * record["median_s"] / row.T  # fewer than N where lengths differ
    return floors.work(case, s.phase == "training", row.part, rows)[0]


FIGURES: dict[str, tuple[Callable[[Section], Any], Callable[[Sequence[Standing]], bool]]] = {
    "ratio": (_ratio, lambda standings: any(s.ratio for s in standings)),
    "time": (_time, lambda standings: any(s.timed for s in standings)),
    "sizes": (plot_sizes.draw, lambda standings: bool(plot_sizes.curves(standings))),
    "roofline": (_roofline, lambda standings: any(s.timed for s in standings)),
}
