"""`python -m bench profile CASE`: where the time of one case goes, by phases on a CPU, by kernels on a GPU.

On a CPU it is our compiled executor that is looked into (see `profile_cpu`).  On a GPU every implementation that can be
had is run under PyTorch's profiler, which records whatever runs in the process's CUDA context, CuPy's kernels included.
"""

import argparse
from collections.abc import Callable
from contextlib import closing

from bench import cases, profile_cpu
from bench.cases import Case
from bench.peers import cuda_device, implementations
from bench.problem import Problem, make

STEPS = 3  # on a GPU, profiled together
MOST_KERNELS = 15
NAME = 70  # characters of a kernel's name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("case", help="a case by name, such as cpu/lstm/T100-N32-I128-H256-float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where a GPU is usable")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="on a CPU, time to spend in each table (%(default)s)"
    )


def main(options: argparse.Namespace) -> int:
    """Prints the tables.  Raises ValueError where the case or the device cannot be had."""
    case = cases.find(options.case)
    gpu = cuda_device()
    if options.device == "cuda" and gpu is None:
        raise ValueError("device: expected a GPU that gpurnn or PyTorch can use, found none (`gpurnn info` says why)")
    print(case.name)
    if (options.device or ("cuda" if gpu else "cpu")) == "cuda":
        print(gpu)
        _on_cuda(case)
    else:
        print(profile_cpu.tables(case, options.seconds))
    return 0


def _on_cuda(case: Case) -> None:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise ValueError("profiling on a GPU needs PyTorch's profiler: pip install torch") from None
    problem = make(case)
    part = "model" if case.group == "train" else "layer"
    for phase in case.phases:
        for implementation in implementations("cuda"):
            title = f"\n{phase}, {implementation.name}"
            if reason := implementation.missing() or implementation.refuses(case, phase, part):
                print(f"{title}: left out: {reason}")
            else:
                print(f"{title}\n{_kernels(implementation.build, problem, phase, part)}")


def _kernels(build: Callable, problem: Problem, phase: str, part: str) -> str:
    """A table of the kernels of a step: calls, us, share of the device's busy time; and what the host saw."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with closing(build(problem, phase, part)) as workload:
        workload.prepare()
        workload.time(2)
        wall = workload.time(STEPS) / STEPS
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            workload.time(STEPS)
        spent: dict[str, list[float]] = {}
        for event in profiler.events() or ():
            if str(event.device_type) == "DeviceType.CUDA":
                spent.setdefault(event.name, []).append(event.device_time)
    torch.cuda.synchronize()
    if not spent:
        return f"  {1e6 * wall:.0f} us a step; the profiler saw no kernel (CUPTI may be missing or not permitted)"
    return kernel_table(spent, wall)


def kernel_table(spent: dict[str, list[float]], wall: float) -> str:
    """spent: us of every launch by kernel, over STEPS steps.  wall: seconds of a step without the profiler."""
    busy = sum(map(sum, spent.values()))
    ranked = sorted(spent.items(), key=lambda item: -sum(item[1]))
    lines = [f"  {'kernel':<{NAME}} {'calls':>8} {'us':>10} {'share':>7}"]
    for name, times in ranked[:MOST_KERNELS]:
        calls, us = len(times) / STEPS, sum(times) / STEPS
        lines.append(f"  {name[:NAME]:<{NAME}} {calls:>8.1f} {us:>10.1f} {sum(times) / busy:>7.1%}")
    if others := ranked[MOST_KERNELS:]:
        us = sum(sum(times) for _, times in others)
        calls = sum(len(times) for _, times in others) / STEPS
        lines.append(f"  {f'{len(others)} others':<{NAME}} {calls:>8.1f} {us / STEPS:>10.1f} {us / busy:>7.1%}")
    lines.append(f"  a step takes {1e6 * wall:.1f} us; kernels, {busy / STEPS:.1f} us, may overlap or leave gaps")
    return "\n".join(lines)
