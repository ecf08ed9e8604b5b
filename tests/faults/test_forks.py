"""Forks: at any moment, whatever other threads are at, child and parent both go on, and compute the same as before."""

import faulthandler
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import ThreadpoolController

import gpurnn
from gpurnn import backend, locks
from tests import ROOT

pytestmark = [
    pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]

RIGHT, WRONG = 7, 8
THESE_TESTS = f"""
    import importlib.util, os, sys, threading, warnings
    warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about fork beside threads: it is the point here
    spec = importlib.util.spec_from_file_location("these_tests", {str(Path(__file__))!r})
    tests = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tests)
"""


def script(code, timeout=120, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPURNN_NUM_THREADS": "2"} | environment
    command = [sys.executable, "-c", textwrap.dedent(THESE_TESTS) + textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def training_step(layer, x):
    layer.zero_grad()
    y, _, backward = layer(x)
    dx, _ = backward(np.ones_like(y))
    return [y, dx, *(gradient.copy() for gradient in layer.grads.values())]


def same(some, others):
    return all(np.array_equal(one, other) for one, other in zip(some, others, strict=True))


def forked(expected, child):
    """The exit status of a child that calls `child()` for what `expected` is: RIGHT, or 1 where it hangs."""
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(60, exit=True)
        os._exit(RIGHT if same(expected, child()) else WRONG)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def two_threads():
    """A layer's step on two threads, and a product on two."""
    layer, x = gpurnn.LSTM(64, 128, rng=0), np.ones((12, 16, 64), np.float32)
    head = gpurnn.Linear(500, 400, rng=0)
    return lambda: [*training_step(layer, x), head(np.ones((200, 500), np.float32))[0]]


def blas_threads():
    return [library.num_threads for library in ThreadpoolController().select(user_api="blas").lib_controllers]


def small_cell():
    """One that nobody has compiled."""
    a = random.random()
    cell = gpurnn.Cell(
        "new", 1, 1, lambda x, r, s, p: ((x[0] + a * r[0],), ()), lambda d, *_: ((d[0],), (a * d[0],), (0,), ())
    )
    layer = gpurnn.Recurrent(cell, 3, 4, rng=0)
    training_step(layer, np.ones((2, 2, 3), np.float32))


def small_function():
    """Of a user of Numba: nothing of it is ours."""
    import numba

    a = random.random()
    numba.njit(lambda b: a * b)(1.0)


OTHERS = {
    "idle": lambda: time.sleep(0.001),
    "two threads": two_threads(),
    "compiles": small_cell,
    "numba": small_function,
}


def forks(count, seed, other, new=False):
    """`count` forks at random moments while another thread does `other` again and again; how many children were right.

    new: children compile as well.
    """
    other, step, rng, ended = OTHERS[other], two_threads(), random.Random(seed), threading.Event()
    expected, right = step(), 0

    def go_on():
        while not ended.is_set():
            other()

    def child():
        if new:
            small_function()
        return step()

    thread = threading.Thread(target=go_on)
    thread.start()
    for _ in range(count):
        time.sleep(rng.uniform(0, 0.02))
        right += forked(expected, child) == RIGHT and same(expected, step())
    ended.set()
    thread.join()
    return right


def forks_in_the_midst(count, seed):
    """The same by a signal's handler, in a thread that is at work itself."""
    step, rng = two_threads(), random.Random(seed)
    expected, statuses = step(), []
    signal.signal(signal.SIGALRM, lambda *_: statuses.append(forked(expected, two_threads())))
    while len(statuses) < count:
        signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-3))
        for _ in range(5):
            assert same(expected, step())
    return statuses.count(RIGHT)


def interrupted_forks(count, seed):
    """Forks that signals come upon; how many locks each has left, for other threads to wait for."""
    two_threads()()  # with a compiler, and its locks
    rng, left, signals = random.Random(seed), [], 0

    def look():
        for lock in locks._waited_for():
            if lock.acquire(timeout=10):
                lock.release()
            else:
                left.append(lock)

    signal.signal(signal.SIGALRM, signal.default_int_handler)
    while signals < count:
        try:
            signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-5, 5e-3))
            for _ in range(3):
                if (pid := os.fork()) == 0:
                    os._exit(0)
                os.waitpid(pid, 0)
        except KeyboardInterrupt:
            pass
        signals += 1
        other = threading.Thread(target=look)
        other.start()
        other.join()
    return len(left)


@pytest.mark.parametrize("other, new", [pytest.param("two threads", False, marks=pytest.mark.slow), ("numba", True)])
def test_a_forked_child_and_its_parent_both_go_on(other, new):
    done = script(f"print(tests.forks(2, 0, {other!r}, {new}))")
    assert done.stdout.strip() == "2", done.stderr


def test_a_fork_in_the_midst_of_a_pass():
    done = script("print(tests.forks_in_the_midst(3, 0))")
    assert done.stdout.strip() == "3", done.stderr


