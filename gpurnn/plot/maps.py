"""Gradient flow over a whole training as a heat map, and eigenvalues against the unit circle."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.files import StrPath
from gpurnn.plot import style

DECADES = 6  # beyond 10^-6 and 10^6 a colour says no more


@style.own()
def flow_map(
    norms: Any, path: StrPath, *, rows: Sequence[Any], row_label: str = "training step", title: str | None = None
) -> None:
    """Draws how far gradients reach back, row by row, as PNG and as SVG: white holds, blue vanishes, red explodes.

    A row without any gradient, whose last norm is 0, is grey.

    norms  (rows, T): norms of dL/dstate_t for a loss at the last step alone; drawn relative to their last one.
    rows   what each row is, such as its training step.
    Raises ValueError for other shapes.
    """
    from matplotlib.ticker import MaxNLocator

    values = np.asarray(backend.to_numpy(norms), float)
    if values.ndim != 2 or 0 in values.shape or len(rows) != len(values):
        raise ValueError(f"norms: expected (rows, T) with {len(rows)} rows, none of them 0, got {values.shape}")
    with np.errstate(divide="ignore", invalid="ignore"):
        powers = np.log10(values / values[:, -1:])
    figure = style.figure()
    axes = figure.subplots()
    image = axes.imshow(
        np.clip(powers, -DECADES, DECADES),
        cmap=_diverging(),
        vmin=-DECADES,
        vmax=DECADES,
        aspect="auto",
        interpolation="nearest",
    )
    style.plain(axes, "time step t in the window", row_label)
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=style.TICKS))
    shown = range(0, len(rows), -(-len(rows) // 9))
    axes.set_yticks(shown, [str(rows[place]) for place in shown])
    bar = figure.colorbar(image, ax=axes, pad=0.02, extend="both", ticks=range(-DECADES, DECADES + 1, 2))
    bar.ax.set_yticklabels([f"$10^{{{power}}}$" for power in range(-DECADES, DECADES + 1, 2)], color=style.INK)
    bar.set_label("norm of dL/dstate$_t$, relative to the last step's", color=style.INK, fontsize=10)
    bar.outline.set_visible(False)
    axes.set_title(title or "", loc="left", color=style.INK, fontsize=12)
    style.save_both(figure, path)


@style.own()
def eigenvalues(spectra: Mapping[str, Any], path: StrPath, *, title: str | None = None) -> None:
    """Draws the eigenvalues of recurrent matrices in the complex plane beside the unit circle, as PNG and as SVG.

    spectra: label -> complex eigenvalues, one panel each; the label is completed by their spectral radius.
    """
    from matplotlib.patches import Circle

    points = {label: np.asarray(backend.to_numpy(given)).reshape(-1) for label, given in spectra.items()}
    reach = 1.1 * max(1.0, *(float(np.abs(values).max(initial=0.0)) for values in points.values()))
    figure = style.figure(max(5.0, 0.6 + 3.9 * len(points)), 5.2 if title else 4.8)
    figure.set_layout_engine("compressed")  # axes of equal scales leave gaps that `constrained` counts as theirs
    (row,) = figure.subplots(1, len(points), squeeze=False, sharey=True)
    for axes, (label, values) in zip(row, points.items(), strict=True):
        axes.add_patch(Circle((0, 0), 1, fill=False, color=style.PALE, linewidth=1.2))
        outside = np.abs(values) > 1 + 1e-6
        for chosen, colour, marker in ((~outside, style.BLUE, "o"), (outside, style.VERMILLION, "^")):
            axes.plot(values.real[chosen], values.imag[chosen], marker, color=colour, markersize=5, alpha=0.8)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        style.plain(axes, "real part", "imaginary part" if axes is row[0] else "")
        radius = float(np.abs(values).max(initial=0.0))
        axes.set_title(
            f"{label}\nspectral radius {radius:.3g}, {outside.sum()} outside", color=style.INK, fontsize=10, loc="left"
        )
    if title:
        figure.suptitle(title, color=style.INK, fontsize=12, x=0.01, ha="left")
    style.save_both(figure, path)


def _diverging() -> Any:
    """Blue, white, red, without the nearly black ends."""
    from matplotlib import colormaps
    from matplotlib.colors import LinearSegmentedColormap

    shades = [colormaps["RdBu_r"](0.1 + 0.8 * place / 64) for place in range(65)]
    return LinearSegmentedColormap.from_list("blue-white-red", shades).with_extremes(bad="#BBBBBB")
