import errno
import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from gpurnn import files
from gpurnn.app import checkpoint
from gpurnn.app.checkpoint import Checkpoint
from gpurnn.app.metrics import MetricsLog, read_metrics
from tests import ROOT


def filled(step):
    """A checkpoint that shows by itself whether it is one of the written states."""
    weights = {f"recurrent.weight_ih_l{layer}": np.full((33, 65), step, np.float32) for layer in range(3)}
    return Checkpoint(weights, {"step": np.array(step)}, {"h": np.full((1, 3, 33), step, float)}, {"step": step})


def assert_filled(path):
    loaded = checkpoint.load(path)
    arrays = [*loaded.tensors.values(), *loaded.optimizer.values(), *loaded.state.values()]
    assert len(arrays) == 5
    assert all((array == loaded.meta["step"]).all() for array in arrays)
    return loaded.meta["step"]


def leftovers(folder):
    return list(folder.glob(".tmp-*"))


def safetensors_file(path, header, body=b""):
    data = header.encode()
    path.write_bytes(len(data).to_bytes(8, "little") + data + body)
    return path


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, array in expected.items():
        assert (got[name].shape, got[name].dtype) == (array.shape, array.dtype), name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64", "uint64", "int8", "bool"])
def test_every_bit_survives(tmp_path, dtype):
    raw = np.random.default_rng(0).integers(0, 256, 8 * 35, np.uint8)  # NaN payloads and huge integers among them
    flat = raw < 128 if dtype == "bool" else raw.view(dtype)
    wide = flat[:35].reshape(5, 7)
    tensors = {"matrix": wide, "scalar": flat[3].reshape(()), "empty": flat[:0].reshape(0, 3)}
    strided = {
        "transposed": wide.T,
        "column": wide[:, 2],
        "reversed": wide[::-1, ::3],
        "one": np.broadcast_to(flat[0], 9),
    }
    meta = {"step": 7, "rng": {"state": 2**127 + 1}, "name": 'é"\n', "best": float("inf"), "list": [None, True, 0.1]}
    checkpoint.save(tmp_path / "m", Checkpoint(tensors, {"m.matrix": wide}, strided, meta))
    loaded = checkpoint.load(tmp_path / "m")
    assert_same_bits(loaded.tensors, tensors)
    assert_same_bits(loaded.optimizer, {"m.matrix": wide})
    assert_same_bits(loaded.state, strided)
    assert loaded.meta == meta


def test_big_endian_values_survive(tmp_path):
    checkpoint.save_weights(tmp_path / "w", {"w": np.arange(5, dtype=">f4")[::2]})
    np.testing.assert_array_equal(checkpoint.load_weights(tmp_path / "w")["w"], np.float32([0, 2, 4]))


def test_weights_of_other_programs_and_of_checkpoints_load(tmp_path):
    weights = {"rnn.weight_ih_l0": np.arange(6, dtype="float32").reshape(2, 3)}
    foreign, ours = tmp_path / "foreign", tmp_path / "ours"
    foreign.write_bytes(safetensors.numpy.save(weights, {"format": "pt"}))
    checkpoint.save(ours, Checkpoint(weights, {"m": np.ones(1)}, {"h": np.ones(1)}, {}))
    assert_same_bits(checkpoint.load_weights(foreign), weights)
    assert_same_bits(checkpoint.load_weights(ours), weights)
    with pytest.raises(ValueError, match=r"foreign: expected a gpurnn checkpoint"):
        checkpoint.load(foreign)


def test_bfloat16_becomes_float32(tmp_path):
    header = '{"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    path = safetensors_file(tmp_path / "w", header, bytes.fromhex("803f 20c0"))
    assert_same_bits(checkpoint.load_weights(path), {"w": np.float32([1.0, -2.5])})


