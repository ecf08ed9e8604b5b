"""One weight, many steps: what multiplication does, and what saturation does to it."""

import numpy as np

from gpurnn import diagnose, plot
from gpurnn.initializers import Initializer
from gpurnn.lab.page import Page
from gpurnn.recurrent import RNN

STEPS = 20


def one_unit(w: float, nonlinearity: str) -> RNN:
    """h_t = f(w h_{t-1} + x_t): a network of one unit."""

    def constant(value: float) -> Initializer:
        return lambda rng, rows, columns: np.full((rows, columns), value)

    init = {"weight_hh": constant(w), "weight_ih": constant(1.0)}
    return RNN(1, 1, nonlinearity=nonlinearity, bias=False, init=init, dtype="float64", executor="numpy")


def influence(w: float, nonlinearity: str, steps: int) -> float:
    """dh_t/dh_{t-steps} of `one_unit` that reads 0.5 at every step."""
    x = np.full((steps + 1, 1, 1), 0.5)
    return float(diagnose.jacobian_product(one_unit(w, nonlinearity), x, lag=steps)[0, 0, 0])


def experiment(page: Page) -> None:
    page.section("One weight, many steps")
    page.say(
        "Take one unit without a squashing function, h_t = w h_{t-1} + x_t. What happened 4 steps ago is multiplied by w "
        f"four times: w = 0.1 leaves {influence(0.1, 'identity', 4):.4g} of it, w = 2 makes it "
        f"{influence(2.0, 'identity', 4):.4g}. That is all there is to vanishing and exploding gradients; the rest is "
        "matrices in the place of w."
    )
    curves = {}
    for nonlinearity, w in (("identity", 0.1), ("identity", 2.0), ("tanh", 2.0)):
        flow = diagnose.gradient_flow(one_unit(w, nonlinearity), np.full((STEPS + 1, 1, 1), 0.5), step=-1)
        curves[f"{nonlinearity}, w = {w:g}"] = flow.by_lag("l0")[0] / flow.norms[0, 0, -1]
    page.say(
        f"tanh tames the explosion: with w = 2 the unit saturates, its derivative is small, and over {STEPS} steps the "
        f"influence is {curves['tanh, w = 2'][-1]:.1e} in the place of {curves['identity, w = 2'][-1]:.1e}. The price is "
        "that the gradient now vanishes. A derivative of tanh is at most 1, one of the sigmoid at most 0.25, so that "
        "without a large w a sigmoid forgets at least three quarters with every step."
    )
    plot.by_lag(
        curves,
        page.figure("one-weight", "The influence of the past on one unit, by lag"),
        quantity="dh$_t$/dh$_{t-lag}$",
    )
    plot.activations(page.figure("activations", "tanh and sigmoid, their derivatives, and tanh of tanh of tanh"))
