"""Interrupts from the keyboard: at every point of a call, the next call comes back and is right, and BLAS is as it was."""

import inspect
import random
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController, threadpool_limits

import gpurnn
from gpurnn import backend
from gpurnn.cpu import threads

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

FILES = tuple(str(Path(*parts)) for parts in (("gpurnn", "locks.py"), ("cpu", "threads.py"), ("cpu", "crew.py")))
FILES += (str(Path("cpu", "memory.py")), "threadpoolctl.py")


@pytest.fixture(autouse=True)
def two_threads(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    with threadpool_limits(2, user_api="blas"):
        yield


def step():
    """A layer's step on two threads, and a product on two beneath a BLAS of one."""
    layer, x = gpurnn.LSTM(64, 128, rng=0), np.ones((12, 16, 64), np.float32)
    head, z = gpurnn.Linear(500, 400, rng=0), np.ones((200, 500), np.float32)

    def call():
        layer.zero_grad()
        y, _, backward = layer(x)
        backward(np.ones_like(y))
        return layer.grads.flat.copy(), head(z)[0]

    return call


def same(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


def interrupted(work, point):
    """What is raised where CPython may raise a KeyboardInterrupt: as a function begins, as a call of one in C has come back.

    point: which of those in FILES.  None where `work` has not as many.
    """
    hit, count = None, 0

    def profile(frame, event, arg):
        nonlocal hit, count
        if event == "call" and frame.f_code.co_flags & inspect.CO_GENERATOR:
            return  # or it ends, which nothing can interrupt
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(FILES):
            count += 1
            if count == point:
                sys.setprofile(None)
                hit = KeyboardInterrupt(f"{frame.f_code.co_qualname}:{frame.f_lineno}")
                raise hit

    sys.setprofile(profile)
    try:
        work()
    except KeyboardInterrupt:
        pass
    finally:
        sys.setprofile(None)
    return hit


def every_point(work, after):
    point = 1
    while (hit := interrupted(work, point)) is not None:
        after(hit)  # which still refers to all the frames that it went through
        point += 1
    return point - 1


def comes_back(call, expected, hit):
    got = []
    thread = threading.Thread(target=lambda: got.append(call()), daemon=True)
    thread.start()
    thread.join(30)
    assert got and same(got[0], expected), hit


def hold():
    with threads.one_blas_thread:
        pass


@pytest.mark.parametrize("work", [hold, lambda: backend.ops.product(np.ones((300, 300)), np.ones((300, 300)))])
def test_an_interrupt_at_any_point_leaves_blas_as_it_was(work):
    before = blas_threads()

    def after(hit):
        assert blas_threads() == before and not threads.one_blas_thread._holders, hit

    work()
    assert every_point(work, after) > 40


@pytest.mark.slow
def test_an_interrupt_at_any_point_of_a_step():
    call, before = step(), blas_threads()
    expected = call()

    def after(hit):
        assert blas_threads() == before, hit
        comes_back(call, expected, hit)

    assert every_point(call, after) > 200


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that interrupt")
@pytest.mark.parametrize("count", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_interrupts_at_any_moment_leave_threads_as_they_were(count):
    """Each next call comes back, and is right."""
    seed = time.time_ns()
    print("seed", seed)
    call, rng, before, signals = step(), random.Random(seed), blas_threads(), 0
    expected = call()
    began = time.perf_counter()
    call()
    long = 1.3 * (time.perf_counter() - began)
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while signals < count:
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, long))
                while True:
                    call()
            except KeyboardInterrupt:
                signals += 1
            assert same(call(), expected) and blas_threads() == before
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
