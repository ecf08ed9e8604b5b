"""Figures of a training: loss curves and gradient flow.

matplotlib is imported by the functions, not by the module; pyplot, which owns global state and may want a display, is
never imported.  Files are written atomically, as PNG or in whatever format the name ends in.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.checkpoint import StrPath, write_atomically

# Okabe and Ito's blue and vermillion, and a darker green: they stay apart for colour-blind eyes.
BLUE, VERMILLION, GREEN = "#0072B2", "#D55E00", "#00735C"
INK, PALE = "#333333", "#767676"
SIZE, DPI = (8.0, 5.0), 150  # inches, dots per inch
LARGEST = float(np.finfo(np.float32).max)  # what is beyond has diverged, and would flatten the rest
LARGEST_STEP = 2**53  # beyond it, steps are not told apart on an axis
MARKED, DENSE = 60, 400  # points: fewer get dots, more get a running mean
LEGIBLE = 8  # entries in a legend
TICKS = [1, 2, 5, 10]


def loss_curve(
    metrics: Sequence[Mapping[str, Any]],
    path: StrPath,
    *,
    baseline: float | None = None,
    baseline_label: str = "order-3 Witten-Bell",
) -> None:
    """Draws training and validation loss in bits per character over the steps, and the gradient norm below.

    metrics: lines as `metrics.read_metrics` returns them, each with `step`, some with `loss`, `validation`,
    `grad_norm`, `chars`.  A key that a line lacks was not measured there; a value that is null, not finite or not positive
    leaves a gap in the curve.  Without any value the figure is empty, and says so.  Of more than 400 values the running
    mean is drawn over them, and labelled.  Raises ValueError where a line has no step or a value is not a number.
    """
    if baseline is not None and not 0 < baseline <= LARGEST:
        raise ValueError(f"baseline: expected a positive, finite loss, got {baseline}")
    figure = _figure()
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    steps, validation = _series(metrics, "validation")
    _draw(losses, steps, validation, color=VERMILLION, marked=len(steps) <= MARKED)
    steps, training = _series(metrics, "loss")
    mean = _draw_with_mean(losses, steps, training, color=BLUE)
    _log_axis(losses, np.concatenate([training, validation, [] if baseline is None else [baseline]]))
    if baseline is not None:
        losses.axhline(baseline, color=INK, linestyle=(0, (5, 4)), linewidth=1.1, zorder=1)
        losses.annotate(
            f"{baseline_label} {baseline:#.4g}", (1.0, baseline), xycoords=("axes fraction", "data"),
            xytext=(-6, 5), textcoords="offset points", va="bottom", ha="right", color=INK, fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )  # fmt: skip  # at the right, where curves that meet the line have come below it
    _finish(losses, "loss (bits per character)", np.concatenate([training, validation]))
    _label_ends(
        losses,
        [("training" if mean is training else "training (mean)", mean, BLUE), ("validation", validation, VERMILLION)],
    )

    steps, values = _series(metrics, "grad_norm")
    _draw_with_mean(norms, steps, values, color=GREEN)
    _log_axis(norms, values)
    _finish(norms, "gradient norm", values)
    _step_axis(norms, metrics)
    _save(figure, path)


def gradient_flow(
    norms: Any,
    path: StrPath,
    *,
    last: Any = None,
    title: str | None = None,
    labels: Sequence[str] | None = None,
) -> None:
    """Draws how gradients flow back through time: the L2 norm of dL/dh_t over the time steps t of a window.

    norms: (curves, T), of the whole window's loss; one curve a layer, a direction, or a moment of the training.  Ordered
    ones read best, since the colours run from dark to bright.  last: (curves, T2), the same of the loss of the window's
    last step alone, in a panel below: how far back it reaches.  labels: one for each curve; of more than eight, an even
    choice is shown.  Where a loss stands at the end alone, in `last` or else in `norms`, the factor by which the norm
    changes with every step back stands beside the label, from a least-squares line through the logarithms of the
    positive, finite values.  Norms of exactly 0 are triangles on the time axis; those that are not finite, or beyond
    1e250 or its inverse, leave gaps.  Raises ValueError for other shapes, negative norms, and labels that do not match.
    """
    panels = [("L2 norm of dL/dh$_t$", _checked_norms("norms", norms))]
    if last is not None:
        panels.append(("of the last step's loss", _checked_norms("last", last)))
    for _, curves in panels:
        if labels is not None and len(labels) != len(curves):
            raise ValueError(f"labels: expected one for each of {len(curves)} curves, got {len(labels)}")
    figure = _figure()
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (quantity, curves) in zip(stack, panels, strict=True):
        t = np.arange(-curves.shape[1], 0) + panels[0][1].shape[1]  # a longer `last` begins before the window
        _flow_panel(axes, t, curves, labels, rated=axes is stack[-1])
        _finish(axes, quantity, curves)
    stack[-1].set_xlabel("time step t in the window", color=INK, fontsize=11)
    stack[0].set_title(title or "", loc="left", color=INK, fontsize=12)
    _save(figure, path)


def _checked_norms(name: str, norms: Any) -> np.ndarray:
    norms = np.array(backend.to_numpy(norms), float)
    if norms.ndim != 2 or 0 in norms.shape:
        raise ValueError(f"{name}: expected (curves, T), neither of them 0, got {norms.shape}")
    if (norms < 0).any():
        raise ValueError(f"{name}: expected L2 norms, got the negative value {np.nanmin(norms)}")
    return norms


def _flow_panel(axes: Any, t: np.ndarray, norms: np.ndarray, labels: Sequence[str] | None, *, rated: bool) -> None:
    """Curves over t; with `rated`, a legend with each one's factor per step back."""
    from matplotlib.ticker import MaxNLocator

    names = labels if labels is not None else [f"curve {curve}" for curve in range(len(norms))]
    on_foot = {"transform": axes.get_xaxis_transform(), "clip_on": False, "in_layout": False}
    listed = set(np.linspace(0, len(norms) - 1, min(len(norms), LEGIBLE)).round())
    positive = np.where((norms > 1e-250) & (norms < 1e250), norms, np.nan)  # matplotlib overflows before float64
    for curve, colour in enumerate(_shades(len(norms))):
        label = f"{names[curve]}:  {_rate(positive[curve])}" if rated and curve in listed else None
        _draw(axes, t, positive[curve], color=colour, label=label)
        zeros = t[norms[curve] == 0]
        axes.plot(zeros, np.zeros(len(zeros)), "v", color=colour, markerfacecolor="white", **on_foot)
    if (norms == 0).any():
        axes.plot([], [], "v", color=INK, markerfacecolor="white", label="exactly 0")
    _log_axis(axes, positive)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=TICKS))
    if not rated:
        return
    legend = axes.legend(title="factor per step back (fit)", fontsize=10, labelcolor=INK, alignment="left")
    legend.get_title().set_color(INK)
    legend.get_frame().set(edgecolor="none", alpha=0.85)


