"""The implementations that are compared, as a plain table: where each runs, what it needs, what it cannot do.

Modules of packages that may be missing are imported when a workload is built, so that the table can be read anywhere.
"""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from bench.cases import Case
from bench.peers.workload import Workload
from bench.problem import Problem
from gpurnn import backend
from gpurnn.cells import CELLS
from gpurnn.environment import cpu_threads

OURS = "gpurnn"
COMPILED_STEPS = 2048  # beyond it torch.compile's loop over steps, in Python, is no comparison


class Implementation(NamedTuple):
    """One row of the table.

    build     (problem, phase, part) -> Workload.
    missing   why it cannot be had on this machine, with what would help; None where it can.
    refuses   (case, phase, part) -> why it has no answer to that case; None where it has one.
    device    "cpu" or "cuda".
    default   False: only where it is asked for by name.
    headline  True: by default only cases of rank 0, for it takes long to compile.
    """

    name: str
    device: str
    build: Callable[[Problem, str, str], Workload]
    missing: Callable[[], str | None]
    refuses: Callable[[Case, str, str], str | None]
    default: bool = True
    headline: bool = False

    @property
    def ours(self) -> bool:
        return self.name.startswith(OURS)


def implementations(device: str) -> list[Implementation]:
    """All that could run on the device ("cpu" or "cuda"), ours first."""
    return _on_cuda() if device == "cuda" else _on_cpu()


def cuda_device() -> str | None:
    """The GPU's name where gpurnn or PyTorch can use one; None elsewhere."""
    if backend.name == "cuda":
        return backend.device_name()
    if backend.device_name() is None and importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return None


def _on_cpu() -> list[Implementation]:
    def torch_cpu(threads: int) -> Implementation:
        def build(problem: Problem, phase: str, part: str) -> Workload:
            from bench.peers.torch_nn import TorchLayer, TorchModel

            if part == "model":
                return TorchModel(problem, "cpu", threads)
            return TorchLayer(problem, phase, "cpu", threads)

        return Implementation(f"torch-cpu-{threads}", "cpu", build, _needs("torch"), _dense_float32)

    most = cpu_threads()
    threads = [count for count in sorted({1, 2, most}) if count <= most]
    return [
        _gpurnn("compiled", "cpu", _ours_float32),
        Implementation(f"{OURS}-torch", "cpu", _gpurnn_torch, _needs("torch"), _layer_only(_dense_float32)),
        _gpurnn("numpy", "cpu", _ours_float32, default=False),
        *map(torch_cpu, threads),
        Implementation("numpy-loop", "cpu", _numpy_loop, lambda: None, _dense_float32),
        Implementation("jax-scan", "cpu", _jax_scan, _needs("jax"), _layer_only(_dense_float32)),
        Implementation(
            "torch-compile",
            "cpu",
            _torch_compiled("cpu"),
            _needs("torch"),
            _compiled_loop(_dense_float32),
            default=False,
        ),
    ]


def _on_cuda() -> list[Implementation]:
    def torch_cudnn(problem: Problem, phase: str, part: str) -> Workload:
        from bench.peers.torch_nn import TorchLayer, TorchModel

        return TorchModel(problem, "cuda") if part == "model" else TorchLayer(problem, phase, "cuda")

    def flash(problem: Problem, phase: str, part: str) -> Workload:
        from bench.peers.flashrnn import FlashRNN

        return FlashRNN(problem, phase, part)

    return [
        _gpurnn("resident", "cuda", _on_chip("resident")),
        _gpurnn("persistent", "cuda", _on_chip("persistent")),
        _gpurnn("step", "cuda", _ours),
        _gpurnn("numpy", "cuda", _ours_float32, default=False),
        Implementation("torch-cudnn", "cuda", torch_cudnn, why_no_torch_cuda, _dense),
        Implementation(
            "torch-compile", "cuda", _torch_compiled("cuda"), why_no_torch_cuda, _compiled_loop(_dense), headline=True
        ),
        Implementation("jax-scan", "cuda", _jax_scan, _jax_cuda, _layer_only(_dense), headline=True),
        Implementation("flashrnn", "cuda", flash, _needs("flashrnn"), _flashrnn),
    ]


