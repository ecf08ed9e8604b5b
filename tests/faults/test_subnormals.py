"""Gradients that fade cost no more time than others; whoever calls, and code beside ours, calculates as before."""

import functools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from llvmlite import binding, ir

import gpurnn
from gpurnn import backend
from gpurnn.cells import Cell, log
from gpurnn.cpu import cache, crew, subnormals
from gpurnn.cpu.barrier import make_meet
from gpurnn.cpu.instructions import put, word
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import I64, Target, address
from gpurnn.cpu.subnormals import flush, restore

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

KINDS = (gpurnn.LSTM, gpurnn.GRU, gpurnn.RNN)
FLUSHING = subnormals.X86 if subnormals.host().x86 else subnormals.ARM


@functools.cache
def control():
    """control(place): writes the register there, and leaves it as it was."""

    def control(place):
        before = flush()
        restore(before)
        put(place, before)

    return cache.external(control, "test").python


@functools.cache
def setting():
    """setting(place): the register is what stands there."""

    def setting(place):
        restore(word(place))

    return cache.external(setting, "test").python


@functools.cache
def controls():
    """Each part writes the register as it finds it."""
    record, meet = Record("out", ""), make_meet()
    read = record.read

    def controls(values, part):
        parties, ready, _, _, out = read(values)
        meet(ready, parties)
        before = flush()
        restore(before)
        put(out + part * 8, before)

    return cache.external(controls, "test", record=record)


def register():
    place = np.zeros(1, np.int64)
    control()(address(place))
    return int(place[0]) & ~0x3F  # without the marks of past exceptions


def is_subnormal(array):
    return (array != 0) & (np.abs(array) < np.finfo(array.dtype).tiny)


def faded(layer, T, scale=1.0):
    """Gradients, dx first, of a loss at the last step only."""
    dy = np.zeros((T, 4, layer.hidden_size), layer.dtype)
    dy[-1] = scale
    layer.zero_grad()
    x = np.random.default_rng(0).standard_normal((T, 4, layer.input_size)).astype(layer.dtype)
    _, _, back = layer(x)
    return [back(dy)[0], *(gradient.copy() for gradient in layer.grads.values())]


@pytest.mark.parametrize("threads", ["1", "2"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_zero_and_all_else_is_the_oracles(monkeypatch, kind, dtype, threads):
    monkeypatch.setenv("GPURNN_NUM_THREADS", threads)
    before, layers = register(), []
    for executor in ("numpy", "compiled"):
        layers.append(kind(5, 40, dtype=dtype, rng=0, executor=executor))
        for name, value in layers[-1].params.items():
            value *= 0.3 if "weight" in name else 1  # so that gradients fade within the steps of a short test
    oracle, compiled = (faded(layer, 300, np.finfo(dtype).tiny * 1e20) for layer in layers)
    assert is_subnormal(oracle[0]).any()
    assert not any(is_subnormal(gradient).any() for gradient in compiled)
    for expected, got in zip(oracle, compiled, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert register() == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_fading_gradient_takes_no_longer(kind):
    """It took 5 to 14 times as long."""
    layer, T = kind(32, 64, rng=0), 600
    for name, value in layer.params.items():
        value *= 0.5 if "weight" in name else 1
    x = np.random.default_rng(0).standard_normal((T, 8, 32)).astype(np.float32)
    last, every = np.zeros((T, 8, 64), np.float32), np.ones((T, 8, 64), np.float32)
    last[-1] = 1
    times = {"last": [], "every": []}
    for _ in range(5):
        for name, dy in (("last", last), ("every", every)):
            _, _, back = layer(x)
            begin = time.perf_counter()
            back(dy)
            times[name].append(time.perf_counter() - begin)
    assert min(times["last"]) < 2.5 * min(times["every"])


def test_every_thread_flushes_while_it_works_and_not_behind(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    before = register()
    for parts in (1, 2, 3):
        out = np.zeros(parts, np.int64)
        crew.run(controls(), (address(out),), [()] * parts)
        assert [int(value) & FLUSHING for value in out] == [FLUSHING] * parts
        assert register() == before and not before & FLUSHING


def test_who_wants_them_flushed_keeps_that():
    """As in a program that has torch.set_flush_denormal(True)."""
    place = np.zeros(1, np.int64)
    control()(address(place))
    own = place | FLUSHING
    setting()(address(own))
    try:
        faded(gpurnn.RNN(3, 8, rng=0), 5)
        assert register() & FLUSHING == FLUSHING
    finally:
        setting()(address(place))
    assert not register() & FLUSHING


def test_code_of_others_never_sees_it(monkeypatch):
    """In the calling thread, in others beside it, in a pool's threads afterwards, and behind an error in between."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")

    def own(_=None):
        small = np.full(1000, 1e-39, np.float32)
        assert (small * np.float32(1e10) > 1e-30).all()  # operands that are subnormal
        assert is_subnormal(np.full(1000, 1e-20, np.float32) * np.float32(1e-19)).all()  # and results

    def both(seed):
        faded(gpurnn.LSTM(5, 40, rng=seed), 40)
        own()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda number: both(number) if number % 2 else own(), range(40)))
    own()
    monkeypatch.setattr(crew, "_alone", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        faded(gpurnn.LSTM(5, 40, rng=0), 4)
    own()


@pytest.mark.parametrize("value", [1e-39, 0.0, -1e-39])
def test_a_logarithm_of_one_is_that_of_zero(value):
    """The C library's own would take it apart bit by bit, with zeros for what it multiplies."""

    def forward(x, r, state, params):
        return (log(state[0]),), ()

    def backward(dnext, saved, state, next_state, params):
        return (0,), (0,), (dnext[0],), ()

    layer = gpurnn.Recurrent(Cell("logarithm", 1, 1, forward, backward), 1, 20, rng=0, executor="compiled")
    y, _, _ = layer(np.zeros((1, 1, 1), np.float32), np.full((1, 1, 20), value, np.float32))
    assert (y == -np.inf).all()


def test_the_code_for_arm(monkeypatch):
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    try:
        target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    except RuntimeError:
        pytest.skip("this LLVM has no code for ARM")
    monkeypatch.setattr(subnormals, "host", lambda: Target(16, 32, False))
    monkeypatch.setattr(subnormals, "_is_arm", lambda: True)
    module = ir.Module()
    module.triple = "aarch64-unknown-linux-gnu"
    other = ir.Function(module, ir.FunctionType(ir.VoidType(), []), "other")
    function = ir.Function(module, ir.FunctionType(I64, []), "function")
    builder = ir.IRBuilder(function.append_basic_block())
    before = subnormals.emit_flush(builder)
    builder.call(other, [])
    subnormals.emit_restore(builder, before)
    builder.ret(before)
    text = target.create_target_machine(opt=3).emit_assembly(binding.parse_assembly(str(module)))
    marks = [line.split("//")[0].strip() for line in text.splitlines()]
    order = [line.split()[0] for line in marks if line.startswith("bl") or "FPCR" in line]
    assert order == ["mrs", "msr", "bl", "msr"], text
    assert "#0x1000000" in text
