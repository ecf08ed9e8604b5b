"""The cliff in the loss of an exploding network, and the three ways to clip that stay on it."""

from typing import Any

import numpy as np

from gpurnn import plot
from gpurnn.bptt import full_bptt
from gpurnn.initializers import zeros
from gpurnn.lab.page import Page
from gpurnn.lab.tasks import squared_error
from gpurnn.optim import clipping
from gpurnn.recurrent import RNN

T, BEGIN, TARGET = 50, 0.5, 0.7
START = (5.0, -2.3)  # w and b at the foot of the cliff
LR, UPDATES = 0.05, 600
CURES = {
    "no clipping": {},
    "by norm, 0.5": {"norm": 0.5},
    "by value, 0.5": {"value": 0.5},
    "in time, 0.005": {"time": 0.005},
}


class Cliff:
    """One sigmoid unit without input, h_t = f(w h_{t-1} + b) from h_0 = 0.5, that should be 0.7 after 50 steps.

    (Pascanu, Mikolov & Bengio 2013.)  Its loss over w and b has a cliff where h_t tips from one fixed point to another.
    """

    def __init__(self, clip_in_time: float | None = None):
        options: dict[str, Any] = {"init": {"weight_ih": zeros}, "dtype": "float64", "executor": "numpy"}
        self.layer = RNN(1, 1, nonlinearity="sigmoid", clip_in_time=clip_in_time, **options)
        self.x, self.h_0 = np.zeros((T, 1, 1)), np.full((1, 1, 1), BEGIN)

    def losses(self, w: np.ndarray, b: np.ndarray) -> np.ndarray:
        """The loss for all pairs of w and b (arrays of one shape), by the recurrence itself: one pass for all."""
        h = np.full(w.shape, BEGIN)
        for _ in range(T):
            h = 0.5 * (1 + np.tanh(0.5 * (w * h + b)))
        return (h - TARGET) ** 2

    def backward(self, w: float, b: float) -> float:
        """Fills the layer's gradients; returns the loss."""
        self.layer.params["weight_hh_l0"][...], self.layer.params["bias_hh_l0"][...] = w, b
        self.layer.zero_grad()
        loss, _ = full_bptt(self.layer, self.x, np.full((1, 1, 1), TARGET), squared_error, self.h_0)
        self.layer.grads["bias_ih_l0"][...] = 0  # the same as bias_hh's: two numbers are learnt, not three
        return float(loss)

    def gradient(self) -> np.ndarray:
        grads = self.layer.grads
        return np.array([float(grads["weight_hh_l0"][0, 0]), float(grads["bias_hh_l0"][0])])


def descend(norm: float | None = None, value: float | None = None, time: float | None = None) -> np.ndarray:
    """Gradient descent from START with a step size that falls to 0: (UPDATES, 4) of w, b, loss and gradient norm."""
    cliff, place, path = Cliff(time), np.array(START), []
    for update in range(UPDATES):
        loss = cliff.backward(*place)
        path.append((*place, loss, float(clipping.grad_norm(cliff.layer))))
        if norm:
            clipping.clip_grad_norm(cliff.layer, norm)
        if value:
            clipping.clip_grad_value(cliff.layer, value)
        place = place - LR * (1 - update / UPDATES) * cliff.gradient()
    return np.array(path)


def experiment(page: Page) -> None:
    page.section("The cliff, and clipping")
    paths = {label: descend(**cure) for label, cure in CURES.items()}
    unclipped = paths["no clipping"]
    worst = int(np.argmax(np.hypot(*np.diff(unclipped[:, :2], axis=0).T)))
    page.say(
        f"One sigmoid unit runs {T} steps and should end at {TARGET}. Where w and b tip it from one fixed point to the "
        f"other, its loss has a cliff. Descending from w = {START[0]}, b = {START[1]} with a step size of {LR}, the "
        f"gradient's norm becomes {unclipped[worst, 3]:.0f} at update {worst + 1}, and the step leaves the valley."
    )
    page.table(
        ["clipping", "largest gradient norm", "smallest loss", f"loss after {UPDATES}"],
        [
            [label, f"{path[:, 3].max():.3g}", f"{path[:, 2].min():.2g}", f"{path[-1, 2]:.2g}"]
            for label, path in paths.items()
        ],
    )
    page.say("Clipped by norm, by value or within the backward pass in time, the same descent stays in the valley.")
    _surface(page, unclipped[worst, :2])
    best = {label: (range(UPDATES), np.minimum.accumulate(path[:, 2])) for label, path in paths.items()}
    panel = plot.Panel("update", "smallest loss so far", best, log_y=True)
    plot.curves(
        [panel], page.figure("clipping", "Gradient descent at the foot of the cliff, with and without clipping")
    )


def _surface(page: Page, start: np.ndarray) -> None:
    """The step from `start` as it is and as it is clipped."""
    cliff = Cliff()
    cliff.backward(*start)
    whole = -LR * cliff.gradient()
    clipping.clip_grad_norm(cliff.layer, 0.5)
    clipped = -LR * cliff.gradient()
    length = float(np.hypot(*whole))
    w, b = (
        np.linspace(low - 0.4 * length, high + 0.4 * length, 480) for low, high in np.sort([start, start + whole], 0).T
    )
    ends = [0.0, float(np.hypot(*clipped)), length]  # on a cliff no grid is fine enough: these points are in it
    distance = np.sort(np.concatenate([np.linspace(-0.25 * length, 1.3 * length, 600), ends]))
    line = start[:, None] + whole[:, None] / length * distance
    plot.surface(
        w, b, cliff.losses(*np.meshgrid(w, b)),
        {"step as it is": (start, start + whole), "step clipped": (start, start + clipped)},
        {"distance": distance, "loss": cliff.losses(*line), "step as it is": length, "step clipped": ends[1]},
        page.figure("cliff", "The loss over w and b, and along the gradient: the step as it is, and clipped by norm"),
    )  # fmt: skip
