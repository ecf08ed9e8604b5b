"""Threads: the same bits every time, right results under concurrency and where none can be had, and BLAS as it was before."""

import _thread
import hashlib
import importlib.util
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from threadpoolctl import threadpool_limits

from gpurnn import backend
from gpurnn.cpu import costs, crew, threads
from gpurnn.layers import Dropout
from gpurnn.recurrent import LSTM
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

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


def script(code, **environment):
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)


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
    assert script(code).stdout.strip() == here


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
    monkeypatch.setattr(costs, "PRODUCT_FLOPS", 0)
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
        backend.ops.product(np.ones((40, 40)), np.ones((40, 40)))
    assert blas_threads() == two_blas_threads
    assert (backend.ops.product(np.ones((2, 2)), np.ones((2, 2))) == 2).all(), "BLAS has no other thread for so few"


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


AT_THE_END = """
    import atexit
    import concurrent.futures
    import threading
    import time
    import weakref
    import numpy as np
    from gpurnn import backend
    from gpurnn.layers import Dropout
    from gpurnn.recurrent import LSTM

    class Something: ...

    def step():
        layer = LSTM(96, 480, executor="compiled", rng=0)
        y, _, backward = layer(np.ones((20, 2, 96), np.float32))
        backward(np.ones_like(y))
        ones = np.ones((400, 400))
        assert (backend.ops.product(ones, ones) == 400).all()
        Dropout(0.5, rng=0)(np.ones((1000, 2000), np.float32))
        layer.zero_grad()
        print("done", float(np.abs(y).sum()), flush=True)

    {beginning}
"""


@pytest.mark.parametrize(
    "beginning",
    [
        "atexit.register(step)",
        pytest.param("step(); atexit.register(step)", marks=pytest.mark.slow),
        pytest.param("weakref.finalize(Something, step)", marks=pytest.mark.slow),
        "threading.Thread(target=lambda: (threading.main_thread().join(), step())).start()",
        "pool = concurrent.futures.ThreadPoolExecutor(1); pool.submit(time.sleep, 0.5); pool.submit(step)",
    ],
    ids=["for the first time at exit", "again at exit", "finalizer", "a thread that lives on", "executor at shutdown"],
)
def test_work_after_the_main_scripts_end(beginning):
    done = script(AT_THE_END.format(beginning=beginning), GPURNN_NUM_THREADS="2")
    assert done.stdout.count("done") == beginning.count("step"), done.stderr
    assert done.returncode == 0 and not done.stderr, done.stderr


def everything():
    """All that wants another thread, by itself and in layers."""
    layer = LSTM(96, 480, executor="compiled", rng=0)
    y, _, backward = layer(np.ones((20, 2, 96), np.float32))
    backward(np.ones_like(y))
    gradients = layer.grads.flat.copy()
    layer.zero_grad()
    assert not layer.grads.flat.any()
    ones = np.ones((400, 400))
    return [y, gradients, backend.ops.product(ones, ones), Dropout(0.5, rng=0)(np.ones((1000, 2000), np.float32))[0]]


@pytest.fixture
def nobody_works_here(monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    expected = everything()
    monkeypatch.setattr(crew, "_office", crew._Office())
    return expected


@pytest.mark.parametrize("error", [RuntimeError("can't start new thread"), MemoryError()])
def test_where_no_thread_can_be_had_one_does_all(monkeypatch, nobody_works_here, error):
    refused = []

    def start(*_):
        refused.append(threading.get_ident())
        raise error

    monkeypatch.setattr(_thread, "start_new_thread", start)
    for got, expected in zip(everything(), nobody_works_here, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    assert len(refused) >= 4 and crew._office._count == 0


def green(*_):
    raise AssertionError("a thread or a lock of the system's was wanted")


@pytest.mark.parametrize("patcher, original", [("gevent.monkey", "get_original"), ("eventlet.patcher", "original")])
def test_among_green_threads_ours_are_the_systems(monkeypatch, nobody_works_here, patcher, original):
    system = SimpleNamespace(**vars(_thread))
    asked = {"get_original": lambda module, name: getattr(system, name), "original": lambda module: system}
    monkeypatch.setitem(sys.modules, patcher, SimpleNamespace(**{original: asked[original]}))
    monkeypatch.setattr(_thread, "start_new_thread", green)
    monkeypatch.setattr(_thread, "allocate_lock", green)
    assert digest(everything()) == digest(nobody_works_here)
    assert crew._office._count == 1


@pytest.mark.parametrize(
    "name, patch", [("gevent", "gevent.monkey.patch_all()"), ("eventlet", "eventlet.monkey_patch()")]
)
@pytest.mark.parametrize("late", [False, True])
def test_in_a_program_of_green_threads(name, patch, late):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    patch = f"warnings.simplefilter('ignore'); import {'gevent.monkey' if name == 'gevent' else name}; {patch}"
    code = f"""
        import os, threading, time, warnings
        {"" if late else patch}
        import importlib.util
        spec = importlib.util.spec_from_file_location("these_tests", {str(Path(__file__))!r})
        tests = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(tests)
        {patch if late else ""}
        expected, same = tests.digest(tests.everything()), []
        others = [threading.Thread(target=lambda: same.append(tests.digest(tests.everything()) == expected)) for _ in range(4)]
        [other.start() for other in others]
        [other.join() for other in others]
        child = os.fork()
        if child == 0:
            os._exit(7 if tests.digest(tests.everything()) == expected else 8)
        print(same, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), tests.crew._office._count)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.2, "a thread spins"
    """
    done = script(code, GPURNN_NUM_THREADS="2")
    assert done.stdout.strip() == f"{[True] * 4} 7 1" and done.returncode == 0, done.stderr
