"""The character model of group `train` in plain NumPy: embedding, layer, head, cross-entropy, clipping, Adam.

In float64 it is that group's reference: the losses and gradient norms of three steps, which are right only where every
part of the step before was.
"""

import numpy as np

from bench.cases import STATES
from bench.peers.numpy_loop import layer, named
from bench.peers.workload import Workload
from bench.problem import CLIP_NORM, LEARNING_RATE, Problem

Arrays = dict[str, np.ndarray]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # of Adam, as in Kingma and Ba 2015


class NumpyModel(Workload):
    """`numpy-loop` in group `train`."""

    def __init__(self, problem: Problem, dtype: str = "float32"):
        self.problem, self.steps = problem, 0
        self.weights = {name: value.astype(dtype) for name, value in problem.weights.items()}
        self.mean, self.square = ({name: np.zeros_like(w) for name, w in self.weights.items()} for _ in range(2))

    def step(self, k: int) -> None:
        problem = self.problem
        self.loss, grads = self._gradients(problem.x[k % len(problem.x)], problem.dy[k % len(problem.x)])
        self.norm = float(np.sqrt(sum(float((grad.astype(np.float64) ** 2).sum()) for grad in grads.values())))
        scale = min(1.0, CLIP_NORM / self.norm)
        self.steps += 1
        for name, weight in self.weights.items():
            grad = grads[name] * scale
            self.mean[name] = BETA1 * self.mean[name] + (1 - BETA1) * grad
            self.square[name] = BETA2 * self.square[name] + (1 - BETA2) * grad**2
            mean, square = self.mean[name] / (1 - BETA1**self.steps), self.square[name] / (1 - BETA2**self.steps)
            weight -= LEARNING_RATE * mean / (np.sqrt(square) + EPSILON)

    def results(self) -> Arrays:
        seen = []
        for _ in range(3):
            self.step(0)
            seen.append((self.loss, self.norm))
        losses, norms = np.array(seen).T
        return {"losses": losses, "norms": norms}

    def _gradients(self, tokens: np.ndarray, targets: np.ndarray) -> tuple[float, Arrays]:
        case, weights = self.problem.case, self.weights
        own = named(
            {name.removeprefix("recurrent."): w for name, w in weights.items() if name.startswith("recurrent.")}
        )
        x = weights["embedding.weight"][tokens]
        zeros = tuple(np.zeros((case.N, case.H), x.dtype) for _ in STATES[case.cell])
        y = layer(case, own, x, zeros, None, None)["y"]
        logits = y @ weights["head.weight"].T + weights["head.bias"]
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        rows = np.arange(targets.size)
        flat = p.reshape(targets.size, -1)
        loss = -float(np.log(flat[rows, targets.reshape(-1)]).mean())
        flat[rows, targets.reshape(-1)] -= 1
        flat /= targets.size
        dy = (flat @ weights["head.weight"]).reshape(y.shape)
        back = layer(case, own, x, zeros, None, dy)
        dembedding = np.zeros_like(weights["embedding.weight"])
        np.add.at(dembedding, tokens.reshape(-1), back["dx"].reshape(targets.size, -1))
        grads = {f"recurrent.{name}_l0": back[f"d{name}"] for name in own}
        head = {"head.weight": flat.T @ y.reshape(targets.size, -1), "head.bias": flat.sum(0)}
        return loss, {"embedding.weight": dembedding, **grads, **head}