TENSOR = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"__metadata__":{"gpurnn":"{\\"format\\":1}"},' + TENSOR + "," + TENSOR + "}", "duplicate"),
        ('{"__metadata__":{"gpurnn":"{}","gpurnn":"{\\"format\\":1}"},' + TENSOR + "}", "duplicate"),
        ('{"__metadata__":{"gpurnn":"{\\"format\\":1,\\"format\\":1}"},' + TENSOR + "}", "duplicate"),
        ('{"__metadata__":{"gpurnn":"{\\"format\\":2}"},' + TENSOR + "}", "expected checkpoint format 1, got 2"),
        ('{"__metadata__":{"gpurnn":"{}"},' + TENSOR + "}", "expected checkpoint format 1, got None"),
        ('{"__metadata__":{"gpurnn":"[1]"},' + TENSOR + "}", "expected a JSON object, got list"),
        ('{"__metadata__":{"gpurnn":"' + "[" * 100_000 + '"},' + TENSOR + "}", "nested"),
        ('{"__metadata__":{"gpurnn":"{"},' + TENSOR + "}", "Expecting"),
        ('{"__metadata__":null,' + TENSOR + "}", "expected a gpurnn checkpoint"),
        ("{" + TENSOR.replace("F32", "F8_E4M3").replace(",4]", ",1]") + "}", "a: expected a tensor of type .* F8_E4M3"),
        ("{" + TENSOR.replace("[1]", "[0,18446744073709551615]").replace(",4]", ",0]") + "}", "dimension"),
    ],
)
def test_foreign_files_are_refused(tmp_path, header, message):
    body = b"" if "[0,0]" in header else b"\0" if "[0,1]" in header else bytes(4)
    path = safetensors_file(tmp_path / "model.safetensors", header, body)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        checkpoint.load(path)


def test_damaged_files_raise_value_error_and_nothing_else(tmp_path):
    path = tmp_path / "m"
    checkpoint.save(path, Checkpoint({"a": np.arange(3.0)}, {"m": np.ones(2, "i4")}, {}, {"step": 3}))
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="m: not a file that can be loaded"):
            checkpoint.load(path)
    rng = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
        except ValueError as error:
            assert str(path) in str(error)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (Checkpoint({"optimizer/a": np.ones(1)}, {}, {}, {}), ValueError, "optimizer/a"),
        (Checkpoint({}, {}, {}, {"format": 3}), ValueError, "format"),
        (Checkpoint({"a": np.array(["x"])}, {}, {}, {}), ValueError, "a: expected a tensor of type"),
        (Checkpoint({"a": np.array([{}])}, {}, {}, {}), ValueError, "a: expected a tensor of type"),
        (Checkpoint({"__metadata__": np.ones(1)}, {}, {}, {}), ValueError, "__metadata__"),
        (Checkpoint({}, {}, {}, {"loss": np.float32(1)}), TypeError, "meta"),
    ],
)
def test_what_cannot_be_saved_loses_nothing(tmp_path, bad, error, message):
    checkpoint.save(tmp_path / "m", filled(1))
    with pytest.raises(error, match=message):
        checkpoint.save(tmp_path / "m", bad)
    assert assert_filled(tmp_path / "m") == 1
    assert not leftovers(tmp_path)


class FullDisk:
    """An open file that takes half of what it is given."""

    def __init__(self, path, mode):
        self.file = open(path, mode)  # noqa: SIM115

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "no space left on device")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


@pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, failing):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    if failing == "write":
        monkeypatch.setattr(files, "open", FullDisk, raising=False)
    else:
        monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="no space left"):
        files.write_atomically(path, b"new, and longer")
    assert path.read_bytes() == b"old"
    assert not leftovers(tmp_path)


