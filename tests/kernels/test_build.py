"""Kernels built where there is no GPU, by the real tools: the disk cache, its keys, who compiles, and what is left as it was."""

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import threading
from types import SimpleNamespace

import pytest

from gpurnn.cells import GRU_CELL, LSTM_CELL
from gpurnn.kernels import build, garbage
from tests.kernels.test_launch import KERNEL

tools = pytest.mark.skipif(
    importlib.util.find_spec("numba_cuda") is None,
    reason="the kernels' tools are not installed: pip install 'gpurnn[test]'",
)


@tools
def test_one_thread_compiles_at_a_time():
    """Each puts a device of its own in the place of the real one meanwhile."""
    from gpurnn.kernels.numba_cuda import dispatcher

    real, entered = dispatcher.get_current_device, threading.Event()

    def compile_too():
        with build._without_device((8, 0)):
            entered.set()

    with build._without_device((9, 0)):
        thread = threading.Thread(target=compile_too)
        thread.start()
        assert not entered.wait(0.2) and dispatcher.get_current_device().compute_capability == (9, 0)
    thread.join(60)
    assert entered.is_set() and dispatcher.get_current_device is real


def scaling(trace, *, factor):
    from gpurnn.kernels.numba_cuda import cuda, types

    def scale(values, n):
        k = cuda.grid(1)
        if k < n:
            values[k] *= factor

    return build.Source(scale, (types.CPointer(types.float32), types.int64), 32, 16)


def other(trace, *, factor):
    return scaling(trace, factor=factor)


def waiting(trace, *, cluster, cooperative):
    return scaling(trace, factor=2)._replace(cluster=cluster, cooperative=cooperative)


@pytest.fixture
def folder(tmp_path):
    return tmp_path


@pytest.fixture
def compilations(monkeypatch):
    """The names of the kernels that are compiled, as they are."""
    names, real = [], build.ptx

    def ptx(source, name, capability):
        names.append(name)
        return real(source, name, capability)

    monkeypatch.setattr(build, "ptx", ptx)
    return names


@tools
def test_a_kernel_is_compiled_once_and_then_read(folder, monkeypatch):
    first = build.build(build.recipe(scaling, factor=2), (9, 0), folder)
    assert first.name == "gpurnn_scale" and first.arguments == 2 and first.threads == 32 and first.shared == 16
    assert first.cubin.startswith(b"\x7fELF") and 0 < first.registers <= 255 and first.spilled == 0
    (path,) = folder.iterdir()
    assert path.name.startswith("scaling-") and path.suffix == ".cubin"
    monkeypatch.setattr(build, "ptx", None)
    assert build.build(build.recipe(scaling, factor=2), (9, 0), folder) == first


@tools
@pytest.mark.parametrize(("cluster", "cooperative"), [(1, False), (1, True), (4, False)])
def test_how_a_kernel_is_launched_is_kept_with_its_code(folder, monkeypatch, cluster, cooperative):
    recipe = build.recipe(waiting, cluster=cluster, cooperative=cooperative)
    built = build.build(recipe, (9, 0), folder)
    monkeypatch.setattr(build, "ptx", None)
    for kernel in (built, build.build(recipe, (9, 0), folder)):
        assert (kernel.cluster, kernel.cooperative) == (cluster, cooperative)


@tools
@pytest.mark.parametrize(
    ("exchange", "blocks", "cluster", "cooperative"),
    [("alone", 1, 1, False), ("flagged", 2, 1, True), ("counted", 3, 1, True), ("clustered", 4, 4, False)],
)
def test_blocks_that_wait_for_each_other_are_launched_together(exchange, blocks, cluster, cooperative):
    from gpurnn.kernels import persistent
    from gpurnn.kernels.tiles import Ffma

    options = {"H": 20, "tile": Ffma(1, 4, 2, 1), "blocks": blocks, "exchange": exchange}
    forward = persistent.forward(LSTM_CELL.trace, **options, training=True)
    backward = persistent.backward(LSTM_CELL.trace, **options, clip=False)
    for source in (forward, backward):
        assert (source.cluster, source.cooperative) == (cluster, cooperative)


