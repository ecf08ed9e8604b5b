"""The record of what went wrong on the device: written without anybody waiting, read when somebody does.

A record is WORDS int64.  The first fault is kept, and what comes behind it changes no parameter: whoever could spoil
them looks at SITE first.  Threads that find something wrong in one tensor leave the smallest position in FIRST,
whatever their order; one thread behind them all makes a fault of it.

    SITE       0: nothing; GAVE_UP; else the index under which the host knows the tensor and the message
    POSITION   of the first wrong value, counted flat            VALUE   that value, as float64
    FIRST      where positions meet; NOWHERE between kernels     NOW     updates done: a fault lets it stand
"""

from .numba_cuda import cuda, types

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
