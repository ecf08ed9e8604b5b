"""The record of what went wrong on the device: written without anybody waiting, read when somebody does.

A record is WORDS int64.  The first fault is kept, and what comes behind it changes no parameter: whoever could spoil
them looks at SITE first.  Threads that find something wrong in one tensor leave the smallest position in FIRST,
whatever their order; one thread behind them all makes a fault of it.

    SITE       0: nothing; GAVE_UP; else the number under which the host knows the tensor and the message
    POSITION   of the first wrong value, counted flat            VALUE   that value, as float64
    FIRST      where positions meet; NOWHERE between kernels     NOW     updates done: a fault lets it stand
"""

import math

from .build import Source
from .numba_cuda import cuda, types
from .vectors import finite

SITE, POSITION, VALUE, FIRST, NOW = range(5)
WORDS = 8
NOWHERE = (1 << 63) - 1
GAVE_UP = 1  # a kernel waited in vain for another block; it stores this itself

i64, f64 = types.int64, types.float64
RECORD = types.CPointer(i64)
VALUES = types.CPointer(f64)  # the same address
WARP = 32


@cuda.jit(device=True)
def note(record, fractions, site, position, value):
    """Keeps a fault, unless there is one.  By one thread.  fractions: the record, as float64."""
    if record[SITE] == 0:
        record[SITE], record[POSITION] = site, position
        fractions[VALUE] = value


@cuda.jit(device=True)
def settle_first(record, fractions, site, values):
    """Makes a fault of the position in FIRST, if one is there.  By one thread."""
    position = record[FIRST]
    if position != NOWHERE:
        note(record, fractions, site, position, f64(values[position]))
        record[FIRST] = NOWHERE


def begin_update(_, *, dtype):
    """The numbers of the update under way (scalars, see `optim`), from lr (1,) and the updates done, steps (1,) int64.

    1 - beta^t takes log2(t) products, always the same ones: a run that is resumed at t computes the same bits.
    loss (1,): a fault, named by `site`, where it is not finite; site 0: nobody looks.
    """
    real = getattr(types, dtype)

    def begin_an_update(record, fractions, site, loss, steps, lr, scalars, beta1, beta2, eps, decay):
        if cuda.threadIdx.x != 0:
            return
        if site != 0 and not finite(loss[0]):
            note(record, fractions, site, i64(0), loss[0])
        power1, power2 = f64(1), f64(1)
        t = steps[0] + 1
        while t > 0:
            if t & 1:
                power1 *= beta1
                power2 *= beta2
            beta1 *= beta1
            beta2 *= beta2
            t >>= 1
        root = math.sqrt(1 - power2)
        scalars[0] = real(lr[0] * root / (1 - power1))
        scalars[1] = real(eps * root)
        scalars[2] = real(1 - lr[0] * decay)

    signature = (RECORD, VALUES, i64, VALUES, RECORD, VALUES, types.CPointer(real), f64, f64, f64, f64)
    return Source(begin_an_update, signature, WARP)


@cuda.jit(device=True)
def end_update(record, fractions, site, params, steps):
    """Counts the update; a fault where FIRST says that it left a parameter that is not finite.  By one thread."""
    settle_first(record, fractions, site, params)
    if record[SITE] == 0:
        steps[0] += 1
        record[NOW] += 1
