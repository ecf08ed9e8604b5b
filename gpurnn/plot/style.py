"""What the figures share: colours, the empty figure, lines with gaps, logarithmic axes, files.

matplotlib is imported by the functions, not by the module; pyplot, which owns global state and may want a display, is
never imported.
"""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from gpurnn.checkpoint import StrPath, write_atomically

# Okabe and Ito's blue and vermillion, and a darker green: they stay apart for colour-blind eyes.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#00735C"
INK, PALE = "#333333", "#767676"
CELLS = {"RNN": GREEN, "GRU": VERMILLION, "LSTM": BLUE}
# For any curves: lightness and dashes tell them apart where colours do not.
CURVES = [(BLUE, "-"), (VERMILLION, "-"), (GREEN, "-"), (INK, "--"), ("#CC79A7", "-"), ("#B38600", "--")]
SIZE, DPI = (8.0, 5.0), 150  # inches, dots per inch
TICKS = [1, 2, 5, 10]


def why_not() -> str | None:
    """Why no figure can be drawn here; None where one can."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return "matplotlib is not installed"
    return None


def figure(width: float = SIZE[0], height: float = SIZE[1]) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")


def draw(
    axes: Any, x: np.ndarray, y: np.ndarray, *, marked: bool = False, label: str | None = None, **style: Any
) -> None:
    """A line with gaps where y is NaN; a point between two gaps, which no line would show, becomes a dot."""
    gap = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
    dots = np.ones(len(y), bool) if marked else gap[:-2] & gap[2:]
    axes.plot(x, y, label=label, **{"linewidth": 1.6, **style})
    axes.plot(x[dots], y[dots], "o", markersize=4, clip_on=False, in_layout=False, **style | {"linestyle": "none"})


def log_axis(axes: Any, values: np.ndarray) -> None:
    """A logarithmic y axis that shows `values`, positive or NaN; with plain numbers where it spans few of them."""
    from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

    powers = np.log10(values[np.isfinite(values)])
    lowest, highest = (powers.min(), powers.max()) if powers.size else (-1.0, 0.0)
    margin = 0.08 * (highest - lowest) or 0.1
    axes.set_ylim(10 ** (lowest - margin), 10 ** (highest + margin))
    axes.set_yscale("log")
    if highest - lowest < 0.9:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=TICKS))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(ScalarFormatter())


def finish(axes: Any, quantity: str, values: np.ndarray) -> None:
    """Names the y axis, and says so where there is nothing to show."""
    plain(axes, ylabel=quantity)
    if not np.isfinite(values).any():
        style = {"color": PALE, "backgroundcolor": "white", "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, **style)


def plain(axes: Any, xlabel: str = "", ylabel: str = "") -> None:
    """A pale grid, no frame, and the names of the axes where they are given."""
    if xlabel:
        axes.set_xlabel(xlabel, color=INK, fontsize=11)
    if ylabel:
        axes.set_ylabel(ylabel, color=INK, fontsize=11)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelcolor=INK, labelsize=10)


def legend(axes: Any, **options: Any) -> Any:
    """A legend that hides little of what it covers."""
    made = axes.legend(**{"fontsize": 9, "labelcolor": INK, "alignment": "left", **options})
    made.get_title().set_color(INK)
    made.get_frame().set(edgecolor="none", alpha=0.85)
    return made


def shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.82, count)]


def rate(norms: np.ndarray) -> str:
    """The factor from one time step to the one before it, as a label."""
    t = np.flatnonzero(np.isfinite(norms))
    if len(t) < 3:
        return "no fit"
    slope = np.polyfit(t, np.log(norms[t]), 1)[0]
    return f"×{math.exp(min(-slope, 700.0)):#.3g}"  # e^710 overflows


def save(figure: Any, path: StrPath) -> None:
    """Writes the figure atomically, as PNG or in whatever format the name ends in."""
    from matplotlib import rc_context

    picture = io.BytesIO()
    form = Path(path).suffix[1:] or "png"
    with rc_context({"svg.hashsalt": "gpurnn"}):  # names within the file are drawn from it: the same, run to run
        figure.savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None)
    write_atomically(path, picture.getvalue())


def save_both(figure: Any, path: StrPath) -> None:
    """Writes `path` as PNG and, beside it, the same as SVG."""
    for suffix in (".png", ".svg"):
        save(figure, Path(path).with_suffix(suffix))
