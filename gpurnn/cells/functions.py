"""The elementwise functions that a cell may use.

They are NumPy's.  On NumPy or CuPy arrays they compute; on the symbolic values of `trace.py` they are recorded, through
NumPy's own dispatch protocols, so that one definition of a cell serves every executor.
"""

import numpy as np

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
