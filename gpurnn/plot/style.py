"""What the figures share: colours, the empty figure, lines with gaps, logarithmic axes, files.

matplotlib is imported by the functions, not by the module; pyplot, which owns global state and may want a display, is
never imported.  Figures look the same for everyone: `own` puts a user's matplotlibrc aside while one is drawn, and a
variable or file of the user's that keeps matplotlib from loading is left out.
"""

import io
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from gpurnn import backend
from gpurnn.files import StrPath, write_atomically

# Okabe and Ito's blue and vermillion, and a darker green: they stay apart for colour-blind eyes.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#00735C"
INK, PALE = "#333333", "#767676"
COLOUR_OF = {"RNN": GREEN, "GRU": VERMILLION, "LSTM": BLUE}
# For any curves: lightness and dashes tell them apart where colours do not.
CURVES = [(BLUE, "-"), (VERMILLION, "-"), (GREEN, "-"), (INK, "--"), ("#CC79A7", "-"), ("#B38600", "--")]
SIZE, DPI = (8.0, 5.0), 150  # inches, dots per inch
TICKS = [1, 2, 5, 10]


def why_not() -> str | None:
    """Why no figure can be drawn here; None where one can."""
    try:
        _matplotlib()
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # whatever keeps it from loading, results do without figures
        return f"matplotlib does not load: {backend.one_line(error)}"
    return None


def _matplotlib() -> Any:
    """The module.  Where it does not load as the user has set it up, it loads as it comes."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise
    except Exception:  # a notebook's MPLBACKEND outside the notebook, a matplotlibrc that cannot be read
        for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
            del sys.modules[name]  # parts that were loaded before it failed, which do not fit another attempt
        with mock.patch.dict(os.environ, MPLBACKEND="agg", MATPLOTLIBRC=os.devnull):
            import matplotlib
    return matplotlib


@contextmanager
def own() -> Iterator[None]:
    """Within it, and within a function that it decorates, matplotlib has its own defaults, nothing of the user's."""
    matplotlib = _matplotlib()
    defaults = {name: value for name, value in matplotlib.rcParamsDefault.items() if not name.startswith("backend")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of settings that matplotlib itself gives up
        changed = matplotlib.rc_context(
            defaults | {"svg.hashsalt": "gpurnn"}
        )  # names within an SVG: the same each time
        changed.__enter__()
    try:
        yield
    finally:
        changed.__exit__(None, None, None)


def figure(width: float = SIZE[0], height: float = SIZE[1]) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(made)  # which becomes the figure's own, whatever MPLBACKEND says
    return made


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
    picture = io.BytesIO()
    form = Path(path).suffix[1:] or "png"
    figure.savefig(picture, format=form, metadata={"Date": None} if form == "svg" else None)
    write_atomically(path, picture.getvalue())


def save_both(figure: Any, path: StrPath) -> None:
    """Writes `path` as PNG and, beside it, the same as SVG."""
    for suffix in (".png", ".svg"):
        save(figure, Path(path).with_suffix(suffix))
