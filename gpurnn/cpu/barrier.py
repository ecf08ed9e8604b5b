"""Words in memory that threads wait at, in compiled code.

A wait is far shorter than a thread's sleep and waking: it spins.  Where it lasts, because another process has the other
CPU, it offers its own CPU to whoever can run, again and again.
"""

import functools
import sys

from llvmlite import ir
from numba import types
from numba.core import cgutils

from gpurnn.cpu import cache, costs
from gpurnn.cpu.instructions import instruction, pointer, whole
from gpurnn.cpu.simd import I64, host

CACHE_LINE = 128  # bytes: two of them, where processors fetch lines in pairs

yield_cpu = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


@whole
def _arrive(builder, address):
    """One more has arrived; how many have."""
    return builder.add(builder.atomic_rmw("add", pointer(builder, address), I64(1), "acq_rel"), I64(1))


@whole
def seen(builder, address):
    """The word as it is now, and with it all that was written before it was."""
    return builder.load_atomic(pointer(builder, address), "acquire", 8)


@instruction
def show(builder, address, value):
    """Writes the word, for others to see what was written before."""
    builder.store_atomic(value, pointer(builder, address), "release", 8)


@whole
def swapped(builder, address, old, new):
    """1, and the word is now `new`, if it was `old`; else 0."""
    pair = builder.cmpxchg(pointer(builder, address), old, new, "acq_rel", "acquire")
    return builder.zext(builder.extract_value(pair, 1), I64)


@instruction
def _relax(builder):
    """What a processor wants to be told in a loop that waits."""
    if host().x86:
        kind = ir.FunctionType(ir.VoidType(), [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])


@functools.cache
def make_pause():
    """pause(turn): what stands in a loop that waits, `turn` its number."""
    spins = costs.SPIN_TURNS

    def pause(turn):
        if turn % spins == 0:
            yield_cpu()
        else:
            _relax()

    return cache.external(pause, host(), spins)


@functools.cache
def make_meet():
    """meet(barrier, arrivals): waits until `arrivals` threads in all have come, its own coming being one; for 1, nothing."""
    pause, spins = make_pause(), costs.SPIN_TURNS

    def meet(barrier, arrivals):
        if arrivals == 1 or _arrive(barrier) >= arrivals:
            return
        turn = 1
        while seen(barrier) < arrivals:
            pause(turn)
            turn += 1

    return cache.external(meet, host(), spins)
