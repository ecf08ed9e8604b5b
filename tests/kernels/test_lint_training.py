"""The kernels of a training step, built for architectures that this machine does not have: registers, spills, calls, and
float64 only where it is meant.  See `test_lint` for those of recurrent layers.
"""

import re

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.kernels import build, columns, dropout, embedding, losses, moves, norms, optim, rounding
from tests.kernels.test_lint import NEWER, built, opcodes

RECIPES = {
    "begin_update": (optim.begin_update, {"dtype": "float32"}),
    "norm": (norms.norm, {"dtype": "float32"}),
    "norm, float64": (norms.norm, {"dtype": "float64"}),
    "move": (moves.move, {"size": 4, "dtype": "float32"}),
    "move, bytes": (moves.move, {"size": 1, "dtype": "float64"}),
    "add_columns": (columns.add, {"dtype": "float32", "first": (0,), "second": (), "start": 0}),
    "add_columns, gates": (columns.add, {"dtype": "float32", "first": (2, 0, 1), "second": (0, 1, 2), "start": 1}),
    "add_columns, float64": (columns.add, {"dtype": "float64", "first": (0, 1), "second": (0, 1), "start": 0}),
    "scale": (norms.scale, {"dtype": "float32"}),
    "gather": (embedding.gather, {"dtype": "float32", "index": "int32"}),
    "add_rows": (embedding.add_rows, {"dtype": "float32", "index": "int32"}),
    "add_rows, float64": (embedding.add_rows, {"dtype": "float64", "index": "uint8"}),
    "rows": (
        losses.rows,
        {"dtype": "float32", "index": "int64", "totalled": True, "columns": 4, "ignoring": False, "counted": False},
    ),
    "rows, long": (
        losses.rows,
        {"dtype": "float32", "index": "int64", "totalled": True, "columns": 32, "ignoring": True, "counted": True},
    ),
    "rows, float16": (
        losses.rows,
        {"dtype": "float16", "index": "int64", "totalled": True, "columns": 32, "ignoring": True, "counted": True},
    ),
    "rows, float64": (
        losses.rows,
        {"dtype": "float64", "index": "int64", "totalled": True, "columns": 16, "ignoring": True, "counted": True},
    ),
    "wide_rows": (
        losses.wide_rows,
        {"dtype": "float32", "index": "int64", "totalled": True, "ignoring": True, "counted": True},
    ),
    "wide_rows, float16": (
        losses.wide_rows,
        {"dtype": "float16", "index": "int64", "totalled": True, "ignoring": False, "counted": False},
    ),
    "wide_rows, float64": (
        losses.wide_rows,
        {"dtype": "float64", "index": "int64", "totalled": True, "ignoring": True, "counted": False},
    ),
    "advance": (dropout.advance, {}),
    "drop": (dropout.drop, {"dtype": "float32", "aligned": True}),
    "drop, float64": (dropout.drop, {"dtype": "float64", "aligned": True}),
    "drop, anywhere": (dropout.drop, {"dtype": "float32", "aligned": False}),
    "rounded": (rounding.rounded, {"kind": "bfloat16"}),
    "rounded, float16": (rounding.rounded, {"kind": "float16"}),
    "sgd": (optim.sgd, {"dtype": "float32", "grouped": False, "momentum": False, "nesterov": False}),
    "sgd, all": (optim.sgd, {"dtype": "float32", "grouped": True, "momentum": True, "nesterov": True}),
    "rmsprop, all": (optim.rmsprop, {"dtype": "float32", "grouped": True, "centered": True, "momentum": True}),
    "adam": (optim.adam, {"dtype": "float32", "grouped": False, "decoupled": False}),
    "adamw": (optim.adam, {"dtype": "float32", "grouped": False, "decoupled": True}),
    "adamw, float64": (optim.adam, {"dtype": "float64", "grouped": True, "decoupled": True}),
}
SIXTEEN_BYTES = ("norm", "scale", "drop", "rounded", "sgd", "rmsprop", "adam")
SINGLE = (
    "gather",
    "drop",
    "drop, anywhere",
    "rounded",
    "rounded, float16",
    "sgd",
    "sgd, all",
    "rmsprop, all",
    "adam",
    "adamw",
)  # nothing computed in float64


# the same code as others, with fewer values in a register or with less of an update
LIKE_OTHERS = {name for name in RECIPES if name.endswith("float64") and name != "rows, float64"}
LIKE_OTHERS |= {"rows", "wide_rows, float16", "rounded, float16", "sgd", "adam", "add_columns"}


def arithmetic_in_float64(codes):
    return sum(codes[word] for word in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"))


def check(name, capability, tmp_path):
    factory, constants = RECIPES[name]
    source, text, cubin, usage = built(build.recipe(factory, **constants), capability)
    codes = opcodes(cubin, tmp_path)
    assert usage["spilled"] == 0 and not {"LDL", "STL"} & set(codes)
    assert "call.uni" not in text and ".s64" not in "".join(re.findall(r"(?:div|rem)\S+", text)), (
        "64 bits divide in a call"
    )
    assert usage["registers"] * source.threads <= 65536
    assert usage["static_shared"] <= 16 * 1024 and ".extern .func" not in text
    if name.split(",")[0] in SIXTEEN_BYTES and constants.get("aligned", True):
        assert any(code.startswith("LDG.E.128") for code in codes)
        assert name.startswith("norm") or any(code.startswith("STG.E.128") for code in codes)
    if name in SINGLE:
        assert "CALL" not in codes
        assert not arithmetic_in_float64(codes)
        assert not re.search(r"(add|sub|mul|fma|div|sqrt|setp|min|max)\S*\.f64", text)  # a fault's value is converted
    return codes


@pytest.mark.parametrize("capability", [(8, 0), pytest.param((9, 0), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_OTHERS)) for name in RECIPES]
)
def test_what_ships(name, capability, tmp_path):
    check(name, capability, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", NEWER, ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_newer_chips(name, capability, tmp_path):
    check(name, capability, tmp_path)


def test_a_row_s_loss_is_in_float64_and_its_logits_are_not(tmp_path):
    """So the number of such instructions does not grow with the logits of a lane."""
    counts = [arithmetic_in_float64(check(name, (9, 0), tmp_path)) for name in ("rows", "rows, long", "rows, float16")]
    assert 0 < counts[0] == counts[1] == counts[2]