def test_data_reaches_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (calls.append("fsync"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *names: (calls.append("replace"), replace(*names)))
    files.write_atomically(tmp_path / "file", b"data")
    assert calls == ["fsync", "replace", "fsync"][: 2 if os.name == "nt" else 3]


def test_clean_removes_leftovers_only(tmp_path):
    kept = [tmp_path / ".tmp-of-somebody-else", tmp_path / "model.safetensors"]
    gone = [tmp_path / files.TEMPORARY / "config.toml", tmp_path / f"{files.TEMPORARY}1"]
    gone[0].parent.mkdir()
    for path in kept + gone:
        path.touch()
    files.clean(tmp_path, older_than=60)
    assert all(path.exists() for path in kept + gone)
    files.clean(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


KILLED_WHILE_TRAINING = """
from pathlib import Path
from gpurnn import files
from gpurnn.app import checkpoint
from gpurnn.app.metrics import MetricsLog
from tests.app.test_checkpoint import assert_filled, filled

run = Path({folder!r})
files.clean(run)
step = assert_filled(run / checkpoint.MODEL)
with MetricsLog.resume(run / checkpoint.METRICS, step) as log:
    while True:
        step += 1
        log.write(step, text="x" * 5000)
        log.sync()
        checkpoint.save(run / checkpoint.MODEL, filled(step))
        print(step, flush=True)
"""

KILLED_WHILE_CREATING = """
import time
from pathlib import Path
from gpurnn.app import checkpoint
from tests.app.test_checkpoint import filled

while True:
    checkpoint.create_run(Path({folder!r}) / str(time.time_ns()), {{"steps": 1}}, filled(0))
    print("made", flush=True)
"""


def run_and_kill(program, folder, seconds):
    """Runs `program`, and kills it some time after its first line."""
    program = program.format(folder=str(folder))
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE) as process:
        first = process.stdout.readline()
        time.sleep(seconds)
        process.kill()
    assert first, "the program failed before it was killed"


def test_a_training_killed_at_any_moment_resumes(tmp_path):
    run = tmp_path / "run"
    checkpoint.create_run(run, {"steps": 100}, filled(0))
    rng, before = random.Random(), 0
    for _ in range(15):
        run_and_kill(KILLED_WHILE_TRAINING, run, rng.uniform(0, 0.03))
        step = assert_filled(run / checkpoint.MODEL)
        assert step > before
        before = step
    files.clean(run)
    assert not leftovers(run)
    MetricsLog.resume(run / checkpoint.METRICS, step).close()
    assert [line["step"] for line in read_metrics(run / checkpoint.METRICS)] == list(range(1, step + 1))
    assert checkpoint.read_config(run / checkpoint.CONFIG) == {"steps": 100}


def test_a_run_killed_while_it_is_made_is_whole_or_absent(tmp_path):
    rng = random.Random()
    for _ in range(5):
        run_and_kill(KILLED_WHILE_CREATING, tmp_path, rng.uniform(0, 0.03))
    runs = [path for path in tmp_path.iterdir() if path not in leftovers(tmp_path)]
    assert len(runs) >= 5
    for run in runs:
        assert assert_filled(run / checkpoint.MODEL) == 0
        assert checkpoint.read_config(run / checkpoint.CONFIG) == {"steps": 1}


def test_create_run_makes_parents_and_never_overwrites(tmp_path):
    run = tmp_path / "runs" / "deep" / "first"
    checkpoint.create_run(run, {"lr": 1e-3, "seed": None}, filled(0))
    assert checkpoint.read_config(run / checkpoint.CONFIG) == {"lr": 1e-3}
    with pytest.raises(FileExistsError, match="--resume"):
        checkpoint.create_run(run, {}, filled(1))
    assert assert_filled(run / checkpoint.MODEL) == 0
    assert [path.name for path in run.parent.iterdir()] == ["first"]


def test_of_two_processes_that_make_a_run_one_gets_the_error(tmp_path, monkeypatch):
    run, rename = tmp_path / "run", Path.rename

    def another_is_faster(temporary, target):
        monkeypatch.setattr(Path, "rename", rename)
        checkpoint.create_run(run, {"winner": True}, filled(1))
        return rename(temporary, target)

    monkeypatch.setattr(Path, "rename", another_is_faster)
    with pytest.raises(FileExistsError, match="another name"):
        checkpoint.create_run(run, {"winner": False}, filled(2))
    assert checkpoint.read_config(run / checkpoint.CONFIG) == {"winner": True}
    assert assert_filled(run / checkpoint.MODEL) == 1
    assert not leftovers(tmp_path)


def test_a_failed_create_run_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.create_run(tmp_path / "run", {}, filled(0))
    assert not list(tmp_path.iterdir())


def test_a_config_is_toml_whatever_it_holds(tmp_path):
    every = "".join(map(chr, (*range(0x250), 0x2028, 0xFEFF, 0x1F600)))
    config = {
        "text": every,
        "": "",
        'a "b" = c': "\\",
        "huge": 1e300,
        "tiny": -5e-324,
        "inf": math.inf,
        "large": 2**63 - 1,
    }
    config |= {"yes": True, "no": False, "minus": -3}
    (tmp_path / "c.toml").write_bytes(checkpoint.config_bytes(config | {"nothing": None}))
    read = checkpoint.read_config(tmp_path / "c.toml")
    assert read == config and [type(value) for value in read.values()] == [type(value) for value in config.values()]
    for value in ([1, 2], {"a": 1}, b"", np.float32(1)):
        with pytest.raises(TypeError, match="k: expected a text, a number, true or false, got"):
            checkpoint.config_bytes({"k": value})


@pytest.mark.parametrize(("data", "message"), [(b"a = 1\nb = = 2\n", "line 2"), (b"a = 1\n\n# \xff", "line 3")])
def test_a_wrong_config_is_named(tmp_path, data, message):
    path = tmp_path / "my.toml"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=rf"my\.toml: .*{message}"):
        checkpoint.read_config(path)


