"""Kernels built on this machine, for architectures it does not have: registers, spills, shared memory, instructions.

The list below is what is published as checked; `-m slow` builds the long one.  A GPU is not needed, its tools are.
"""

import functools
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.cells import CELLS
from gpurnn.executors.resident import _registers
from gpurnn.kernels import build, plan, products, resident, step
from gpurnn.kernels.products import Ffma, Shape

ARCHITECTURES = ((8, 0), (9, 0))
NEWER = ((10, 0), (12, 0))
SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024}  # of a block, bytes

# cell, H, rows of the batch in a block (8: bfloat16 on tensor cores)
RESIDENT = [
    ("rnn_tanh", 1, 1), ("rnn_tanh", 64, 1), ("rnn_tanh", 256, 1), ("rnn_relu", 100, 4), ("lstm", 64, 1), ("lstm", 128, 2),
    ("gru", 33, 2), ("gru", 128, 1), ("rnn_tanh", 256, 8), ("lstm", 128, 8), ("gru", 128, 8),
]  # fmt: skip
LONG = [
    (cell, H, rows)
    for cell in ("rnn_tanh", "lstm", "gru")
    for H in (1, 7, 32, 64, 100, 128, 256)
    for rows in (1, 2, 4, 8)
]


def tool(name):
    """NVIDIA's disassembler, from its wheel or from a toolkit."""
    for folder in (Path(path) for path in sys.path):
        for place in ("nvidia/cu13/bin", "nvidia/cuda_nvdisasm/bin"):
            if (folder / place / name).exists():
                return folder / place / name
    return shutil.which(name)


