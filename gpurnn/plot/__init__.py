"""Figures: of a training, of its gradients, and of the laboratory's experiments."""

from gpurnn.plot.curves import Panel, by_lag, curves
from gpurnn.plot.flow import gradient_flow
from gpurnn.plot.lab import activations, surface, unrolled
from gpurnn.plot.maps import eigenvalues, flow_map
from gpurnn.plot.style import why_not
from gpurnn.plot.training import loss_curve

__all__ = [
    "Panel",
    "activations",
    "by_lag",
    "curves",
    "eigenvalues",
    "flow_map",
    "gradient_flow",
    "loss_curve",
    "surface",
    "unrolled",
    "why_not",
]
