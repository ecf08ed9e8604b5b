"""What `python -m bench gpu` consists of: its parts, in order of worth, and what each of them runs.

First whether the GPU's side is right and comes to an end, then how fast it is: the cases of rank 0 of each group, which
hold what a claim would rest on, the tuning of those, and the other ranks as far as time goes.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import cases

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
GROUPS = ("latency", "persistent", "gaps", "lengths", "train", "flashrnn", "deepbench")  # in order of worth
OURS = ("gpurnn-resident", "gpurnn-persistent", "gpurnn-step")
PEER = "torch-cudnn"
ABOUT, RESULTS = "about.json", "results.jsonl"
TESTS = ("tests/gpu/test_gpu.py", "tests/gpu/test_gpu_training.py")
REHEARSED = "(test_nothing_to_do and step-float32) or test_the_choice_and_its_limits"
TEST_PROCESSES = 4  # on one GPU
SECONDS_PER_CASE = 9.0  # both phases, ours and cuDNN, and its share of the start
LEAST = 20.0  # s: with less left a group is not begun

Command = list[str]


class Part(NamedTuple):
    """seconds: that it is thought to take; with fewer than `least` left it is left out.

    commands   one after another; `{budget}` in them becomes the seconds that there are.
    why_not    why it cannot run here; then it is skipped.
    cases      (group, rank) of what it measures, to see what is left of it.
    """

    name: str
    seconds: float
    least: float
    commands: list[Command]
    why_not: str | None = None
    cases: tuple[str, int] | None = None


def about(folder: Path) -> Part:
    return Part("about", 10, 10, [python("-m", "bench.about", str(folder))])


def parts(folder: Path, found: dict[str, Any]) -> list[Part]:
    """found: what `bench.about` wrote."""
    if found["device"] is None:
        return list(_rehearsed(folder))
    return [*_right(folder), *_fast(folder, found["peers"])]


def _right(folder: Path) -> Iterator[Part]:
    smoke = _bench("smoke", "--out", str(folder / "smoke.jsonl"))
    yield Part("smoke", 60, 20, [_bench("build", "--smoke"), smoke])
    yield Part("tests", 150, 40, [_bench("build", "--tests"), _pytest(folder, TEST_PROCESSES)], _needs("pytest"))
    tool = _sanitizer()
    for name in SANITIZERS:
        here = _bench("smoke", "--here", "--case", "small/*")
        # packages ask the driver for functions of newer ones, and what it answers is no error of ours
        command = [tool or "", "--tool", name, "--report-api-errors", "no", "--error-exitcode", "9", *here]
        yield Part(name, 15, 15, [command], None if tool else "compute-sanitizer is not here")


def _fast(folder: Path, no_torch: str | None) -> Iterator[Part]:
    why_not = f"the GPU's peaks and cuDNN are measured with PyTorch, but {no_torch}" if no_torch else None
    for rank in (0, 1, 2):
        for group in GROUPS:
            count = sum(case.rank == rank for case in cases.GROUPS[group])
            if count:
                asked = ["--group", group, "--rank", str(rank)]
                run = _bench("run", "--device", "cuda", *asked, "--budget", "{budget}", "--out", str(folder / RESULTS))
                run += [word for name in (*OURS, PEER) for word in ("--only", name)]
                seconds = SECONDS_PER_CASE * count / (1 if rank == 0 else 20)  # what is left goes to the other ranks
                yield Part(f"{group}-{rank}", seconds, LEAST, [_bench("build", *asked), run], why_not, (group, rank))
        if rank == 0:
            asked = ["--group", "latency", "--group", "persistent", "--group", "gaps", "--rank", "0"]
            yield Part("tune", 40, LEAST, [_bench("build", "--tune", *asked), _bench("tune", *asked)])


def _rehearsed(folder: Path) -> Iterator[Part]:
    """Without a GPU: the same on the tests' stand-in and interpreter, as small as can be; nothing is measured."""
    build = _bench("build", "--smoke", "--case", "small/rnn/step/float32", "--gpu", "h200", "--jobs", "1")
    yield Part("smoke", 60, 10, [build, _bench("smoke", "--limit", "200", "--out", str(folder / "smoke.jsonl"))])
    missing = _needs("pytest") or (None if (ROOT / "tests/stand_in.py").exists() else "tests/stand_in.py is not there")
    yield Part("tests", 60, 10, [_pytest(folder, 1, "-p", "tests.stand_in", "-k", REHEARSED)], missing)
    for name in (*SANITIZERS, "tune"):
        yield Part(name, 1, 1, [], "there is no GPU")
    rehearsal = python("-m", "bench.rehearsal", str(folder / RESULTS))
    yield Part("groups", 30, 10, [rehearsal])


def python(*arguments: str) -> Command:
    return [sys.executable, *arguments]


def _bench(*arguments: str) -> Command:
    return python("-m", "bench", *arguments)


def _pytest(folder: Path, processes: int, *arguments: str) -> Command:
    """With what is installed; -v so that each test's outcome stands in the log as soon as it is known."""
    command = python("-m", "pytest", "-o", "addopts=--import-mode=importlib", "-p", "no:benchmark", "-m", "gpu", "-v")
    command += ["--tb=short", "-rf", f"--junitxml={folder / 'tests.xml'}"]
    if processes > 1 and not _needs("xdist"):
        command += ["-n", str(processes), "--dist", "worksteal"]
    if not _needs("pytest_timeout"):
        command += ["--timeout", "120"]
    return [*command, *arguments, *TESTS]


def _needs(package: str) -> str | None:
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _sanitizer() -> str | None:
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    inside = [os.path.join(place, "bin") for place in places if place]
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=os.pathsep.join(inside))
