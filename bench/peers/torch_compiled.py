"""torch.compile: the step of a cell compiled and fused by Inductor, called from a Python loop over time.

This is how a cell that cuDNN does not know is made fast in PyTorch.  Compiling the whole loop would unroll it, which
takes minutes at a few hundred steps; nn.LSTM itself is left to cuDNN by the compiler, which `torch-cudnn` measures.
"""

import torch

from bench.peers.torch_nn import TorchLayer


class TorchCompiled(TorchLayer):
    """`torch-compile`"""

    def load(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.compiler.reset()  # so that one case's shapes do not make the next one's dynamic
        self.cell = torch.compile(_STEPS[self.case.cell], dynamic=False)
        return {name: value.requires_grad_(self.training) for name, value in weights.items()}

    def initial(self, part):
        return self.tensor(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight_ih, weight_hh, bias_ih, bias_hh = self.params.values()
        projected = torch.nn.functional.linear(x, weight_ih, bias_ih)
        state, outputs, back = tuple(self.state), [], weight_hh.t()
        for x_t in projected.unbind(0):
            state = self.cell(x_t, state, back, bias_hh)
            outputs.append(state[0])
        return torch.stack(outputs)


def _rnn(x, state, back, bias):
    return (torch.tanh(x + torch.addmm(bias, state[0], back)),)


def _lstm(x, state, back, bias):
    i, f, g, o = (x + torch.addmm(bias, state[0], back)).chunk(4, 1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(x, state, back, bias):
    (x_r, x_z, x_n), (r_r, r_z, r_n) = x.chunk(3, 1), torch.addmm(bias, state[0], back).chunk(3, 1)
    z = torch.sigmoid(x_z + r_z)
    n = torch.tanh(x_n + torch.sigmoid(x_r + r_r) * r_n)
    return (n + z * (state[0] - n),)


_STEPS = {"rnn": _rnn, "lstm": _lstm, "gru": _gru}
