"""`python -m bench gpu`: all that a GPU should show, in so many minutes, by one command.

Is it right, does it hang, what do the tests and the sanitizers say, how fast is it beside cuDNN, beside the floor and
beside what the plan predicted.  Each part (`bench.gpu_parts`) runs in a process of its own, with a time limit at which
it is killed with all that it started; what it prints stands in FOLDER/<part>.log as it comes, what it measures in
FOLDER/results.jsonl, lines as `bench run` writes them, what became of it in FOLDER/parts.jsonl, and all of that in
short in FOLDER/summary.md.  This process never touches the GPU.

Time is shared out by what each part is thought to take; what one leaves over goes to the others, and a part for which
too little is left is named as left out.  `--resume FOLDER` goes on with what was stopped or left out.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from bench import cases, gpu_parts, results
from bench.gpu_parts import Command, Part
from bench.watched import kill_group

STATES = "parts.jsonl"
OVERTIME = 1.5  # times its share that a part may take before it is killed
FIRST_LOOK = 60.0  # s for the machine to be looked at
SUMMARY = 60.0  # s for the summary at most
ENDING = 10.0  # s kept for the summary, and for a group to end in before its limit
TOOLKIT = "/usr/local/cuda"
BROKEN = 3  # `bench run`: the device stopped working, the same command goes on behind the case
SETTLED = ("ok", "failed", "skipped")  # not run again by --resume


class State(NamedTuple):
    """What became of a part: ok, failed, stopped (at its limit, or with cases left), left out or skipped; and why."""

    part: str
    state: str
    seconds: float
    why: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--minutes", type=float, default=9.0, help="for all of it (default: %(default)s)")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", type=Path, metavar="FOLDER", help="where results go: a new folder")
    where.add_argument("--resume", type=Path, metavar="FOLDER", help="go on with what was stopped or left out there")
    add("--part", action="append", metavar="NAME", help="only that part, though it had its turn; may be given again")


def main(options: argparse.Namespace) -> int:
    """Runs; 0 where all that ran was right, 1 where something was not.  ValueError for options that make no sense."""
    if not 0 < options.minutes < math.inf:
        raise ValueError(f"--minutes: expected a time above 0, got {options.minutes:g}")
    run = Run(_folder(options), time.monotonic() + 60 * options.minutes)
    if run.part(gpu_parts.about(run.folder), FIRST_LOOK).state != "ok":
        print(f"this machine could not be looked at: see {run.folder / 'about.log'}")
        return 1
    found = json.loads((run.folder / gpu_parts.ABOUT).read_text())
    print(found["device"] or f"no GPU: stand-in, nothing is measured ({found['reason']})", flush=True)
    if found["device"]:
        run.environment["GPURNN_BACKEND"] = "cuda"  # where that is lost on the way, it is an error and no surprise
    chosen = _chosen(gpu_parts.parts(run.folder, found), options.part, run.states)
    for place, part in enumerate(chosen):
        run.part(part, run.share(part, chosen[place:]))
    print(_summary(run.folder))
    return 1 if any(state.state == "failed" for state in run.states.values()) else 0


def _folder(options: argparse.Namespace) -> Path:
    folder = options.out or options.resume
    begun = (folder / STATES).exists()
    if options.out and begun:
        raise ValueError(f"--out: {folder} holds such results already: --resume {folder} goes on with them")
    if options.resume and not begun:
        raise ValueError(f"--resume: {folder} holds no {STATES}: expected a folder that --out filled")
    folder.mkdir(parents=True, exist_ok=True)
    return folder.resolve()


def _chosen(parts: list[Part], names: list[str] | None, states: dict[str, State]) -> list[Part]:
    """The parts asked for by name, or those that are not settled yet."""
    for name in names or ():
        if name not in (known := [part.name for part in parts]):
            raise ValueError(f"--part: expected one of {', '.join(known)}, got {name!r}")
    if names:
        return [part for part in parts if part.name in names]
    return [part for part in parts if part.name not in states or states[part.name].state not in SETTLED]


def read(folder: Path) -> dict[str, State]:
    """What became of each part the last time, in the order in which they first ran."""
    path = folder / STATES
    lines = path.read_text().splitlines() if path.exists() else []
    return {state.part: state for state in (State(*json.loads(line)) for line in lines)}


class Run:
    """One call of the command, until `deadline` (of time.monotonic); `states` of its parts and of those before."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline, self.states = folder, deadline, read(folder)
        self.environment = os.environ | {"PYTHONUNBUFFERED": "1"}  # what is killed has said all it had to say
        if "CUDA_HOME" not in os.environ and os.path.isdir(TOOLKIT):
            self.environment["CUDA_HOME"] = TOOLKIT

    def left(self) -> float:
        return self.deadline - ENDING - time.monotonic()

    def share(self, part: Part, coming: list[Part]) -> float:
        """Seconds of what is left, by what this part and those that come are thought to take."""
        weights = [other.seconds for other in coming if other.why_not is None]
        return max(part.least, self.left() * part.seconds / max(sum(weights), part.seconds))

    def part(self, part: Part, share: float) -> State:
        """Runs it in its share of the time, keeps and prints what became of it."""
        began = time.monotonic()
        state, why = self._outcome(part, share)
        kept = State(part.name, state, round(time.monotonic() - began, 1), why)
        self.states[part.name] = kept
        with open(self.folder / STATES, "a") as file:
            file.write(json.dumps(kept) + "\n")
        print(f"{kept.part:14s} {kept.state:8s} {kept.seconds:6.1f} s  {kept.why}", flush=True)
        return kept

    def _outcome(self, part: Part, share: float) -> tuple[str, str]:
        if part.why_not is not None:
            return "skipped", part.why_not
        if self.left() < part.least:
            return "left out", f"{max(0.0, self.left()):.0f} s are left, it takes {part.least:.0f} s at least"
        allowed = min(self.left(), OVERTIME * share)
        began, log, failed = time.monotonic(), self.folder / f"{part.name}.log", ""

        def executed(command: Command) -> int | None:
            spent = time.monotonic() - began
            budget = f"{max(1.0, min(share, allowed) - ENDING - spent):.0f}"
            ready = [word.replace("{budget}", budget) for word in command]
            return execute(ready, log, allowed - spent, self.environment)

        for command in part.commands:
            while (code := executed(command)) == BROKEN:
                pass  # it goes on behind the case that broke the device
            if code is None:
                return "stopped", f"killed after {allowed:.0f} s: {_last_line(log)}"
            if code:
                failed = f"exit status {code}: {_last_line(log)}"
        if part.cases and (unmeasured := _unmeasured(part.cases, self.folder / gpu_parts.RESULTS)):
            return "stopped", "; ".join([f"{unmeasured} cases and phases are left", *([failed] if failed else [])])
        return ("failed", failed) if failed else ("ok", _last_line(log))


def execute(command: Command, log: Path, seconds: float, environment: dict[str, str]) -> int | None:
    """The command's exit status, None where it was killed because its time was over; its output is added to the log."""
    if seconds <= 0:
        return None
    with open(log, "ab") as file:
        file.write(f"$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command,
            cwd=gpu_parts.ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill_group(process)  # what it started may still hold the GPU


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip(" =")[:160] if lines else ""


def _unmeasured(asked: tuple[str, int], path: Path) -> int:
    group, rank = asked
    known = {(record["case"], record["phase"]) for record in results.read(path)} if path.exists() else set()
    chosen = [case for case in cases.GROUPS[group] if case.rank <= rank]
    return sum((case.name, phase) not in known for case in chosen for phase in case.phases)


def _summary(folder: Path) -> str:
    """Written in a process of its own, like all that imports the library."""
    command = gpu_parts.python("-m", "bench.gpu_summary", str(folder))
    execute(command, folder / "summary.log", SUMMARY, os.environ | {"GPURNN_BACKEND": "numpy"})
    with contextlib.suppress(OSError):
        return (folder / "summary.md").read_text()
    return f"no summary: see {folder / 'summary.log'}"
