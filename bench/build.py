"""`python -m bench build`: builds the kernels that cases will use into the cache, with a process for each CPU.

Neither a GPU nor its driver is needed, only the kernels' tools, which come with the `test` extra.  What a case's
kernels are is found by doing its work dry (`bench.dry`), a phase and an executor at a time, each in one process.
"""

import argparse
import contextlib
import functools
import importlib.util
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple
from unittest.mock import patch

from bench import cases, dry, model
from bench.dry import Target
from bench.gpu_parts import ROOT, TESTS
from bench.peers import implementations
from bench.problem import make
from gpurnn import backend
from gpurnn.backend import one_line
from gpurnn.environment import cpu_threads

STEPS = 2  # of a case that is done dry: its kernels do not depend on how many there are


class Work(NamedTuple):
    """Something to be done dry: `what` in `_DO`, and its arguments; numbers and names, to be sent to a process."""

    what: str
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return " ".join(map(str, (self.what, *self.arguments)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--group", action="append", choices=list(cases.GROUPS), help="cases of this group; may be given again")
    add("--case", metavar="PATTERN", help="cases of such names, * and ? as in a shell")
    add("--precision", choices=cases.DTYPES, help="cases of this precision only")
    add("--rank", type=int, metavar="N", help="cases up to that rank, see `bench run`")
    add("--tune", action="store_true", help="the candidates that `bench tune` measures for these cases, instead")
    add("--smoke", action="store_true", help="what `bench smoke` needs, instead")
    add("--tests", action="store_true", help="what `pytest -m gpu` needs, instead")
    add("--gpu", choices=sorted(model.GPUS), help="for that chip (default: the GPU at hand)")
    add("--jobs", type=int, metavar="N", help="processes (default: one for each CPU)")


def main(options: argparse.Namespace) -> int:
    """Builds; 0 where all is there, 1 where something failed.  ValueError for options that make no sense."""
    target, jobs = _target(options.gpu), cpu_threads() if options.jobs is None else options.jobs
    if jobs < 1:
        raise ValueError(f"--jobs: expected a number from 1, got {jobs}")
    print(f"kernels for {target.name or options.gpu}, {jobs} at a time, into {dry.folder()}", flush=True)
    if options.tests:
        return _tests(target, jobs, options.case)
    return everything(_chosen(options), target, jobs)


def _chosen(options: argparse.Namespace) -> list[Work]:
    if options.smoke:
        from bench import smoke

        return [Work("smoke", (case.name,)) for case in smoke.select(options.case)]
    found = cases.select(options.group, options.case, "cuda", rank=options.rank)
    names = [case.name for case in found if options.precision in (None, case.dtype)]
    if not names:
        raise ValueError(f"no case of those computes in {options.precision}")
    if options.tune:
        return [
            Work("tune", (name, alone, back)) for name in names for alone in (False, True) for back in (False, True)
        ]
    ours = [implementation.name for implementation in implementations("cuda") if implementation.ours]
    phases = {name: cases.find(name).phases for name in names}
    return [Work("case", (name, phase, who)) for name in names for phase in phases[name] for who in ours]


def everything(chosen: list[Work], target: Target, jobs: int) -> int:
    """Builds what all of that work needs; prints what was built and what failed; returns 1 where something failed."""
    began, asked, failures = time.monotonic(), set(), 0
    built: set[str] = set()
    for work, result in _done(chosen, target, jobs):
        try:
            wanted, new = result()
        except Exception as error:  # of one kernel: the others go on
            failures += 1
            print(f"{work.name} FAILED: {type(error).__name__}: {one_line(error)}", flush=True)
            continue
        asked |= wanted
        if new - built:
            print(f"{work.name}: {len(new - built)} built", flush=True)
        built |= new
    failed = f", {failures} of {len(chosen)} failed" if failures else ""
    print(f"{len(asked)} kernels, {len(built)} of them new, in {time.monotonic() - began:.0f} s{failed}")
    return 1 if failures else 0


def _done(chosen: list[Work], target: Target, jobs: int) -> Iterator[tuple[Work, Callable[[], tuple[set, set]]]]:
    """Each work as it is done, and what gives its result."""
    if jobs == 1:
        yield from ((work, functools.partial(_kernels_of, target, work)) for work in chosen)
        return
    with _without_gpu(), ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        waiting: dict[Future, Work] = {pool.submit(_kernels_of, target, work): work for work in chosen}
        for future in as_completed(waiting):
            yield waiting[future], future.result


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """For the processes started within: they look for no device, and stay with one CPU each."""
    environment = {"GPURNN_BACKEND": "numpy", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    with patch.dict(os.environ, environment):
        yield


def _kernels_of(target: Target, work: Work) -> tuple[set[str], set[str]]:
    """Names of the kernels that the work asks for, and of those built for it."""
    with dry.dry(target) as kernels:
        _DO[work.what](*work.arguments)
    return {path.name for path in kernels.asked}, {path.name for path in kernels.built}


def _case(name: str, phase: str, who: str) -> None:
    case = cases.find(name)
    (implementation,) = (each for each in implementations("cuda") if each.name == who)
    part = "model" if case.group == "train" else "layer"
    if implementation.refuses(case, phase, part) is None:
        problem = make(replace(case, T=min(case.T, STEPS)), sets=1)
        workload = implementation.build(problem, phase, part)
        workload.step(0)
        workload.close()


def _tune(name: str, alone: bool, transposed: bool) -> None:
    from bench.tune import question
    from gpurnn.cuda import device, tuning

    asked = question(cases.find(name), alone, transposed)
    if asked is not None and tuning.choices(asked, device.chip()):
        tuning.tune(asked, device.chip())


def _smoke(name: str) -> None:
    from bench import smoke

    with contextlib.suppress(smoke.DoesNotFit):
        smoke.on_device(smoke.find(name))


_DO: dict[str, Callable[..., None]] = {"case": _case, "tune": _tune, "smoke": _smoke}


def _tests(target: Target, jobs: int, pattern: str | None) -> int:
    """Runs `pytest -m gpu` dry: its tests ask for their kernels, and what they find is of no interest.

    Where pytest-xdist is not installed, one process does it all.
    """
    command = [sys.executable, "-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "bench.dry_tests"]
    command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "gpu", "-q", "--assert=plain", "--no-header"]
    command += ["--tb=no", "-r", "N", "-W", "ignore", *TESTS]
    command += ["-n", str(jobs), "--dist", "worksteal"] if jobs > 1 and importlib.util.find_spec("xdist") else []
    command += ["-k", pattern] if pattern else []
    with _without_gpu(), tempfile.TemporaryDirectory() as compiled:
        chip = json.dumps([target.chip, target.name])
        os.environ |= {"GPURNN_DRY_TESTS": chip, "PYTHONPYCACHEPREFIX": compiled}
        done = subprocess.run(command, cwd=ROOT).returncode
    return 0 if done in (0, 1) else 1  # 1: a test failed, as it may


def _target(name: str | None) -> Target:
    if name is not None:
        return Target(model.GPUS[name].chip)
    if backend.name != "cuda":
        raise ValueError(
            f"--gpu: expected one of {', '.join(sorted(model.GPUS))}, for there is no GPU: {backend.reason}"
        )
    from gpurnn.cuda import device

    return Target(device.chip(), backend.device_name() or "")
