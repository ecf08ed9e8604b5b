"""The compile cache: a second process compiles nothing, and nothing that can be wrong with the folder matters."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gpurnn import backend

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

ROOT = Path(__file__).parents[1]
# Runs a tiny cell forward and backward, and prints the compilations that it took and a digest of the results.
PROGRAM = """
    import numpy as np
    from numba.core import event
    from gpurnn.cells import Cell, tanh
    from gpurnn.recurrent import Recurrent

    def helper(a):
        return {scale} * a

    def forward(x, r, state, params):
        return (tanh(helper(x[0] + r[0])),), ()

    def backward(dnext, saved, state, next_state, params):
        da = helper(dnext[0] * (1 - next_state[0] * next_state[0]))
        return (da,), (da,), (0,), ()

    with event.install_recorder("numba:llvm_lock") as recorder, event.install_recorder("numba:compile") as compilations:
        layer = Recurrent(Cell("tiny", 1, 1, forward, backward), 2, 3, executor="compiled", rng=0)
        y, state, back = layer(np.ones((3, 2, 2)))
        dx, _ = back(np.ones_like(y))
    names = {{e.data["dispatcher"].py_func.__name__ for _, e in compilations.buffer if e.is_start}}
    print(sorted(names & {names}), float(np.abs(y).sum()), float(np.abs(dx).sum()))
"""
ENTRIES = [
    "add",
    "backward",
    "backward_rows",
    "combine",
    "forward",
    "forward_rows",
    "gemm",
    "give_back",
    "meet",
    "pack_gates",
]
ENTRIES += ["pack_rows", "pause", "project", "reduce", "share", "transpose", "turn"]
COMPILED, LOADED = str(sorted(set(ENTRIES))), "[]"


def start(folder, scale=1, **environment):
    """A process that runs the program with `folder` as its cache."""
    env = os.environ | {"GPURNN_CACHE_DIR": str(folder), "GPURNN_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env = {name: value for name, value in (env | environment).items() if value is not None}
    code = textwrap.dedent(PROGRAM.format(scale=scale, names=set(ENTRIES)))
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def answer(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert not err
    compilations, results = out.strip().split("] ")
    return compilations + "]", results


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A cache folder that one process has filled, and its results."""
    folder = tmp_path_factory.mktemp("filled")
    compilations, results = answer(start(folder))
    assert compilations == COMPILED
    return folder, results


