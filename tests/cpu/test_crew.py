"""Workers: every part once, awake or woken, for several callers at once, and nobody left behind when something fails."""

import functools
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cpu import cache, crew, threads
from gpurnn.cpu.barrier import make_meet
from gpurnn.cpu.instructions import put, word
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import address, host
from tests import ROOT

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")


@functools.cache
def task(meets):
    """Each part adds its share to its place in `out` in each of `steps`; where they meet, it looks whether all have."""
    meet, record = make_meet(), Record("steps out", "number")
    read = record.read

    def add_up(values, part):
        parties, ready, step, shares, steps, out = read(values)
        meet(ready, parties)
        met = 0
        for turn in range(1, steps + 1):
            put(out + part * 8, word(out + part * 8) + word(values + shares + part * 8))
            if meets:
                met += parties
                meet(step, met)
                for other in range(parties):
                    if word(out + other * 8) != turn * word(values + shares + other * 8):
                        put(out + (parties + part) * 8, 1)
                met += parties
                meet(step, met)

    return cache.external(add_up, "test", meets, host(), record=record)


def add_up(parts, steps=1, meets=False):
    out, given = np.zeros((2, parts), np.int64), np.arange(1, parts + 1) * 7
    crew.run(task(meets), (steps, address(out)), [(int(number),) for number in given])
    np.testing.assert_array_equal(out, [steps * given, 0 * given])


@pytest.fixture
def office(monkeypatch):
    own = crew._Office()
    monkeypatch.setattr(crew, "_office", own)
    return own


def asleep(worker):
    """Waits until it is."""
    end = time.monotonic() + 20
    while worker.state != crew.ASLEEP:
        assert time.monotonic() < end
        time.sleep(0.001)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_every_part_once_by_workers_asleep_and_awake(office, parts):
    for turn in range(30):
        add_up(parts, 3)
        if turn % 10 == 9:
            for worker in office._free:
                asleep(worker)
    assert len(office._free) == office._count == parts - 1
    assert all(worker.state in (crew.IDLE, crew.ASLEEP) for worker in office._free)


def test_parts_meet(office):
    for parts in (2, 3, 5):
        add_up(parts, 200, meets=True)


def test_a_meeting_holds_until_all_have_come():
    meet = make_meet().python
    place, passed = np.zeros(1, np.int64), []

    def come():
        for turn in range(1, 51):
            meet(address(place), 3 * turn)
            passed.append(turn)

    others = [threading.Thread(target=come) for _ in range(2)]
    for other in others:
        other.start()
    for turn in range(1, 51):
        time.sleep(0.001)
        assert passed.count(turn) == 0  # the third has not come
        meet(address(place), 3 * turn)
    for other in others:
        other.join(10)
    assert [passed.count(turn) for turn in range(1, 51)] == [2] * 50


def test_callers_share_the_workers_there_may_be(office, monkeypatch):
    """Six at once with two workers for all: each has both, or waits."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")

    def often(_):
        for _ in range(50):
            add_up(3, 2)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(often, range(6)))
    assert office._count == len(office._free) == 2


def test_a_call_for_more_than_there_may_be_gets_them(office, monkeypatch):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "1")
    add_up(4)
    add_up(2)
    assert office._count == 3


@pytest.mark.parametrize("had", [0, 1, 2])
def test_what_no_thread_can_be_had_for_is_shared_by_fewer(office, monkeypatch, had):
    started, real = [], threads.start

    def start(work):
        if len(started) == had:
            raise RuntimeError("can't start new thread")
        started.append(real(work))

    monkeypatch.setenv("GPURNN_NUM_THREADS", "4")
    with monkeypatch.context() as patch:
        patch.setattr(threads, "start", start)
        with pytest.raises(RuntimeError, match=f"4 are wanted, {had + 1} can be had"):
            add_up(4)
        assert len(crew.cut(lambda parts: list(range(parts)))) == had + 1
        add_up(had + 1, 20, meets=had > 0)
    assert office._count == len(office._free) == had
    add_up(4)
    assert office._count == 3


def test_a_process_ends_while_its_workers_wait_for_more():
    code = """
        import numpy as np
        from gpurnn.recurrent import LSTM

        layer = LSTM(96, 320, executor="compiled", rng=0)
        layer(np.ones((20, 2, 96), np.float32))
    """
    env = os.environ | {"PYTHONPATH": str(ROOT), "GPURNN_NUM_THREADS": "4"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=env, cwd=ROOT, check=True, timeout=120)
