"""The product inside the time loop: a block's share of weight_hh, kept in registers and shared memory, times a vector.

The vector (`tiles`: h forward, dL/dr backward, of a few batch rows) lies in shared memory, in one or two buffers.  A
thread gets all results of its (unit, batch row) pairs, so the cell that follows runs in its registers.  What does not
fit into registers is read from shared memory at every step, in the same order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir

from . import tiles
from .numba_cuda import cuda, types
from .ptx import (
    global_address,
    load_global_4f,
    load_global_4u,
    load_shared_2f,
    load_shared_4f,
    load_shared_4u,
    mma_bf16,
    mma_f16,
    mma_tf32,
    multiply_add,
    pack_bf16,
    pack_f16,
    round_tf32,
    shared_address,
    shuffle,
    store_shared_2f,
    store_shared_4f,
    written_out,
)
from .tiles import Ffma, Layout, Shape, Tile, layout

i64, u32, f32 = types.int64, types.uint32, types.float32
I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()
MMA = {"bfloat16": mma_bf16, "float16": mma_f16, "tf32": mma_tf32}


class Product(NamedTuple):
    """Sizes, and the device functions that a time loop is written with.

    place(tid, pair) -> unit of the block, batch row; the unit is `tiles.layout(...).units` where the pair is nobody's
    or another thread's.  fetch(packed, registers): packed begins with this block's words.  word(values, k): the k-th
    word that goes into the vector, from the values of `grain` pairs.  multiply(registers, vector, sums):
    sums[pair*outputs + output]; `vector` is the address of a buffer.  All threads of the block call it: it may have
    barriers.
    """

    pairs: int  # of a thread
    registers: int  # 32-bit words of weights in a thread
    vector: int  # where the vector begins in dynamic shared memory, behind the weights, in bytes
    partial: int  # bytes of shared memory for partial sums, which stand first of all
    packed: Any  # the type of packed words
    place: Callable
    fetch: Callable
    word: Callable
    multiply: Callable
    barriers: bool  # whether all threads have left the vector when `multiply` is done


class Columns(NamedTuple):
    """Device functions: where a unit stands in its part of the vector, and which unit stands there."""

    column: Callable
    unit_at: Callable


def columns(lay: Layout) -> Columns:
    pair = (tiles.alike, tiles.alike) if lay.grain == 1 else (tiles.paired, tiles.unpaired)
    return Columns(*(cuda.jit(device=True)(function) for function in pair))


def product(shape: Shape, tile: Tile) -> Product:
    return (ffma if isinstance(tile, Ffma) else mma)(shape, tile)


def ffma(shape, tile):
    UNITS, LANES, ROWS, KEPT = tile
    lay = layout(shape, tile)
    OUT, THREADS, CHUNKS, OF_BLOCK = shape.outputs, lay.threads, lay.chunks, lay.units
    SPILLED, J = CHUNKS - KEPT, UNITS * OUT
    PAIRS, OWN = tiles.results(shape, tile)
    PARTIAL = PAIRS * OUT
    HALVINGS = min(PAIRS, LANES).bit_length() - 1
    DOUBLE = 1 << HALVINGS  # lanes that differ beyond this bit have the same pairs
    STEP, WIDE = 4 * 4 * LANES, lay.stride
    reduce = _reduction(PAIRS, LANES, OUT)

    @cuda.jit(device=True)
    def place(tid, pair):
        lane, first = tid % LANES, 0
        for bit in range(HALVINGS):
            first += (lane >> bit & 1) * (PAIRS >> (bit + 1))
        own = first + pair
        unit = tid // LANES * UNITS + own // ROWS
        return (unit if lane < DOUBLE and unit < OF_BLOCK else OF_BLOCK), own % ROWS

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

    @written_out
    def bits(b, value, word):
        word[0] = b.bitcast(value, I32)

    @cuda.jit(device=True)
    def word(values, k):
        same = cuda.local.array(1, u32)
        bits(values[k], same)
        return same[0]

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
    def multiply(registers, vector, sums):
        tid = i64(cuda.threadIdx.x)
        partial = cuda.local.array(PARTIAL, f32)
        weights = cuda.shared.array(0, f32)
        start = u32(vector + 16 * (tid % LANES))
        multiply_all(registers, start, shared_address(weights, 4 * tid), partial)
        reduce(partial, tid % LANES)
        for k in range(OWN * OUT):
            sums[k] = partial[k]

    spilled = tiles.spilled_bytes(shape, tile)
    return Product(OWN, KEPT * J * 4, spilled, 0, f32, place, fetch, word, multiply, False)


def _reduction(pairs, lanes, outputs):
    """Adds partial sums over a team.  While a lane has several pairs, it gives half of them away."""

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
                partial[k] = (high if upper else low) + shuffle(low if upper else high, u32(mask))
            then(partial, lane)

        return stage

    def adding(mask, then):
        @cuda.jit(device=True)
        def stage(partial, lane):
            for k in range(outputs):
                partial[k] += shuffle(partial[k], u32(mask))
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
    KIND, GROUPS, SPLIT, ROWS, KEPT = tile
    lay = layout(shape, tile)
    OUT, CHUNKS, OF_BLOCK = shape.outputs, lay.chunks, lay.units
    SPILLED, TILES, EIGHTS = CHUNKS - KEPT, GROUPS * OUT // 2, ROWS // 8
    PAIRS, OWN = tiles.results(shape, tile)
    ROW, PARTIAL = lay.stride * lay.size, tiles.partial_bytes(shape, tile)
    VALUES = PAIRS * OUT
    CHAINS = 2 if TILES * EIGHTS <= 2 else 1  # enough products at once that one need not wait for the one before
    matrices = MMA[KIND]
    AT = 4 if OWN * OUT % 4 == 0 else 2  # partial sums that a lane leaves and gathers at once
    load, store = (load_shared_4f, store_shared_4f) if AT == 4 else (load_shared_2f, store_shared_2f)

    @cuda.jit(device=True)
    def place(tid, pair):
        """A lane has units 8 apart of rows 2 apart; the two units of a pair of groups come first."""
        warp, lane = tid // 32, tid % 32
        own = warp % SPLIT * OWN + pair
        group = own // (4 * EIGHTS) * 2 + own % 2
        unit = (warp // SPLIT * GROUPS + group) * 8 + lane // 4
        row = own // 4 % EIGHTS * 8 + 2 * (lane % 4) + own // 2 % 2
        return (unit if own < PAIRS else OF_BLOCK), row

    @written_out
    def fetch_kept(b, address, registers):
        for at in range(TILES):
            for k in range(KEPT * 2):
                words = load_global_4u.emit(b, b.add(address, I64(16 * 32 * (at * CHUNKS * 2 + k))))
                for i, value in enumerate(words):
                    registers[(at * KEPT * 2 + k) * 4 + i] = value

    @cuda.jit(device=True)
    def fetch(packed, registers):
        tid = i64(cuda.threadIdx.x)
        lane, first = tid % 32, tid // 32 * (TILES * CHUNKS * 256)
        fetch_kept(global_address(packed, first + lane * 4), registers)
        weights = cuda.shared.array(0, u32)
        for at in range(TILES):
            for k in range(lane, SPILLED * 256, 32):
                weights[PARTIAL // 4 + (tid // 32 * TILES + at) * SPILLED * 256 + k] = packed[
                    first + (at * CHUNKS + KEPT) * 256 + k
                ]

    @cuda.jit(device=True)
    def word(values, k):
        if KIND == "tf32":
            return round_tf32(values[k])
        if KIND == "float16":
            return pack_f16(values[2 * k + 1], values[2 * k])
        return pack_bf16(values[2 * k + 1], values[2 * k])

    @written_out
    def multiply_all(b, registers, vector, weights, sums):
        totals = [[[[F32(0)] * 4 for _ in range(EIGHTS)] for _ in range(TILES)] for _ in range(CHAINS)]
        for c in range(CHUNKS):
            rows = [load_shared_4u.emit(b, b.add(vector, I32(8 * ROW * r + tiles.CHUNK * c))) for r in range(EIGHTS)]
            for at in range(TILES):
                for second in range(2):
                    if c < KEPT:
                        first = ((at * KEPT + c) * 2 + second) * 4
                        a = [registers[first + i] for i in range(4)]
                    else:
                        offset = ((at * SPILLED + c - KEPT) * 2 + second) * 512
                        a = load_shared_4u.emit(b, b.add(weights, I32(offset)))
                    chain = totals[second % CHAINS][at]
                    for r in range(EIGHTS):
                        chain[r] = matrices.emit(b, *chain[r], *a, *rows[r][2 * second : 2 * second + 2])
        for pair in range(PAIRS):
            group, r, row = pair // (4 * EIGHTS) * 2 + pair % 2, pair // 4 % EIGHTS, pair // 2 % 2
            for out in range(OUT):
                half = group * OUT + out
                found = [totals[k][half // 2][r][half % 2 * 2 + row] for k in range(CHAINS)]
                sums[pair * OUT + out] = b.fadd(*found) if CHAINS == 2 else found[0]

    @written_out
    def leave(b, address, values):
        """[pair and output by AT][lane][AT]: 8 or 16 bytes a lane, side by side, so that no bank is met twice."""
        for k in range(VALUES // AT):
            store.emit(b, b.add(address, I32(128 * AT * k)), *(values[AT * k + i] for i in range(AT)))

    @written_out
    def gather(b, address, sums):
        """The sums of all warps with the same units, always in the same order; each warp takes the pairs it keeps."""
        for k in range(OWN * OUT // AT):
            found = [load.emit(b, b.add(address, I32(s * 128 * VALUES + 128 * AT * k))) for s in range(SPLIT)]
            for i in range(AT):
                total = found[0][i]
                for other in found[1:]:
                    total = b.fadd(total, other[i])
                sums[AT * k + i] = total

    @cuda.jit(device=True)
    def multiply(registers, vector, sums):
        tid = i64(cuda.threadIdx.x)
        lane, warp = tid % 32, tid // 32
        dynamic = cuda.shared.array(0, u32)
        start = u32(vector + lane // 4 * ROW + lane % 4 * 16 + warp % SPLIT * (CHUNKS * 64))
        weights = shared_address(dynamic, PARTIAL // 4 + warp * (TILES * SPILLED * 256) + lane * 4)
        if SPLIT == 1:
            multiply_all(registers, start, weights, sums)
        else:
            values = cuda.local.array(VALUES, f32)
            multiply_all(registers, start, weights, values)
            leave(shared_address(dynamic, warp * (32 * VALUES) + AT * lane), values)
            cuda.syncthreads()
            team, own = warp // SPLIT * SPLIT, min(warp % SPLIT * OWN, PAIRS - OWN)
            gather(shared_address(dynamic, (team * PAIRS + own) * (32 * OUT) + AT * lane), sums)

    vector = PARTIAL + tiles.spilled_bytes(shape, tile)
    return Product(OWN, TILES * KEPT * 8, vector, PARTIAL, u32, place, fetch, word, multiply, SPLIT > 1)
