"""Products of layers in heads by cuBLAS: the same product of many blocks, evenly apart, in one call.

weight_hh (G*H, H/K) is G*K blocks.  A step's product is a call for each gate, with a block for each head, or a call for each
head where these are fewer; backward, where all gates of a head are added up in one place, always one for each gate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from gpurnn import backend
from gpurnn.cuda.device import kinds, leading, row_stride, scales
from gpurnn.types import Array


class Blocks(NamedTuple):
    """Matrices alike: the first of them, and how many values on the next begins."""

    first: Array
    apart: int


def add_products(a: Blocks, b: Blocks, out: Blocks, count: int, precision: str) -> None:
    """out += a b, for each of `count` blocks.  Types and strides of each block as for `device.product`."""
    (m, k), n = a.first.shape, b.first.shape[1]
    if not (m and n and k):
        return
    multiply, handle = _gemm()
    kind, compute, automatic = kinds(backend.xp, precision, a.first.dtype.char)
    of_out = kinds(backend.xp, precision, out.first.dtype.char)[0]
    one, beta = scales(out.first.dtype.char, True)
    (ta, lda), (tb, ldb) = leading(a.first), leading(b.first)
    multiply(
        handle, tb, ta, n, m, k, one, b.first.data.ptr, kind, ldb, b.apart, a.first.data.ptr, kind, lda, a.apart, beta,
        out.first.data.ptr, of_out, row_stride(out.first), out.apart, count, compute, automatic,
    )  # fmt: skip


def adding(weight_hh: Array, H: int, h_row: int, r_row: int, precision: str) -> Callable[[int, int, int], None]:
    """`add(m, h, r)`: r (m, G*H) += h (m, H) times each head's own weights; h and r at these addresses, rows in bytes apart.

    weight_hh: its gates in the order of r.
    """
    width = weight_hh.shape[1]
    gates, heads = len(weight_hh) // H, H // width
    block, size = width * width, weight_hh.itemsize
    if heads < gates:
        places = [(head * block, head * width, head * width) for head in range(heads)]
        count, apart = gates, (H * width, 0, H)
    else:
        places = [(gate * H * width, 0, gate * H) for gate in range(gates)]
        count, apart = heads, (block, width, width)
    return _adding(weight_hh, 1, places, count, apart, (h_row // size, r_row // size), precision)


def adding_back(weight_hh: Array, H: int, dr_row: int, dh_row: int, precision: str) -> Callable[[int, int, int], None]:
    """`add(m, dr, dh)`: dh (m, H) += what the gradients dr (m, G*H) of each head's gates mean for its units; see `adding`."""
    width, size = weight_hh.shape[1], weight_hh.itemsize
    places = [(gate * H * width, gate * H, 0) for gate in range(len(weight_hh) // H)]
    apart = width * width, width, width
    return _adding(weight_hh, 0, places, H // width, apart, (dr_row // size, dh_row // size), precision)


def _adding(
    weight_hh: Array,
    transposed: int,
    places: list[tuple[int, int, int]],
    count: int,
    apart: tuple[int, int, int],
    rows: tuple[int, int],
    precision: str,
) -> Callable[[int, int, int], None]:
    """A call for each of `places`: where in weights, vector and result its first block begins, in values, as `apart`."""
    width, size, first = weight_hh.shape[1], weight_hh.itemsize, weight_hh.data.ptr
    multiply, handle = _gemm()
    kind, compute, automatic = kinds(backend.xp, precision, weight_hh.dtype.char)
    one, beta = scales(weight_hh.dtype.char, True)
    (w_apart, a_apart, out_apart), (lda, ldc) = apart, rows
    starts = [(first + w * size, a * size, out * size) for w, a, out in places]

    def add(m: int, a: int, out: int) -> None:
        for w, a_at, out_at in starts:
            multiply(
                handle, transposed, 0, width, m, width, one, w, kind, width, w_apart, a + a_at, kind, lda, a_apart, beta,
                out + out_at, kind, ldc, out_apart, count, compute, automatic,
            )  # fmt: skip

    return add


def _gemm() -> tuple[Any, int]:
    """cuBLAS's product of many blocks, and the handle that it takes: CuPy's, unless a step is being captured."""
    cuda = backend.xp.cuda
    return (backend.thread.cublas or cuda.cublas).gemmStridedBatchedEx, cuda.device.get_cublas_handle()
