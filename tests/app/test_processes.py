"""The command line in processes of its own: signals, terminals, readers that leave."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from gpurnn.app import checkpoint
from gpurnn.app.metrics import read_metrics
from gpurnn.app.train_command import _signals
from gpurnn.cli import main
from tests.app.conftest import COMMAND, ENVIRONMENT, SMALL


def start(*arguments, **options) -> subprocess.Popen:
    return subprocess.Popen([*COMMAND, *map(str, arguments)], env=ENVIRONMENT, text=True, **options)


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    for _ in range(600):
        if (run / "metrics.jsonl").exists() and any(x["step"] >= step for x in read_metrics(run / "metrics.jsonl")):
            return
        assert process.poll() is None, "it ended too early"
        time.sleep(0.05)
    raise AssertionError("it never got there")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_and_saves(number, code, text, tmp_path):
    run = tmp_path / "run"
    options = [*SMALL, "--steps", "1000000", "--save-every", "1000000"]
    process = start("train", "--data", text, *options, "--run", run, stdout=subprocess.PIPE)
    wait_for_step(run, 10, process)
    second = subprocess.run(
        [*COMMAND, "train", "--resume", str(run)], env=ENVIRONMENT, capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 2 and "another process is training this run" in second.stderr
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code
    step = checkpoint.load(run / "model.safetensors").meta["step"]
    assert step >= 10 and f"stopped and saved at step {step}; go on with: gpurnn train --resume {run}" in output
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "gradient_flow.png"))
    assert main(["train", "--resume", str(run), "--steps", str(step + 2)]) == 0
    assert checkpoint.load(run / "model.safetensors").meta["step"] == step + 2


def test_one_signal_is_noted_and_a_second_kills():
    def programs_own(number, frame):
        raise AssertionError

    before = signal.signal(signal.SIGTERM, programs_own)
    try:
        with _signals() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
            assert caught == [143]
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL == signal.getsignal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == programs_own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_thread_trains_too(text, tmp_path):
    """Only the main thread can have handlers of signals."""
    codes, arguments = [], ["train", "--data", str(text), *SMALL, "--run", str(tmp_path / "run")]
    thread = threading.Thread(target=lambda: codes.append(main(arguments)))
    thread.start()
    thread.join(60)
    assert codes == [0] and (tmp_path / "run" / "loss.png").exists()


def test_a_signal_is_told_on_stderr_or_nowhere(tmp_path, monkeypatch):
    """Descriptor 2 may be another file where there is no stderr."""
    log, kept = open(tmp_path / "log", "w+b"), os.dup(2)  # noqa: SIM115
    try:
        os.dup2(log.fileno(), 2)
        monkeypatch.setattr(sys, "stderr", None)
        with _signals() as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [143] and (tmp_path / "log").read_bytes() == b""
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        log.close()


def test_a_run_without_stdout_and_stderr_keeps_its_metrics(text, tmp_path):
    run = tmp_path / "run"
    options = [*SMALL, "--steps", "1000000", "--save-every", "1000000", "--run", str(run)]
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *COMMAND, "train", "--data", str(text), *options]
    process = subprocess.Popen(closed, env=ENVIRONMENT)
    wait_for_step(run, 10, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    step = checkpoint.load(run / "model.safetensors").meta["step"]
    assert (
        read_metrics(run / "metrics.jsonl")[-1]["step"] <= step
        and "finishing" not in (run / "metrics.jsonl").read_text()
    )
    assert main(["train", "--resume", str(run), "--steps", str(step + 2)]) == 0


def test_a_training_whose_reader_leaves_is_saved(text, tmp_path):
    options = [*SMALL, "--steps", "1000000", "--save-every", "1000000", "--run", tmp_path / "run"]
    process = start("train", "--data", text, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while "step " not in process.stdout.readline():
        pass
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait(timeout=60) == 141
    assert checkpoint.load(tmp_path / "run" / "model.safetensors").meta["step"] > 1


def test_a_reader_that_leaves_is_no_error(run):
    process = start("sample", run, "--length", "3000", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(10)
    process.stdout.close()
    with process.stderr as errors:
        assert errors.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_terminal_shows_a_live_line(text, tmp_path):
    reader, writer = pty.openpty()
    fcntl.ioctl(writer, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 80, 0, 0))
    process = start("train", "--data", text, *SMALL, "--run", tmp_path / "run", stdout=writer, stderr=writer)
    os.close(writer)
    shown = b""
    while True:
        try:
            block = os.read(reader, 4096)
        except OSError:  # how a pseudo-terminal ends on Linux
            break
        shown += block
        if not block:
            break
    os.close(reader)
    assert process.wait() == 0
    text_shown = shown.decode(errors="replace")
    last = [line for line in text_shown.splitlines() if "8/8" in line][-1]
    assert all(name in last for name in ("step 8/8, ", " bits/char, val ", " chars/s, grad ")) and len(last) <= 80


def test_output_that_the_terminal_cannot_show_is_replaced(run):
    environment = {**ENVIRONMENT, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*COMMAND, "sample", str(run), "--prompt", "Fü", "--length", "2"],
        env=environment,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and done.stdout.startswith(b"F?")
