"""How parameters begin.  An initialiser is a function (rng, rows, columns) -> float64 (rows, columns) for one gate.

Values are drawn on the host in float64 whatever the layer's type and device, so a seed gives the same model everywhere.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn.arguments import at_least_0, fitting, function, number, whole
from gpurnn.parameters.buffers import check_memory

Initializer = Callable[[np.random.Generator, int, int], np.ndarray]


def _sizes(rng: np.random.Generator, rows: int, columns: int) -> tuple[int, int]:
    """rows and columns, beside a generator; TypeError or ValueError where they are none."""
    if not isinstance(rng, np.random.Generator | np.random.RandomState):
        raise TypeError(f"rng: expected a numpy.random.Generator, got {type(rng).__name__}")
    rows, columns = whole("rows", rows, 0), whole("columns", columns, 0)
    check_memory(rows * columns, np.dtype("float64"), "values")
    return rows, columns


def glorot_uniform(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Uniform within sqrt(6 / (rows + columns)): keeps variances through a linear map (Glorot & Bengio 2010)."""
    rows, columns = _sizes(rng, rows, columns)
    limit = math.sqrt(6 / max(1, rows + columns))
    return rng.uniform(-limit, limit, (rows, columns))


def orthogonal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """Orthonormal rows or columns, from the QR of a Gaussian matrix (Saxe et al. 2014): every singular value is 1."""
    rows, columns = _sizes(rng, rows, columns)
    q, r = np.linalg.qr(rng.standard_normal((max(rows, columns), min(rows, columns))))
    q = q * np.sign(np.diag(r))  # makes the distribution uniform over orthogonal matrices
    return q if rows >= columns else q.T


def identity(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """The identity: with relu, the IRNN of Le, Jaitly & Hinton 2015."""
    return np.eye(*_sizes(rng, rows, columns))


def zeros(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.zeros(_sizes(rng, rows, columns))


def uniform(limit: float) -> Initializer:
    """Uniform within [-limit, limit]; PyTorch's recurrent layers use 1/sqrt(H) for every parameter."""
    return _Uniform(at_least_0("limit", limit))


def normal(deviation: float) -> Initializer:
    """Gaussian with mean 0."""
    return _Normal(at_least_0("deviation", deviation))


def scaled(initializer: Initializer, gain: float) -> Initializer:
    """`gain` times what `initializer` draws: below 1 an orthogonal matrix forgets, above 1 it explodes."""
    return _Scaled(function("initializer", initializer), number("gain", gain))


def chrono(longest: float) -> "Chrono":
    """A gate's bias log(u), u uniform in [1, longest - 1]: units that forget within 1 to `longest` steps (Tallec and Ollivier 2018).

    For `LSTM(forget_bias=chrono(784))`, whose input gate begins with the negative, as they have it, and `GRU(update_bias=)`.
    """
    return Chrono(number("longest", longest, lambda v: v >= 2, "from 2"))


def gate_bias(name: str, given: Any, dtype: np.dtype) -> Initializer:
    """What draws a gate's bias: of a number that number, of a pair (low, high) uniform numbers, of an initialiser its own."""
    if isinstance(given, tuple | list):
        if len(given) != 2 or not all(isinstance(end, int | float) for end in given) or not given[0] <= given[1]:
            raise ValueError(f"{name}: expected a number, a range (low, high) or an initialiser, got {given!r:.80}")
        low, high = (fitting(name, number(name, end), dtype) for end in given)
        return _Between(low, high)
    if callable(given):
        return given
    value = fitting(name, number(name, given), dtype)
    return _Between(value, value)


# They pickle, and so do cells that begin with them.


@dataclass(frozen=True)
class _Uniform:
    limit: float

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        return rng.uniform(-self.limit, self.limit, _sizes(rng, rows, columns))


@dataclass(frozen=True)
class _Between:
    low: float
    high: float

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        shape = _sizes(rng, rows, columns)
        return np.full(shape, self.low) if self.low == self.high else rng.uniform(self.low, self.high, shape)


@dataclass(frozen=True)
class Chrono:
    longest: float

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        return np.log(rng.uniform(1, self.longest - 1, _sizes(rng, rows, columns)))


@dataclass(frozen=True)
class _Normal:
    deviation: float

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        return rng.normal(0, self.deviation, _sizes(rng, rows, columns))


@dataclass(frozen=True)
class _Scaled:
    initializer: Initializer
    gain: float

    def __call__(self, rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
        return self.gain * self.initializer(rng, *_sizes(rng, rows, columns))


INITIALIZERS: dict[str, Initializer] = {
    "glorot_uniform": glorot_uniform,
    "identity": identity,
    "orthogonal": orthogonal,
    "zeros": zeros,
}


def chosen(defaults: Mapping[str, Initializer], init: Any) -> dict[str, Initializer]:
    """`defaults` by parameter, with those that `init` names in their place; ValueError where it is not right."""
    kinds = dict(defaults)
    if not isinstance(init, Mapping):
        raise ValueError(f"init: expected a mapping from parameter names, got {init!r}")
    for kind, given in init.items():
        if kind not in kinds:
            raise ValueError(f"init: expected names among {', '.join(kinds)}, got {kind!r}")
        if not callable(given) and not (isinstance(given, str) and given in INITIALIZERS):
            choices = f"one of {', '.join(INITIALIZERS)} or a function (rng, rows, columns)"
            raise ValueError(f"init[{kind!r}]: expected {choices}, got {given!r}")
        kinds[kind] = INITIALIZERS[given] if isinstance(given, str) else given
    return kinds


def drawn(
    initializer: Initializer, what: str, rng: np.random.Generator, gates: int, shape: tuple[int, ...]
) -> np.ndarray:
    """A parameter of this shape, each gate by itself.  what: the option that the initialiser came by."""
    rows, columns = shape[0] // gates, shape[1] if len(shape) > 1 else 1
    blocks = [np.asarray(initializer(rng, rows, columns)) for _ in range(gates)]
    for block in blocks:
        if block.shape != (rows, columns):
            raise ValueError(f"{what}: expected (rows, columns) = {(rows, columns)}, got {block.shape}")
    return np.concatenate(blocks).reshape(shape)
