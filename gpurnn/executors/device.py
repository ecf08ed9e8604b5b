"""What the CUDA executors share: built kernels, matrix products by cuBLAS, and the buffers of a sweep through time.

Forward: one product projects all inputs into the slots, then an executor goes through time.  Backward: it goes back and
turns the slots into gradients in place, then one product each gives dW_ih, dW_hh and dx.  Nothing waits for the device.

Precisions of the products, which always add up in float32 (float64 in "float64"): "float32" and "float64" exactly,
"bfloat16", "float16" and "tf32" with both factors rounded to that.  Arrays, states and parameters keep their own type.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.executors import cache, layout
from gpurnn.executors.layout import is_ragged, lengths_of, ordered
from gpurnn.executors.numpy_loop import States, Weights
from gpurnn.kernels import build
from gpurnn.kernels.launch import Launcher
from gpurnn.kernels.plan import Chip

Array = Any

INFERENCE_BYTES = 256 << 20  # of slots; longer sequences are projected and run a piece at a time


class Tape(NamedTuple):
    """What backward needs, the same of every CUDA executor: either may go back over what the other wrote.

    `slots` is overwritten by the gradients, unless a backward is told to keep it.  lengths: (N,) int64 on the device.
    """

    cell: Cell
    x: Array
    weights: Weights
    reverse: bool
    rows: np.ndarray
    lengths: Array
    slots: Array
    h: Array
    rest: Array
    precision: str


class Sweep(NamedTuple):
    """One pass forward: `tape` (slots of `steps` time steps only without training), and what is not kept for backward."""

    tape: Tape
    training: bool
    bias: Array
    params: Array
    weight_hh: Array  # its gates in the order of the slots
    steps: int


def begin(
    cell: Cell,
    x: Array,
    weights: Weights,
    state: tuple[Array, ...],
    rows: np.ndarray,
    reverse: bool,
    training: bool,
    precision: str,
) -> Sweep:
    """Buffers, with the initial states in their places."""
    xp = backend.xp
    T, N, _ = x.shape
    H, S, trace, dtype = weights.weight_hh.shape[1], cell.states, cell.trace, x.dtype
    allocate = xp.zeros if is_ragged(rows, N) else xp.empty  # nothing but zeros may stand where a row has ended
    h = allocate((T + 1, N, H), dtype)
    rest = allocate((S - 1, T + 1 if training else 1, N, H), dtype)
    lengths = xp.asarray(lengths_of(rows, N)) if is_ragged(rows, N) else xp.full(N, T, np.int64)
    _place(h, state[0], lengths, reverse, is_ragged(rows, N))
    for part, given in zip(rest, state[1:], strict=True):
        _place(part, given, lengths, reverse, training and is_ragged(rows, N))
    steps = T if training else max(1, min(T, INFERENCE_BYTES // max(1, N * trace.slots * H * dtype.itemsize)))
    slots = allocate((steps, N, trace.slots * H), dtype)
    tape = Tape(cell, x, weights, reverse, rows, lengths, slots, h, rest, precision)
    bias, params = layout.biases(cell, weights, H, xp), layout.params(weights, H, xp)
    return Sweep(tape, training, bias, params, ordered_weight_hh(cell, weights), steps)


def _place(states: Array, initial: Array, lengths: Array, reverse: bool, ragged: bool) -> None:
    if ragged and reverse:
        states[lengths, backend.xp.arange(len(lengths))] = initial
    else:
        states[-1 if reverse else 0] = initial


def pieces(sweep: Sweep) -> Iterator[tuple[int, int, Array]]:
    """(t0, t1, slots of these steps with x projected into them), in the order in which time runs."""
    tape = sweep.tape
    weight_x = ordered(tape.weights.weight_ih, tape.cell.trace.x_order, tape.h.shape[2])
    starts = range(0, len(tape.x), max(1, sweep.steps))
    for t0 in reversed(starts) if tape.reverse else starts:
        t1 = min(len(tape.x), t0 + sweep.steps)
        slots = tape.slots[: t1 - t0]
        product(_flat(tape.x[t0:t1]), weight_x.T, x_slots(tape, slots), tape.precision)
        yield t0, t1, slots


def x_slots(tape: Tape, slots: Array) -> Array:
    """The slots of x, or of dL/dx projected, as a matrix (T*N, G*H)."""
    H, start = tape.h.shape[2], tape.cell.trace.x_start
    return _flat(slots)[:, start * H : (start + tape.cell.gates) * H]


def r_slots(tape: Tape, slots: Array) -> Array:
    return _flat(slots)[:, : tape.cell.gates * tape.h.shape[2]]


def finish(sweep: Sweep, final: tuple[Array, ...]) -> tuple[States, Tape | None]:
    tape = sweep.tape
    N = tape.x.shape[1]
    visible = tape.h
    if is_ragged(tape.rows, N) and tape.reverse:  # initial states stand in h behind each row's end
        visible = tape.h.copy()
        visible[tape.lengths, backend.xp.arange(N)] = 0
    return States(visible, final), tape if sweep.training else None


def parameters(tape: Tape) -> tuple[Array, Array]:
    """The cell's own parameters (P, H), and zeros (P, N, H) for their gradients, row by row."""
    N, H = tape.h.shape[1:]
    params = layout.params(tape.weights, H, backend.xp)
    return params, backend.xp.zeros((len(params), N, H), tape.x.dtype)


