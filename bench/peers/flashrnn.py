"""FlashRNN's fused CUDA kernels (Pöppel, Beck, Hochreiter 2024), LSTM with any number of heads.

FlashRNN computes the recurrence from projected inputs Wx (B, T, G, heads, D).  Part "recurrence" times that alone, with
Wx made beforehand; part "layer" puts a linear layer in front, over inputs that lie batch-first as FlashRNN wants them.
It has one bias, so both of ours are added and only their common gradient can be compared.
"""

import numpy as np
import torch
from flashrnn import flashrnn

from bench.peers.torch_nn import TorchWorkload, host
from bench.problem import Problem


class FlashRNN(TorchWorkload):
    """`flashrnn`"""

    def __init__(self, problem: Problem, phase: str, part: str):
        super().__init__(problem.case, "cuda", None)
        case, self.training, self.part = problem.case, phase == "training", part
        weights = {name.removesuffix("_l0"): self.tensor(value) for name, value in problem.weights.items()}
        D = case.H // case.heads
        self.weight_ih = weights["weight_ih"].requires_grad_(self.training)
        self.R = weights["weight_hh"].view(case.gates, case.heads, D, D).requires_grad_(self.training)
        bias = (weights["bias_ih"].float() + weights["bias_hh"].float()).to(self.R.dtype)
        self.bias = bias.view(case.gates, case.heads, D).requires_grad_(self.training)
        state = np.stack(problem.state).reshape(len(problem.state), case.N, 1, case.heads, D)
        self.state = self.tensor(state).requires_grad_(self.training)
        self.x = [self.tensor(x.swapaxes(0, 1)) for x in problem.x]
        if part == "recurrence":
            with torch.no_grad():
                self.x = [self._projected(x).contiguous() for x in self.x]
        for x in self.x:
            x.requires_grad_(self.training)
        self.dy = [self.tensor(dy.swapaxes(0, 1)) for dy in problem.dy]
        self.all_is_loaded()

    def _projected(self, x: torch.Tensor) -> torch.Tensor:
        case = self.case
        wide = torch.nn.functional.linear(x, self.weight_ih)
        return wide.view(case.N, case.T, case.gates, case.heads, case.H // case.heads)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected = x if self.part == "recurrence" else self._projected(x)
        states, _ = flashrnn(
            projected,
            self.R,
            self.bias,
            states=self.state,
            function=self.case.cell,
            backend="cuda_fused",
            dtype=self.case.dtype,
        )
        return states[0].reshape(self.case.N, self.case.T, self.case.H)

    def step(self, k: int) -> None:
        k %= len(self.x)
        if not self.training:
            with torch.no_grad():
                self.y = self.forward(self.x[k])
            return
        self.y = self.forward(self.x[k])
        weights = (self.R, self.bias) if self.part == "recurrence" else (self.R, self.bias, self.weight_ih)
        self.grads = torch.autograd.grad(self.y, (self.x[k], self.state, *weights), self.dy[k])

    def results(self) -> dict[str, np.ndarray]:
        self.step(0)
        named = {"y": host(self.y).swapaxes(0, 1)}
        if self.training:
            dx, dstate, dR, dbias, *dweight_ih = map(host, self.grads)
            named |= {"dweight_hh": dR.reshape(-1, dR.shape[-1]), "dbias_hh": dbias.reshape(-1)}
            named |= {name: part.reshape(self.case.N, -1) for name, part in zip(("dh_0", "dc_0"), dstate, strict=True)}
            if dweight_ih:
                named |= {"dx": dx.swapaxes(0, 1), "dweight_ih": dweight_ih[0]}
        return named
