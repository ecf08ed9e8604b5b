"""Cases given to processes that are watched: one that hangs or dies is named, and the others go on in a new process.

A kernel that hangs cannot be interrupted from within; its process can be killed.
"""

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
GRACE = 5.0  # s that a killed process has to end; a driver that cannot free a GPU keeps it longer, and nobody waits


class Outcome(NamedTuple):
    """verdict: ok, skip, WRONG, ERROR, HUNG or DIED.  seconds: that the case took."""

    case: str
    verdict: str
    text: str
    seconds: float


def watched(module: str, names: Sequence[str], jobs: int, limit: float) -> Iterator[Outcome]:
    """Outcomes as they come.  `python -m module` reads a name a line and answers with an Outcome as a line of JSON."""
    given: queue.SimpleQueue[str] = queue.SimpleQueue()
    found: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    for name in names:
        given.put(name)
    threads = [
        threading.Thread(target=_serve, args=(module, given, found, limit), daemon=True)
        for _ in range(min(max(1, jobs), len(names)))
    ]
    for thread in threads:
        thread.start()
    for _ in names:
        yield found.get()


def _serve(module: str, given: "queue.SimpleQueue[str]", found: "queue.SimpleQueue[Outcome]", limit: float) -> None:
    process: _Process | None = None
    while True:
        try:
            name = given.get_nowait()
        except queue.Empty:
            break
        process = process or _Process(module)
        outcome = process.outcome(name, limit)
        if outcome.verdict in ("ERROR", "HUNG", "DIED"):
            process.end()
            process = None
        found.put(outcome)
    if process is not None:
        process.end()


class _Process:
    def __init__(self, module: str):
        self.errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `end`)
        command = [sys.executable, "-m", module]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors
        )
        self.said = b""

    def outcome(self, name: str, limit: float) -> Outcome:
        began = time.monotonic()
        try:
            self._tell(name)
            line = self._line(began + limit)
        except BrokenPipeError:
            line = ""
        seconds = round(time.monotonic() - began, 2)
        if line is None:
            return Outcome(name, "HUNG", f"no answer within {limit:g} s", seconds)
        if not line:
            return Outcome(name, "DIED", self._last_words(), seconds)
        return Outcome(*json.loads(line))

    def _tell(self, name: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()

    def _line(self, deadline: float) -> str | None:
        """The next line that is an outcome's; "" where the process ended, None where the time did."""
        assert self.process.stdout is not None
        source = self.process.stdout.fileno()
        while True:
            line, end, rest = self.said.partition(b"\n")
            if end:
                self.said = rest
                if line.startswith(b"["):
                    return line.decode()
                continue
            if not select.select([source], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            more = os.read(source, 1 << 16)
            if not more:
                return ""
            self.said += more

    def _last_words(self) -> str:
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        return f"exit status {self.process.returncode}: {lines[-1][:200] if lines else 'no message'}"

    def end(self) -> None:
        """It stays in our group of processes, so that who kills that kills it too."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.errors.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def kill_group(process: subprocess.Popen) -> None:
    """Kills a process that began a session of its own, and all that it started; waits GRACE at most for its end."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
