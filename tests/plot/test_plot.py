import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from gpurnn import plot
from gpurnn.plot import style
from gpurnn.plot import training as training_figures
from tests import ROOT


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    figures, save = [], style.save
    monkeypatch.setattr(style, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def assert_png(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (1200, 750)
    assert data.endswith(b"IEND\xaeB`\x82")
    assert not list(path.parent.glob(".tmp-*"))


def training(lines):
    return [
        {"step": 10 * n, "loss": 2 + 4 / (n + 1), "grad_norm": 1 / (n + 1), "chars": 640 * n, "lr": 1e-3}
        | ({"validation": 2.1 + 4 / (n + 1)} if n % 5 == 0 else {})
        for n in range(lines)
    ]


def text(figure):
    from matplotlib.text import Text

    return "\n".join(found.get_text() for found in figure.findobj(Text))


@pytest.mark.parametrize("lines", [1, 2, 33, 1001])
def test_loss_curve(tmp_path, drawn, lines):
    plot.loss_curve(training(lines), tmp_path / "loss.png", baseline=2.2)
    assert_png(tmp_path / "loss.png")
    losses, norms = drawn[0].axes
    assert losses.get_ylim()[0] < 2.2 < losses.get_ylim()[1], "the baseline is in view"
    assert norms.get_yscale() == "log"
    assert norms.get_xlim() == losses.get_xlim() == (0, max(10 * (lines - 1), 1))
    label = "training (mean)\n" if lines == 1001 else f"training\n{2 + 4 / lines:#.4g}"
    assert all(expected in text(drawn[0]) for expected in ("order-3 Witten-Bell 2.200", "validation\n", label))


def test_what_was_not_measured_is_skipped_and_what_was_not_finite_leaves_a_gap(tmp_path, drawn):
    values = [3.0, None, 2.0, float("nan"), 1.5, float("inf"), 1.4, 1e300, 1.3, 1.2]
    metrics = [{"step": 2 * n, "loss": value, "grad_norm": value} for n, value in enumerate(values)]
    metrics[4:4] = [{"step": 7, "validation": 2.5}, {"step": 8, "grad_norm": 0.0, "validation": 2.4}]
    plot.loss_curve(metrics, tmp_path / "loss.png")
    validation, _, loss, dots = drawn[0].axes[0].lines
    np.testing.assert_array_equal(validation.get_xdata(), [7, 8])
    np.testing.assert_array_equal(loss.get_ydata(), [3, np.nan, 2, np.nan, 1.5, np.nan, 1.4, np.nan, 1.3, 1.2])
    np.testing.assert_array_equal(dots.get_xdata(), [0, 4, 8, 12])  # between gaps, where no line shows
    np.testing.assert_array_equal(np.isnan(drawn[0].axes[1].lines[0].get_ydata()).sum(), 5)


def test_running_mean_is_that_of_the_values_that_are_there():
    values = np.array([1.0, 2.0, np.nan, 6.0, 8.0])
    np.testing.assert_allclose(training_figures._running_mean(values, 3), [1.5, 1.5, np.nan, 7.0, 7.0])


@pytest.mark.parametrize(
    "metrics", [[], [{"step": 3}], [{"step": 3, "loss": None, "grad_norm": float("inf")}], [{"step": 0, "loss": 0}]]
)
def test_a_training_without_values_gives_an_empty_labelled_figure(tmp_path, drawn, metrics):
    plot.loss_curve(metrics, tmp_path / "loss.png", baseline=2.0)
    assert_png(tmp_path / "loss.png")
    assert text(drawn[0]).count("no values") == 2
    assert "bits per character" in text(drawn[0])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"loss": 1.0}, "line 2: step: expected a number, got None"),
        ({"step": float("nan"), "loss": 1.0}, "line 2: step"),
        ({"step": 1, "loss": "high"}, "line 2: loss: expected a number, got 'high'"),
        ({"step": 1, "validation": [1]}, "line 2: validation"),
    ],
)
def test_wrong_metrics_are_named_and_the_old_figure_stands(tmp_path, line, message):
    path = tmp_path / "loss.png"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        plot.loss_curve([{"step": 0, "loss": 1.0}, line], path)
    with pytest.raises(ValueError, match="baseline"):
        plot.loss_curve([], path, baseline=float("nan"))
    assert path.read_bytes() == b"old"


def test_gradient_flow(tmp_path, drawn):
    back = np.arange(63, -1, -1)
    norms = np.stack([0.7**back, 0.98**back, 1.25**back])
    norms[0, :20], norms[1, 5], norms[2, 7] = 0, np.nan, np.inf
    plot.gradient_flow(norms, tmp_path / "flow.png", labels=["early", "late", "later"], title="layer 0")
    assert_png(tmp_path / "flow.png")
    axes = drawn[0].axes[0]
    assert axes.get_yscale() == "log"
    assert axes.get_title(loc="left") == "layer 0"
    entries = [entry.get_text() for entry in axes.get_legend().get_texts()]
    assert entries == ["early:  ×0.700", "late:  ×0.980", "later:  ×1.25", "exactly 0"]
    zeros = [line for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in zeros] == [list(range(20))]
    plot.gradient_flow(np.ones((1, 4)), tmp_path / "flow.png", last=np.ones((1, 6)))
    assert [list(axes.lines[0].get_xdata()) for axes in drawn[-1].axes] == [list(range(4)), list(range(-2, 4))]


@pytest.mark.parametrize(
    "norms",
    [
        [[1.0]],
        np.ones((2, 5), np.float32),
        np.zeros((2, 3)),
        np.full((1, 4), np.nan),
        [[5e-324, 1e-320, 1e-10, 1.0]],
        [[1e308, 1.0, np.inf, 1e-300, 1e200]],
        np.exp(-np.arange(700.0)) * np.ones((20, 1)),
    ],
)
def test_degenerate_gradients_are_drawn(tmp_path, drawn, norms):
    plot.gradient_flow(norms, tmp_path / "flow.png")
    assert_png(tmp_path / "flow.png")
    assert 1 <= len(drawn[0].axes[0].get_legend().get_texts()) <= 9


@pytest.mark.parametrize(
    ("norms", "labels", "message"),
    [
        (np.ones(5), None, r"expected \(curves, T\).*got \(5,\)"),
        (np.ones((2, 0)), None, r"got \(2, 0\)"),
        (np.ones((2, 5)), ["one"], "expected one for each of 2 curves, got 1"),
        (-np.ones((2, 5)), None, "negative value -1.0"),
    ],
)
def test_wrong_gradients_are_refused(tmp_path, norms, labels, message):
    with pytest.raises(ValueError, match=message):
        plot.gradient_flow(norms, tmp_path / "flow.png", labels=labels)
    assert not list(tmp_path.iterdir())


def test_the_name_chooses_the_format(tmp_path):
    plot.loss_curve(training(3), tmp_path / "loss.svg")
    assert b"<svg" in (tmp_path / "loss.svg").read_bytes()
    plot.loss_curve(training(3), tmp_path / "loss")
    assert_png(tmp_path / "loss")


def test_matplotlib_comes_late_and_pyplot_never(tmp_path):
    program = (
        "import sys; from gpurnn import plot; assert 'matplotlib' not in sys.modules\n"
        f"plot.loss_curve([], {str(tmp_path / 'loss.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    environment = {**os.environ, "MPLBACKEND": "TkAgg"}  # one that needs a display is not asked for either
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True, timeout=120)
