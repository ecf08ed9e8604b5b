"""Threads: the same bits every time, right results under concurrency, BLAS as it was before, and life after a fork."""

import hashlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from gpurnn import backend
from gpurnn.executors import threads
from gpurnn.recurrent import LSTM

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

ROOT = Path(__file__).parents[1]
T, N, I, H = 6, 9, 20, 100  # a step and the large products are both worth several threads


def training_step(seed=0, lengths=None):
    """Everything that a step gives: y, final states, dx, dstates, all gradients."""
    layer = LSTM(I, H, executor="compiled", rng=seed)
    rng = np.random.default_rng(seed)
    y, state, backward = layer(rng.standard_normal((T, N, I)), lengths=lengths)
    dx, dstate = backward(rng.standard_normal(y.shape))
    return [y, *state, dx, *dstate, *layer.grads.values()]


def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()


def blas_threads():
    """Of NumPy's BLAS, and of others that were loaded when it was first looked for: SciPy brings one of its own."""
    return [library["num_threads"] for library in threads._controller().info() if library["user_api"] == "blas"]


@pytest.fixture
def two_blas_threads():
    with threadpool_limits(2, user_api="blas"):
        if 2 not in blas_threads():
            pytest.skip("this BLAS does not run on two threads")
        yield blas_threads()


def script(code, seconds=120, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds)


