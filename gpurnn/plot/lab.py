"""Pictures of the laboratory: activation functions, a network unrolled in time, a loss surface with its cliff."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpurnn.files import StrPath
from gpurnn.plot import style

REPEATS = (1, 2, 4, 8, 16)
STEPS = ((style.VERMILLION, "^"), ("#56B4E9", "o"))  # on a dark ground


@style.own()
def activations(path: StrPath) -> None:
    """Draws tanh and sigmoid, their derivatives, and both applied again and again, as PNG and as SVG."""
    figure = style.figure(13.5, 4.6)
    functions, derivatives, repeated = figure.subplots(1, 3)
    a = np.linspace(-5, 5, 501)
    tanh, sigmoid = np.tanh(a), 0.5 * (1 + np.tanh(0.5 * a))
    looks = ((style.BLUE, "-"), (style.VERMILLION, "--"))
    for axes, lines in (
        (functions, {"tanh": tanh, "sigmoid": sigmoid}),
        (derivatives, {"tanh': at most 1": 1 - tanh**2, "sigmoid': at most 0.25": sigmoid * (1 - sigmoid)}),
    ):
        for (label, values), (colour, dashes) in zip(lines.items(), looks, strict=True):
            axes.plot(a, values, color=colour, linestyle=dashes, linewidth=1.8, label=label)
    for level in (1, 0.25):
        derivatives.axhline(level, color=style.PALE, linestyle=(0, (2, 3)), linewidth=1)
    derivatives.set_ylim(0, 1.35)
    value = a
    for time, colour in zip(range(1, max(REPEATS) + 1), _fading(), strict=False):
        value = np.tanh(value)
        if time in REPEATS:
            repeated.plot(a, value, color=colour, linewidth=1.8, label=f"{time}")
    for axes, ylabel in ((functions, "f(a)"), (derivatives, "f'(a)"), (repeated, "tanh(tanh(... a))")):
        style.plain(axes, "a", ylabel)
        style.legend(axes, loc="upper left", title="applied how often" if axes is repeated else None)
    style.save_both(figure, path)


def _fading() -> list[Any]:
    """A colour for each number of repetitions: those that are shown are spread evenly."""
    shades = dict(zip(REPEATS, style.shades(len(REPEATS)), strict=True))
    return [shades.get(time) for time in range(1, max(REPEATS) + 1)]


@style.own()
def unrolled(
    inputs: Sequence[str],
    outputs: Sequence[str],
    norms: Sequence[float],
    path: StrPath,
    *,
    title: str | None = None,
) -> None:
    """Draws a network unrolled in time, the gradient's way back written on its arrows, as PNG and as SVG.

    inputs   what is read at each of T steps.
    outputs  what is said about each step's output: short lines.
    norms    (T,) norms of dL/dh_t of the loss of the last step; a thicker arrow carries more.
    Raises ValueError where they differ in number.
    """
    T = len(inputs)
    if not 0 < T == len(outputs) == len(norms):
        raise ValueError(
            f"expected as many outputs and norms as inputs, {T} from 1, got {len(outputs)} and {len(norms)}"
        )
    figure = style.figure(max(5.0, 1.0 + 1.9 * T), 4.2)
    axes = figure.subplots()
    axes.set(xlim=(-0.7, T - 0.3), ylim=(-1.35, 1.75))
    axes.set_axis_off()
    box = {"boxstyle": "round,pad=0.45", "facecolor": "white", "edgecolor": style.INK}
    centre = {"ha": "center", "va": "center", "color": style.INK}
    for t, (given, said) in enumerate(zip(inputs, outputs, strict=True)):
        axes.text(t, -1.1, given, fontsize=15, **centre)
        axes.text(t, 0, f"h$_{{{t + 1}}}$", fontsize=13, bbox=box, **centre)
        axes.text(t, 1.35, said, fontsize=9.5, linespacing=1.4, **centre)
        _arrow(axes, (t, -0.88), (t, -0.28), style.PALE, 1.2)
        _arrow(axes, (t, 0.28), (t, 0.98), style.PALE, 1.2)
        if t:
            _arrow(axes, (t - 0.78, 0.1), (t - 0.22, 0.1), style.PALE, 1.2)
    _arrow(axes, (T - 0.93, 0.98), (T - 0.93, 0.28), style.VERMILLION, _width(norms[-1], norms))
    axes.text(T - 0.86, 0.62, f"{norms[-1]:.2g}", color=style.VERMILLION, fontsize=10, va="center")
    for t in range(T - 1):
        _arrow(axes, (t + 0.78, -0.12), (t + 0.22, -0.12), style.VERMILLION, _width(norms[t], norms))
        axes.text(t + 0.5, -0.36, f"{norms[t]:.2g}", color=style.VERMILLION, fontsize=10, ha="center", va="center")
    axes.set_title(title or "", loc="left", color=style.INK, fontsize=12)
    style.save_both(figure, path)


def _width(norm: float, norms: Sequence[float]) -> float:
    """Of an arrow, in points: 4.5 for the largest norm, 0.5 for none."""
    return 0.5 + 4.0 * norm / max(norms) if max(norms) > 0 else 0.5


def _arrow(axes: Any, start: tuple[float, float], end: tuple[float, float], colour: str, width: float) -> None:
    head = {"arrowstyle": "-|>", "color": colour, "linewidth": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12}
    axes.annotate("", end, start, arrowprops=head)


@style.own()
def surface(
    w: Any, b: Any, loss: Any, steps: Mapping[str, tuple[Any, Any]], along: Mapping[str, Any], path: StrPath
) -> None:
    """Draws a loss over two parameters, and along the gradient's direction, with steps on it, as PNG and as SVG.

    w, b    (W,) and (B,) values of the parameters; loss (B, W).
    steps   two labels -> from where to where, each (w, b).
    along   "distance" (K,) from the first step's start, against the gradient, and "loss" (K,) there; and label -> distance
            for each step's end.
    """
    figure = style.figure(12.5, 5.0)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    image = left.pcolormesh(w, b, loss, cmap="cividis", shading="nearest", rasterized=True)
    bar = figure.colorbar(image, ax=left, pad=0.02)
    bar.set_label("loss", color=style.INK)
    bar.outline.set_visible(False)
    left.set(xlim=(w[0], w[-1]), ylim=(b[0], b[-1]))
    style.plain(left, "recurrent weight w", "bias b")
    left.grid(False)
    right.plot(along["distance"], along["loss"], color=style.INK, linewidth=1.6)
    for (label, (start, end)), (colour, marker) in zip(steps.items(), STEPS, strict=True):
        _arrow(left, tuple(start), tuple(end), colour, 2.2)
        left.plot(*end, marker, color=colour, markersize=7, markeredgecolor="white", clip_on=True)
        at = along[label]
        height = float(np.interp(at, along["distance"], along["loss"]))
        right.plot(at, height, marker, color=colour, markersize=9, label=f"{label}: loss {height:.3f}")
    left.plot(*next(iter(steps.values()))[0], "o", color="white", markeredgecolor=style.INK, markersize=7)
    height = float(np.interp(0, along["distance"], along["loss"]))
    right.plot(0, height, "o", color="white", markeredgecolor=style.INK, label=f"start: loss {height:.3f}")
    style.plain(right, "distance along the negative gradient", "loss")
    style.legend(right)
    style.save_both(figure, path)
