"""Where threads that work on the same time step wait for one another, in compiled code.

A wait is far shorter than a thread's sleep and waking: it spins.  Where it lasts, because another process has the other
CPU, it offers its own CPU to whoever can run, again and again.
"""

import functools
import sys

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurnn.executors import cache
from gpurnn.executors.simd import I64, begin, host

PLACES = 3
CACHE_LINE = 128  # bytes: two of them, where processors fetch lines in pairs
SPINS = 1000  # before the CPU is offered: some ten microseconds
OPEN = 1 << 62  # more arrivals than there will ever be

_yield = types.ExternalFunction("SwitchToThread" if sys.platform == "win32" else "sched_yield", types.int32())


class Barrier:
    """For `parties` threads that meet at PLACES, any number of times at each: compiled code knows them by `addresses`."""

    def __init__(self, parties: int):
        self.parties = parties
        self._words = np.zeros((PLACES + 1) * CACHE_LINE // 8, np.int64)  # each place alone in its cache lines
        start = begin(self._words)
        first = start + -start % CACHE_LINE
        self.addresses: tuple[int, ...] = tuple(first + place * CACHE_LINE for place in range(PLACES))

    def open(self) -> None:
        """Lets all pass, now and later: a thread that has failed must not keep the others waiting."""
        self._words[:] = OPEN

    @property
    def is_open(self) -> bool:
        return bool((self._words >= OPEN).any())


def _pointer(builder: ir.IRBuilder, address: ir.Value) -> ir.Value:
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def _arrive(typing, address):
    """One more has arrived; how many have."""

    def codegen(context, builder, signature, args):
        before = builder.atomic_rmw("add", _pointer(builder, args[0]), I64(1), "acq_rel")
        return builder.add(before, I64(1))

    return types.intp(types.intp), codegen


@intrinsic
def _arrived(typing, address):
    """How many have."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def _pause(typing):
    """What a processor wants to be told in a loop that waits."""

    def codegen(context, builder, signature, args):
        if host().x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse2.pause"), [])
        return context.get_dummy_value()

    return types.void(), codegen


@functools.cache
def make_meet():
    """meet(barrier, arrivals): waits until `arrivals` threads in all have come, its own coming being one; for 1, nothing."""

    def meet(barrier, arrivals):
        if arrivals == 1 or _arrive(barrier) >= arrivals:
            return
        spins = 0
        while _arrived(barrier) < arrivals:
            spins += 1
            if spins % SPINS == 0:
                _yield()
            else:
                _pause()

    return cache.external(meet, host())
