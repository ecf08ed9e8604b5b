"""What the figures share: colours, axes, legends, the line that says where the figures come from."""

from collections.abc import Sequence
from typing import Any

from bench.standings import Section

# Okabe and Ito's blue and vermillion, and a darker green: apart for colour-blind eyes.
BLUE, VERMILLION, GREEN, INK, PALE = "#0072B2", "#D55E00", "#00735C", "#333333", "#8A8A8A"
COLOURS = {"rnn": GREEN, "gru": VERMILLION, "lstm": BLUE}
DPI = 150


def diverging() -> Any:
    """Red, white, blue, without the nearly black ends, on which no label reads well."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    shades = [colormaps["RdBu"](0.13 + 0.74 * place / 64) for place in range(65)]
    return LinearSegmentedColormap.from_list("red-white-blue", shades)


def figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=DPI, layout="constrained")


def log_ticks(axis: Any, values: Sequence[float]) -> None:
    """Plain numbers: powers of ten where the values span decades, 1, 2, 5 and so on where they do not."""
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    narrow = max(values, default=1.0) < 100 * min(values, default=1.0)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def plain(axes: Any) -> None:
    axes.grid(True, color="#E4E4E4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def key(figure: Any, entries: Sequence[tuple[str, str, str]]) -> None:
    from matplotlib.lines import Line2D

    marks = []
    for style, colour, label in entries:
        marker, line = style[0] if style[0] in "os|_" else "", style.lstrip("os|_")
        edge = INK if colour == "white" else colour
        marks.append(
            Line2D([], [], marker=marker, linestyle=line or "", color=edge, markerfacecolor=colour, label=label)
        )
    figure.legend(handles=marks, loc="outside upper center", ncols=len(marks), frameon=False, fontsize=9)


def credit(figure: Any, section: Section) -> None:
    first = section.records[0]
    figure.supxlabel(f"{section.machine}, {first['date'][:10]}, commit {first['commit']}", fontsize=8, color=PALE)