@tools
def test_whatever_decides_the_code_is_another_file(folder, compilations, monkeypatch):
    def build_all():
        for recipe, capability in (
            (build.recipe(scaling, factor=2), (9, 0)),
            (build.recipe(scaling, factor=3), (9, 0)),
            (build.recipe(scaling, factor=2.0), (9, 0)),
            (build.recipe(scaling, factor=2), (8, 0)),
            (build.recipe(scaling, LSTM_CELL.trace, factor=2), (9, 0)),
            (build.recipe(scaling, GRU_CELL.trace, factor=2), (9, 0)),
            (build.recipe(other, factor=2), (9, 0)),
        ):
            build.build(recipe, capability, folder)

    build_all()
    assert len(list(folder.iterdir())) == len(compilations) == 7
    build_all()
    assert len(compilations) == 7
    build.environment.cache_clear()
    monkeypatch.setattr(build, "_version", lambda tool: "another")
    build.build(build.recipe(scaling, factor=2), (9, 0), folder)
    monkeypatch.undo()
    build.environment.cache_clear()
    assert len(list(folder.iterdir())) == 8, "a tool of another version writes other code"


def test_what_walks_through_a_graph_is_part_of_the_key():
    elsewhere = type("Graph", (), {"__module__": "gpurnn.files"})()
    trace = SimpleNamespace(text=LSTM_CELL.trace.text, forward=elsewhere)
    a, b = (build.recipe(scaling, each, factor=2) for each in (LSTM_CELL.trace, trace))
    assert a.text == b.text and build._key(a, (9, 0)) != build._key(b, (9, 0))


def test_the_order_of_constants_does_not_matter_and_their_values_do():
    a, b = build.recipe(scaling, x=1, y=2), build.recipe(scaling, y=2, x=1)
    assert a == b and build._key(a, (9, 0)) == build._key(b, (9, 0))
    assert build._key(a, (9, 0)) != build._key(build.recipe(scaling, x=2, y=1), (9, 0))


@tools
@pytest.mark.parametrize(
    "damage",
    [
        lambda entry: b"",
        lambda entry: entry[:20],
        lambda entry: entry[:-1],
        lambda entry: entry + b"more",
        lambda entry: entry[:-100] + bytes([entry[-100] ^ 1]) + entry[-99:],
        lambda entry: bytes([entry[0] ^ 1]) + entry[1:],
    ],
    ids=["empty", "cut in its digest", "cut", "longer", "a bit of the code", "a bit of the digest"],
)
def test_a_damaged_file_is_built_again(folder, compilations, damage):
    recipe = build.recipe(scaling, factor=2)
    kernel = build.build(recipe, (9, 0), folder)
    (path,) = folder.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    again = build.build(recipe, (9, 0), folder)
    assert len(compilations) == 2 and again._replace(cubin=b"") == kernel._replace(cubin=b"")
    assert build.build(recipe, (9, 0), folder) == again and len(compilations) == 2, "the good file is in its place"