def test_same_bits_twice_and_in_every_process(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    here = digest(training_step())
    assert digest(training_step()) == here
    code = f"""
        import importlib.util, sys
        spec = importlib.util.spec_from_file_location("these_tests", {str(Path(__file__))!r})
        tests = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tests)
        print(tests.digest(tests.training_step()))
    """
    assert [script(code).stdout.strip() for _ in range(2)] == [here, here]


@pytest.mark.parametrize("lengths", [None, [6, 0, 1, 6, 3, 2, 2, 5, 0], [0] * N])
def test_any_number_of_threads_gives_the_same(monkeypatch, lengths):
    outcomes = []
    for count in ("1", "2", "3", "20"):
        monkeypatch.setenv("GPURNN_NUM_THREADS", count)
        outcomes.append(training_step(lengths=lengths))
    for outcome in outcomes[1:]:
        for one, several in zip(outcomes[0], outcome, strict=True):
            np.testing.assert_allclose(several, one, rtol=0, atol=1e-5 * max(1e-30, np.abs(one).max()))


def test_layers_in_several_python_threads_at_once(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    alone = [digest(training_step(seed)) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda seed: digest(training_step(seed)), range(8)))
    assert together == alone


@pytest.mark.parametrize("count", [0, 1, 7])
def test_shares_are_never_empty(count):
    assert [share.stop - share.start for share in threads.shares(count, 3)] == {0: [0], 1: [1], 7: [2, 2, 3]}[count]


def test_matmul_in_parts(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    monkeypatch.setattr(threads, "PARALLEL_FLOPS", 0)
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((31, 17)), rng.standard_normal((17, 12))
    np.testing.assert_allclose(threads.matmul(a, b), a @ b, rtol=1e-13)


@pytest.mark.parametrize("bad", [0, 2])
def test_an_exception_in_any_part_is_raised_when_all_parts_have_ended(bad):
    ended = []

    def work(part):
        if part == bad:
            raise ArithmeticError(f"part {part}")
        ended.append(part)

    with pytest.raises(ArithmeticError, match=f"part {bad}"):
        threads.run(work, range(4))
    assert sorted([*ended, bad]) == [0, 1, 2, 3]


def test_blas_threads_come_back(two_blas_threads):
    training_step()
    assert blas_threads() == two_blas_threads
    with threads.one_blas_thread:
        assert set(blas_threads()) == {1}
        with threads.one_blas_thread:
            training_step()
        assert set(blas_threads()) == {1}
    assert blas_threads() == two_blas_threads


def test_blas_threads_come_back_after_an_exception(two_blas_threads, monkeypatch):
    def fails(*_, **__):
        assert set(blas_threads()) == {1}
        raise ArithmeticError

    monkeypatch.setattr(threads, "matmul", fails)
    with pytest.raises(ArithmeticError):
        threads.product(np.ones((2, 2)), np.ones((2, 2)))
    assert blas_threads() == two_blas_threads


def test_blas_threads_come_back_when_the_last_of_many_has_left(two_blas_threads):
    """Whoever was first in, whoever is last out, and whoever set the number before."""
    barrier = threading.Barrier(4)

    def hold(number):
        seen = []
        for turn in range(12):
            barrier.wait()
            with threads.one_blas_thread:
                seen.append(set(blas_threads()))
                for _ in range(number + turn % 4):
                    blas_threads()
            barrier.wait()
            seen.append(blas_threads())
        return seen

    with ThreadPoolExecutor(4) as pool:
        for seen in pool.map(hold, range(4)):
            assert seen[::2] == [{1}] * 12
            assert seen[1::2] == [two_blas_threads] * 12
    assert blas_threads() == two_blas_threads


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_and_its_parent_both_go_on():
    code = f"""
        import importlib.util, os, sys, warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's own about fork beside threads: it is the point here
        spec = importlib.util.spec_from_file_location("these_tests", {str(Path(__file__))!r})
        tests = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tests)
        before = tests.digest(tests.training_step())
        child = os.fork()
        same = tests.digest(tests.training_step()) == before
        if child == 0:
            os._exit(7 if same else 8)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), same, tests.digest(tests.training_step()) == before)
    """
    done = script(code, GPURNN_NUM_THREADS="2")
    assert done.stdout.strip() == "7 True True", done.stderr


AT_THE_END = """
    import atexit
    import threading
    import numpy as np
    from gpurnn.executors import crew, threads
    from gpurnn.recurrent import LSTM

    def step():
        layer = LSTM(96, 320, executor="compiled", rng=0)
        y, _, backward = layer(np.ones((20, 2, 96), np.float32))
        backward(np.ones_like(y))
        ones = np.ones((400, 400))
        assert (threads.matmul(ones, ones) == 400).all()
        print("done", float(np.abs(y).sum()), flush=True)

    {beginning}
"""


@pytest.mark.parametrize(
    "beginning",
    [
        "atexit.register(step)",
        "step(); atexit.register(step)",
        "threading.Thread(target=lambda: (threading.main_thread().join(), step())).start()",
    ],
    ids=["for the first time at exit", "again at exit", "in a thread that outlives the main script"],
)
def test_work_after_the_main_scripts_end(beginning):
    done = script(AT_THE_END.format(beginning=beginning), GPURNN_NUM_THREADS="2")
    assert done.returncode == 0 and done.stdout.startswith("done") and not done.stderr, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize(
    "delay", [0.0, *(pytest.param(delay, marks=pytest.mark.slow) for delay in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0))]
)
def test_a_fork_while_another_thread_compiles_or_imports(delay):
    code = f"""
        import faulthandler, os, threading, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        import numpy as np, gpurnn

        def one():
            layer = gpurnn.RNN(3, 4, rng=0)
            y, _, backward = layer(np.ones((2, 2, 3), np.float32))
            backward(np.ones_like(y))

        other = threading.Thread(target=one)
        other.start()
        time.sleep({delay})
        child = os.fork()
        if child == 0:
            faulthandler.dump_traceback_later(60, exit=True)
            one()
            os._exit(7)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        other.join()
    """
    done = script(code, GPURNN_NUM_THREADS="2")
    assert done.stdout.strip() == "7", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_waits_for_who_compiles_without_the_lock_of_logs():
    """Numba writes to a log as it compiles, and logging holds its own lock over a fork."""
    code = """
        import os, threading, time, warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        from gpurnn.executors import threads
        import logging

        inside = threading.Event()

        def compiles():
            with threads.building:
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
    assert script(code, seconds=20).stdout.strip() == "7"


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers that interrupt")
def test_interrupts_at_any_moment_leave_threads_as_they_were(monkeypatch):
    """Ctrl-C 60 times in calls of two threads; each next call comes back, and is right."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    layer, x, random = LSTM(64, 128, rng=0), np.ones((12, 16, 64), np.float32), np.random.default_rng(0)

    def call():
        layer.zero_grad()
        y, _, backward = layer(x)
        backward(np.ones_like(y))
        return layer.grads.flat.copy()

    expected, interrupted = call(), 0
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        for _ in range(60):
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-5, 5e-3))
                while True:
                    call()
            except KeyboardInterrupt:
                interrupted += 1
            np.testing.assert_array_equal(call(), expected)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 60