def ordered_weight_hh(cell: Cell, weights: Weights) -> Array:
    """weight_hh (G*H, H), its gates in the order of the slots."""
    return backend.xp.ascontiguousarray(ordered(weights.weight_hh, cell.trace.r_order, weights.weight_hh.shape[1]))


def with_unit_stride(dy: Array) -> Array:
    """dy as kernels read it, unit by unit; steps and rows may stand anywhere, a step's rows within 2^31 values."""
    near = dy.shape[1] * dy.strides[1] < dy.itemsize << 31
    return dy if dy.strides[-1] == dy.itemsize and near else backend.xp.ascontiguousarray(dy)


def weight_gradients(tape: Tape, slots: Array, grads: Weights) -> Array:
    """Adds dW_ih, dW_hh and the biases' gradients, from the gradients in the slots; returns dx (T, N, I)."""
    xp, cell, trace = backend.xp, tape.cell, tape.cell.trace
    T, N, I = tape.x.shape
    H, dtype = tape.h.shape[2], tape.x.dtype
    dr, dx = r_slots(tape, slots), x_slots(tape, slots)
    before = _flat(tape.h[1:] if tape.reverse else tape.h[:T])
    ones = xp.ones((1, T * N), dtype)
    for gradient, order, factor, other in (
        (grads.weight_hh, trace.r_order, dr, before),
        (grads.weight_ih, trace.x_order, dx, _flat(tape.x)),
    ):
        value = product(factor.T, other, xp.empty(gradient.shape, dtype), tape.precision)
        layout.add_ordered(gradient, value, order, H)
    exact = "float64" if dtype == np.float64 else "float32"
    for bias, order, factor in ((grads.bias_hh, trace.r_order, dr), (grads.bias_ih, trace.x_order, dx)):
        if bias is not None:  # a product sums columns in one order, whatever the layout
            layout.add_ordered(bias, product(ones, factor, xp.empty((1, cell.gates * H), dtype), exact)[0], order, H)
    weight_x = xp.ascontiguousarray(ordered(tape.weights.weight_ih, trace.x_order, H))
    return product(dx, weight_x, xp.empty((T * N, I), dtype), tape.precision).reshape(T, N, I)


def _flat(array: Array) -> Array:
    return array.reshape(-1, array.shape[-1])


def product(a: Array, b: Array, out: Array, precision: str, add: bool = False) -> Array:
    """out = a b, or out += a b with `add`, for matrices with unit stride along one axis; out along its rows.

    cuBLAS counts by columns, so it is asked for out^T = b^T a^T.
    """
    (m, k), n = a.shape, b.shape[1]
    if not (m and n):
        return out
    if not k:
        if not add:
            out.fill(0)
        return out
    multiply, handle = _gemm()
    kind, compute, automatic = _kinds(backend.xp, precision, out.dtype.char)
    one, beta = _scales(out.dtype.char, add)
    (ta, lda), (tb, ldb) = _leading(a), _leading(b)
    multiply(
        handle, tb, ta, n, m, k, one, b.data.ptr, kind, ldb, a.data.ptr, kind, lda, beta, out.data.ptr, kind,
        _row_stride(out), compute, automatic,
    )  # fmt: skip
    return out


