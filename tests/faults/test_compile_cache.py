"""The compile cache: a second process compiles nothing, and nothing that can be wrong with the folder matters."""

import importlib
import os
import py_compile
import re
import subprocess
import sys
import textwrap
import zipfile
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

from gpurnn import backend, files
from gpurnn.app import data
from gpurnn.cpu import cache
from gpurnn.files import code_folder
from gpurnn.kernels import entries
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="this system keeps users' files apart by itself")

# Runs a tiny cell forward and backward, and prints the compilations that it took, the results, and the entries it asked for.
PROGRAM = """
    import numpy as np
    from numba.core import event
    from gpurnn.cells import Cell, tanh
    from gpurnn.kernels import entries
    from gpurnn.recurrent import Recurrent

    read, asked = entries.read, []
    entries.read = lambda path: (asked.append(path.name), read(path))[1]

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
    print(*sorted(asked))
"""
ENTRIES = [
    "add",
    "alone",
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
ENTRIES += ["pack_heads", "pack_heads_back", "pack_rows", "pause", "project", "recur", "recur_back", "reduce"]
ENTRIES += ["transpose", "turn"]
COMPILED, LOADED = str(sorted(set(ENTRIES))), "[]"


# Calls one small function, compiled or from each of the folders that it is given; prints of each whether it was compiled.
ONE_FUNCTION = """
    import os, sys
    import numpy as np
    from numba.core import event
    from gpurnn.cpu.cache import external
    from gpurnn.cpu.instructions import put

    for folder in sys.argv[1:] or [None]:
        if folder:
            os.environ["GPURNN_CACHE_DIR"] = folder

        def seven(place):
            put(place, 7)

        with event.install_recorder("numba:compile") as compilations:
            function = external(seven, "test")
        place = np.zeros(1, np.int64)
        function.python(place.ctypes.data)
        assert place[0] == 7
        print("compiled" if compilations.buffer else "loaded")
"""


def started(code, *arguments, cwd=ROOT, **environment):
    """A process that runs `code`.  None in `environment`: a variable that is not set."""
    env = os.environ | {"GPURNN_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=cwd,
        env={name: value for name, value in env.items() if value is not None},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output(process, warned=None):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    if warned:
        assert err.count("Warning") == 1 and re.search(warned, err), err
    else:
        assert not err
    return out.strip()


def start(folder, scale=1, **given):
    """A process that runs the program with `folder` as its cache."""
    return started(PROGRAM.format(scale=scale, names=set(ENTRIES)), GPURNN_CACHE_DIR=str(folder), **given)


def answer(process, warned=None):
    line, *_ = output(process, warned).splitlines()
    compilations, results = line.split("] ")
    return compilations + "]", results


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A folder with what the program takes of the session's cache, most of which other tests want too, and its results."""
    folder, session = tmp_path_factory.mktemp("filled"), Path(os.environ["GPURNN_CACHE_DIR"])
    line, names = output(start(session)).splitlines()
    for name in names.split():
        (folder / name).write_bytes((session / name).read_bytes())
    return folder, line.split("] ")[1]


def contents(folder):
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def copied(folder, target):
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_a_second_process_loads_what_the_first_compiled(filled):
    """And leaves the compiler behind: what Numba imports for it, SciPy's linear algebra with it, takes longer than all else."""
    folder, results = filled
    before = contents(folder)
    assert sorted(name.split("-")[0] for name in before) == ENTRIES
    whether = "\nimport sys\nprint('numba.np.linalg' in sys.modules)"
    program = textwrap.dedent(PROGRAM.format(scale=1, names=set(ENTRIES))) + whether
    line, names, compiler = output(started(program, GPURNN_CACHE_DIR=str(folder))).splitlines()
    assert line == f"{LOADED} {results}" and names.split() == sorted(before) and compiler == "False"
    assert contents(folder) == before


def test_other_mathematics_is_another_entry(filled, tmp_path):
    folder, results = filled
    place = copied(folder, tmp_path)
    compilations, other = answer(start(place, scale=2))
    assert compilations == "['backward_rows', 'forward_rows']"  # through a helper function; all else serves both
    assert other != results
    assert len(contents(place)) == len(ENTRIES) + 2


@pytest.mark.slow
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


def test_damaged_entries_are_compiled_again(tmp_path):
    whole = tmp_path / "whole"
    assert output(started(ONE_FUNCTION, whole, whole)) == "compiled\nloaded"
    (entry,) = whole.iterdir()
    content = entry.read_bytes()
    damaged = [
        content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
        content[: len(content) // 2],
        b"not an entry of any kind",
        content[:31],
        bytes(len(content)),
        b"",
        content[:33],
        content + b"more",
        content[:-1],
        content[:40],
    ]
    folders = [tmp_path / str(number) for number in range(len(damaged))]
    for folder, wrong in zip(folders, damaged, strict=True):
        folder.mkdir(mode=0o700)
        (folder / entry.name).write_bytes(wrong)
    shown = output(started(ONE_FUNCTION, whole, *folders, *folders)).split()
    assert shown == ["loaded", *["compiled"] * len(folders), *["loaded"] * len(folders)]


def test_what_else_lies_in_the_folder_does_no_harm(filled, tmp_path):
    folder, results = filled
    place = copied(folder, tmp_path)
    names = [path.name for path in place.iterdir()]
    (place / f".tmp-1-{names[0]}").write_bytes(b"half an ent")
    (place / names[1]).unlink()
    (place / names[1]).mkdir()  # a folder where an entry should be: it cannot be read, nor replaced
    compilations, same = answer(start(place), "Is a directory|Access is denied")
    assert compilations == f"['{names[1].split('-')[0]}']"
    assert same == results
    assert [path.name for path in place.iterdir() if path.name.startswith(".tmp")] == [f".tmp-1-{names[0]}"]


@pytest.mark.slow
def test_two_processes_at_once(filled, tmp_path):
    processes = [start(tmp_path), start(tmp_path)]
    assert [answer(process)[1] for process in processes] == [filled[1]] * 2
    assert answer(start(tmp_path)) == (LOADED, filled[1])


def test_without_a_folder_everything_works(tmp_path):
    """The name of a file, and a home that does not exist: nothing can be kept, nothing breaks."""
    taken = tmp_path / "file"
    taken.write_text("")
    nowhere = {"HOME": str(taken), "XDG_CACHE_HOME": None, "GPURNN_CACHE_DIR": None}
    for process in (started(ONE_FUNCTION, *[taken / "below"] * 2), started(ONE_FUNCTION, **nowhere)):
        assert set(output(process, "is not kept in .*Not a directory").split()) == {"compiled"}
    assert taken.read_text() == ""


@pytest.fixture
def untold(monkeypatch):
    monkeypatch.setattr(entries, "_told", set())


def test_the_folder_is_found_or_done_without(monkeypatch, tmp_path, untold):
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert code_folder() == tmp_path / "a" / "b"
    assert code_folder().stat().st_mode & 0o077 == 0  # what is in it will be executed
    monkeypatch.delenv("GPURNN_CACHE_DIR")
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert code_folder() == tmp_path / "xdg" / "gpurnn"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert code_folder() == tmp_path / "home" / ".cache" / "gpurnn"
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "access", lambda *_: False)
        with pytest.warns(RuntimeWarning, match="cannot be written.*GPURNN_CACHE_DIR") as told:
            assert code_folder() is code_folder() is None
        assert len(told) == 1


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_a_user_without_a_home(monkeypatch, untold):
    """In a container whose user has no entry and no HOME: code is compiled, large texts get a nameless file."""
    for name in ("GPURNN_CACHE_DIR", "XDG_CACHE_HOME", "HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files.Path, "home", no_home)
    with pytest.warns(RuntimeWarning, match="there is no home folder") as told:
        assert code_folder() is code_folder() is None
    assert len(told) == 1
    assert data._cache_folder() is None


@posix
@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o775, 0o707, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(monkeypatch, tmp_path, untold, mode):
    place, link = tmp_path / "folder", tmp_path / "link"
    place.mkdir()
    place.chmod(mode)
    link.symlink_to(place)
    for given in (place, link):
        monkeypatch.setenv("GPURNN_CACHE_DIR", str(given))
        with pytest.warns(RuntimeWarning, match=rf"others can write to it \(mode {mode:04o}\)"):
            assert code_folder() is None
    place.chmod(0o755)
    assert code_folder() == link


@posix
def test_a_folder_of_another_users_is_not_used(monkeypatch, tmp_path, untold):
    """But one of root's is: what root gives to be run is run anyway."""
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    owner = tmp_path.stat().st_uid
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: owner + 1000)
        if owner:
            with pytest.warns(RuntimeWarning, match=f"belongs to user {owner}, and this is user {owner + 1000}"):
                assert code_folder() is None
        else:
            assert code_folder() == tmp_path
            os.chown(tmp_path, 7, 7)
            with pytest.warns(RuntimeWarning, match="belongs to user 7, and this is user 1000"):
                assert code_folder() is None


@posix
def test_an_entry_that_another_may_have_written_is_none(monkeypatch, tmp_path):
    path = tmp_path / "entry"
    entries.write(path, b"code")
    assert entries.read(path) == b"code" and path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "copy").write_bytes(path.read_bytes())
    assert entries.read(tmp_path / "copy") is None  # it is another's, by its name
    for mode in (0o620, 0o602, 0o666):
        path.chmod(mode)
        assert entries.read(path) is None
    path.chmod(0o644)
    assert entries.read(path) == b"code"
    path.rename(tmp_path / "aside")
    path.symlink_to(tmp_path / "aside")
    assert entries.read(path) is None
    path.unlink()
    os.mkfifo(path)
    assert entries.read(path) is None  # and nobody waits for who would write into it
    path.unlink()
    entries.write(path, b"code")
    if os.geteuid() == 0:
        os.chown(path, 7, 7)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 1 << 20)
    assert entries.read(path) is None


