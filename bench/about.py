"""`python -m bench.about FOLDER`: what machine this is, printed, and what later parts have to know, in the folder."""

import datetime
import json
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from bench import results
from bench.gpu_parts import ABOUT
from bench.peers import why_no_torch_cuda
from gpurnn import backend, environment
from gpurnn.kernels.build import TOOLS

PACKAGES = (*TOOLS, "cuda-bindings", "cuda-pathfinder", "numpy", "torch", "pytest", "pytest-xdist", "pytest-timeout")
QUESTIONS = ("nvidia-smi", "nvcc --version", "compute-sanitizer --version")


def main(folder: Path) -> None:
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    about: dict[str, Any] = {
        "date": now,
        "commit": results.commit(),
        "reason": backend.reason,
        "device": None,
        "chip": None,
    }
    about["peers"] = why_no_torch_cuda()
    if backend.name == "cuda":
        from gpurnn.cuda import device

        about |= {"device": backend.device_name(), "chip": device.chip()}
    (folder / ABOUT).write_text(json.dumps(about))
    print(environment.report())
    print(" ".join(f"{name}={_version(name)}" for name in dict.fromkeys(PACKAGES)))
    for question in QUESTIONS:
        print(f"-- {question}\n{_answer(question.split())}", flush=True)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "-"


def _answer(question: list[str]) -> str:
    if shutil.which(question[0]) is None:
        return "not on the path"
    try:
        return subprocess.run(question, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"no answer: {error}"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
