"""Peak memory of a step on the CPU: `python -m bench.memory CASE PHASE IMPLEMENTATION` prints bytes, in a new process.

tracemalloc does not see what torch allocates, so the system is asked: the process's peak resident memory over building
the workload and three steps, less what was resident before, when weights and inputs lay ready and two steps of the same
sizes had loaded the libraries, compiled the loops and started the threads.  Linux only: the peak is reset through
/proc/self/clear_refs.  Weights, gradients, tape, results and scratch of the implementation are in the figure; the input
set is not, unless the implementation copies it.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import subprocess
import sys
from pathlib import Path

from bench.cases import Case, find
from bench.peers import implementations
from bench.problem import make
from gpurnn.cpu.memory import release

STEPS = 3
TIMEOUT = 300  # s


def peak_bytes(case: Case, phase: str, implementation: str) -> int:
    """Measured in a fresh process.  Raises RuntimeError with its message where it fails."""
    command = [sys.executable, "-m", "bench.memory", case.name, phase, implementation]
    root = Path(__file__).resolve().parent.parent
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no peak memory within {TIMEOUT} s") from None
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: Case, phase: str, name: str) -> int:
    """Bytes, in this process: call it once, in a fresh one."""
    chosen = {implementation.name: implementation for implementation in implementations("cpu")}[name]
    part = "model" if case.group == "train" else "layer"
    problem = make(case, sets=1)
    small = chosen.build(problem.first(min(case.T, 2)), phase, part)
    for _ in range(2):
        small.prepare()
        small.step(0)
    small.close()
    del small
    gc.collect()
    _give_back_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak to what is resident now
    before = _status("VmRSS")
    workload = chosen.build(problem, phase, part)
    for _ in range(STEPS):
        workload.prepare()
        workload.step(0)
    return _status("VmHWM") - before


def _give_back_free_memory() -> None:
    """What our executor and the C library keep of freed memory would be used again unseen."""
    release()
    with contextlib.suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(entry: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == entry:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {entry}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of a step, in bytes.")
    for name in ("case", "phase", "implementation"):
        parser.add_argument(name)
    options = parser.parse_args()
    print(json.dumps(measure(find(options.case), options.phase, options.implementation)))


if __name__ == "__main__":
    main()