def test_metrics_lines_are_valid_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.write(1, loss=np.float32(0.5), grad_norm=float("inf"), norms=np.array([1.0, np.nan]), note="é")
        assert read_metrics(path), "flushed per line"
        log.write(step=np.int64(2), loss=float("nan"), best=np.float64("-inf"))
        with pytest.raises(TypeError):
            log.write(2.5, loss=1.0)
        with pytest.raises(TypeError):
            log.write(3, loss=object())

    def refuse(constant):
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines == read_metrics(path)
    assert lines[0] == {"step": 1, "loss": 0.5, "grad_norm": None, "norms": [1.0, None], "note": "é"}
    assert lines[1] == {"step": 2, "loss": None, "best": None}


@pytest.mark.parametrize("tail", [b"", b'{"step": 4', b'{"step": 4}', bytes(50), b"\xff\n{}\n\0\0"])
def test_metrics_are_cut_back_on_resume(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 2, "validation": 1}\n{"step": 3}\n' + tail)
    with MetricsLog.resume(path, 2) as log:
        log.write(3)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 2, "validation": 1}\n{"step": 3}\n'
    assert not leftovers(tmp_path)


def test_resume_keeps_a_whole_last_line_without_newline_and_starts_a_missing_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog.resume(path, 0):
        assert read_metrics(path) == []
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    with MetricsLog.resume(path, 2):
        assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


@pytest.mark.parametrize("wrong", [b"{", b"[1]", b"{}", b'{"step": "1"}', b'{"step": 1, "step": 1}', b"", b"[" * 10**5])
def test_wrong_lines_amid_the_metrics_are_named(tmp_path, wrong):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + wrong + b'\n{"step": 2}\n')
    before = path.read_bytes()
    for read in (read_metrics, lambda path: MetricsLog.resume(path, 2)):
        with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2"):
            read(path)
    assert path.read_bytes() == before


def test_half_a_last_line_is_tolerated_in_reading_and_refused_in_appending(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    with pytest.raises(ValueError, match="half a line"):
        MetricsLog(path)
