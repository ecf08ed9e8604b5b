"""The rooms of the house: imports run one way, downwards, as CONTRIBUTING's table says, and never in a circle."""

import ast
import re

import pytest

from tests import ROOT

TABLE = re.findall(
    r"^\| (`.*?) \|", (ROOT / "CONTRIBUTING.md").read_text().partition("Dependencies run one way")[2], re.M
)
FLOORS = [re.findall(r"`([\w/.]+)`", row) for row in TABLE]  # the highest first


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_of(path): path
    for folder in ("gpurnn", "kernels")
    for path in (ROOT / folder).rglob("*.py")
    if "gpurnn/kernels" not in path.as_posix()
}


def room_of(module):
    """As the table calls it: `cells/`, `layers.py`, `kernels/`."""
    first, *rest = module.removeprefix("gpurnn.").split(".")
    return f"{first}/" if rest or (ROOT / "gpurnn" / first).is_dir() or first == "kernels" else f"{first}.py"


def imports(module, all_of_them=True):
    """The modules of ours that one imports, those that functions import as well."""
    tree = ast.parse(FILES[module].read_text())
    nodes = ast.walk(tree) if all_of_them else tree.body
    package = module if FILES[module].name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            base = (above + (node.module or "")).rstrip(".").replace("gpurnn.kernels", "kernels")
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name in FILES and name != "gpurnn"}


def floor(module):
    (found,) = [number for number, rooms in enumerate(FLOORS) if room_of(module) in rooms]
    return found


@pytest.mark.parametrize("module", sorted(name for name in FILES if name != "gpurnn"))
def test_imports_run_downwards(module):
    for other in imports(module):
        assert floor(other) >= floor(module), f"{module} imports {other}, which stands above it"


def test_nothing_is_imported_in_a_circle():
    """By modules as they are loaded; functions import what the table lets them."""
    done, under_way = set(), []

    def visit(module):
        assert module not in under_way, " -> ".join([*under_way, module])
        if module not in done:
            under_way.append(module)
            for other in imports(module, all_of_them=False):
                visit(other)
            done.add(under_way.pop())

    for module in FILES:
        visit(module)


def test_the_table_has_every_room_once():
    rooms = [room for rooms in FLOORS for room in rooms]
    assert sorted(rooms) == sorted({room_of(module) for module in FILES if module != "gpurnn"})


def test_no_room_has_two_machines():
    """What goes with NumPy or with CUDA is asked of `backend.ops`; few others may ask which it is."""
    asking = {
        module
        for module, path in FILES.items()
        if re.search(r"backend\.name [!=]=|\bname [!=]= \"(cuda|numpy)\"", path.read_text())
    }
    assert asking <= {"gpurnn.backend"}, asking


def test_the_top_level_is_thirty_rooms_at_most():
    entries = [
        path.name
        for path in (ROOT / "gpurnn").iterdir()
        if path.name not in ("__pycache__", "__main__.py", "py.typed", "kernels")
    ]
    assert len(entries) <= 30, sorted(entries)
