"""The table of opcodes: each with the file that has it."""

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

FILES = (
    arithmetic, functions, compare, moves, convert, bits, access, atomics, copies, warp, clusters, synchronise,
    asynchronous,
)  # fmt: skip
BUILDERS = {opcode: build for file in FILES for opcode, build in file.TABLE.items()}
STEERING = ("bra", "call", "ret", "exit", "bar", "barrier", "trap")  # threads, by `program` itself
FILE_OF = {opcode: file.__name__.rpartition(".")[2] for file in FILES for opcode in file.TABLE}
FILE_OF |= dict.fromkeys(STEERING, "program")
