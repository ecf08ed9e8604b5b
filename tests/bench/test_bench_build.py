"""Kernels built ahead: their keys are those that a run asks for, spills and all, and each is built once."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import cases, dry, model, peers, problem
from bench.__main__ import main
from bench.cases import Case
from gpurnn import backend
from gpurnn.cells import CELLS
from gpurnn.cuda import device
from gpurnn.kernels import build as kernels
from gpurnn.kernels import step
from tests.fake_cupy.backend import as_backend

TINY = (
    Case("gaps", "rnn", 3, 2, 2, 12, "bfloat16"),
    Case("gaps", "lstm", 3, 2, 2, 40),
    Case("train", "rnn", 3, 2, 2, 5),
)


@pytest.fixture
def quick_tools(tmp_path, monkeypatch):
    """Assembling costs nothing, and spills where more than one chunk of weights is in registers."""
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    built = []

    def compiled(recipe, capability):
        built.append(recipe)
        source = recipe.factory(recipe.trace, **dict(recipe.constants))
        kept = getattr(dict(recipe.constants).get("tile"), "kept", 0)
        spilled = 8 if kept > 1 and "persistent" in recipe.factory.__module__ else 0
        launched = {"cluster": source.cluster, "cooperative": source.cooperative}
        return kernels.Kernel("k", b"code", len(source.signature), source.threads, 0, 0, 32, spilled, **launched)

    monkeypatch.setattr(kernels, "_compiled", compiled)
    return built


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(cases.GROUPS, "gaps", TINY[:2])
    monkeypatch.setitem(cases.GROUPS, "train", TINY[2:])


def test_who_comes_at_the_same_time_builds_it_once(tmp_path, monkeypatch):
    recipe, count = kernels.recipe(step.forward, CELLS["rnn_tanh"].trace, dtype="float32"), []

    def compiled(recipe, capability):
        count.append(recipe)
        time.sleep(0.1)
        return kernels.Kernel("k", b"code", 3, 32, 0, 0, 32, 0)

    monkeypatch.setattr(kernels, "_compiled", compiled)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: kernels.build(recipe, (9, 0), tmp_path), range(4)))
    assert len(count) == 1 and found[1:] == found[:-1]
    assert [path.suffix for path in tmp_path.iterdir()] == [".cubin"]


def test_nobody_waits_for_ever_for_another_s_build(tmp_path, monkeypatch):
    recipe = kernels.recipe(step.forward, CELLS["rnn_tanh"].trace, dtype="float32")
    monkeypatch.setattr(kernels, "PATIENCE", 0.05)
    monkeypatch.setattr(kernels, "_compiled", lambda *_: kernels.Kernel("k", b"code", 3, 32, 0, 0, 32, 0))
    with kernels._in_turn(kernels.entry(recipe, (9, 0), tmp_path)):
        assert kernels.build(recipe, (9, 0), tmp_path).cubin == b"code"


numbers = itertools.count(100)


class Asked:
    """Launches like `kernels.launch.Launcher`, and computes nothing; `names` of the kernels asked for."""

    names: ClassVar[set[str]] = set()
    resident_blocks = 132

    def __init__(self, recipe, number):
        self.kernel = kernels.build(recipe, device.chip().capability, dry.folder())
        self.names.add(kernels.entry(recipe, device.chip().capability, dry.folder()).name)

    def __call__(self, blocks, *arguments):
        assert len(arguments) == self.kernel.arguments

    def series(self, before, after):
        return lambda blocks, *between: self(blocks, *before, *between, *after)


def asked_by_a_run(case):
    """By all that the harness does with it, on the stand-in."""
    Asked.names.clear()
    chip = model.GPUS["h200"].chip._replace(device=next(numbers))  # launchers are remembered by chip
    with as_backend(None), pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_chip", lambda number: chip)
        patch.setattr("tests.fake_cupy.cuda.runtime.getDeviceProperties", lambda number: {"name": b"H200"})
        patch.setattr(device, "_launcher", Asked)
        patch.setattr("tests.fake_cupy.get_default_memory_pool", lambda: None, raising=False)
        part = "model" if case.group == "train" else "layer"
        for implementation in (i for i in peers.implementations("cuda") if i.ours and i.default):
            for phase in case.phases:
                if implementation.refuses(case, phase, part) is None:
                    implementation.build(problem.make(case), phase, part).results()
    return set(Asked.names)


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_a_run_asks_for_nothing_that_was_not_built(case, quick_tools, tiny, tmp_path, capsys):
    command = ["build", "--gpu", "h200", "--group", case.group, "--case", case.name, "--jobs", "1"]
    assert main(command) == 0
    before = {path.name for path in tmp_path.glob("*.cubin")}
    assert before and f"{len(before)} kernels, {len(before)} of them new" in capsys.readouterr().out
    asked = asked_by_a_run(case)
    assert asked <= before
    assert {path.name for path in tmp_path.glob("*")} == before, "no locks left, nothing built behind"
    assert {"pack", "forward", "backward"} <= {name.split("-")[0] for name in asked}
    kept = {
        dict(recipe.constants)["tile"].kept
        for recipe in quick_tools
        if "pack" not in recipe.factory.__name__ and "tile" in dict(recipe.constants)
    }
    assert case.H < 40 or (min(kept) <= 1 < max(kept)), "what spills is built again with less in registers"
    count = len(quick_tools)
    assert main(command) == 0 and len(quick_tools) == count, "once"
    assert f"{len(before)} kernels, 0 of them new" in capsys.readouterr().out


def test_the_gpu_tests_kernels_are_found_whatever_they_assert(tmp_path, monkeypatch, capfd):
    """A test that raises, asserts and looks at results, none of which are there, comes to its last kernel."""
    if backend.name == "cuda":
        pytest.skip("on a GPU the stand-in is not gpurnn's backend")
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    assert main(["build", "--gpu", "h200", "--tests", "--jobs", "1", "--case", "faults_come_late"]) == 0
    shown = capfd.readouterr().out
    found = {path.name.split("-")[0] for path in tmp_path.glob("*.cubin")}
    assert {"adam", "rows", "gather"} <= found and "1 passed" in shown, shown
    assert f"{len(list(tmp_path.glob('*.cubin')))} kernels" in shown


def test_what_makes_no_sense(capsys, monkeypatch):
    for wrong in (["--gpu", "h200", "--jobs", "0"], ["--gpu", "h200", "--group", "latency", "--precision", "tf32"]):
        assert main(["build", *wrong]) == 2
    monkeypatch.setattr(backend, "name", "numpy")
    assert main(["build", "--group", "gaps"]) == 2
    said = capsys.readouterr().err
    assert "--jobs: expected" in said and "in tf32" in said and "--gpu: expected one of a100, h100, h200" in said


def test_what_fails_is_named_and_the_rest_is_built(quick_tools, tiny, monkeypatch, capsys):
    real = kernels._compiled

    def fails(recipe, capability):
        if "backward" in recipe.factory.__name__:
            raise RuntimeError("it does not assemble")
        return real(recipe, capability)

    monkeypatch.setattr(kernels, "_compiled", fails)
    assert main(["build", "--gpu", "h200", "--group", "gaps", "--case", TINY[0].name, "--jobs", "1"]) == 1
    shown = capsys.readouterr().out
    assert "training gpurnn-step FAILED: RuntimeError: it does not assemble" in shown and "3 of 8 failed" in shown


def test_processes_share_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    assert main(["build", "--gpu", "a100", "--smoke", "--case", "small/*/step/*", "--jobs", "2"]) == 0
    count = len(list(tmp_path.glob("*.cubin")))
    assert count >= 4 and f"{count} kernels, {count} of them new" in capsys.readouterr().out
