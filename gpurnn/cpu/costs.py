"""Every measured constant of the CPU side: the size from which something pays, or of a block that stays in a cache.

`kernels/plan.py` is the same for GPUs.  In each annotation: its unit, the experiment that measures it again (`python -m
bench calibrate --only EXPERIMENT`), the modules of this room that read it, and ORDER where another value adds up numbers
in another order.  Two runs have the same bits where device, versions and thread count are the same: what is measured is
kept here, by CPU where one differs, and nothing is measured while the library runs.

The values were fitted on a 2-core AMD EPYC with AVX-512 (2026-11-21); BY_CPU has what other CPUs have otherwise.  No costs,
and so with their code, are what follows from a CPU's registers and lanes (tiles, panels, rows side by side), what accuracy
asks for (`sums.CHUNK`), and what is a choice (how much `memory` keeps, how long `crew` rests between two looks).
"""

from typing import Annotated, NamedTuple

from gpurnn.environment import cpu_family


class Cost(NamedTuple):
    unit: str
    experiment: str
    users: str  # modules of this room, blanks between them
    order: bool = False  # whether the order of sums, and so the last bits of a result, depend on it


ORDER = True

# sharing: when a second thread pays, and whether threads share the rows of a batch or the units.
# Of a pass; a second thread pays from 5 million on if it is awake, asleep from 30.
LOOP_FLOPS: Annotated[int, Cost("flop", "loops", "sharing", ORDER)] = 12_000_000
# Of a sum behind a loop that had one thread: the others sleep.
SUM_FLOPS: Annotated[int, Cost("flop", "sums", "sharing", ORDER)] = 30_000_000
# To read a weight takes as long as to use it for so many.
FEWEST_ROWS: Annotated[int, Cost("rows", "loops", "sharing", ORDER)] = 8
# So many are done in the time in which one weight is packed.
PACKING_FLOPS: Annotated[int, Cost("flop/weight", "loops", "sharing", ORDER)] = 25
# Of a step, for each thread; below it meeting costs more than a second thread gains.
UNITS_FLOPS: Annotated[int, Cost("flop", "loops", "sharing", ORDER)] = 250_000
# For each thread; of fewer the products are slow.  The second where each thread's second-level cache has room for W_hh.
ENOUGH_ROWS: Annotated[float, Cost("rows/thread", "loops", "sharing", ORDER)] = 4.0
ENOUGH_ROWS_CACHED: Annotated[float, Cost("rows/thread", "loops", "sharing", ORDER)] = 3.0
CACHED_BYTES: Annotated[int, Cost("bytes", "loops", "sharing", ORDER)] = 1 << 20
# Of a matrix, whose product takes as long as all else in a step of a cell without a recurrent matrix.
UNITWISE_COLUMNS: Annotated[int, Cost("columns", "unitwise", "sharing", ORDER)] = 100

# products: whether weights are packed.  As they lie a product loses the time of LYING_ROWS + its rows in each step;
# packing takes that of PACKING_ROWS, or of COPYING_ROWS where nothing has to be transposed.
LYING_ROWS: Annotated[int, Cost("rows", "packing", "products", ORDER)] = 12
PACKING_ROWS: Annotated[int, Cost("rows", "packing", "products", ORDER)] = 400
COPYING_ROWS: Annotated[int, Cost("rows", "copying", "products", ORDER)] = 300
# In the time of so many terms a dot product begins, and adds up its lanes.
DOT_TERMS: Annotated[int, Cost("terms", "packing", "products", ORDER)] = 300

# gemm, combine, reduction, compiled: the sizes of blocks.
# A fused multiply-add takes 4 cycles and two start in each: fewer sums side by side leave the unit idle.
CHAINS: Annotated[int, Cost("sums", "chains", "gemm", ORDER)] = 8
# Of C at once: what is read of W, and for few rows all of C, stays in the first-level cache.
COMBINE_COLUMNS: Annotated[int, Cost("columns", "combine", "combine")] = 512
# Of a block of gradients: transposed, it stays in the second-level cache.
SUM_ROWS: Annotated[int, Cost("rows", "blocks", "reduction", ORDER)] = 512
SUM_COLUMNS: Annotated[int, Cost("columns", "blocks", "reduction", ORDER)] = 192
# A sum of so few rows takes as long as to read and write the weights' gradients, and goes along their rows.
FEW_SUM_ROWS: Annotated[int, Cost("rows", "few_rows", "reduction", ORDER)] = 8
FEW_SUM_COLUMNS: Annotated[int, Cost("columns", "few_columns", "reduction")] = 16
# Of all threads: enough to read W_ih once for, and few enough to be in cache when the loop comes.
PROJECTED_ROWS: Annotated[int, Cost("rows", "projected", "compiled", ORDER)] = 128

# crew, barrier: threads that wait.
# Before a worker goes to sleep: half a millisecond.  More is never slower for one process, and takes CPUs from others.
LINGER_TURNS: Annotated[int, Cost("turns", "lingering", "crew")] = 20_000
# Before the CPU is offered to others: some ten microseconds.
SPIN_TURNS: Annotated[int, Cost("turns", "spinning", "barrier")] = 1000

# ops, threads, clear, memory, dropout, updates: the rest of a training step.
# Of a product by NumPy that is worth waking another thread for.
PRODUCT_FLOPS: Annotated[int, Cost("flop", "products", "threads", ORDER)] = 40_000_000
# OpenBLAS starts its threads from 9216 on, for a matrix by a vector; to hold it to one takes 13 us.
BLAS_PRODUCT: Annotated[int, Cost("multiplications", "blas_products", "ops", ORDER)] = 1 << 13
# OpenBLAS starts its threads for longer dot products, which costs more than it gains.
BLAS_SUM: Annotated[int, Cost("values", "blas_sums", "ops", ORDER)] = 1 << 13
# Zeros that are worth waking another thread for; the forward pass behind them has use for one that is awake.
CLEAR_BYTES: Annotated[int, Cost("bytes", "clearing", "ops")] = 1 << 22
# More would not stay in a cache, and written past it memory is not read first.
STREAMED_BYTES: Annotated[int, Cost("bytes", "streaming", "clear")] = 1 << 25
# What is smaller the allocator keeps by itself.
BLOCK_BYTES: Annotated[int, Cost("bytes", "allocating", "memory")] = 1 << 16
# That one thread drops before another has woken up.
DROPOUT_VALUES: Annotated[int, Cost("values", "dropping", "dropout")] = 1 << 16
# Of an optimiser's block: some of the second-level cache.
UPDATE_VALUES: Annotated[int, Cost("values", "updating", "updates")] = 1 << 16

NAMES = tuple(name for name, value in list(globals().items()) if name.isupper() and type(value) in (int, float))

# What differs: by a CPU's vendor and family, or where it differs within a family by vendor, family and model.
BY_CPU: dict[tuple[str, ...], dict[str, int | float]] = {}


def differing(cpu: tuple[str, str, str]) -> dict[str, int | float]:
    """What a CPU, (vendor, family, model), has otherwise: its family's row, and what its model's says instead."""
    return BY_CPU.get(cpu[:2], {}) | BY_CPU.get(cpu, {})


globals().update(differing(cpu_family()))
# On this CPU.  Some are compiled in, so the compile cache's key has them.
KEPT = {name: globals()[name] for name in NAMES}
