"""What the harness asks of an implementation: one step of one case, ready to be run and timed again and again."""

import time

import numpy as np


class Workload:
    """Made from a problem and a phase; weights and input sets lie ready where the implementation wants them.

    A training step is forward and backward: from x and dy to y, dx, all gradients of weights and biases, and those of
    the initial states, gradients written anew (not added to the last step's).  An inference step is y alone.
    """

    def prepare(self) -> None:
        """Before each sample, untimed: sets the implementation's thread counts and flags.  Or RuntimeError."""

    def step(self, k: int) -> None:
        """One step on input set k, modulo the number of sets.  May return before a device has finished."""
        raise NotImplementedError

    def results(self) -> dict[str, np.ndarray]:
        """Runs one step on input set 0 and returns y (T, N, H) and, in training, the gradients by name, on the host."""
        raise NotImplementedError

    def time(self, steps: int) -> float:
        """Seconds that `steps` steps take, all work on a device included."""
        start = time.perf_counter()
        for k in range(steps):
            self.step(k)
        return time.perf_counter() - start

    def kernels(self) -> list[str]:
        """The kernels that one step runs on a GPU, by the profiler, the longest first; on a CPU none."""
        return []

    def peak_bytes(self) -> int | None:
        """Device memory that a step needs at most beyond weights and input sets; None where nobody tells."""
        return None

    def flags(self) -> list[str]:
        """What a reader of this implementation's times has to know."""
        return []

    def close(self) -> None:
        """Gives back what the workload holds outside Python's own memory."""
