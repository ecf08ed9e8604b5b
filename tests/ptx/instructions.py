"""Every opcode that the interpreter knows, but for those that steer threads (program.py)."""

from tests.ptx import (
    access,
    arithmetic,
    asynchronous,
    atomics,
    bits,
    clusters,
    compare,
    convert,
    copies,
    functions,
    moves,
    synchronise,
    warp,
)

BUILDERS = arithmetic.TABLE | functions.TABLE | compare.TABLE | moves.TABLE | convert.TABLE | bits.TABLE
BUILDERS |= access.TABLE | atomics.TABLE | copies.TABLE | warp.TABLE
BUILDERS |= clusters.TABLE | synchronise.TABLE | asynchronous.TABLE
