"""The check that comes before any timing: an implementation's results against the float64 reference in NumPy.

The reference covers so many first steps that it is affordable; what comes later in time cannot change what y is there.
"""

from collections.abc import Sequence

import numpy as np

from bench.peers.numpy_loop import reference
from bench.peers.numpy_model import NumpyModel
from bench.problem import Problem

# Largest error relative to a tensor's largest entry.  Ours and torch's float32 stay below 1e-5 at the table's sizes;
# half precisions round every h, so their error is that of the format times what the recurrence makes of it.
TOLERANCE = {"float32": 1e-4, "tf32": 1e-2, "float16": 2e-2, "bfloat16": 1e-1}
CHECK_FLOPS = 4e9  # of the reference, which runs in float64 on the CPU
CHECK_STEPS = 512
REQUIRED = {"layer": ("y", "dx", "dweight_hh"), "recurrence": ("y", "dweight_hh"), "model": ("losses", "norms")}


class Expected:
    """The reference over the first steps of a problem, and how far a result is from it."""

    def __init__(self, problem: Problem):
        case = problem.case
        passes = 9 if case.group == "train" else 3  # forward and backward, for three steps of the model
        per_step = 2 * passes * case.N * case.gates * case.H * (case.I + case.H / case.heads)
        self.steps = int(min(case.T, CHECK_STEPS, max(2, CHECK_FLOPS // per_step)))
        self.problem, self.case = problem.first(self.steps), case
        model = case.group == "train"
        self.values = NumpyModel(self.problem, "float64").results() if model else reference(self.problem, training=True)

    def error(self, got: dict[str, np.ndarray], names: Sequence[str]) -> float:
        """The largest error over all tensors that were given.  Raises ArithmeticError where it is too large."""
        for name in names:
            if name not in got:
                raise ArithmeticError(f"{name} is missing among {', '.join(got)}")
        worst, allowed = 0.0, TOLERANCE[self.case.dtype]
        for name, value in got.items():
            expected = self.values[name]
            if value.shape != expected.shape:
                raise ArithmeticError(f"{name}: expected shape {expected.shape}, got {value.shape}")
            error = float(np.abs(value - expected).max(initial=0)) / max(float(np.abs(expected).max(initial=0)), 1e-3)
            if not error <= allowed:  # NaN is not
                raise ArithmeticError(f"wrong: {name} is off by {error:.1e}, {allowed:.0e} is allowed")
            worst = max(worst, error)
        return worst
