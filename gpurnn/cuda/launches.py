"""What a training step runs on a device beside recurrent layers: arrays in, arrays out, one function a kernel.

Nothing here waits for the device or copies from the host, so all of it can be captured.  What is wrong with the values goes
to the record of `faults`.  Imported where it is used, on CUDA only: it imports Numba.
"""

import functools
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.cuda import device, faults
from gpurnn.cuda.faults import Site
from gpurnn.kernels import dropout, embedding, losses, norms
from gpurnn.kernels.vectors import WIDTH
from gpurnn.parameters import Parameters
from gpurnn.types import Array


def done() -> int:
    """The address of a count of blocks, 0 between launches, that no other stream's kernels count in."""
    return _counter(*faults.place()).data.ptr


@functools.cache
def _counter(xp: Any, device: int, stream: int) -> Array:
    return xp.zeros(1, np.int64)


def _flat(numbers: Array) -> Array:
    return backend.xp.ascontiguousarray(numbers).reshape(-1)


def cross_entropy(
    logits: Array, targets: Array, ignore: int | None, count: int | Array, total: bool
) -> tuple[Array, Array]:
    """logits (..., C), targets (...) -> E_t (...) float64, or with `total` their sum divided by count, and dlogits.

    dlogits, of the shape and dtype of logits, is that of the losses' sum divided by count: a number, or () int64 on the
    device.
    """
    xp, C = backend.xp, logits.shape[-1]
    rows, given = xp.ascontiguousarray(logits).reshape(-1, C), _flat(targets)
    errors, dlogits, value = xp.empty(len(rows)), xp.empty(rows.shape, rows.dtype), xp.empty(())
    constants = {"dtype": logits.dtype.name, "index": given.dtype.name, "ignoring": ignore is not None}
    constants |= {"counted": not isinstance(count, int), "totalled": total}
    if losses.WARP * losses.MOST_COLUMNS[logits.dtype.name] >= C:
        columns = 1 << max(0, (C - 1) // losses.WARP).bit_length()  # few kernels serve all C
        kernel, blocks = device.kernel(losses.rows, columns=columns, **constants), device.grid(len(rows), losses.WARPS)
    else:
        kernel, blocks = device.kernel(losses.wide_rows, **constants), len(rows)
    pointers = [array.data.ptr for array in (rows, given, errors, dlogits)]
    pointers.append(0 if isinstance(count, int) else count.data.ptr)
    divisor = np.float64(count if isinstance(count, int) else 1)
    site = faults.index_of(Site("targets", targets.shape, C))
    kernel(
        max(1, blocks), *faults.pointers(), site, *pointers, len(rows), C, ignore or 0, 1 / divisor, done(), divisor,
        value.data.ptr,
    )  # fmt: skip
    return value if total else errors.reshape(targets.shape), dlogits.reshape(logits.shape)


def gather(weight: Array, tokens: Array) -> Array:
    """weight (V, dim), tokens of any shape -> (*tokens.shape, dim)."""
    xp, (V, dim), given = backend.xp, weight.shape, _flat(tokens)
    y = xp.empty((*tokens.shape, dim), weight.dtype)
    if given.size:
        kernel = device.kernel(embedding.gather, dtype=weight.dtype.name, index=given.dtype.name)
        pointers = (weight.data.ptr, given.data.ptr, y.data.ptr)
        site = faults.index_of(Site("tokens", tokens.shape, V))
        kernel(device.grid(given.size, embedding.WARPS) + 1, *faults.pointers(), site, *pointers, given.size, dim, V)
    return y


def add_rows(target: Array, rows: Array, values: Array) -> None:
    """target[rows[k]] += values[k] for all k, in one order."""
    xp, (V, dim) = backend.xp, target.shape
    given, values = xp.ascontiguousarray(rows), xp.ascontiguousarray(values)
    if given.size:
        spans = device.grid(dim, embedding.SPAN)
        kernel = device.kernel(embedding.add_rows, dtype=target.dtype.name, index=given.dtype.name)
        kernel(V * spans, target.data.ptr, given.data.ptr, values.data.ptr, given.size, dim, spans)


def advance(calls: Array) -> Array:
    """calls (1,) int64: one more than it was; returns what it was, in memory of its own."""
    call = backend.xp.empty(1, np.int64)
    device.kernel(dropout.advance)(1, calls.data.ptr, call.data.ptr)
    return call


def drop(x: Array, seed: int, call: Array, threshold: int, scale: np.floating) -> Array:
    """x times scale where a value stays, times 0 elsewhere: `kernels.dropout`.  call: its number, (1,) int64."""
    x = backend.xp.ascontiguousarray(x)
    y = backend.xp.empty(x.shape, x.dtype)
    if x.size:
        kernel = device.kernel(dropout.drop, dtype=x.dtype.name, aligned=x.data.ptr % 16 == 0)
        blocks = device.grid(x.size, dropout.THREADS * dropout.EACH)
        kernel(blocks, x.data.ptr, y.data.ptr, x.size, call.data.ptr, seed & 0xFFFFFFFF, seed >> 32, threshold, scale)
    return y


def norm(grads: Parameters, max_norm: float = np.inf) -> Array:
    """(2,) float64: the L2 norm of all gradients, and the factor that brings it down to max_norm."""
    flat, dtype = grads.flat, grads.dtype.name
    blocks = max(1, min(norms.BLOCKS, device.grid(flat.size, norms.THREADS * WIDTH[dtype])))
    partial, out = backend.xp.empty((norms.KINDS, norms.BLOCKS)), backend.xp.empty(2)
    site = faults.index_of(Site("gradient", parts=grads.places))
    arguments = (site, flat.data.ptr, partial.data.ptr, flat.size, np.float64(max_norm), out.data.ptr, done())
    device.kernel(norms.norm, dtype=dtype)(blocks, *faults.pointers(), *arguments)
    return out


def scale(grads: Parameters, found: Array) -> None:
    """Multiplies all gradients by the factor that `norm` found."""
    flat, dtype = grads.flat, grads.dtype.name
    if flat.size:
        blocks = device.grid(flat.size, norms.THREADS * WIDTH[dtype])
        device.kernel(norms.scale, dtype=dtype)(blocks, flat.data.ptr, found.data.ptr, flat.size)
