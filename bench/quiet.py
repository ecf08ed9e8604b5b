"""Timing among others: waits until spinning threads sleep, and notices when other processes took the CPU.

Thread pools spin for a while after a parallel region, OpenBLAS's for about 0.1 s, in the hope of more work, and take
the core that the next implementation wants.  So before a sample this process's own CPU time must have come to rest.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SLICE = 0.004  # s
RESTING = 0.1  # of a core: below it nothing of ours spins any more
LONGEST_WAIT = 0.3  # s
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
LIMIT = 0.06  # of all CPUs we may use: what others may take during a sample before it counts as disturbed


class Mark(NamedTuple):
    wall: float
    own: float
    busy: float | None


def settle() -> None:
    """Sleeps until this process's threads rest, or LONGEST_WAIT has passed."""
    end = time.perf_counter() + LONGEST_WAIT
    while time.perf_counter() < end:
        wall, own = time.perf_counter(), time.process_time()
        time.sleep(SLICE)
        if time.process_time() - own < RESTING * (time.perf_counter() - wall):
            return


def fastest(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of all runs within `seconds`, at least two: what the machine does when it is left alone.

    It takes some tens of milliseconds until a pool's threads are spread over the cores, so a few runs are not enough.
    """
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def mark() -> Mark:
    return Mark(time.perf_counter(), time.process_time(), _busy())


def disturbed(before: Mark, after: Mark) -> bool:
    """Whether other processes, or the host that steals from a virtual machine, took a notable share of our CPUs.

    The system counts in ticks of 10 ms: one tick for each CPU is given away.  False where it does not count at all.
    """
    if before.busy is None or after.busy is None:
        return False
    wall, own = after.wall - before.wall, after.own - before.own
    cpus = len(_cpus())
    return after.busy - before.busy - own > max(LIMIT * cpus * wall, (cpus + 0.1) / TICKS)


def _busy(stat: Path = Path("/proc/stat")) -> float | None:
    """Seconds that the CPUs we may use were not idle, stolen time included; None outside Linux."""
    try:
        lines = stat.read_text().splitlines()
    except OSError:
        return None
    ours = {f"cpu{number}" for number in _cpus()}
    total = 0
    for line in lines:
        name, *fields = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / TICKS


def _cpus() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