def test_temporary_files_follow_no_link_and_do_not_stay(tmp_path, untold, monkeypatch):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(60)
    victim = tmp_path / "victim"
    victim.write_text("mine")
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    for name in (f".tmp-{os.getpid()}-entry", ".tmp-word-entry"):
        (cache / name).symlink_to(victim)
    (cache / f".tmp-{ended.pid}-x").write_bytes(b"half an ent")
    (cache / ".tmp-word-old").write_bytes(b"half an ent")
    os.utime(cache / ".tmp-word-old", (0, 0))
    entries.write(cache / "entry", b"code")
    left = {path.name for path in cache.iterdir()}
    assert left == {"entry", f".tmp-{os.getpid()}-entry", ".tmp-word-entry"} and victim.read_text() == "mine"
    monkeypatch.setattr(os, "replace", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        entries.write(cache / "other", b"code")
    assert {path.name for path in cache.iterdir()} == left


def test_an_edited_source_is_another_key(monkeypatch, tmp_path):
    """However the package is installed: as files, compiled, in a zip."""
    room = tmp_path / "files" / "house"
    room.mkdir(parents=True)
    for name in ("__init__", "a", "b"):
        (room / f"{name}.py").write_text(f"name = {name!r}")
    seen = []

    def digests(place):
        monkeypatch.syspath_prepend(str(place))
        importlib.invalidate_caches()
        sys.modules.pop("house", None)
        seen.append((entries.sources("house", "1"), entries.sources("house", "1", ["a"])))
        sys.modules.pop("house", None)

    for edited in (None, "b", "a"):
        if edited:
            (room / f"{edited}.py").write_text("name = None")
        digests(tmp_path / "files")
        compiled = tmp_path / f"compiled{edited}" / "house"
        compiled.mkdir(parents=True)
        for path in room.glob("*.py"):
            py_compile.compile(str(path), str(compiled / f"{path.stem}.pyc"))
        digests(compiled.parent)
        with zipfile.ZipFile(tmp_path / f"{edited}.zip", "w") as archive:
            for path in room.glob("*.py"):
                archive.write(path, f"house/{path.name}")
        digests(tmp_path / f"{edited}.zip")
    whole, only = zip(*seen, strict=True)
    for kind in range(3):
        assert len(set(whole[kind::3])) == 3 and only[kind] == only[kind + 3] != only[kind + 6]


def test_without_sources_the_version_is_the_key(monkeypatch):
    assert cache._environment_key() == cache._environment_key.__wrapped__()
    monkeypatch.setattr(SourceFileLoader, "get_data", lambda *_: (_ for _ in ()).throw(OSError))
    without = cache._environment_key.__wrapped__()
    monkeypatch.setattr(cache, "__version__", "another")
    assert len({without, cache._environment_key.__wrapped__(), cache._environment_key()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "compiled"])
def test_installed_without_files_of_source(filled, tmp_path, form):
    """As zipapp, PyInstaller and their like do."""
    names = [path.relative_to(ROOT) for path in (ROOT / "gpurnn").rglob("*.py")]
    names += [Path("gpurnn") / "kernels" / path.name for path in (ROOT / "kernels").glob("*.py")]
    if form == "zip":
        place = tmp_path / "gpurnn.zip"
        with zipfile.ZipFile(place, "w") as archive:
            for name in set(names):
                archive.write(ROOT / name, name)
    else:
        place = tmp_path / "compiled"
        for name in names:
            py_compile.compile(str(ROOT / name), str(place / name.with_suffix(".pyc")), doraise=True)
    folder = tmp_path / "cache"
    assert answer(start(folder, PYTHONPATH=str(place), cwd=tmp_path)) == (COMPILED, filled[1])
    assert answer(start(folder, PYTHONPATH=str(place), cwd=tmp_path)) == (LOADED, filled[1])


def test_importing_leaves_numba_alone():
    code = """
        import importlib, sys

        for module in ("gpurnn", "gpurnn.recurrent", "gpurnn.executors", "gpurnn.diagnose.check"):
            importlib.import_module(module)
            print([name for name in ("numba", "llvmlite", "cupy", "matplotlib") if name in sys.modules])
    """
    assert output(started(code)).split() == ["[]"] * 4