@tools
def test_a_folder_that_cannot_be_written_costs_only_time(folder, compilations):
    (folder / "file").write_text("no folder")
    for place, told in ((None, ()), (folder / "missing", ("No such file",)), (folder / "file", ("Not a directory",))):
        with pytest.warns(RuntimeWarning, match=told[0]) if told else contextlib.nullcontext():
            kernel = build.build(build.recipe(scaling, factor=2), (9, 0), place)
        assert kernel.cubin.startswith(b"\x7fELF")
    assert len(compilations) == 3 and [path.name for path in folder.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_written_file(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        build._write(folder / "a.cubin", KERNEL)
    assert not list(folder.iterdir())


def test_an_entry_under_another_name_is_none(folder):
    build._write(folder / "a.cubin", KERNEL)
    assert build._read(folder / "a.cubin") == KERNEL
    (folder / "a.cubin").rename(folder / "b.cubin")
    assert build._read(folder / "b.cubin") is None


def write_again_and_again(path, kernel, times, ready):
    ready.wait(60)
    for _ in range(times):
        build._write(path, kernel)


def test_two_processes_that_write_at_once_leave_a_whole_file(folder):
    path = folder / "shared.cubin"
    kernels = [KERNEL._replace(cubin=bytes([k]) * size) for k, size in ((1, 3_000_000), (2, 50_000))]
    context = multiprocessing.get_context("spawn")
    ready = context.Barrier(3)
    writers = [context.Process(target=write_again_and_again, args=(path, kernel, 40, ready)) for kernel in kernels]
    for writer in writers:
        writer.start()
    ready.wait(60)
    seen = set()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            kernel = build._read(path)
            assert kernel in kernels, "a half-written file was read"
            seen.add(kernel.cubin[0])
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    assert build._read(path) in kernels and seen
    assert [left.name for left in folder.iterdir()] == ["shared.cubin"]


@tools
def test_ptx_newer_than_the_assembler_gets_a_version_that_it_reads():
    text = "//\n.version 9.4\n.target sm_90\n"
    for newest, found in (((9, 0), "9.0"), ((8, 8), "8.8"), ((9, 4), "9.4"), ((10, 0), "9.4")):
        assert build._as_old_as(newest, text, (9, 0)) == text.replace("9.4", found)
    assert build._assembler() >= (8, 0)


def test_code_that_does_not_assemble_is_an_error_with_the_assembler_s_words(folder, monkeypatch):
    real = build.ptx
    monkeypatch.setattr(build, "ptx", lambda *given: real(*given).replace("ret;", "retreat;"))
    with pytest.raises(RuntimeError, match=r"gpurnn_scale: .*sm_90.*'retreat'") as caught:
        build.build(build.recipe(scaling, factor=2), (9, 0), folder)
    assert "\x00" not in str(caught.value) and "\n" not in str(caught.value)
    assert not list(folder.iterdir())


@tools
def test_ptx_has_our_name_and_nothing_to_be_resolved():
    text = build.ptx(scaling(None, factor=2), "gpurnn_scale", (8, 0))
    assert text.count(".entry") == 1 and ".entry gpurnn_scale(" in text and ".target sm_80" in text
    assert ".common" not in text and ".extern" not in text and ".maxntid 32" in text


@tools
def test_compiling_leaves_numba_as_it_was():
    from gpurnn.kernels.numba_cuda import dispatcher

    before = dispatcher.get_current_device
    build.ptx(scaling(None, factor=2), "gpurnn_scale", (9, 0))
    with pytest.raises(ZeroDivisionError), build._without_device((9, 0)):
        assert dispatcher.get_current_device().compute_capability == (9, 0)
        raise ZeroDivisionError
    assert dispatcher.get_current_device is before


@tools
def test_garbage_is_left_lying_while_a_kernel_compiles_and_no_longer(monkeypatch):
    from gpurnn.kernels.numba_cuda import cuda

    seen, real = [], cuda.compile
    monkeypatch.setattr(
        cuda, "compile", lambda *given, **options: seen.append(gc.isenabled()) or real(*given, **options)
    )
    build.ptx(scaling(None, factor=2), "gpurnn_scale", (9, 0))
    with pytest.raises(ZeroDivisionError), garbage.left_lying():
        raise ZeroDivisionError
    assert seen == [False] and gc.isenabled()
    gc.disable()
    try:
        build.ptx(scaling(None, factor=2), "gpurnn_scale", (9, 0))
        assert not gc.isenabled(), "whoever does without it goes on without it"
    finally:
        gc.enable()
