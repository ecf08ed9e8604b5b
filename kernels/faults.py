"""The record of what went wrong on the device: written without anybody waiting, read when somebody does.

A record is WORDS int64.  The first fault is kept, and what comes behind it changes no parameter: whoever could spoil them
looks at SITE first.  Threads that find something wrong in one tensor leave the smallest position in FIRST, whatever their
order; one thread behind them, in a launch of its own, makes a fault of it.

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


def settle(_, *, dtype):
    """values: the tensor that FIRST points into."""

    def settle_fault(record, fractions, site, values):
        if cuda.threadIdx.x == 0:
            settle_first(record, fractions, site, values)

    return Source(settle_fault, (RECORD, VALUES, i64, types.CPointer(getattr(types, dtype))), WARP)


def expect_finite(_):
    """value: one float64, such as a loss; a fault where it is not finite."""

    def expect_finite_value(record, fractions, site, value):
        if cuda.threadIdx.x == 0 and not finite(value[0]):
            note(record, fractions, site, i64(0), value[0])

    return Source(expect_finite_value, (RECORD, VALUES, i64, VALUES), WARP)


def begin_update(_, *, dtype):
    """The numbers of the update under way (scalars, see `optim`), from lr (1,) and the updates done, steps (1,) int64.

    1 - beta^t takes log2(t) products, always the same ones: a run that is resumed at t computes the same bits.
    """
    real = getattr(types, dtype)

    def begin_an_update(steps, lr, scalars, beta1, beta2, eps, decay):
        if cuda.threadIdx.x != 0:
            return
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

    return Source(begin_an_update, (RECORD, VALUES, types.CPointer(real), f64, f64, f64, f64), WARP)


def end_update(_, *, dtype):
    """Counts the update; a fault where FIRST says that it left a parameter (params) that is not finite."""

    def end_an_update(record, fractions, site, params, steps):
        if cuda.threadIdx.x != 0:
            return
        settle_first(record, fractions, site, params)
        if record[SITE] == 0:
            steps[0] += 1
            record[NOW] += 1

    return Source(end_an_update, (RECORD, VALUES, i64, types.CPointer(getattr(types, dtype)), RECORD), WARP)
