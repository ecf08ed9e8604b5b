"""The package as a whole: what importing it costs, what it offers, how it is mapped."""

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import gpurnn
from gpurnn import backend

ROOT = Path(__file__).parent.parent


def python(code: str, *, cwd: Path | None = None) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd or ROOT
    ).stdout.strip()


def test_importing_it_is_light():
    heavy = ["numba", "llvmlite", "matplotlib", "safetensors"] + (["cupy"] if backend.name == "numpy" else [])
    loaded = python(f"import sys, gpurnn; print([name for name in {heavy} if name in sys.modules])")
    assert loaded == "[]"


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


def test_kernels_are_a_part_of_gpurnn():
    import gpurnn.kernels

    assert Path(gpurnn.kernels.__file__).resolve() == ROOT / "kernels" / "__init__.py"


def test_kernels_never_import_the_rest():
    for path in (ROOT / "kernels").glob("*.py"):
        lines = path.read_text().splitlines()
        imports = [line for line in lines if line.lstrip().startswith(("import gpurnn", "from gpurnn"))]
        assert all("gpurnn.kernels" in line for line in imports), path