def entries(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def copied(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_second_process_loads_what_the_first_compiled(filled):
    folder, results = filled
    before = entries(folder)
    assert sorted(name.split("-")[0] for name in before) == ENTRIES
    assert answer(start(folder)) == (LOADED, results)
    assert entries(folder) == before


def test_loading_leaves_the_compiler_behind(filled):
    """What Numba imports to compile, SciPy's linear algebra with it, takes longer than all the rest of a first call."""
    program = (
        textwrap.dedent(PROGRAM.format(scale=1, names=set(ENTRIES)))
        + "\nimport sys\nprint('numba.np.linalg' in sys.modules)"
    )
    env = os.environ | {"GPURNN_CACHE_DIR": str(filled[0]), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(LOADED)
    assert done.stdout.split()[-1] == "False"


def test_other_mathematics_is_another_entry(filled, tmp_path):
    folder, results = filled
    place = copied(folder, tmp_path)
    compilations, other = answer(start(place, scale=2))
    assert compilations == "['backward_rows', 'forward_rows']"  # through a helper function; all else serves both
    assert other != results
    assert len(entries(place)) == len(ENTRIES) + 2


def test_entries_of_several_processes_stay_apart_in_one(tmp_path):
    """Numba names machine code by a counter of the process: code compiled in three may carry the same names."""
    code = """
        import sys
        import numpy as np
        from gpurnn.cells import CELLS
        from gpurnn.recurrent import Recurrent

        for choice in sys.argv[1:]:
            name, dtype = choice.split(":")
            y = {}
            for executor in ("numpy", "compiled"):
                layer = Recurrent(CELLS[name], 3, 20, dtype=dtype, executor=executor, rng=0)
                out, _, back = layer(np.ones((3, 2, 3)))
                dx, _ = back(np.ones_like(out))
                y[executor] = np.concatenate([out.ravel(), dx.ravel(), *(g.ravel() for g in layer.grads.values())])
            assert np.abs(y["numpy"] - y["compiled"]).max() < 1e-4, choice
    """
    env = os.environ | {"GPURNN_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    choices = ["rnn_tanh:float32", "rnn_identity:float32", "rnn_tanh:float64"]
    alone = [subprocess.Popen([*command, choice], env=env, cwd=ROOT) for choice in choices]
    assert [process.wait(timeout=120) for process in alone] == [0, 0, 0]
    together = subprocess.run([*command, *choices], env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert together.returncode == 0, together.stderr


def test_damaged_entries_are_compiled_again(filled, tmp_path):
    folder, results = filled
    place = copied(folder, tmp_path)
    for number, path in enumerate(sorted(place.iterdir())):
        whole = path.read_bytes()
        damaged = [
            whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            whole[: len(whole) // 2],
            b"not an entry of any kind",
            whole[:31],
            bytes(len(whole)),
            b"",
            whole[:33],
            whole + b"more",
            whole[: len(whole) - 1],
            whole[:40],
        ]
        path.write_bytes(damaged[number % len(damaged)])
    assert answer(start(place)) == (COMPILED, results)
    assert answer(start(place)) == (LOADED, results)


def test_what_else_lies_in_the_folder_does_no_harm(filled, tmp_path):
    folder, results = filled
    place = copied(folder, tmp_path)
    names = [path.name for path in place.iterdir()]
    (place / f".tmp-1-{names[0]}").write_bytes(b"half an ent")
    (place / names[1]).unlink()
    (place / names[1]).mkdir()  # a folder where an entry should be: it cannot be read, nor replaced
    compilations, same = answer(start(place))
    assert compilations == f"['{names[1].split('-')[0]}']"
    assert same == results
    assert [path.name for path in place.iterdir() if path.name.startswith(".tmp")] == [f".tmp-1-{names[0]}"]


def test_two_processes_at_once(filled, tmp_path):
    processes = [start(tmp_path), start(tmp_path)]
    assert [answer(process)[1] for process in processes] == [filled[1]] * 2
    assert answer(start(tmp_path)) == (LOADED, filled[1])


def test_without_a_folder_everything_works(filled, tmp_path):
    """The name of a file, and a home that does not exist: nothing can be kept, nothing breaks."""
    taken = tmp_path / "file"
    taken.write_text("")
    nowhere = {"HOME": str(taken), "XDG_CACHE_HOME": None, "GPURNN_CACHE_DIR": None}
    processes = [start(taken / "below"), start("", **nowhere)]
    assert [answer(process) for process in processes] == [(COMPILED, filled[1])] * 2
    assert taken.read_text() == ""


def test_the_folder_is_found_or_done_without(monkeypatch, tmp_path):
    from gpurnn.executors import cache

    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cache.folder() == tmp_path / "a" / "b"
    assert cache.folder().stat().st_mode & 0o077 == 0  # what is in it will be executed
    monkeypatch.delenv("GPURNN_CACHE_DIR")
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache.folder() == tmp_path / "xdg" / "gpurnn"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert cache.folder() == tmp_path / "home" / ".cache" / "gpurnn"
    monkeypatch.setattr(cache.os, "access", lambda *_: False)
    assert cache.folder() is None
    monkeypatch.undo()
    monkeypatch.delenv("GPURNN_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.Path, "home", no_home)
    assert cache.folder() is None


def test_an_edited_source_is_another_key(monkeypatch, tmp_path):
    from gpurnn.executors import cache

    for room in ("executors", "cells"):
        (tmp_path / room).mkdir()
        for path in (ROOT / "gpurnn" / room).glob("*.py"):
            (tmp_path / room / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(cache, "__file__", str(tmp_path / "executors" / "cache.py"))
    key = cache._environment_key.__wrapped__
    seen = {key()}
    for name in ("executors/simd.py", "executors/gemm.py", "cells/trace.py", "cells/cell.py"):
        with (tmp_path / name).open("a") as file:
            file.write("# edited\n")
        seen.add(key())
    assert len(seen) == 5


@pytest.mark.parametrize("module", ["gpurnn", "gpurnn.recurrent", "gpurnn.executors", "gpurnn.check"])
def test_importing_leaves_numba_alone(module):
    code = f"import sys, {module}; print([name for name in ('numba', 'llvmlite', 'cupy', 'matplotlib') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
