"""How long a block waits for another, and how all of them leave when one has waited in vain.

A wait is bounded by time.  Who has waited too long says so in the fault word, which every waiting block looks at
now and then, and so does a block that begins: all leave, and the launches behind them run empty.  A block leaves as
one.  Its threads find out at different steps, so they raise one of two flags in shared memory, which take turns: a flag
that is raised in a step's wait is looked at by all threads behind the next step's sends.  In between there is a barrier
of the block, and before the flag's next turn another one.  A block that begins raises the second flag, for step 0.
"""

from collections.abc import Callable
from typing import NamedTuple

from .faults import GAVE_UP
from .numba_cuda import cuda, types
from .ptx import (
    global_address,
    global_timer,
    load_relaxed_u,
    load_shared_u,
    raise_flag,
    store_relaxed_u,
    store_shared_u,
)

u32, u64 = types.uint32, types.uint64
FLAGS = 16  # bytes of shared memory: two words, and the rest of what keeps 16 bytes aligned


class Waiting(NamedTuple):
    """open(flags, fault): by one thread, before the block's first barrier.  flags: the shared address of FLAGS bytes.

    begun(tries, since): the time from which a wait counts, once it has lasted a while; 0 before.
    hopeless(tries, since, fault): whether to give up; looks at every `look`-th try.
    give_up(flags, step, fault): by the thread that has waited in vain in this step's wait.
    left(flags, step): whether the block has to leave, for all threads alike: behind this step's sends.
    """

    open: Callable
    begun: Callable
    hopeless: Callable
    give_up: Callable
    left: Callable


def waiting(limit: int, look: int) -> Waiting:
    """limit: nanoseconds.  look: tries, a power of 2."""
    LOOK, OFTEN = look, look - 1

    @cuda.jit(device=True)
    def open(flags, fault):
        """Lowers the flags; but raises the second where somebody has given up already: this block need not begin."""
        store_shared_u(flags, u32(0))
        store_shared_u(u32(flags + u32(4)), u32(load_relaxed_u(global_address(fault, 0)) == u32(GAVE_UP)))

    @cuda.jit(device=True)
    def begun(tries, since):
        return global_timer() if tries == u32(LOOK) else since

    @cuda.jit(device=True)
    def hopeless(tries, since, fault):
        if tries & u32(OFTEN) != u32(0):
            return False
        late = global_timer() - since > u64(limit)
        return late or load_relaxed_u(global_address(fault, 0)) == u32(GAVE_UP)

    @cuda.jit(device=True)
    def give_up(flags, step, fault):
        store_relaxed_u(global_address(fault, 0), u32(GAVE_UP))
        raise_flag(u32(flags + 4 * (step & 1)))

    @cuda.jit(device=True)
    def left(flags, step):
        return load_shared_u(u32(flags + 4 * (step + 1 & 1))) != u32(0)

    return Waiting(open, begun, hopeless, give_up, left)
