"""The product inside a resident kernel: weight_hh, kept in one block's registers and shared memory, times a step's vector.

Forward, the vector is h (K = H values a batch row) and each unit has G results, one a gate; backward it is dL/dr
(K = G*H) and each unit has one result, dL/dh.  Both products own their results in the same way: a thread has all results
of a (unit, batch row) pair, so the cell that follows runs in its registers.  The vector lies in shared memory twice,
one buffer being read while the next step's is written, so a step costs one barrier.

    ffma   float32, exact.  A team of lanes shares a few units and splits K; partial sums meet by shuffles.
    mma    bfloat16 on tensor cores, float32 sums.  weight_hh is the A operand and stays in fragments; 8 rows are N = 8.

What does not fit into registers is read from shared memory at every step, in the same order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import cuda
from numba.cuda import types

from .build import Source
from .ptx import (
    exchange,
    global_address,
    load_global_4f,
    load_global_4u,
    load_shared_4f,
    load_shared_4u,
    mma_bf16,
    multiply_add,
    pack_bf16,
    shared_address,
    store_shared_b16,
    store_shared_f,
    written_out,
)

i64, u16, u32, f32 = types.int64, types.uint16, types.uint32, types.float32
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
PACK_THREADS = 256


class Shape(NamedTuple):
    """`outputs` results for each of H units from a vector of K values.  transposed: results of weight_hh^T."""

    H: int
    K: int
    outputs: int
    transposed: bool

    @classmethod
    def of(cls, gates: int, H: int, transposed: bool) -> "Shape":
        return cls(H, gates * H, 1, True) if transposed else cls(H, H, gates, False)


class Ffma(NamedTuple):
    """A team of `lanes` has `units` units and splits K; the block has `rows` batch rows; `kept` chunks of K in registers."""

    units: int
    lanes: int
    rows: int
    kept: int


class Mma(NamedTuple):
    """A warp has `groups` groups of 8 units; `kept` chunks of 32 of K in registers."""

    groups: int
    kept: int


class Product(NamedTuple):
    """Sizes, and the device functions that a time loop is written with.

    place(tid, pair) -> unit, batch row (unit H where the pair is another thread's), fetch(packed, registers),
    home(vector, row, k) -> an element's address in the first buffer, put(home, buffer, k, value): k elements behind it,
    multiply(registers, vector, buffer, sums): sums[pair*outputs + output].
    """

    threads: int
    rows: int
    pairs: int  # of a thread
    registers: int  # 32-bit words of weights in a thread
    shared: int  # bytes of weights in shared memory
    vector: int  # elements of both buffers
    word: Any
    element: Any
    place: Callable
    fetch: Callable
    home: Callable
    put: Callable
    multiply: Callable


def product(shape: Shape, tile: "Ffma | Mma") -> Product:
    return (ffma if isinstance(tile, Ffma) else mma)(shape, tile)


def ffma_sizes(shape: Shape, tile: Ffma) -> tuple[int, int]:
    """Threads of the block, chunks of K (each 4 values a lane)."""
    teams = -(-shape.H // tile.units)
    return -(-teams * tile.lanes // 32) * 32, -(-shape.K // (4 * tile.lanes))


def mma_sizes(shape: Shape, tile: Mma) -> tuple[int, int]:
    """Threads of the block, chunks of K (each 32 values)."""
    return 32 * -(-shape.H // (8 * tile.groups)), -(-shape.K // 32)


def ffma(shape, tile):
    UNITS, LANES, ROWS, KEPT = tile
    H, OUT = shape.H, shape.outputs
    THREADS, CHUNKS = ffma_sizes(shape, tile)
    SPILLED, J, WIDE = CHUNKS - KEPT, UNITS * OUT, 4 * LANES * CHUNKS
    PAIRS, PARTIAL = UNITS * ROWS, UNITS * ROWS * OUT
    OWN = max(1, PAIRS // LANES)
    HALVINGS = (min(PAIRS, LANES)).bit_length() - 1
    DOUBLE = 1 << HALVINGS  # lanes that differ beyond this bit have the same pairs
    STEP, BUFFER = 4 * 4 * LANES, ROWS * WIDE
    reduce = _reduction(PAIRS, LANES, OUT)

    @cuda.jit(device=True)
    def place(tid, pair):
        lane, first = tid % LANES, 0
        for bit in range(HALVINGS):
            first += (lane >> bit & 1) * (PAIRS >> (bit + 1))
        own = first + pair
        unit = tid // LANES * UNITS + own // ROWS
        return (unit if lane < DOUBLE and unit < H else H), own % ROWS

    @written_out
    def fetch_kept(b, address, registers):
        for k in range(KEPT * J):
            for i, value in enumerate(load_global_4f.emit(b, b.add(address, I64(k * THREADS * 16)))):
                registers[k * 4 + i] = value

    @cuda.jit(device=True)
    def fetch(packed, registers):
        tid = i64(cuda.threadIdx.x)
        fetch_kept(global_address(packed, 4 * tid), registers)
        weights = cuda.shared.array(0, f32)
        for k in range(tid, SPILLED * J * THREADS * 4, THREADS):
            weights[k] = packed[KEPT * J * THREADS * 4 + k]

    @cuda.jit(device=True)
    def home(vector, row, k):
        return shared_address(vector, row * WIDE + k)

    @cuda.jit(device=True)
    def put(home, buffer, k, value):
        store_shared_f(u32(home + (buffer * BUFFER + k) * 4), value)

    def add(b, partial, row, j, weights, values):
        at = (j // OUT * ROWS + row) * OUT + j % OUT
        total = partial[at]
        for weight, value in zip(weights, values, strict=True):
            total = multiply_add(b, weight, value, total)
        partial[at] = total

    @written_out
    def multiply_all(b, registers, vector, weights, partial):
        """`vector` and `weights`: the addresses of this thread's first values."""
        for k in range(PARTIAL):
            partial[k] = F32(0)
        for c in range(CHUNKS):
            values = [load_shared_4f.emit(b, b.add(vector, I32(4 * row * WIDE + c * STEP))) for row in range(ROWS)]
            for j in range(J):
                if c < KEPT:
                    four = [registers[(c * J + j) * 4 + i] for i in range(4)]
                else:
                    four = load_shared_4f.emit(b, b.add(weights, I32(((c - KEPT) * J + j) * THREADS * 16)))
                for row in range(ROWS):
                    add(b, partial, row, j, four, values[row])

    @cuda.jit(device=True)
    def multiply(registers, vector, buffer, sums):
        tid = i64(cuda.threadIdx.x)
        partial = cuda.local.array(PARTIAL, f32)
        weights = cuda.shared.array(0, f32)
        start = shared_address(vector, buffer * BUFFER + 4 * (tid % LANES))
        multiply_all(registers, start, shared_address(weights, 4 * tid), partial)
        reduce(partial, tid % LANES)
        for k in range(OWN * OUT):
            sums[k] = partial[k]

    return Product(
        THREADS,
        ROWS,
        OWN,
        KEPT * J * 4,
        SPILLED * J * THREADS * 16,
        2 * BUFFER,
        f32,
        f32,
        place,
        fetch,
        home,
        put,
        multiply,
    )


def _reduction(pairs, lanes, outputs):
    """Adds partial sums over a team.  While a lane has several pairs, it gives half of them away and keeps the other."""

    @cuda.jit(device=True)
    def nothing(partial, lane):
        pass

    def halving(half, mask, then):
        COUNT = half * outputs

        @cuda.jit(device=True)
        def stage(partial, lane):
            upper = lane & mask != 0
            for k in range(COUNT):
                low, high = partial[k], partial[COUNT + k]
                partial[k] = (high if upper else low) + exchange(low if upper else high, u32(mask))
            then(partial, lane)

        return stage

    def adding(mask, then):
        @cuda.jit(device=True)
        def stage(partial, lane):
            for k in range(outputs):
                partial[k] += exchange(partial[k], u32(mask))
            then(partial, lane)

        return stage

    stages, mask = [], 1
    while mask < lanes:
        pairs //= 2
        stages.append((halving, pairs, mask) if pairs else (adding, mask))
        mask *= 2
    run = nothing
    for make, *constants in reversed(stages):
        run = make(*constants, run)
    return run


def mma(shape, tile):
    GROUPS, KEPT = tile
    H, OUT = shape.H, shape.outputs
    THREADS, CHUNKS = mma_sizes(shape, tile)
    SPILLED, TILES, ROWS = CHUNKS - KEPT, GROUPS * OUT // 2, 8
    WIDE = 32 * (CHUNKS + (CHUNKS + 1) % 2)  # an odd number of half cache lines: 8 rows' 16 bytes meet no bank twice
    BUFFER = ROWS * WIDE
    WARP = TILES * CHUNKS * 256  # words

    @cuda.jit(device=True)
    def place(tid, pair):
        unit = (tid // 32 * GROUPS + pair // 2) * 8 + tid % 32 // 4
        return min(unit, H), 2 * (tid % 4) + pair % 2

    @written_out
    def fetch_kept(b, address, registers):
        for tile in range(TILES):
            for k in range(KEPT * 2):
                words = load_global_4u.emit(b, b.add(address, I64(16 * 32 * (tile * CHUNKS * 2 + k))))
                for i, word in enumerate(words):
                    registers[(tile * KEPT * 2 + k) * 4 + i] = word

    @cuda.jit(device=True)
    def fetch(packed, registers):
        tid = i64(cuda.threadIdx.x)
        lane, first = tid % 32, tid // 32 * WARP
        fetch_kept(global_address(packed, first + lane * 4), registers)
        weights = cuda.shared.array(0, u32)
        for tile in range(TILES):
            for k in range(lane, SPILLED * 256, 32):
                weights[(tid // 32 * TILES + tile) * SPILLED * 256 + k] = packed[
                    first + (tile * CHUNKS + KEPT) * 256 + k
                ]

    @cuda.jit(device=True)
    def home(vector, row, k):
        return shared_address(vector, row * WIDE + k)

    @cuda.jit(device=True)
    def put(home, buffer, k, value):
        store_shared_b16(u32(home + (buffer * BUFFER + k) * 2), pack_bf16(f32(0), value))

    @written_out
    def multiply_all(b, registers, vector, weights, sums):
        """Two chains of sums for each tile: one product need not wait for the one before."""
        totals = [[[F32(0)] * 4 for _ in range(TILES)] for _ in range(2)]
        for c in range(CHUNKS):
            values = load_shared_4u.emit(b, b.add(vector, I32(64 * c)))
            for tile in range(TILES):
                for second in range(2):
                    if c < KEPT:
                        first = ((tile * KEPT + c) * 2 + second) * 4
                        a = [registers[first + i] for i in range(4)]
                    else:
                        offset = ((tile * SPILLED + c - KEPT) * 2 + second) * 512
                        a = load_shared_4u.emit(b, b.add(weights, I32(offset)))
                    operands = (*totals[second][tile], *a, *values[2 * second : 2 * second + 2])
                    totals[second][tile] = mma_bf16.emit(b, *operands)
        for group in range(GROUPS):
            for row in range(2):
                for out in range(OUT):
                    half = group * OUT + out
                    one, two = (totals[k][half // 2][half % 2 * 2 + row] for k in range(2))
                    sums[(group * 2 + row) * OUT + out] = b.fadd(one, two)

    @cuda.jit(device=True)
    def multiply(registers, vector, buffer, sums):
        tid = i64(cuda.threadIdx.x)
        lane = tid % 32
        weights = cuda.shared.array(0, u32)
        start = shared_address(vector, buffer * BUFFER + lane // 4 * WIDE + lane % 4 * 8)
        multiply_all(registers, start, shared_address(weights, tid // 32 * TILES * SPILLED * 256 + lane * 4), sums)

    return Product(
        THREADS, ROWS, 2 * GROUPS, TILES * KEPT * 8, SPILLED * TILES * THREADS * 32, 2 * BUFFER, u32, u16, place, fetch,
        home,
        put, multiply,
    )  # fmt: skip


def pack(trace, *, shape: Shape, tile: "Ffma | Mma") -> Source:
    """weight_hh (G*H, H), its gates in the order of the slots -> words in the order in which `fetch` reads them; assigns."""
    return (_pack_ffma if isinstance(tile, Ffma) else _pack_mma)(shape, tile)


def rows_of(tile: "Ffma | Mma") -> int:
    """Batch rows of a block."""
    return tile.rows if isinstance(tile, Ffma) else 8


def packed_words(shape: Shape, tile: "Ffma | Mma") -> int:
    if isinstance(tile, Ffma):
        threads, chunks = ffma_sizes(shape, tile)
        return chunks * tile.units * shape.outputs * threads * 4
    threads, chunks = mma_sizes(shape, tile)
    return threads // 32 * tile.groups * shape.outputs // 2 * chunks * 256


def _element(shape):
    H, K, TRANSPOSED = shape.H, shape.K, shape.transposed

    @cuda.jit(device=True)
    def element(weight, unit, output, k):
        """0 beyond the matrix: H and K are padded here and nowhere else."""
        if unit >= H or k >= K:
            return f32(0)
        return weight[k * H + unit] if TRANSPOSED else weight[(output * H + unit) * H + k]

    return element


def _pack_ffma(shape, tile):
    UNITS, LANES, OUT = tile.units, tile.lanes, shape.outputs
    THREADS = ffma_sizes(shape, tile)[0]
    WORDS, J = packed_words(shape, tile), UNITS * OUT
    element = _element(shape)

    def pack_ffma(weight, packed):
        """[chunk][unit of the team, output][thread][4 values of k]"""
        word = i64(cuda.blockIdx.x) * PACK_THREADS + cuda.threadIdx.x
        if word < WORDS:
            tid, j, c = word // 4 % THREADS, word // (4 * THREADS) % J, word // (4 * THREADS * J)
            k = 4 * (tid % LANES + LANES * c) + word % 4
            packed[word] = element(weight, tid // LANES * UNITS + j // OUT, j % OUT, k)

    return Source(pack_ffma, (types.CPointer(f32), types.CPointer(f32)), PACK_THREADS)


def _pack_mma(shape, tile):
    """A fragments of m16n8k16.  The k of a chunk of 32 is permuted, for vector and weights alike: lane q of 4 has
    k = 8q .. 8q+7, which are 16 bytes of the vector, and so two products' B fragments in one load."""
    GROUPS, OUT = tile.groups, shape.outputs
    TILES, WORDS = GROUPS * OUT // 2, packed_words(shape, tile)
    CHUNKS = mma_sizes(shape, tile)[1]
    element = _element(shape)

    def pack_mma(weight, packed):
        """[warp][tile][chunk][first or second product][lane][4 words]"""
        word = i64(cuda.blockIdx.x) * PACK_THREADS + cuda.threadIdx.x
        if word < WORDS:
            part, lane, second = word % 4, word // 4 % 32, word // 128 % 2
            c, block, warp = word // 256 % CHUNKS, word // (256 * CHUNKS) % TILES, word // (256 * CHUNKS * TILES)
            half = 2 * block + part % 2
            unit = (warp * GROUPS + half // OUT) * 8 + lane // 4
            k = 32 * c + 8 * (lane % 4) + 4 * second + 2 * (part // 2)
            low, high = element(weight, unit, half % OUT, k), element(weight, unit, half % OUT, k + 1)
            packed[word] = pack_bf16(high, low)

    return Source(pack_mma, (types.CPointer(f32), types.CPointer(u32)), PACK_THREADS)