def _gpurnn(executor: str, device: str, refuses: Any, default: bool = True) -> Implementation:
    def build(problem: Problem, phase: str, part: str) -> Workload:
        from bench.peers.gpurnn_layer import GpurnnLayer, GpurnnModel

        return GpurnnModel(problem, executor) if part == "model" else GpurnnLayer(problem, phase, executor)

    def missing() -> str | None:
        wanted = "cuda" if device == "cuda" else "numpy"
        return None if backend.name == wanted else f"gpurnn's backend is {backend.name}: {backend.reason}"

    return Implementation(f"{OURS}-{executor}", device, build, missing, refuses, default)


def _gpurnn_torch(problem: Problem, phase: str, part: str) -> Workload:
    from bench.peers.gpurnn_torch import GpurnnTorchLayer

    return GpurnnTorchLayer(problem, phase, "cpu", cpu_threads())


def _numpy_loop(problem: Problem, phase: str, part: str) -> Workload:
    from bench.peers.numpy_loop import NumpyLoop
    from bench.peers.numpy_model import NumpyModel

    return NumpyModel(problem) if part == "model" else NumpyLoop(problem, phase)


def _jax_scan(problem: Problem, phase: str, part: str) -> Workload:
    from bench.peers.jax_scan import JaxScan

    return JaxScan(problem, phase)


def _torch_compiled(device: str) -> Callable[[Problem, str, str], Workload]:
    def build(problem: Problem, phase: str, part: str) -> Workload:
        from bench.peers.torch_compiled import TorchCompiled

        return TorchCompiled(problem, phase, device, cpu_threads())

    return build


def _needs(package: str) -> Callable[[], str | None]:
    def missing() -> str | None:
        return None if importlib.util.find_spec(package) else f"{package} is not installed: pip install {package}"

    return missing


def why_no_torch_cuda() -> str | None:
    """Why PyTorch cannot use a GPU here; None where it can."""
    if reason := _needs("torch")():
        return reason
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} finds no usable GPU"


def _jax_cuda() -> str | None:
    if reason := _needs("jax")():
        return reason
    from bench.peers import jax_scan

    return None if jax_scan.on_gpu() else "JAX finds no GPU: pip install 'jax[cuda13]'"


def _ours(case: Case, phase: str, part: str) -> str | None:
    return "it does not run the recurrence apart from the input projection" if part == "recurrence" else None


def _dense(case: Case, phase: str, part: str) -> str | None:
    return _ours(case, phase, part) or ("it has no block-diagonal weight_hh" if case.heads > 1 else None)


def _float32(rule: Any) -> Callable[[Case, str, str], str | None]:
    def refuses(case: Case, phase: str, part: str) -> str | None:
        if case.dtype != "float32":
            return f"it computes in float32, not in {case.dtype}"
        return rule(case, phase, part)

    return refuses


_ours_float32, _dense_float32 = _float32(_ours), _float32(_dense)


def _on_chip(executor: str) -> Any:
    def refuses(case: Case, phase: str, part: str) -> str | None:
        if reason := _ours(case, phase, part):
            return reason
        if backend.name != "cuda":
            return "what fits is known on a GPU only"
        from gpurnn import executors

        cell = CELLS["rnn_tanh" if case.cell == "rnn" else case.cell]
        engine = executors.executor(executor)
        if engine.cycles(cell, case.H, case.N, np.dtype("float32"), case.dtype, case.heads) is not None:
            return None
        where = "one SM" if engine.alone else "the GPU"
        heads = f" in {case.heads} heads" if case.heads > 1 else ""
        return f"weight_hh of {case.cell} with {case.H} units{heads} does not fit {where} in {case.dtype}"

    return refuses


def _layer_only(rule: Any) -> Callable[[Case, str, str], str | None]:
    return lambda case, phase, part: "it has no character model" if part == "model" else rule(case, phase, part)


def _compiled_loop(rule: Any) -> Callable[[Case, str, str], str | None]:
    def refuses(case: Case, phase: str, part: str) -> str | None:
        if case.lengths:
            return "it has no lengths"
        if case.T > COMPILED_STEPS:
            return f"T is above {COMPILED_STEPS}"
        return _layer_only(rule)(case, phase, part)

    return refuses


def _flashrnn(case: Case, phase: str, part: str) -> str | None:
    if part == "model" or case.cell != "lstm":
        return "only its LSTM layer is compared"
    if case.lengths:
        return "it has no lengths"
    return "it computes in float16 and bfloat16" if case.dtype not in ("float16", "bfloat16") else None
