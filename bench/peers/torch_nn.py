"""torch.nn.RNN, GRU and LSTM: oneDNN and MKL on the CPU with a given number of threads, cuDNN on an NVIDIA GPU.

Uneven lengths go through PackedSequence, packing and unpacking included, for ours takes and gives padded arrays too.
What PyTorch decides by flags is set before each sample: TF32 by the case's dtype, cudnn.benchmark off (its recurrent
kernels are chosen by rules, not by trial).
"""

from typing import Any, ClassVar

import numpy as np
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bench.cases import STATES, Case
from bench.peers.workload import Workload
from bench.problem import CLIP_NORM, LEARNING_RATE, Problem

LAYERS = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_KERNELS = 12
KERNEL_NAME = 100  # characters: templates run to thousands


class TorchWorkload(Workload):
    """Devices, flags, clocks and profiler: what all implementations on PyTorch share."""

    def __init__(self, case: Case, device: str, threads: int | None):
        self.case, self.device, self.threads = case, device, threads
        self.memory_before = 0

    def all_is_loaded(self) -> None:
        """To be called when weights and input sets are in place: from here on memory counts as the step's."""
        if self.device == "cuda":
            self.memory_before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    def prepare(self) -> None:
        if self.device == "cuda":
            set_tf32(self.case.dtype == "tf32")
            torch.backends.cudnn.benchmark = False
            return
        torch.set_num_threads(self.threads or 1)
        if torch.get_num_threads() != self.threads:
            raise RuntimeError(f"torch's threads: expected {self.threads}, got {torch.get_num_threads()}")

    def time(self, steps: int) -> float:
        if self.device != "cuda":
            return super().time(steps)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for k in range(steps):
            self.step(k)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000

    def kernels(self) -> list[str]:
        if self.device != "cuda":
            return []
        from torch.profiler import ProfilerActivity, profile

        self.step(0)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.step(0)
            torch.cuda.synchronize()
        spent: dict[str, list[float]] = {}
        for event in profiler.events():
            if event.device_type.name == "CUDA":
                spent.setdefault(event.name, []).append(event.device_time)
        longest = sorted(spent.items(), key=lambda item: -sum(item[1]))[:MOST_KERNELS]
        return [f"{len(times)} x {name[:KERNEL_NAME]} ({sum(times):.0f} us)" for name, times in longest]

    def peak_bytes(self) -> int | None:
        return torch.cuda.max_memory_allocated() - self.memory_before if self.device == "cuda" else None

    def close(self) -> None:
        vars(self).clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def tensor(self, array: np.ndarray) -> torch.Tensor:
        """On the device in the case's dtype; on the CPU in float32 it shares the array's memory."""
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, DTYPES[self.case.dtype])


class TorchLayer(TorchWorkload):
    """`torch-cpu-<threads>` and `torch-cudnn`."""

    layers: ClassVar[dict[str, type[torch.nn.RNNBase]]] = LAYERS

    def __init__(self, problem: Problem, phase: str, device: str, threads: int | None = None):
        super().__init__(problem.case, device, threads)
        self.training = phase == "training"
        self.lengths = None if problem.lengths is None else torch.from_numpy(problem.lengths)
        self.x = [self.input(x).requires_grad_(self.training) for x in problem.x]
        self.dy = [self.input(dy) for dy in problem.dy]
        self.state = [self.initial(part).requires_grad_(self.training) for part in problem.state]
        self.params = self.load({name: self.tensor(value) for name, value in problem.weights.items()})
        self.y: torch.Tensor | None = None
        self.grads: tuple[torch.Tensor, ...] = ()
        self.all_is_loaded()

    def input(self, array: np.ndarray) -> torch.Tensor:
        return self.tensor(array)

    def initial(self, part: np.ndarray) -> torch.Tensor:
        return self.tensor(part[None])

    def load(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Takes the weights; returns what gradients are wanted of, by name."""
        case = self.case
        module = self.layers[case.cell](case.I, case.H).to(self.device, DTYPES[case.dtype])
        module.load_state_dict(weights)
        self.module = module.train(self.training)
        return dict(module.named_parameters())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state = tuple(self.state) if len(self.state) > 1 else self.state[0]
        if self.lengths is None:
            return self.module(x, state)[0]
        packed = pack_padded_sequence(x, self.lengths, enforce_sorted=False)
        return pad_packed_sequence(self.module(packed, state)[0], total_length=self.case.T)[0]

    def step(self, k: int) -> None:
        k %= len(self.x)
        self.y, self.grads = None, ()
        if not self.training:
            with torch.inference_mode():
                self.y = self.forward(self.x[k])
            return
        self.y = self.forward(self.x[k])
        wanted = (self.x[k], *self.state, *self.params.values())
        self.grads = torch.autograd.grad(self.y, wanted, self.dy[k])

    def results(self) -> dict[str, np.ndarray]:
        self.prepare()
        self.step(0)
        assert self.y is not None
        names = ["dx", *(f"d{name}" for name in STATES[self.case.cell])]
        names += [f"d{name.removesuffix('_l0')}" for name in self.params]
        grads = dict(zip(names, self.grads, strict=True)) if self.training else {}
        named = {name: host(tensor) for name, tensor in {"y": self.y, **grads}.items()}
        rows = self.case.N
        return named | {name: named[name].reshape(rows, -1) for name in named if name in ("dh_0", "dc_0")}


class TorchModel(TorchWorkload):
    """The character model of group `train`: one full step with torch's own loss, clipping and fused Adam."""

    def __init__(self, problem: Problem, device: str, threads: int | None = None):
        super().__init__(problem.case, device, threads)
        case, weights = problem.case, problem.weights
        symbols = len(weights["head.bias"])
        self.model = torch.nn.ModuleDict(
            {
                "embedding": torch.nn.Embedding(symbols, case.I),
                "recurrent": LAYERS[case.cell](case.I, case.H),
                "head": torch.nn.Linear(case.H, symbols),
            }
        ).to(device, DTYPES[case.dtype])
        self.model.load_state_dict({name: self.tensor(value) for name, value in weights.items()})
        self.x, self.targets = ([torch.from_numpy(a).to(device) for a in arrays] for arrays in (problem.x, problem.dy))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.loss = self.norm = torch.zeros(())
        self.all_is_loaded()

    def step(self, k: int) -> None:
        x, targets = self.x[k % len(self.x)], self.targets[k % len(self.x)]
        self.optimizer.zero_grad()
        y, _ = self.model["recurrent"](self.model["embedding"](x))
        self.loss = torch.nn.functional.cross_entropy(self.model["head"](y).flatten(0, 1), targets.flatten())
        self.loss.backward()
        self.norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()

    def results(self) -> dict[str, np.ndarray]:
        self.prepare()
        seen = []
        for _ in range(3):
            self.step(0)
            seen.append((self.loss.item(), self.norm.item()))
        losses, norms = np.array(seen).T
        return {"losses": losses, "norms": norms}


def host(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().float().numpy()


def set_tf32(allowed: bool) -> None:
    """For cuBLAS and for cuDNN's recurrent layers; by the per-operator setting where PyTorch has it (from 2.9)."""
    recurrent: Any = getattr(torch.backends.cudnn, "rnn", None)
    if hasattr(recurrent, "fp32_precision"):
        torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
        recurrent.fp32_precision = "tf32" if allowed else "ieee"
    else:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
