"""Experiments on passes of whole layers: who shares a loop or a sum, are weights packed, how much is projected."""

from typing import Any

import numpy as np

from bench.calibrate.measure import Case, Experiment, Way, either, patched, settings_of, sized, some
from gpurnn.cells import CELLS
from gpurnn.cpu import compiled, costs, products, sharing
from gpurnn.executors.contract import Backward, Job, Weights

FLOAT32 = np.dtype(np.float32)
NEVER = 1 << 62
INPUTS = 8  # of the passes whose W_hh is packed or lies
ALONE = settings_of(LOOP_FLOPS=NEVER, SUM_FLOPS=NEVER)
SHARED = {
    "one": settings_of(LOOP_FLOPS=NEVER),
    "rows": settings_of(LOOP_FLOPS=0, UNITS_FLOPS=NEVER, ENOUGH_ROWS=1.0, ENOUGH_ROWS_CACHED=1.0),
    "units": settings_of(LOOP_FLOPS=0, UNITS_FLOPS=1, ENOUGH_ROWS=NEVER, ENOUGH_ROWS_CACHED=NEVER),
}


class Pass:
    """A layer in one direction: a forward pass, and backward passes along its tape."""

    def __init__(self, name: str, T: int, N: int, I: int, H: int):
        rng = np.random.default_rng(0)
        self.cell, self.sizes = CELLS["rnn_tanh" if name == "rnn" else name], (T, N, I, H)
        self.name = f"{name} T{T} N{N} I{I} H{H}"
        shapes = (self.cell.gates * H, I), (self.cell.gates * H, H), (self.cell.gates * H,), (self.cell.gates * H,)
        drawn = [rng.uniform(-(H**-0.5), H**-0.5, shape).astype(FLOAT32) for shape in shapes]
        self.weights, self.grads = (Weights._make([*own, ()]) for own in (drawn, map(np.zeros_like, drawn)))
        if not self.cell.recurrent:
            self.weights, self.grads = (w._replace(weight_hh=None, bias_hh=None) for w in (self.weights, self.grads))
        self.x, self.dy = (rng.standard_normal((T, N, width), dtype=np.float32) for width in (I, H))
        self.state, self.rows = (np.zeros((N, H), FLOAT32),) * self.cell.states, np.full(T, N)
        self.tape: Any = None

    def _job(self, training: bool) -> Job:
        return Job(self.cell, self.x, self.weights, self.state, self.rows, False, training)

    def infer(self) -> None:
        compiled.forward(self._job(False))

    def forward(self) -> None:
        self.tape = compiled.forward(self._job(True))[1]

    def backward(self) -> None:
        if self.tape is None:
            self.forward()
        compiled.backward(self.tape, self.dy, None, self.grads, Backward(keep=True))

    def train(self) -> None:
        self.forward()
        self.backward()

    def sum(self) -> None:
        """The weights' gradients alone, behind a loop of one thread."""
        if self.tape is None:
            self.forward()
        T, N, I, H = self.sizes
        alone = sharing.Plan([sharing.Share(slice(0, N), slice(0, H), slice(0, I))])
        columns = sharing.plan_reduction(self.cell, T * N, I, H, H, alone)
        compiled._add_weight_gradients(self.tape, self.tape.slots, self.grads, columns)

    def shared(self) -> str:
        T, N, I, H = self.sizes
        plan = sharing.plan_loop(self.cell, self.rows, T, N, I, H, FLOAT32)
        return "one" if len(plan.shares) == 1 else "units" if plan.by_units else "rows"


def _loops(quick: bool) -> list[Case]:
    """Passes about as long as LOOP_FLOPS, their workers awake and asleep; then small batches of long passes."""
    short = [(1, 1, 256), (1, 1, 512), (1, 2, 384), (1, 16, 128), (2, 8, 128), (4, 4, 128), (8, 16, 64), (20, 8, 64)]
    short += [(64, 1, 64), (16, 32, 32), (40, 4, 96), (4, 1, 256), (100, 1, 96)]
    long = [(20, N, H) for H in (96, 256, 384, 640) for N in (1, 2, 4, 6, 8, 12)]
    if quick:
        short, long = short[:1], [(4, 2, 256)]
    sizes = [(False, size) for size in short] + [(True, size) for size in short] + [(False, size) for size in long]
    return [_shared_by(Pass("lstm", T, N, H, H), asleep) for asleep, (T, N, H) in sizes]


def _unitwise(quick: bool) -> list[Case]:
    """Passes about as long as LOOP_FLOPS of a cell without a recurrent matrix, most of whose work is no product."""
    sizes = [(16, 4, 256), (64, 4, 128), (64, 8, 128), (32, 1, 512), (100, 8, 64), (100, 16, 64), (200, 4, 256)]
    return [_shared_by(Pass("mingru", T, N, 16, H), False) for T, N, H in (sizes[:1] if quick else sizes)]