def _figure() -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=SIZE, dpi=DPI, layout="constrained", facecolor="white")


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the lines that have `name`; NaN for what a logarithmic axis cannot show, and for null."""
    lines = [(number, line) for number, line in enumerate(metrics, start=1) if name in line]
    steps = np.array([_number(number, line, "step") for number, line in lines], float)
    values = np.array([_number(number, line, name) for number, line in lines], float)
    return steps, np.where(values > 0, values, np.nan)


def _number(number: int, line: Mapping[str, Any], name: str) -> float:
    value = line.get(name)
    if value is None and name != "step":
        return math.nan
    try:
        converted = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"metrics line {number}: {name}: expected a number, got {value!r:.60}") from None
    if name == "step" and not abs(converted) <= LARGEST_STEP:
        raise ValueError(f"metrics line {number}: step: expected a number up to {LARGEST_STEP}, got {converted}")
    return converted if abs(converted) <= LARGEST else math.nan


def _draw(
    axes: Any, x: np.ndarray, y: np.ndarray, *, marked: bool = False, label: str | None = None, **style: Any
) -> None:
    """A line with gaps where y is NaN; a point between two gaps, which no line would show, becomes a dot."""
    gap = np.isnan(np.concatenate([[np.nan], y, [np.nan]]))
    dots = np.ones(len(y), bool) if marked else gap[:-2] & gap[2:]
    axes.plot(x, y, label=label, **{"linewidth": 1.6, **style})
    axes.plot(x[dots], y[dots], "o", markersize=4, clip_on=False, in_layout=False, **style)


def _draw_with_mean(axes: Any, x: np.ndarray, y: np.ndarray, *, color: str) -> np.ndarray:
    """As `_draw`; but many points are drawn pale, and their running mean over them.  Returns the strong line's y."""
    if len(y) <= DENSE:
        _draw(axes, x, y, color=color)
        return y
    _draw(axes, x, y, color=color, alpha=0.3, linewidth=0.7)
    mean = _running_mean(y, len(y) // 100)
    _draw(axes, x, mean, color=color)
    return mean


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` points and as many before it as after, those that are NaN left out; NaN where y is."""
    window = np.ones(2 * (width // 2) + 1)
    present = np.isfinite(y)
    sums = np.convolve(np.where(present, y, 0.0), window, mode="same")
    return np.where(present, sums / np.maximum(np.convolve(present, window, mode="same"), 1), np.nan)


def _log_axis(axes: Any, values: np.ndarray) -> None:
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


def _finish(axes: Any, quantity: str, values: np.ndarray) -> None:
    axes.set_ylabel(quantity, color=INK, fontsize=11)
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(PALE)
    axes.tick_params(which="both", color=PALE, labelcolor=INK, labelsize=10)
    if not np.isfinite(values).any():
        style = {"color": PALE, "backgroundcolor": "white", "ha": "center", "va": "center"}
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, **style)


def _step_axis(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = [_number(number, line, "step") for number, line in enumerate(metrics, start=1)] or [0.0]
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    characters = _series(metrics, "chars")[1][-1:]
    seen = f"  ({characters[0]:,.0f} characters in all)" if np.isfinite(characters).any() else ""
    axes.set_xlabel(f"training step{seen}", color=INK, fontsize=11)


def _label_ends(axes: Any, curves: Sequence[tuple[str, np.ndarray, str]]) -> None:
    """Writes names and last values right of the ends of (at most two) curves; near ones move apart."""
    ends = [(y[np.isfinite(y)][-1], name, colour) for name, y, colour in curves if np.isfinite(y).any()]
    ends.sort()
    lowest, highest = axes.get_ylim()
    places = np.array([math.log(value / lowest) / math.log(highest / lowest) for value, _, _ in ends])
    if len(ends) == 2:
        places += np.array([-0.5, 0.5]) * max(0.0, 0.14 - (places[1] - places[0]))
    for place, (value, name, colour) in zip(places, ends, strict=True):
        style = {"color": colour, "va": "center", "fontsize": 10, "textcoords": "offset points"}
        axes.annotate(f"{name}\n{value:#.4g}", (1.0, place), xycoords="axes fraction", xytext=(8, 0), **style)


def _shades(count: int) -> list[Any]:
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0.0, 0.82, count)]


def _rate(norms: np.ndarray) -> str:
    """The factor from one time step to the one before it, as a label."""
    t = np.flatnonzero(np.isfinite(norms))
    if len(t) < 3:
        return "no fit"
    slope = np.polyfit(t, np.log(norms[t]), 1)[0]
    return f"×{math.exp(min(-slope, 700.0)):#.3g}"  # e^710 overflows


def _save(figure: Any, path: StrPath) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format=Path(path).suffix[1:] or "png")
    write_atomically(path, picture.getvalue())