def adding(b: Array, a_row: int, out_row: int, precision: str) -> Callable[[int, int, int], None]:
    """`add(m, a, out)`: out (m, n) += a (m, k) b, a and out at these addresses, their rows so many bytes apart.

    For the products of all time steps with one b, on the stream that is current now: a call of cuBLAS and no more.
    """
    (k, n), size = b.shape, b.itemsize
    multiply, handle = _gemm()
    kind, compute, automatic = _kinds(backend.xp, precision, b.dtype.char)
    one, beta = _scales(b.dtype.char, True)
    (tb, ldb), lda, ldc, factor = _leading(b), a_row // size, out_row // size, b.data.ptr

    def add(m: int, a: int, out: int) -> None:
        multiply(handle, tb, 0, n, m, k, one, factor, kind, ldb, a, kind, lda, beta, out, kind, ldc, compute, automatic)

    return add


def _gemm() -> tuple[Any, int]:
    """cuBLAS's product, and the handle that it takes: CuPy's, unless a step is being captured."""
    cuda = backend.xp.cuda
    return backend.gemm or cuda.cublas.gemmEx, cuda.device.get_cublas_handle()


def _leading(matrix: Array) -> tuple[int, int]:
    """(whether cuBLAS transposes it, leading dimension), seen as the transpose that a row-major matrix is to cuBLAS."""
    (rows, columns), (down, along), size = matrix.shape, matrix.strides, matrix.itemsize
    if along == size or columns == 1:
        return 0, max(_row_stride(matrix), columns)  # CUBLAS_OP_N
    if down == size or rows == 1:
        return 1, max(along // size, rows)  # CUBLAS_OP_T
    raise ValueError(f"expected a matrix with unit stride along one axis, got strides {matrix.strides}")


def _row_stride(matrix: Array) -> int:
    return matrix.strides[0] // matrix.itemsize if matrix.shape[0] > 1 else max(1, matrix.shape[1])


@functools.cache
def _scales(dtype: str, add: bool) -> tuple[int, int]:
    """Where alpha = 1 and beta lie on the host, for as long as the process lives."""
    scales = np.array([1.0, float(add)], dtype)
    _kept.append(scales)
    return scales.ctypes.data, scales.ctypes.data + scales.itemsize


_kept: list[np.ndarray] = []


@functools.cache
def _kinds(xp: Any, precision: str, dtype: str) -> tuple[int, int, int]:
    """cuBLAS's type of the arrays, how it computes, and that it may choose the way."""
    cublas, runtime = xp.cuda.cublas, xp.cuda.runtime
    if dtype == "d":
        return runtime.CUDA_R_64F, cublas.CUBLAS_COMPUTE_64F, cublas.CUBLAS_GEMM_DEFAULT
    compute = {
        "float32": cublas.CUBLAS_COMPUTE_32F,
        "bfloat16": cublas.CUBLAS_COMPUTE_32F_FAST_16BF,
        "float16": cublas.CUBLAS_COMPUTE_32F_FAST_16F,
        "tf32": cublas.CUBLAS_COMPUTE_32F_FAST_TF32,
    }
    return runtime.CUDA_R_32F, compute[precision], cublas.CUBLAS_GEMM_DEFAULT


def kernel(factory: Any, trace: Any = None, /, **constants: Any) -> Launcher:
    """The kernel of these constants for the current device, built once and loaded once."""
    return _launcher(build.recipe(factory, trace, **constants), backend.xp.cuda.Device().id)


@functools.lru_cache(maxsize=512)
def _launcher(recipe: build.Recipe, device: int) -> Launcher:
    return Launcher(build.build(recipe, _chip(device).capability, cache.folder()))


def chip() -> Chip:
    """The current device."""
    return _chip(backend.xp.cuda.Device().id)


@functools.cache
def _chip(number: int) -> Chip:
    device = backend.xp.cuda.Device(number)
    digits, attributes = device.compute_capability, device.attributes
    capability = int(digits[:-1]), int(digits[-1])
    return Chip(number, capability, attributes["MultiProcessorCount"], attributes["MaxSharedMemoryPerBlockOptin"])


def grid(count: int, each: int) -> int:
    return -(-count // each)
