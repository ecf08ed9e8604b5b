"""Ours: a layer of gpurnn, or the whole character model, with the executor named, on the backend gpurnn has chosen.

A case's dtype asks for that precision of the matrix products; what goes in and comes out is float32.
"""

import time
from typing import Any

import numpy as np

import gpurnn
from bench.peers.workload import Workload
from bench.problem import CLIP_NORM, LEARNING_RATE, Problem
from gpurnn import backend

Array = Any

LAYERS = {"rnn": gpurnn.RNN, "gru": gpurnn.GRU, "lstm": gpurnn.LSTM}


class GpurnnWorkload(Workload):
    def time(self, steps: int) -> float:
        backend.synchronize()
        start = time.perf_counter()
        for k in range(steps):
            self.step(k)
        backend.synchronize()  # the device's work is in the time, and one wait for it
        spent = time.perf_counter() - start
        gpurnn.synchronize()  # what went wrong is told here and not in cases to come, whose kernels would run empty
        return spent

    def close(self) -> None:
        vars(self).clear()
        if backend.name == "cuda":  # CuPy would keep the memory, and the next implementation may want it
            backend.xp.get_default_memory_pool().free_all_blocks()


class GpurnnLayer(GpurnnWorkload):
    """`gpurnn-<executor>`"""

    def __init__(self, problem: Problem, phase: str, executor: str):
        case = problem.case
        self.layer = LAYERS[case.cell](case.I, case.H, heads=case.heads, executor=executor, precision=case.dtype)
        self.layer.load_state_dict(problem.weights)
        self.training, self.lengths = phase == "training", problem.lengths
        self.x = [backend.asarray(x, "float32", "x") for x in problem.x]
        self.dy = [backend.asarray(dy, "float32", "dy") for dy in problem.dy]
        parts = tuple(backend.asarray(part[None], "float32", "state") for part in problem.state)
        self.state = parts if len(parts) > 1 else parts[0]

    def step(self, k: int) -> None:
        k %= len(self.x)
        self.y = self.dx = self.dstate = None  # the last step's results need not lie beside this one's
        if not self.training:
            self.y, _, _ = self.layer(self.x[k], self.state, lengths=self.lengths, training=False)
            return
        self.layer.zero_grad()
        self.y, _, backward = self.layer(self.x[k], self.state, lengths=self.lengths)
        assert backward is not None
        self.dx, self.dstate = backward(self.dy[k])

    def results(self) -> dict[str, np.ndarray]:
        self.step(0)
        gpurnn.synchronize()
        named = {"y": self.y}
        if self.training:
            dstates = self.dstate if isinstance(self.dstate, tuple) else (self.dstate,)
            states = zip(self.layer.cell.state_names, dstates, strict=True)
            named |= {"dx": self.dx, **{f"d{name}_0": part[0] for name, part in states}}
            named |= {f"d{name.removesuffix('_l0')}": grad for name, grad in self.layer.grads.items()}
        return {name: backend.to_numpy(array) for name, array in named.items()}


class GpurnnModel(GpurnnWorkload):
    """The character model of group `train`: one full step, on CUDA one graph, as `gpurnn train` runs it."""

    def __init__(self, problem: Problem, executor: str):
        case = problem.case
        symbols = len(problem.weights["head.bias"])
        recurrent = LAYERS[case.cell](case.I, case.H, executor=executor, precision=case.dtype)
        self.model = gpurnn.SequenceModel(gpurnn.Embedding(symbols, case.I), recurrent, gpurnn.Linear(case.H, symbols))
        self.model.load_state_dict(problem.weights)
        self.x, self.targets = (
            [backend.asarray(a, None, "tokens") for a in arrays] for arrays in (problem.x, problem.dy)
        )
        self.optimizer = gpurnn.Adam(self.model, lr=LEARNING_RATE)
        self.captured = gpurnn.captured(self.whole)

    def whole(self, x: Array, targets: Array) -> tuple[Array, Array]:
        self.model.zero_grad()
        logits, _, backward = self.model(x)
        assert backward is not None
        loss, dlogits = gpurnn.softmax_cross_entropy(logits, targets)
        backward(dlogits)
        norm = gpurnn.clip_grad_norm(self.model, CLIP_NORM)
        self.optimizer.step()
        return loss, norm

    def step(self, k: int) -> None:
        k %= len(self.x)
        self.loss, self.norm = self.captured(self.x[k], self.targets[k])

    def flags(self) -> list[str]:
        return ["not captured"] if backend.name == "cuda" and self.captured.reason else []

    def results(self) -> dict[str, np.ndarray]:
        seen = []
        for _ in range(3):
            self.step(0)
            seen.append((float(self.loss), float(self.norm)))
        losses, norms = np.array(seen).T
        return {"losses": losses, "norms": norms}
