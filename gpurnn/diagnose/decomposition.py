"""BPTT term by term: dL_t/dW = sum over k of dL_t/dstate_t . dstate_t/dstate_k . dstate_k/dW, each term by itself.

Term (t, k) is what the loss of step t has to say about the parameters as they were used in step k.  In a stack of
layers the way from t to k leads through all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import listed
from gpurnn.diagnose.subject import (
    Loss,
    at_every_step,
    back_through,
    blocks,
    layer_names,
    output_gradient,
    recurrent_part,
    run_steps,
    step_number,
    undisturbed,
)
from gpurnn.executors import heads
from gpurnn.executors.numpy_loop import Tape
from gpurnn.recurrent import Recurrent
from gpurnn.types import Array


@dataclass(frozen=True, eq=False)
class Decomposition:
    """The terms of a gradient, by parameter (names as in `model.params`).

    steps      (R,) the steps t whose losses were taken apart, ascending.
    norms      {name: (R, T)} Frobenius norm of term (steps[r], k); 0 where the loss does not depend on step k.
    outputs    {name: (R,)} of the head, whose parameters have one term for each t.
    gradients  {name: its shape} the sum of all terms, and the head's, in float64: what backward gives.
    """

    steps: np.ndarray
    norms: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    _term: Callable[[int, int], dict[str, np.ndarray]] = field(repr=False)

    def term(self, t: int, k: int) -> dict[str, np.ndarray]:
        """Term (t, k) itself, {name: the parameter's shape}; costs a backward pass from t, any t of the sequence."""
        return self._term(t, k)


def decompose(
    model: Any,
    x: Any,
    targets: Any = None,
    loss: Loss | None = None,
    *,
    state: Any = None,
    steps: Sequence[int] | None = None,
) -> Decomposition:
    """Takes the gradient of the recurrent parameters apart into its terms (t, k), for any cell.

    model, x, targets, loss, state: as for `gradient_flow`.  The loss is one that sums (or averages) over steps, with
    no term that couples two of them.  steps: the t to look at; None: all.
    Costs R * T / 2 backward steps with as many weight gradients, R = len(steps), taken many at a time; of these only
    norms and sums are kept, `term` computes a term again.  The embedding and trained initial states are left out.
    Raises ValueError with `clip_in_time`: a clipped gradient is no sum of such terms.
    """
    layer = recurrent_part(at_every_step(model))
    if layer.clip_in_time is not None:
        raise ValueError(
            f"clip_in_time: a clipped gradient is no sum of terms, expected None, got {layer.clip_in_time}"
        )
    with undisturbed(model):
        tapes, y = run_steps(model, x, state)
        wanted = range(len(y)) if steps is None else listed("steps", steps, "numbers of steps or None")
        chosen = sorted({step_number(t, len(y)) for t in wanted})
        dy, outputs, gradients = _through_the_head(model, y, targets, loss, chosen)
    terms = _Terms(layer, tapes, dy, "" if model is layer else "recurrent.")
    norms, sums = terms.norms_and_sums(chosen)
    return Decomposition(np.array(chosen), norms, outputs, {**gradients, **sums}, terms.term)


def _through_the_head(
    model: Any, y: Array, targets: Any, loss: Loss | None, chosen: list[int]
) -> tuple[Array, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """dL/dy (T, N, D*H), norms of the head's gradients for each t in `chosen`, and their sums."""
    head = getattr(model, "head", None)
    if head is None:
        return output_gradient(y, targets, loss), {}, {}
    out, backward = head(y)
    dout = output_gradient(out, targets, loss)
    dy = backward(dout)
    norms = {f"head.{name}": np.zeros(len(chosen)) for name in head.params}
    sums = {f"head.{name}": np.zeros(value.shape) for name, value in head.params.items()}
    for r, t in enumerate(chosen):
        head.zero_grad()
        head(y[t : t + 1])[1](dout[t : t + 1])
        for name in head.params:
            gradient = backend.to_numpy(head.grads[name]).astype(np.float64)
            norms[f"head.{name}"][r] = np.linalg.norm(gradient)
            sums[f"head.{name}"] += gradient
    return dy, norms, sums


class _Terms:
    """The terms of all recurrent parameters, for losses whose dL_t/dy_t are the rows of dy (T, N, D*H)."""

    def __init__(self, layer: Recurrent, tapes: list[Tape], dy: Array, prefix: str):
        self.layer, self.tapes, self.dy, self.prefix = layer, tapes, dy, prefix
        self.suffixes = layer_names(layer)

    def norms_and_sums(self, chosen: list[int]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        T, xp = len(self.dy), backend.xp
        shapes = {name: shape for name, shape in self.layer.params.shapes.items() if not name.endswith("_0")}
        norms = {self.prefix + name: np.zeros((len(chosen), T)) for name in shapes}
        sums = {self.prefix + name: xp.zeros(shape) for name, shape in shapes.items()}
        widest = max(int(np.prod(shape)) for shape in shapes.values())
        bytes_each = self.dy.itemsize * max(3 * self.dy.size, widest)
        for part in blocks(range(len(chosen)), bytes_each):

            def visit(at: int, step: tuple, gradients: tuple, part: Any = part) -> None:
                for name, value in self._matrices(at, step, gradients).items():
                    wide = value.astype("float64")
                    squares = (wide * wide).reshape(len(part), -1).sum(1)
                    norms[name][part.start : part.stop, step[0]] = np.sqrt(backend.to_numpy(squares))
                    sums[name] += wide.sum(0)

            self._back([chosen[r] for r in part], visit)
        return norms, {name: backend.to_numpy(value) for name, value in sums.items()}

    def term(self, t: int, k: int) -> dict[str, np.ndarray]:
        t, k = (step_number(step, len(self.dy)) for step in (t, k))
        shapes = self.layer.params.shapes
        found = {self.prefix + name: np.zeros(shape) for name, shape in shapes.items() if not name.endswith("_0")}

        def visit(at: int, step: tuple, gradients: tuple) -> None:
            if step[0] == k:
                for name, value in self._matrices(at, step, gradients).items():
                    found[name] = backend.to_numpy(value[0]).astype(np.float64)

        self._back([t], visit)
        return found

    def _back(self, steps: list[int], visit: Callable[[int, tuple, tuple], None]) -> None:
        """Each of these steps' losses by itself; what lies behind the last of them is spared where nothing looks ahead."""
        until = max(steps) + 1 if self.layer.directions == 1 else len(self.dy)
        dy = backend.xp.zeros((len(steps), until, *self.dy.shape[1:]), self.dy.dtype)
        for r, t in enumerate(steps):
            dy[r, t] = self.dy[t]
        back_through(self.layer, self.tapes, dy, visit)

    def _matrices(self, at: int, step: tuple, gradients: tuple) -> dict[str, Array]:
        """{name: (R, *shape)}: a step's own gradients of the parameters, for each of R losses."""
        dgates_x, dgates_r, dparams = gradients
        t, _, _, before, _ = step
        tape, end = self.tapes[at], "_" + self.suffixes[at]
        found = {"weight_ih": dgates_x.swapaxes(1, 2) @ tape.job.x[t]}
        if tape.job.weights.weight_hh is not None:
            found["weight_hh"] = heads.gradient(dgates_r, before[0], tape.job.weights.weight_hh.shape[1])
        if tape.job.weights.bias_ih is not None:
            found["bias_ih"] = dgates_x.sum(1)
        if tape.job.weights.bias_hh is not None:
            found["bias_hh"] = dgates_r.sum(1)
        found |= {name: value.sum(1) for name, value in zip(tape.job.cell.params, dparams, strict=True)}
        return {self.prefix + name + end: value for name, value in found.items()}