def _shared_by(own: Pass, asleep: bool) -> Case:
    ways = {name: Way(own.train, patches) for name, patches in SHARED.items() if _can(own, name)}
    return Case(own.name + " asleep" * asleep, ways, own.shared, asleep)


def _can(own: Pass, name: str) -> bool:
    """Whether a pass can be shared in that way at all."""
    with patched(SHARED[name]):
        return own.shared() == name


def _sums(quick: bool) -> list[Case]:
    sizes = [(1, 512), (4, 256), (8, 256), (16, 256), (8, 512), (16, 512), (100, 128), (400, 64), (400, 128)]
    return [_sum(K, H) for K, H in (sizes[:1] if quick else sizes)]


def _sum(K: int, H: int) -> Case:
    own = Pass("lstm", K, 1, H, H)
    flops = 2 * K * own.cell.gates * H * 2 * H
    shared, alone = settings_of(SUM_FLOPS=0), settings_of(SUM_FLOPS=NEVER)
    return either(own.name, own.sum, lambda: flops >= costs.SUM_FLOPS, shared, alone, asleep=True)


def _packing(quick: bool) -> list[Case]:
    return [_packed("infer", "packing_pays", sizes) for sizes in (PACKED[:2] if quick else PACKED)]


def _copying(quick: bool) -> list[Case]:
    sizes = PACKED[:2] if quick else PACKED
    return [_packed("backward", "packing_pays_backwards", own, FLOAT32) for own in sizes]


def _packed(phase: str, rule: str, sizes: tuple[int, int, int], *dtype: np.dtype) -> Case:
    """W_hh packed or as it lies, on one thread; x is narrow, and W_ih always packed."""
    T, N, H = sizes
    own, pays = Pass("lstm", T, N, INPUTS, H), getattr(products, rule)
    packs = (*ALONE, (compiled, rule, lambda *_: True))
    lies = (*ALONE, (compiled, rule, lambda steps, rows, width, *_: width == INPUTS))
    return either(own.name, getattr(own, phase), lambda: pays(T, N, H, *dtype), packs, lies)


def _projected(quick: bool) -> list[Case]:
    sizes = [
        ("lstm", 100, 8, 128, 128),
        ("lstm", 100, 16, 256, 256),
        ("rnn", 200, 32, 256, 256),
        ("gru", 50, 4, 512, 512),
    ]
    passes = [Pass(*size) for size in (sizes[:1] if quick else sizes)]
    values = some(PROJECTED, costs.PROJECTED_ROWS, quick)
    return [sized(own.name, own.train, "PROJECTED_ROWS", values) for own in passes]


def _few_rows(quick: bool) -> list[Case]:
    return [_few(K, H) for H in (128, 512) for K in ((4,) if quick else (2, 4, 6, 8, 10, 12, 16, 24, 32))]


def _few(K: int, H: int) -> Case:
    """A sum along the rows of the weights' gradients, against one in blocks, on one thread."""
    own = Pass("lstm", K, 1, H, H)
    few, many = (ALONE + settings_of(FEW_SUM_ROWS=rows) for rows in (NEVER, 0))
    return either(own.name, own.sum, lambda: K <= costs.FEW_SUM_ROWS, few, many)


PACKED = [
    (T, N, H)
    for N, steps in ((1, (4, 8, 16, 32, 64)), (4, (4, 8, 16, 32, 48)), (16, (2, 4, 8, 16, 32)), (48, (2, 4, 8, 12)))
    for T in steps
    for H in (64, 256, 704)
]
PROJECTED = (32, 64, 128, 256, 512)
SHARING = (
    "LOOP_FLOPS",
    "FEWEST_ROWS",
    "PACKING_FLOPS",
    "UNITS_FLOPS",
    "ENOUGH_ROWS",
    "ENOUGH_ROWS_CACHED",
    "CACHED_BYTES",
)
EXPERIMENTS = {
    "loops": Experiment(SHARING, _loops, threads=2),
    "unitwise": Experiment(("UNITWISE_COLUMNS",), _unitwise, threads=2),
    "sums": Experiment(("SUM_FLOPS",), _sums, threads=2),
    "packing": Experiment(("PACKING_ROWS", "LYING_ROWS", "DOT_TERMS"), _packing),
    "copying": Experiment(("COPYING_ROWS",), _copying),
    "few_rows": Experiment(("FEW_SUM_ROWS",), _few_rows),
    "projected": Experiment(("PROJECTED_ROWS",), _projected, {"PROJECTED_ROWS": PROJECTED}, threads=2),
}
