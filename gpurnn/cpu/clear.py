"""Zeros in a large buffer, written by all threads: one alone leaves half of the memory's bandwidth unused."""

import functools

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from gpurnn.cpu import cache, costs, crew
from gpurnn.cpu.cache import Compiled
from gpurnn.cpu.instructions import instruction
from gpurnn.cpu.records import Record
from gpurnn.cpu.simd import I32, I64, Emitter, address, host
from gpurnn.cpu.threads import shares
from gpurnn.parameters.buffers import ALIGNMENT

LINES = Record("", "begin end")


@functools.cache
def _clear(streamed: bool) -> Compiled:
    """clear(values, part), see `crew.run`.  A part's share: where its cache lines begin, and where they end."""
    read, read_share, apart = LINES.read, LINES.read_share, LINES.stride
    dtype, vector = np.dtype(np.float64), host().register_bytes

    @instruction
    def clear_line(b: ir.IRBuilder, line):
        emit = Emitter(b, dtype, host().width(dtype))
        for offset in range(0, ALIGNMENT, vector):
            place = b.inttoptr(b.add(line, I64(offset)), emit.type.as_pointer())
            store = b.store(emit.constant(0), place, align=vector)
            if streamed:
                store.set_metadata("nontemporal", b.module.add_metadata([I32(1)]))

    @instruction
    def finish(b: ir.IRBuilder):
        """Nobody hears that a part is done before what it streamed has arrived."""
        if streamed and host().x86:
            kind = ir.FunctionType(ir.VoidType(), [])
            b.call(cgutils.get_or_insert_function(b.module, kind, "llvm.x86.sse.sfence"), [])

    def clear(values, part):
        _parties, _ready, _barrier, shares = read(values)
        begin, end = read_share(values + shares + part * apart)
        for line in range(begin, end, ALIGNMENT):
            clear_line(line)
        finish()

    return cache.external(clear, streamed, host(), record=LINES)


def clear(buffer: np.ndarray) -> None:
    """buffer[...] = 0, of one that begins and ends with a cache line as those of `Parameters` do."""
    begin = address(buffer)
    cuts = crew.cut(lambda parts: shares(buffer.nbytes // ALIGNMENT, parts))
    lines = [(begin + cut.start * ALIGNMENT, begin + cut.stop * ALIGNMENT) for cut in cuts]
    crew.run(_clear(buffer.nbytes > costs.STREAMED_BYTES), (), lines)
