"""The package as a whole: what importing it costs, what it offers, how it is mapped."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

import gpurnn
from gpurnn import backend
from tests import ROOT


def python(code: str, *, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd or ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_it_is_light():
    heavy = ["numba", "llvmlite", "matplotlib", "safetensors"] + (["cupy"] if backend.name == "numpy" else [])
    heavy += ["gpurnn.diagnose", "gpurnn.app", "gpurnn.lab"]
    loaded = python(f"import sys, gpurnn; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


def test_every_room_is_installed():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"gpurnn", *(f"gpurnn.{init.parent.name}" for init in (ROOT / "gpurnn").glob("*/__init__.py"))}
    assert set(named) == there


BARE = """
import importlib, pkgutil, sys

class Refuse:
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] in {lacking}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse)
import bench, gpurnn
names = [module.name for package in (bench, gpurnn) for module in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
names.remove("bench.dry_tests")  # a plugin of pytest's, which begins when it is imported
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        assert name.startswith(("bench.peers.", "gpurnn.torch")) and error.name in ("torch", "jax", "flashrnn"), (name, error)
for name in ("conftest", "gpu.test_gpu", "gpu.test_gpu_training"):
    importlib.import_module(f"tests.{name}")

from gpurnn.cli import main
assert main(["info"]) == 0
model = gpurnn.SequenceModel(gpurnn.Embedding(5, 3), gpurnn.GRU(3, 4), gpurnn.Linear(4, 5))
optimizer, tokens = gpurnn.Adam(model), gpurnn.backend.xp.arange(12).reshape(6, 2) % 5
before = gpurnn.full_bptt(model, tokens[:-1], tokens[1:], gpurnn.softmax_cross_entropy)[0]
optimizer.step()
gpurnn.synchronize()
assert gpurnn.full_bptt(model, tokens[:-1], tokens[1:], gpurnn.softmax_cross_entropy)[0] < before
"""


def test_a_bare_machine():
    """NumPy, Numba and the GPU's packages: imports everything but the peers' code, and trains."""
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    files, comfort = ("safetensors", "tomli_w", "matplotlib"), ("tqdm", "threadpoolctl", "pynvml")
    lacking = (*files, *comfort, "hypothesis", "torch", "jax", "scipy")
    said = python(BARE.replace("{lacking}", repr(lacking)))
    assert "blas          unknown: threadpoolctl is not installed" in said, said


def test_numba_cuda_has_one_door():
    """What `kernels/numba_cuda.py` does has to come first."""
    found = re.compile(r"^\s*(from|import) numba[. ](import )?cuda\b|importorskip\(.numba\.cuda", re.MULTILINE)
    rooms = (path for room in ("bench", "gpurnn", "kernels", "tests") for path in (ROOT / room).rglob("*.py"))
    assert {path.name for path in rooms if found.search(path.read_text())} == {"numba_cuda.py"}


DOOR = """
import sys, warnings
import numpy as np
warnings.simplefilter("error")
if hasattr(np, "row_stack"):  # as from NumPy 2.5 on
    del np.row_stack
gone = not hasattr(np, "row_stack")
from gpurnn.kernels import build, plan
from gpurnn.kernels.numba_cuda import cuda, types
assert "numba.cuda.np.arrayobj" in sys.modules
assert hasattr(np, "row_stack") != gone and warnings.filters[0][0] == "error"

def copy(a, b):
    b[0] = a[0]

pointer = types.CPointer(types.float32)
print(build.ptx(build.Source(copy, (pointer, pointer), 32), "copy", (9, 0)).count(".entry copy("))
"""


def test_kernels_compile_where_numpy_has_no_row_stack():
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    assert python(DOOR) == "1"


def test_version_needs_no_installation(tmp_path):
    """An uninstalled checkout knows its version; an installed one has the same."""
    assert python("import gpurnn; print(gpurnn.__version__)") == gpurnn.__version__
    try:
        installed = metadata.version("gpurnn")
    except metadata.PackageNotFoundError:
        pytest.skip("gpurnn runs uninstalled here: there is no installed version to compare with")
    assert installed == gpurnn.__version__


def test_public_names():
    assert sorted(gpurnn.__all__) == sorted(set(gpurnn.__all__))
    for name in gpurnn.__all__:
        assert getattr(gpurnn, name) is not None


def test_what_is_imported_when_asked_for():
    done = python(
        "import sys, gpurnn; before = 'gpurnn.app.checkpoint' in sys.modules;"
        "gpurnn.diagnose.gradient_flow, gpurnn.lab.tour, gpurnn.plot.why_not, gpurnn.checkpoint.save;"
        "from gpurnn import checkpoint; print(before, {'checkpoint', 'lab', 'LSTM'} <= set(dir(gpurnn)), checkpoint.__name__)"
    )
    assert done == "False True gpurnn.app.checkpoint"
    with pytest.raises(AttributeError, match="module 'gpurnn' has no attribute 'LTSM'"):
        gpurnn.LTSM  # noqa: B018


def test_kernels_are_a_part_of_gpurnn():
    import gpurnn.kernels

    assert Path(gpurnn.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_kernels_never_import_the_rest():
    paths = list((ROOT / "kernels").glob("*.py"))
    assert len(paths) > 20
    for path in paths:
        lines = path.read_text().splitlines()
        imports = [line for line in lines if line.lstrip().startswith(("import gpurnn", "from gpurnn"))]
        assert all("gpurnn.kernels" in line for line in imports), path


def test_every_process_of_a_test_has_a_time_limit():
    """One that hangs fails its test, and does not keep the others waiting for ever."""
    waiting, seen = {"run", "call", "check_call", "check_output"}, 0
    for path in (ROOT / "tests").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            function = call.func if isinstance(call, ast.Call) else None
            if isinstance(function, ast.Attribute):
                of_subprocess = isinstance(function.value, ast.Name) and function.value.id == "subprocess"
                waits = (of_subprocess and function.attr in waiting) or function.attr == "communicate"
                limited = "timeout" in {keyword.arg for keyword in call.keywords}
                seen += waits
                assert limited or not waits, f"{path.name}:{call.lineno}: {function.attr} without a timeout"
    assert seen > 20
