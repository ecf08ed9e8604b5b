"""Kernels as Numba compiles them, run from their PTX: right ones give the right numbers, and planted bugs are found."""

import math

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.kernels.numba_cuda import cuda, types
from tests.ptx.errors import Deadlock, OutOfBounds, PtxError, Race, Uninitialised
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse

SEEDS = (None, 0, 1, 2)
THREADS = 64


def compiled(function, *kinds):
    """The module of a kernel whose arguments are arrays of these NumPy types, or int32 where it says "n"."""
    names = {"f4": types.float32[::1], "f8": types.float64[::1], "i4": types.int32[::1], "n": types.int32}
    try:
        text, _ = cuda.compile(
            function, tuple(names[k] for k in kinds), cc=(9, 0), device=False, abi="numba", output="ptx"
        )
    except Exception as error:
        if "nvvm" in str(error).lower() and "found" in str(error).lower():
            pytest.skip(f"needs NVVM: {error}")
        raise
    return parse(text)


def execute(module, grid, block, *args, seed=None):
    """Returns the arrays as the kernel left them; a tuple stands for an array that nobody has written."""
    memory, flat, held = Memory(), [], []
    for k, value in enumerate(args):
        if isinstance(value, int):
            flat.append(value)
            continue
        blank = isinstance(value, tuple)
        array = np.zeros(value[1], value[0]) if blank else value
        address = memory.put(array, name=f"argument{k}", initialised=not blank)
        flat += [0, 0, array.size, array.itemsize, address, array.size, array.itemsize]
        held.append((address, array))
    run(module, grid, block, flat, memory, seed=seed)
    return [memory.get(address, array) for address, array in held]


def found(module, grid, block, *args) -> set:
    """The errors that any of the schedules finds."""
    kinds = set()
    for seed in SEEDS:
        try:
            execute(module, grid, block, *args, seed=seed)
        except PtxError as error:
            kinds.add(type(error))
    return kinds


def axpy(slack):
    def kernel(x, y, n):
        i = cuda.grid(1)
        if i < n + slack:
            y[i] = 2 * x[i] + y[i]

    return kernel


def test_elementwise_with_a_ragged_end():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 1001)).astype("f4")
    _, out = execute(compiled(axpy(0), "f4", "f4", "n"), 8, 128, x, y, 1001)
    assert (out == 2 * x + y).all()


def test_an_index_one_too_far():
    x = np.zeros(1001, "f4")
    assert found(compiled(axpy(1), "f4", "f4", "n"), 8, 128, x, x, 1001) == {OutOfBounds}


def reduction(first=True, inside=True, shift=0):
    def kernel(x, out):
        shared = cuda.shared.array(THREADS, types.float32)
        t = cuda.threadIdx.x
        shared[t] = x[cuda.grid(1)]
        if first:
            cuda.syncthreads()
        width = THREADS // 2
        while width > 0:
            if t < width:
                shared[t] += shared[t + width + shift]
            if inside:
                cuda.syncthreads()
            width //= 2
        if t == 0:
            out[cuda.blockIdx.x] = shared[0]

    return kernel


@pytest.mark.parametrize("seed", SEEDS)
def test_a_tree_of_sums_in_shared_memory(seed):
    x = np.arange(3 * THREADS, dtype="f4")
    _, out = execute(compiled(reduction(), "f4", "f4"), 3, THREADS, x, ("f4", 3), seed=seed)
    assert (out == x.reshape(3, -1).sum(1)).all()


@pytest.mark.parametrize(
    "change, errors",
    [({"first": False}, {Race, Uninitialised}), ({"inside": False}, {Race}), ({"shift": 1}, {OutOfBounds, Race})],
)
def test_a_tree_of_sums_gone_wrong(change, errors):
    kinds = found(compiled(reduction(**change), "f4", "f4"), 2, THREADS, np.ones(2 * THREADS, "f4"), ("f4", 2))
    assert kinds and kinds <= errors


def library(x, y, n):
    i = cuda.grid(1)
    if i < n:
        v = x[i]
        y[i] = math.tanh(v)
        y[i + n] = math.exp(v)
        y[i + 2 * n] = math.log(abs(v))
        y[i + 3 * n] = math.sin(v)
        y[i + 4 * n] = math.pow(abs(v), v)
        y[i + 5 * n] = math.sqrt(abs(v)) / v
        y[i + 6 * n] = math.copysign(v, -1.0)
        y[i + 7 * n] = math.expm1(v)