def opcodes(cubin, tmp_path):
    """Of the machine code, counted by their first word and whole.  Fails where there is none to count."""
    path = tmp_path / "kernel.cubin"
    path.write_bytes(cubin)
    text = subprocess.run([tool("nvdisasm"), "-c", path], capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    assert len(found) > 20, "an empty disassembly would pass every check below"
    return Counter(word.split(".")[0] for word in found) + Counter(found)


@functools.lru_cache(maxsize=4)
def built(recipe, capability):
    source = recipe.factory(recipe.trace, **dict(recipe.constants))
    text = build.ptx(source, "kernel", capability)
    cubin, usage = build.assemble(text, capability)
    return source, text, cubin, usage


def check(recipe, capability, tmp_path):
    """Spills nothing; on the newer chips, whose 99 KB leave less room for weights, at most eight registers."""
    source, text, cubin, usage = built(recipe, capability)
    codes = opcodes(cubin, tmp_path)
    assert usage["spilled"] <= (32 if capability in NEWER else 0)
    assert not {"CALL.ABS", "CALL.ABS.NOINC", *(() if usage["spilled"] else ("LDL", "STL"))} & set(codes)
    warps = -(-source.threads // 128)  # on the busiest of four schedulers
    assert 0 < usage["registers"] <= min(255, 65536 // 4 // (32 * warps))
    assert usage["static_shared"] + source.shared <= SHARED[capability]
    assert ".extern .func" not in text
    doubles = {"DADD", "DMUL", "DFMA", "DSETP"} & set(codes)
    assert not doubles if ".f64" not in text else doubles
    return codes, text


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "lstm", "gru"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_step(cell, dtype, capability, tmp_path):
    for recipe in (
        build.recipe(step.forward, CELLS[cell].trace, dtype=dtype),
        build.recipe(step.backward, CELLS[cell].trace, dtype=dtype, clip=True),
    ):
        codes, text = check(recipe, capability, tmp_path)
        assert (".f64" in text) == (dtype == "float64")
        assert codes["LDG"] and codes["STG"]


def test_step_of_a_user_s_cell(user_cell, tmp_path):
    for recipe in (
        build.recipe(step.forward, user_cell.trace, dtype="float32"),
        build.recipe(step.backward, user_cell.trace, dtype="float32", clip=False),
    ):
        check(recipe, (9, 0), tmp_path)


def resident_recipes(cell, H, rows, capability):
    """Forward and backward, as the executor would choose them; less where a direction does not fit."""
    recipes = []
    for transposed, factory, constants in (
        (False, resident.forward, {"training": True}),
        (True, resident.backward, {"clip": True}),
    ):
        shape = Shape.of(cell.gates, H, transposed)
        pair = _registers(cell, transposed)
        fit = tile_for(shape, rows, pair, capability)
        if fit is not None:
            recipes.append(shipped(factory, cell, H, fit.tile, constants, shape, capability))
    return recipes


def tile_for(shape, rows, pair, capability):
    if rows == 8:
        return plan.mma_tile(shape, pair, SHARED[capability])
    return plan.ffma_tile(shape, rows, pair, SHARED[capability], capability >= (9, 0))


def shipped(factory, cell, H, tile, constants, shape, capability):
    """The executor's choice: the first tile that spills nothing."""
    for tries, fewer in enumerate(plan.relaxed(shape, tile, SHARED[capability])):
        recipe = build.recipe(factory, cell.trace, H=H, tile=fewer, **constants)
        if not built(recipe, capability)[3]["spilled"]:
            assert tries <= 8, "the plan is far from what the cell needs"
            return recipe, fewer, shape
    assert capability in NEWER, f"every tile spills: {tile}"
    return recipe, fewer, shape


def check_resident(cell, H, rows, capability, tmp_path):
    recipes = resident_recipes(CELLS[cell], H, rows, capability)
    for recipe, tile, shape in recipes:
        codes, text = check(recipe, capability, tmp_path)
        products_of = "FFMA" if isinstance(tile, Ffma) else "HMMA"
        assert codes[products_of] >= (_products(shape, tile) if products_of == "FFMA" else 1)
        assert ".f64" not in text
        assert any(code.startswith("LDG.E.128") for code in codes) or tile.kept == 0
        assert any(code.startswith("LDS.128") for code in codes)
        assert codes["BAR"] >= 2
    return len(recipes)


def _products(shape, tile):
    """Multiplications of a step that a thread cannot do without."""
    return tile.rows * tile.units * shape.outputs * 4 * products.ffma_sizes(shape, tile)[1]


@pytest.mark.parametrize("capability", ARCHITECTURES, ids=str)
@pytest.mark.parametrize(("cell", "H", "rows"), RESIDENT)
def test_resident(cell, H, rows, capability, tmp_path):
    fits = check_resident(cell, H, rows, capability, tmp_path)
    assert fits == 2 or (capability == (8, 0) and H >= 128)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES + NEWER, ids=str)
@pytest.mark.parametrize(("cell", "H", "rows"), LONG)
def test_resident_long_list(cell, H, rows, capability, tmp_path):
    if not check_resident(cell, H, rows, capability, tmp_path):
        pytest.skip(f"{cell} with {H} units does not fit one SM")


def test_pack_kernels(tmp_path):
    for rows in (1, 8):
        for _, tile, shape in resident_recipes(CELLS["lstm"], 33, rows, (9, 0)):
            check(build.recipe(products.pack, shape=shape, tile=tile), (9, 0), tmp_path)


def test_lint_notices_spills_and_an_empty_disassembly(tmp_path):
    """The checks above can fail: a tile that asks for more registers than a thread has, and no code at all."""
    cell, shape = CELLS["lstm"], Shape.of(4, 128, False)
    tile = Ffma(2, 2, 4, products.ffma_sizes(shape, Ffma(2, 2, 4, 0))[1])
    recipe = build.recipe(resident.forward, cell.trace, H=128, tile=tile, training=True)
    with pytest.raises(AssertionError):
        check(recipe, (9, 0), tmp_path)
    empty = build.Source(lambda p: None, (_pointer(),), 32)
    with pytest.raises(AssertionError, match="empty disassembly"):
        opcodes(build.assemble(build.ptx(empty, "empty", (9, 0)), (9, 0))[0], tmp_path)


def _pointer():
    from numba.cuda import types

    return types.CPointer(types.float32)


def test_plan_refuses_what_does_not_fit_and_never_asks_for_more_than_there_is():
    assert plan.ffma_tile(Shape.of(4, 512, False), 1, 20) is None
    assert plan.mma_tile(Shape.of(4, 512, False), 20) is None
    for G, H, rows in ((1, 250, 1), (3, 77, 2), (4, 128, 1), (4, 5, 4)):
        for transposed in (False, True):
            shape = Shape.of(G, H, transposed)
            for fit in (plan.ffma_tile(shape, rows, 20), plan.mma_tile(shape, 20)):
                assert fit is not None
                tiles = list(plan.relaxed(shape, fit.tile))
                assert tiles[0] == fit.tile
                assert [tile.kept for tile in tiles] == sorted((tile.kept for tile in tiles), reverse=True)
                for tile in tiles:
                    assert plan.vector_bytes(shape, tile) + plan.spilled_bytes(shape, tile) <= plan.SHARED
    assert np.isfinite(plan.ffma_tile(Shape.of(1, 1, False), 1, 8).cycles)
