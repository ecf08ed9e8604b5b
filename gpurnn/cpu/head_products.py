"""Recurrent products head by head: weight_hh packed, h times it, and gradients back through it, for the units of a share.

A share's units may be of several heads, of some only a part.  With one head all is as `products` and `packing` have it.
"""

import functools

import numpy as np

from gpurnn.cpu import cache
from gpurnn.cpu.cache import call
from gpurnn.cpu.gemm import make_gemm
from gpurnn.cpu.instructions import least, word
from gpurnn.cpu.packing import make_pack_gates, make_pack_rows
from gpurnn.cpu.products import make_give_back, make_project
from gpurnn.cpu.simd import host


@functools.cache
def make_pack_heads(dtype: np.dtype):
    """pack_heads(weights, order, gates, H, head, unit, end_unit, part, parts, out): see `pack_gates`, head after head."""
    pack, width, size = make_pack_gates(dtype), host().width(dtype), dtype.itemsize

    def pack_heads(weights, order, gates, H, head, unit, end_unit, part, parts, out):
        while unit < end_unit:
            stop = least(end_unit, (unit // head + 1) * head)
            pack(weights, head, order, gates, H, unit, stop, part, parts, out)
            out += gates * ((stop - unit + width - 1) // width) * width * head * size
            unit = stop

    return cache.external(pack_heads, dtype.str, host())


@functools.cache
def make_recur(dtype: np.dtype):
    """recur(dot, h, m, weights, H, head, unit, end_unit, order, gates, c, ldc, accumulate): m rows of C (+)= h W^T for those
    units, each by its own head's units of h (m, H).

    c: where the share's first unit of the first gate goes.  weights: as `pack_heads` leaves them, or as for `project`.
    """
    project, width, size = make_project(dtype), host().width(dtype), dtype.itemsize

    def recur(dot, h, m, weights, H, head, unit, end_unit, order, gates, c, ldc, accumulate):
        if head == H:
            project(dot, 1, h, 0, H * size, m, weights, H, H, unit, end_unit, order, gates, c, 0, ldc, accumulate)
            return
        first = unit
        while unit < end_unit:
            start = unit // head * head
            stop = least(end_unit, start + head)
            to = c + (unit - first) * size
            project(
                dot, 1, h + start * size, 0, H * size, m, weights, head, H, unit, stop, order, gates, to, 0, ldc, accumulate
            )  # fmt: skip
            if not dot:
                weights += gates * ((stop - unit + width - 1) // width) * width * head * size
            unit = stop

    return cache.external(recur, dtype.str, host())


@functools.cache
def make_pack_heads_back(dtype: np.dtype):
    """pack_heads_back(weights, order, gates, H, head, unit, end_unit, part, parts, out): the columns of W_hh that are those
    units, all gates' rows in one matrix; of several heads, head after head, each gate's `head` rows by themselves.
    """
    pack, width, size = make_pack_rows(dtype), host().width(dtype), dtype.itemsize

    def pack_heads_back(weights, order, gates, H, head, unit, end_unit, part, parts, out):
        row = head * size
        if head == H:
            pack(weights + unit * size, row, order, gates, H, end_unit - unit, part, parts, out)
            return
        while unit < end_unit:
            start = unit // head * head
            stop = least(end_unit, start + head)
            for place in range(gates):
                at = weights + (word(order + place * 8) * H + start) * row + (unit - start) * size
                pack(at, row, 0, 1, head, stop - unit, part, parts, out)
                out += head * ((stop - unit + width - 1) // width) * width * size
            unit = stop

    return cache.external(pack_heads_back, dtype.str, host())


@functools.cache
def make_recur_back(dtype: np.dtype):
    """recur_back(lies, combine, d, ldd, m, weights, H, head, unit, end_unit, order, gates, c, ldc): m rows of C += D W for
    those units, each from the gates of its own head's units in D (m, gates*H).

    c: where the share's first unit goes.  weights: as `pack_heads_back` leaves them, or W as it `lies`.  combine: as for
    `give_back`.
    """
    give_back, gemm, width, size = make_give_back(dtype), make_gemm(dtype), host().width(dtype), dtype.itemsize

    def recur_back(lies, combine, d, ldd, m, weights, H, head, unit, end_unit, order, gates, c, ldc):
        row = head * size
        if head == H:
            w, ldw = (weights + unit * size, row) if lies else (weights, 0)
            give_back(ldw, combine, 1, d, 0, ldd, m, w, H, end_unit - unit, order, gates, c, 0, ldc, 1)
            return
        while unit < end_unit:
            start = unit // head * head
            stop = least(end_unit, start + head)
            n = stop - unit
            for place in range(gates):
                at = d + (place * H + start) * size
                if not lies:
                    gemm(1, at, 0, ldd, m, weights, 0, head, 1, n, c, 0, 0, ldc, 1)
                    weights += head * ((n + width - 1) // width) * width * size
                    continue
                w = weights + (word(order + place * 8) * H + start) * row + (unit - start) * size
                if combine:
                    call(combine, at, ldd, m, w, row, head, n, c, ldc, 1)
                else:
                    gemm(1, at, 0, ldd, m, w, row, head, 1, n, c, 0, 0, ldc, 1)
            c += n * size
            unit = stop

    return cache.external(recur_back, dtype.str, host())
