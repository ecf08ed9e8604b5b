"""The elementwise functions that a cell may use, and its random numbers.

The first are NumPy's.  On NumPy or CuPy arrays they compute; on the symbolic values of `trace.py` they are recorded, through
NumPy's own dispatch protocols, so that one definition of a cell serves every executor.
"""

from typing import Any

import numpy as np

from gpurnn.arguments import number, one_of
from gpurnn.cells.trace import Graph, Symbol, recorded

abs = np.abs
exp = np.exp
log = np.log
maximum = np.maximum
minimum = np.minimum
sqrt = np.sqrt
tanh = np.tanh
where = np.where


def sigmoid(x):
    """The logistic function, 1 / (1 + exp(-x)), written with tanh so that no exponential overflows."""
    return 0.5 * (1 + tanh(0.5 * x))


def relu(x):
    """max(x, 0)."""
    return maximum(x, 0)


def softplus(x):
    """log(1 + exp(x)), where no exponential overflows; written with `where`, its derivative at 0 is right as well."""
    return where(x < 0, 0, x) + log(1 + exp(where(x < 0, x, -x)))


def bernoulli(p: float, per: str = "step") -> Any:
    """1 with probability p, else 0: a number for each unit of each batch row, at each step or one for a whole sequence.

    It is a function of its place: of the layer's seed, the call of the layer, layer, direction, step, row, unit, and which
    call of `bernoulli` or `normal` in the cell it is.  So all executors have the same bits, and backward has them again.
    To gradients it is a constant.  With training=False it is p.  For a cell's forward: RuntimeError elsewhere.
    """
    p, graph = number("p", p, lambda v: 0 <= v <= 1, "in [0, 1]"), _asking("bernoulli", per)
    return graph.constant(p) if p in (0, 1) else graph.random("bernoulli", per, p)


def normal(per: str = "step") -> Any:
    """A number of mean 0 and standard deviation 1, float32 in every layer; 0 with training=False.  Else as `bernoulli`."""
    return _asking("normal", per).random("normal", per)


def candidate(value: Any) -> Any:
    """`value`, marked as what a cell would add to its memory: a layer's `recurrent_dropout` drops units of it."""
    if isinstance(value, Symbol):
        value.graph.candidates.add(value.index)
    return value


def _asking(function: str, per: str) -> Graph:
    one_of("per", per, ("step", "sequence"))
    graph = recorded()
    if graph is None:
        raise RuntimeError(f"{function}: expected to be called by a cell's forward while the cell is made")
    return graph