@pytest.mark.parametrize("dtype, tolerance", [("f4", 2.5e-7), ("f8", 5e-16)])
def test_library_functions(dtype, tolerance):
    """libdevice: bit tricks, tables, carries, calls; its documented errors are 1 or 2 units in the last place."""
    v = np.random.default_rng(0).standard_normal(101) * 3
    v[:6] = [1e-5, -1e-5, 0.55, 20, -20, 1e5 if dtype == "f8" else 12]
    v = v.astype(dtype)
    with np.errstate(over="ignore"):
        wide = v.astype("f8")
        power, exponential, less_one = np.abs(wide) ** wide, np.exp(wide), np.expm1(wide)
        expected = [
            np.tanh(wide),
            exponential,
            np.log(np.abs(wide)),
            np.sin(wide),
            power,
            np.sqrt(np.abs(wide)) / wide,
            -np.abs(wide),
            less_one,
        ]
    _, out = execute(compiled(library, dtype, dtype, "n"), 4, 32, v, (dtype, 8 * v.size), v.size)
    for row, values in zip(out.reshape(8, -1), expected, strict=True):
        np.testing.assert_allclose(row, values, rtol=4 * tolerance if values is power else tolerance)


def warp_sums(x, out):
    lane = cuda.threadIdx.x % 32
    value = x[cuda.grid(1)]
    distance = 1
    while distance < 32:
        other = cuda.shfl_up_sync(0xFFFFFFFF, value, distance)
        if lane >= distance:
            value += other
        distance *= 2
    out[cuda.grid(1)] = value


def test_a_scan_by_shuffles():
    x = np.arange(128, dtype="i4") ** 2
    _, out = execute(compiled(warp_sums, "i4", "i4"), 2, 64, x, ("i4", 128))
    assert (out == np.cumsum(x.reshape(4, 32), axis=1).ravel()).all()


def local_table(x, out):
    table = cuda.local.array(8, types.float32)
    i = cuda.grid(1)
    for k in range(8):
        table[k] = x[i] * k
    out[i] = table[i * 5 % 8]


def test_local_memory_indexed_at_run_time():
    x = np.arange(40, dtype="f4")
    _, out = execute(compiled(local_table, "f4", "f4"), 1, 40, x, ("f4", 40))
    assert (out == x * (np.arange(40) * 5 % 8)).all()


def persistent(arrive=True, release=True, acquire=True, depart=True, target=0, row=0, early=False):
    """T steps by all blocks: h[t + 1, i] = h[t, i] / 2 + h[t, i + n / 2], with a barrier of the grid in each step."""

    def kernel(h, count, steps):
        i = cuda.grid(1)
        n = cuda.gridsize(1)
        other = (i + n // 2) % n
        blocks = types.int32(cuda.gridDim.x)
        first = cuda.threadIdx.x == 0
        for t in range(steps):
            if early and first:
                cuda.threadfence()
                cuda.atomic.add(count, 0, types.int32(1))
            h[(t + 1) * n + i] = h[(t + row) * n + i] * types.float32(0.5) + h[(t + row) * n + other]
            if arrive:
                cuda.syncthreads()
            if first:
                if not early:
                    if release:
                        cuda.threadfence()
                    cuda.atomic.add(count, 0, types.int32(1))
                while cuda.atomic.add(count, 0, types.int32(0)) < blocks * types.int32(t + 1) + target:
                    pass
                if acquire:
                    cuda.threadfence()
            if depart:
                cuda.syncthreads()

    return kernel


def history(steps: int) -> np.ndarray:
    """The rows that the steps will write, and the one they begin with."""
    h = np.zeros((steps + 1, 3 * THREADS), "f4")
    h[0] = np.random.default_rng(0).standard_normal(3 * THREADS)
    return h


@pytest.mark.parametrize("seed", SEEDS)
def test_a_persistent_kernel(seed):
    expected = history(4)
    out, count = execute(
        compiled(persistent(), "f4", "i4", "n"), 3, THREADS, history(4).ravel(), np.zeros(1, "i4"), 4, seed=seed
    )
    for t in range(4):
        expected[t + 1] = expected[t] * np.float32(0.5) + np.roll(expected[t], -expected.shape[1] // 2)
    assert (out.reshape(expected.shape) == expected).all() and count[0] == 12


MUTANTS = {
    "no barrier before the release": ({"arrive": False}, Race),
    "no fence before the release": ({"release": False}, Race),
    "no fence after the wait": ({"acquire": False}, Race),
    "no barrier after the wait": ({"depart": False}, Race),
    "a release too early": ({"early": True}, Race),
    "a target one too high": ({"target": 1}, Deadlock),
    "a target one too low": ({"target": -1}, Race),
    "a row too far": ({"row": 1}, Race),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_persistent_kernels_gone_wrong(name):
    change, error = MUTANTS[name]
    module = compiled(persistent(**change), "f4", "i4", "n")
    assert error in found(module, 3, THREADS, history(3).ravel(), np.zeros(1, "i4"), 3)
