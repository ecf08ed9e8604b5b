"""The table of opcodes, `python -m tests.ptx`, and the interpreter standing alone."""

import ast
import sys
from pathlib import Path

import pytest

import tests.ptx
from tests.ptx.__main__ import main
from tests.ptx.instructions import FILE_OF, FILES, STEERING
from tests.ptx.survey import survey
from tests.ptx_tests.snippets import kernel

FOLDER = Path(tests.ptx.__file__).parent
KNOWN = "ld.global.u32 %r0, [%ptr0]; add.u32 %r0, %r0, 1; st.global.u32 [%ptr1], %r0; st.global.u32 [%ptr1+4], %r0;"
UNKNOWN = "wgmma.fence.sync.aligned; add.rz.v9.u32 %r0, 1, 2;"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_the_interpreter_imports_nothing_of_the_library(path):
    """So that what is wrong in both is seen: NumPy, the standard library, and itself."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [("." * node.level) + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            first = name.split(".")[0]
            assert first in sys.stdlib_module_names | {"numpy"} or name.startswith("tests.ptx"), f"{path.name}: {name}"


def test_each_opcode_stands_in_one_file():
    every = [opcode for file in FILES for opcode in file.TABLE] + list(STEERING)
    assert len(every) == len(set(every)) == len(FILE_OF) > 60


def test_a_survey_counts_opcodes_and_names_all_that_is_not_known():
    found = survey(kernel(KNOWN))
    assert found.forms["st"] == {"st.global.u32": 2} and found.forms["add"]["add.u32"] == 1 and not found.lacking
    assert found.params == ["u64", "u64"] and found.threads is None and "does not know:\n    nothing" in found.text
    lacking = survey(kernel(KNOWN + UNKNOWN)).lacking
    assert len(lacking) == 2 and "opcode wgmma" in lacking[0] and "add.rz.v9.u32" in lacking[1]


def test_the_command(tmp_path, capsys):
    paths = [tmp_path / "known.ptx", tmp_path / "unknown.ptx"]
    for path, body in zip(paths, (KNOWN, KNOWN + UNKNOWN), strict=True):
        path.write_text(kernel(body))
    assert main([str(paths[0])]) == 0 and "st.global.u32 2" in capsys.readouterr().out
    assert main([str(path) for path in paths]) == 1 and "opcode wgmma" in capsys.readouterr().out
    assert main([str(tmp_path / "none.ptx")]) == 1 and "none.ptx" in capsys.readouterr().err
    assert main([]) == 0 and "program" in capsys.readouterr().out
