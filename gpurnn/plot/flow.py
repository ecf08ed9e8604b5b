"""How gradients flow back through time: over the steps of a window."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.files import StrPath
from gpurnn.plot import style

LEGIBLE = 8  # entries in a legend


@style.own()
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
    figure = style.figure()
    stack = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (quantity, curves) in zip(stack, panels, strict=True):
        t = np.arange(-curves.shape[1], 0) + panels[0][1].shape[1]  # a longer `last` begins before the window
        _flow_panel(axes, t, curves, labels, rated=axes is stack[-1])
        style.finish(axes, quantity, curves)
    stack[-1].set_xlabel("time step t in the window", color=style.INK, fontsize=11)
    stack[0].set_title(title or "", loc="left", color=style.INK, fontsize=12)
    style.save(figure, path)


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
    for curve, colour in enumerate(style.shades(len(norms))):
        label = f"{names[curve]}:  {style.rate(positive[curve])}" if rated and curve in listed else None
        style.draw(axes, t, positive[curve], color=colour, label=label)
        zeros = t[norms[curve] == 0]
        axes.plot(zeros, np.zeros(len(zeros)), "v", color=colour, markerfacecolor="white", **on_foot)
    if (norms == 0).any():
        axes.plot([], [], "v", color=style.INK, markerfacecolor="white", label="exactly 0")
    style.log_axis(axes, positive)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=style.TICKS))
    if not rated:
        return
    style.legend(axes, title="factor per step back (fit)", fontsize=10)
