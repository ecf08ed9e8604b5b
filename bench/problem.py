"""The numbers of a case, the same for every implementation: weights, inputs, gradients, lengths; drawn from a seed.

Everything is drawn in float32 and rounded to the case's dtype, so that the float64 reference sees the values that a
half-precision implementation sees, and the error that is left is arithmetic.
"""

from dataclasses import dataclass, replace

import numpy as np

from bench.cases import STATES, SYMBOLS, Case

SETS_BYTES = 256 << 20  # of inputs and gradients, all sets together
MOST_SETS = 8
LEARNING_RATE, CLIP_NORM = 1e-3, 0.1  # of group `train`; the norm is low enough that every step is clipped


@dataclass(frozen=True)
class Problem:
    """float32 arrays unless a line says otherwise.

    weights  by PyTorch's names: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H/heads), bias_ih_l0 and bias_hh_l0 (G*H,).
             Row g*H + u of weight_hh is gate g of unit u and meets the H/heads units of that unit's head.
    x, dy    input sets that a timed loop rotates through: x (T, N, I), dy (T, N, H), zero behind each row's end.
    state    initial states (N, H), one array for each state of the cell.
    lengths  (N,) int64, or None.

    Group `train`: x and dy hold tokens and targets, (T, N) int64, and weights has embedding.weight (SYMBOLS, I),
    recurrent.weight_ih_l0 and so on, head.weight (SYMBOLS, H), head.bias (SYMBOLS,).
    """

    case: Case
    weights: dict[str, np.ndarray]
    x: tuple[np.ndarray, ...]
    dy: tuple[np.ndarray, ...]
    state: tuple[np.ndarray, ...]
    lengths: np.ndarray | None

    def first(self, steps: int) -> "Problem":
        """The same problem cut off behind its first steps, with one input set: checked where all is too much."""
        lengths = None if self.lengths is None else np.minimum(self.lengths, steps)
        case = replace(self.case, T=steps)
        return replace(self, case=case, x=(self.x[0][:steps],), dy=(self.dy[0][:steps],), lengths=lengths)

    @property
    def tokens(self) -> int:
        """Steps that are computed: padding is not among them."""
        return self.case.T * self.case.N if self.lengths is None else int(self.lengths.sum())


def make(case: Case, sets: int | None = None, seed: int = 0) -> Problem:
    """The problem of a case.  sets: how many inputs to rotate through; None: up to 8 that fit 256 MB together."""
    rng = np.random.default_rng(seed)
    model = case.group == "train"
    size = case.T * case.N * (16 if model else 4 * (case.I + case.H))
    sets = sets or int(np.clip(SETS_BYTES // max(size, 1), 1, MOST_SETS))
    lengths = None
    if case.lengths == "uniform":
        lengths = rng.integers(max(1, case.T // 10), case.T + 1, case.N)
        lengths[rng.integers(case.N)] = case.T  # so that T is the longest row, as in a batch of real texts
    layer = _layer_weights(case, rng)
    if model:
        tokens = tuple(rng.integers(0, SYMBOLS, (case.T + 1, case.N)) for _ in range(sets))
        x, dy = tuple(part[:-1] for part in tokens), tuple(part[1:] for part in tokens)
        return Problem(case, _model_weights(case, layer, rng), x, dy, (), None)
    keep = None if lengths is None else (np.arange(case.T)[:, None] < lengths)[..., None]

    def draw(width: int) -> tuple[np.ndarray, ...]:
        """Sets after the first are the same values at other steps: to draw gigabytes takes longer than the timing."""
        values = rounded(rng.standard_normal((case.T, case.N, width), dtype=np.float32), case.dtype)
        rolled = (np.roll(values, k, axis=0) for k in range(sets))
        return tuple(rolled if keep is None else (part * keep for part in rolled))

    x, dy = draw(case.I), draw(case.H)
    state = tuple(_uniform(rng, 0.5, (case.N, case.H), case.dtype) for _ in STATES[case.cell])
    return Problem(case, layer, x, dy, state, lengths)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` can hold, to nearest with ties to even."""
    if dtype == "float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).view(np.float32)
    return values


def _layer_weights(case: Case, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """PyTorch's initialisation, uniform to 1/sqrt(H) (of a head's H): gradients neither explode nor vanish at once."""
    wide, head = case.gates * case.H, case.H // case.heads
    shapes = {"weight_ih": (wide, case.I), "weight_hh": (wide, head), "bias_ih": (wide,), "bias_hh": (wide,)}
    return {f"{name}_l0": _uniform(rng, head**-0.5, shape, case.dtype) for name, shape in shapes.items()}


def _model_weights(case: Case, layer: dict[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
    scale = case.H**-0.5
    return {
        "embedding.weight": rng.standard_normal((SYMBOLS, case.I), dtype=np.float32),
        **{f"recurrent.{name}": value for name, value in layer.items()},
        "head.weight": _uniform(rng, scale, (SYMBOLS, case.H), case.dtype),
        "head.bias": _uniform(rng, scale, (SYMBOLS,), case.dtype),
    }


def _uniform(rng: np.random.Generator, limit: float, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return rounded(rng.uniform(-limit, limit, shape).astype(np.float32), dtype)
