"""Truncated against full BPTT: what it costs, what it bends, and what it then cannot learn."""

import time

import numpy as np

from gpurnn import diagnose, losses, optim, plot
from gpurnn.bptt import TruncatedBPTT
from gpurnn.lab.page import Page
from gpurnn.lab.tasks import echo, with_head
from gpurnn.model import SequenceModel
from gpurnn.optim import clipping
from gpurnn.recurrent import GRU

LAG, K1, STREAMS = 8, 5, 32
HIDDEN = 32


def experiment(page: Page) -> None:
    page.section("Truncated against full BPTT")
    reaches, updates = ((5, 10, 20), 150) if page.quick else ((5, 10, 20, 40, 80), 700)
    page.say(
        f"A GRU of {HIDDEN} units hears a stream of ±1 and has to say what it heard {LAG} steps ago. It is updated every "
        f"k1 = {K1} steps, from gradients that go k2 steps back. Guessing errs by 1."
    )
    model = trained(page.seed, 20, updates // 2)[0]
    x, targets = echo(np.random.default_rng(page.seed + 1), 100, 16, LAG)
    rows, found = [], []
    for k2 in reaches:
        bias = diagnose.truncation_bias(model, x, targets, losses.mean_squared_error, K1, k2)
        _, error, milliseconds = trained(page.seed, k2, updates)
        found.append((bias.degrees, error, milliseconds))
        rows.append([f"{k2}", f"{bias.degrees:.2f}°", f"{bias.ratio:.3f}", f"{milliseconds:.2f}", f"{error:.4f}"])
        page.progress(f"k2 = {k2}: error {error:.4f}")
    page.table(["k2", "angle to the full gradient", "norm / full norm", "ms per update", "error"], rows)
    angles, errors, times = zip(*found, strict=True)
    learnt = [k2 for k2, error in zip(reaches, errors, strict=True) if error < 0.1]
    page.say(
        f"The angle is that between the truncated and the full gradient of a half-trained model over 100 steps. With "
        f"k2 = {reaches[0]}, below the lag of {LAG}, the gradient never sees what the task is about"
        + (f"; it is learnt from k2 = {learnt[0]} on." if learnt else ".")
        + " Beyond that the angle falls towards 0 while every update costs more."
    )
    panels = [
        plot.Panel("k2 (steps back)", ylabel, {"": (reaches, values)}, log_x=True, log_y=log, marked=True)
        for ylabel, values, log in (
            ("angle to the full gradient (degrees)", angles, False),
            ("time per update (ms)", times, False),
            ("squared error (guessing: 1)", errors, True),
        )
    ]
    plot.curves(panels, page.figure("truncation", "What truncation costs and what it bends"))


def trained(seed: int, k2: int, updates: int) -> tuple[SequenceModel, float, float]:
    """The model, its mean error over the last tenth of the updates, and the 10th percentile of their times in ms."""
    rng = np.random.default_rng(seed)
    model = with_head(GRU(1, HIDDEN, rng=rng), 1, rng)
    optimizer = optim.Adam(model, lr=0.01)
    bptt = TruncatedBPTT(model, losses.mean_squared_error, K1, k2)
    heard, wanted = echo(rng, updates * K1, STREAMS, LAG)
    errors, times = [], []
    for start in range(0, len(heard), K1):
        began = time.perf_counter()
        model.zero_grad()
        errors.append(float(bptt.step(heard[start : start + K1], wanted[start : start + K1])))
        clipping.clip_grad_norm(model, 1.0)
        optimizer.step()
        times.append(time.perf_counter() - began)
    last = max(1, updates // 10)
    return model, float(np.mean(errors[-last:])), 1e3 * float(np.quantile(times, 0.1))
