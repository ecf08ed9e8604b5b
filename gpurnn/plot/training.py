"""Loss curves of a training."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpurnn.files import StrPath
from gpurnn.plot import style

LARGEST = float(np.finfo(np.float32).max)  # what is beyond has diverged, and would flatten the rest
LARGEST_STEP = 2**53  # beyond it, steps are not told apart on an axis
MARKED, DENSE = 60, 400  # points: fewer get dots, more get a running mean


@style.own()
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
    figure = style.figure()
    losses, norms = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    steps, validation = _series(metrics, "validation")
    style.draw(losses, steps, validation, color=style.VERMILLION, marked=len(steps) <= MARKED)
    steps, training = _series(metrics, "loss")
    mean = _draw_with_mean(losses, steps, training, color=style.BLUE)
    style.log_axis(losses, np.concatenate([training, validation, [] if baseline is None else [baseline]]))
    if baseline is not None:
        losses.axhline(baseline, color=style.INK, linestyle=(0, (5, 4)), linewidth=1.1, zorder=1)
        losses.annotate(
            f"{baseline_label} {baseline:#.4g}", (1.0, baseline), xycoords=("axes fraction", "data"),
            xytext=(-6, 5), textcoords="offset points", va="bottom", ha="right", color=style.INK, fontsize=10,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1.5},
        )  # fmt: skip  # at the right, where curves that meet the line have come below it
    style.finish(losses, "loss (bits per character)", np.concatenate([training, validation]))
    _label_ends(
        losses,
        [
            ("training" if mean is training else "training (mean)", mean, style.BLUE),
            ("validation", validation, style.VERMILLION),
        ],
    )

    steps, values = _series(metrics, "grad_norm")
    _draw_with_mean(norms, steps, values, color=style.GREEN)
    style.log_axis(norms, values)
    style.finish(norms, "gradient norm", values)
    _step_axis(norms, metrics)
    style.save(figure, path)


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


def _draw_with_mean(axes: Any, x: np.ndarray, y: np.ndarray, *, color: str) -> np.ndarray:
    """As `_draw`; but many points are drawn pale, and their running mean over them.  Returns the strong line's y."""
    if len(y) <= DENSE:
        style.draw(axes, x, y, color=color)
        return y
    style.draw(axes, x, y, color=color, alpha=0.3, linewidth=0.7)
    mean = _running_mean(y, len(y) // 100)
    style.draw(axes, x, mean, color=color)
    return mean


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """The mean over `width` points and as many before it as after, those that are NaN left out; NaN where y is."""
    window = np.ones(2 * (width // 2) + 1)
    present = np.isfinite(y)
    sums = np.convolve(np.where(present, y, 0.0), window, mode="same")
    return np.where(present, sums / np.maximum(np.convolve(present, window, mode="same"), 1), np.nan)


def _step_axis(axes: Any, metrics: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = [_number(number, line, "step") for number, line in enumerate(metrics, start=1)] or [0.0]
    axes.set_xlim(min(steps), max(*steps, min(steps) + 1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=style.TICKS))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    characters = _series(metrics, "chars")[1][-1:]
    seen = f"  ({characters[0]:,.0f} characters in all)" if np.isfinite(characters).any() else ""
    axes.set_xlabel(f"training step{seen}", color=style.INK, fontsize=11)


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
