"""What goes wrong around a run, in one sentence each: disks, folders, codecs, sizes, a compiler that is off."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import gpurnn
from gpurnn import executors, files, plot
from gpurnn.app import checkpoint, data, metrics
from gpurnn.cli import main
from gpurnn.cpu import ops
from tests import ROOT

TINY = [
    "--hidden-size", "5", "--embedding-size", "3", "--batch", "2", "--k1", "6",
    "--steps", "3", "--validation", "0.3", "--dropout", "0.2",
]  # fmt: skip


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 30)
    return tmp_path / "text.txt"


def said(capsys, *arguments) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("gpurnn: error: ") and error.count("\n") == 1, error
    return error


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    log = metrics.MetricsLog(tmp_path / "log")
    os.dup2(os.open("/dev/full", os.O_WRONLY), log._file.fileno())
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'log'}'"):
        log.write(1)
    with pytest.raises(OSError, match="/log'"):
        log.close()

    def no_space(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'model'}'"):
        files.write_atomically(tmp_path / "model", b"x")
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    (tmp_path / "text").write_text("abc" * 9)
    with pytest.raises(OSError, match=r"No space left on device: '.*\.tokens'"):
        data.load_corpus(tmp_path / "text", cache_dir=tmp_path / "cache")
    assert not list(tmp_path.rglob("*.partial")) and not (tmp_path / "model").exists()


def test_a_current_folder_that_is_gone(text):
    code = f"import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); from gpurnn.cli import main; sys.exit(main({['train', '--data', 'text.txt']}))"
    (text.parent / "gone").mkdir()
    command = [sys.executable, "-c", code, str(text.parent / "gone")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "the current folder does not exist any more" in done.stderr


def test_a_config_with_a_byte_order_mark(text, tmp_path, capsys):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbfhidden_size = 7\r\n")
    assert checkpoint.read_config(tmp_path / "c.toml") == {"hidden_size": 7}
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf\nhidden_size = \n")
    assert "c.toml: Invalid value (at line 2" in said(capsys, "train", "--data", text, "--config", tmp_path / "c.toml")


@pytest.mark.parametrize("codec", ["zlib", "hex", "rot13", "undefined", "no-such"])
def test_a_coding_line_that_names_no_text_codec_is_passed_over(codec, tmp_path):
    (tmp_path / "a.py").write_text(f"# -*- coding: {codec} -*-\nprint('ü')\n", "utf-8")
    assert "ü" in data.load_corpus(tmp_path).alphabet.symbols
    with pytest.raises(ValueError, match=f"encoding: unknown text encoding '{codec}'"):
        data.load_corpus(tmp_path, encoding=codec)


@pytest.mark.parametrize("size", [10**6, 10**9, 2**62])
def test_sizes_beyond_all_memory(size, text, tmp_path, capsys):
    error = said(capsys, "train", "--data", text, *TINY, "--hidden-size", size, "--run", tmp_path / "run")
    assert "parameters in float32 need " in error and "a smaller --hidden-size" in error
    assert not (tmp_path / "run").exists()


def test_a_smaller_batch_behind_a_larger_one():
    model = gpurnn.SequenceModel(gpurnn.Embedding(5, 3), gpurnn.GRU(3, 4, executor="numpy"), gpurnn.Linear(4, 5))
    bptt = gpurnn.TruncatedBPTT(model, gpurnn.softmax_cross_entropy, k1=2, k2=4)
    tokens = gpurnn.backend.xp.zeros((2, 3), np.int32)
    bptt.step(tokens, tokens)
    with pytest.raises(ValueError, match=r"^x: expected \(t, 3\) as in the steps before, got \(2, 2\); another batch"):
        bptt.step(tokens[:, :2], tokens[:, :2])
    bptt.reset()
    bptt.step(tokens[:, :2], tokens[:, :2])


def test_without_numbas_compiler_a_run_is_slow_and_right(text, tmp_path, monkeypatch):
    """No figures are drawn: they would take most of the time."""
    code = """if True:
        import sys
        from gpurnn import plot
        from gpurnn.cli import main
        plot.loss_curve = plot.gradient_flow = lambda *_, **__: None
        sys.exit(main(sys.argv[1:]))
    """
    train = ["train", "--data", str(text), *TINY, "--run"]
    command = [sys.executable, "-c", code, *train, str(tmp_path / "off")]
    env = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("NUMBA_DISABLE_JIT is set: layers run on NumPy alone") == 1
    monkeypatch.setenv("GPURNN_EXECUTOR", "numpy")
    for figure in ("loss_curve", "gradient_flow"):
        monkeypatch.setattr(plot, figure, lambda *_, **__: None)
    assert main([*train, str(tmp_path / "numpy")]) == 0
    off, numpy = (checkpoint.load(tmp_path / name / "model.safetensors").tensors for name in ("off", "numpy"))
    assert off and all(np.array_equal(off[name], numpy[name]) for name in numpy), "dropout's masks too"


def test_a_forced_compiled_executor_needs_the_compiler(monkeypatch):
    monkeypatch.setattr(executors, "compiles", lambda: False)
    with pytest.raises(
        ValueError, match="executor: compiled needs Numba's compiler, which NUMBA_DISABLE_JIT turns off"
    ):
        gpurnn.GRU(3, 4, executor="compiled")(np.zeros((2, 2, 3)))


def test_numpys_dropout_is_the_compiled_one(monkeypatch):
    x = np.random.default_rng(0).standard_normal((7, 3, 5)).astype(np.float32)
    options = {"seed": 2**62 + 5, "call": 2**40 + 1, "threshold": 2**30, "scale": np.float32(4 / 3)}
    compiled = ops.drop(x, **options)
    monkeypatch.setattr(ops, "compiles", lambda: False)
    assert compiled.tobytes() == ops.drop(x, **options).tobytes()