@pytest.mark.slow
def test_a_fork_that_a_signal_comes_upon_leaves_no_lock_behind():
    done = script("print(tests.interrupted_forks(15, 0))")
    assert done.stdout.strip() == "0", done.stderr


def test_a_child_has_blas_as_it_was_before_other_threads_held_it():
    code = """
        from threadpoolctl import threadpool_limits
        from gpurnn.cpu.threads import one_blas_thread

        def in_a_child(check):
            pid = os.fork()
            if pid == 0:
                os._exit(tests.RIGHT if check() else tests.WRONG)
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

        def hold():
            with one_blas_thread:
                held.set()
                ended.wait()

        threadpool_limits(2, user_api="blas")
        before, held, ended = tests.blas_threads(), threading.Event(), threading.Event()
        other = threading.Thread(target=hold)
        other.start()
        held.wait()
        in_a_child(lambda: tests.blas_threads() == before)
        with one_blas_thread:
            in_a_child(lambda: set(tests.blas_threads()) == {1})
        ended.set()
        other.join()
        print(tests.blas_threads() == before)
    """
    done = script(code)
    assert done.stdout.split() == [f"{RIGHT}", f"{RIGHT}", "True"], done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("other, new", [("compiles", True), ("numba", True), ("two threads", True), ("idle", False)])
def test_a_hundred_forks_at_any_moment(other, new):
    seed = time.time_ns()
    print("seed", seed)
    done = script(f"print(tests.forks(100, {seed}, {other!r}, {new}))", 900)
    assert done.stdout.strip() == "100", done.stderr


@pytest.mark.slow
def test_a_hundred_forks_in_the_midst_of_a_pass():
    seed = time.time_ns()
    print("seed", seed)
    done = script(f"print(tests.forks_in_the_midst(100, {seed}))", 300)
    assert done.stdout.strip() == "100", done.stderr


@pytest.mark.parametrize(
    "delay", [0.01, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.0, 0.03, 0.1, 0.3, 1.0, 3.0))]
)
def test_a_fork_while_another_thread_compiles_or_imports_for_the_first_time(delay, tmp_path):
    code = f"""
        import faulthandler, time
        import numpy as np, gpurnn

        def one():
            layer = gpurnn.RNN(3, 4, rng=0)
            return [y.copy() for y in tests.training_step(layer, np.ones((2, 2, 3), np.float32))]

        assert "numba" not in sys.modules
        other = threading.Thread(target=one)
        other.start()
        time.sleep({delay})
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(60, exit=True)
            one()
            os._exit(tests.RIGHT)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        other.join()
    """
    done = script(
        code, **({"GPURNN_CACHE_DIR": str(tmp_path)} if delay >= 0.03 else {})
    )  # or it loads what is on the disk
    assert done.stdout.strip() == f"{RIGHT}", done.stderr


def test_whatever_a_call_imports_it_holds_what_forks_wait_for():
    code = """
        import numpy as np, gpurnn
        from gpurnn import locks

        class Watch:
            def find_spec(name, path=None, target=None):
                if not locks.building._is_owned():
                    print(name)

        sys.meta_path.insert(0, Watch)
        tokens = np.random.default_rng(0).integers(0, 20, (40, 4))
        lstm = gpurnn.LSTM(16, 32, num_layers=2, bidirectional=True, dropout=0.5)
        model = gpurnn.SequenceModel(gpurnn.Embedding(20, 16), lstm, gpurnn.Linear(64, 20))
        gpurnn.full_bptt(model, tokens, tokens, gpurnn.softmax_cross_entropy, lengths=[40, 30, 30, 2])
        model = gpurnn.SequenceModel(gpurnn.Embedding(20, 16), gpurnn.GRU(16, 64), gpurnn.Linear(64, 20))
        bptt = gpurnn.TruncatedBPTT(model, gpurnn.softmax_cross_entropy, k1=10, k2=20)
        for optimizer in gpurnn.Adam(model, lr=1e-3), gpurnn.SGD(model, lr=1e-3):
            bptt.step(tokens[:10], tokens[:10])
            gpurnn.clip_grad_norm(model, 1.0)
            optimizer.step()
            model.zero_grad()
        tests.two_threads()()
        gpurnn.diagnose.verdicts(gpurnn.RNN(4, 8), np.ones((20, 3, 4)))
        assert "numba" in sys.modules and len(list(locks._waited_for())) == 4
    """
    done = script(code)
    assert done.returncode == 0 and not done.stdout, done.stdout + done.stderr


def test_a_fork_waits_for_who_compiles_before_it_takes_the_lock_of_logs():
    """Numba writes to a log as it compiles, and logging holds its own lock over a fork."""
    code = """
        import os, threading, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gpurnn.locks import building
        import logging

        inside = threading.Event()

        def compiles():
            with building:
                inside.set()
                time.sleep(0.2)
                logging.getLogger("compiler")

        threading.Thread(target=compiles, daemon=True).start()
        inside.wait()
        child = os.fork()
        if child == 0:
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    done = script(code, timeout=20)
    assert done.stdout.strip() == "7", done.stderr
