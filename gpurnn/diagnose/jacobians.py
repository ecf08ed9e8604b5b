"""Jacobians of the recurrence: of one step, over spans of steps, and their exponents in the long run.

They are computed by the engine's backward products, with unit vectors side by side: whatever the cell, on either
backend.  J_t = dstate_t/dstate_{t-1} is of the layer alone, its input held still; in a stack of layers the Jacobian of the
whole is block triangular, with these on its diagonal, so that its exponents are those of the layers together.
state_t is what step t leaves; its S parts (for an LSTM h, then c) lie side by side, S*H in all.  A reverse direction runs from
the last step to the first, and "before" means what it ran before.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import listed, whole
from gpurnn.cpu.threads import one_blas_thread
from gpurnn.diagnose.subject import checked_input, recurrent_part, step_number, steps_of
from gpurnn.executors.numpy_loop import Tape, step_backward
from gpurnn.types import Array

LARGEST = 2 << 30  # bytes that `jacobians` returns without being asked twice
SAFE_EXPONENT = 40  # a product's largest entry stays within 2**+-40
LARGEST_SHIFT = 120  # at once: float32 has 2**+-120 itself


@dataclass(frozen=True, eq=False)
class Spans:
    """Singular values of dstate_t/dstate_{t-lag}.

    lags (K,); values (K, N, S*H) descending, float64: 0 where they are below 1e-308, inf beyond 1e308.
    """

    lags: np.ndarray
    values: np.ndarray

    @property
    def spectral(self) -> np.ndarray:
        """(K, N): the largest factor by which a gradient can change over the span."""
        return self.values[..., 0]

    @property
    def frobenius(self) -> np.ndarray:
        """(K, N)"""
        return np.hypot.reduce(self.values, axis=-1)


def jacobians(
    model: Any, x: Any, *, layer: str = "l0", state: Any = None, steps: Sequence[int] | None = None
) -> np.ndarray:
    """J_t for each t in `steps` (None: all), (len(steps), N, S*H, S*H) float64; [..., i, j] is dstate_t[i]/dstate_{t-1}[j].

    Costs S*H backward products a step.  Raises ValueError where the result would take more than 2 GiB: ask for fewer steps,
    or for `lyapunov_exponents`, `singular_values`, which keep no more than one Jacobian.
    """
    part = recurrent_part(model)
    T, N = checked_input(model, x).shape[:2]
    width = part.cell.states * part.hidden_size
    chosen = (
        range(T) if steps is None else [step_number(t, T) for t in listed("steps", steps, "numbers of steps or None")]
    )
    shape = (len(chosen), N, width, width)
    if 8 * math.prod(shape) > LARGEST:
        raise ValueError(
            f"steps: expected so few that {shape} float64 stay below {LARGEST:,} bytes, got {8 * math.prod(shape):,}"
        )
    tape = steps_of(model, layer, x, state)
    found = np.empty(shape)
    for at, t in enumerate(chosen):
        ((_, rows, exponents),) = _walk(tape, _place(tape, t), 1, _units(tape, N))
        found[at] = _matrix(rows, exponents)
    return found


def jacobian_product(
    model: Any, x: Any, *, lag: int, step: int | None = None, layer: str = "l0", state: Any = None
) -> np.ndarray:
    """dstate_t/dstate_{t-lag}, t = `step`: the product of `lag` Jacobians, (N, S*H, S*H) float64.

    step: None: the last that was run, in a reverse direction step 0.  lag: from 1 to as many steps as were run until t, which leads to the initial state.  Costs S*H backward products for
    each step of the span.
    """
    tape = steps_of(model, layer, x, state)
    last = _last(tape, step)
    lag = _lag(lag, last)
    *_, (_, rows, exponents) = _walk(tape, last, lag, _units(tape, len(tape.steps[0][3][0])))
    return _matrix(rows, exponents)


def singular_values(
    model: Any,
    x: Any,
    *,
    step: int | None = None,
    lags: Sequence[int] | None = None,
    layer: str = "l0",
    state: Any = None,
) -> Spans:
    """Singular values of dstate_t/dstate_{t-lag}, t = `step`, for each of `lags` (None: 1, 2, 4, 8, ... and the longest).

    step: None: the last that was run, in a reverse direction step 0.  Costs S*H backward products for each step of the
    longest span, and N singular value decompositions of (S*H, S*H) on the host for each lag.
    """
    tape = steps_of(model, layer, x, state)
    last = _last(tape, step)
    if lags is None:
        lags = [2**power for power in range(last.bit_length() + 1) if 2**power <= last] + [last + 1]
    chosen = sorted({_lag(lag, last) for lag in listed("lags", lags, "numbers of steps or None")})
    if not chosen:
        raise ValueError("lags: expected at least one, got none")
    values = []
    with one_blas_thread:
        for lag, rows, exponents in _walk(tape, last, chosen[-1], _units(tape, len(tape.steps[0][3][0]))):
            if lag in chosen:
                values.append(np.ldexp(np.linalg.svd(_matrix(rows), compute_uv=False), exponents[:, None]))
    return Spans(np.array(chosen), np.stack(values))


def lyapunov_exponents(
    model: Any, x: Any, *, layer: str = "l0", state: Any = None, leading: int | None = None, warmup: int = 0
) -> np.ndarray:
    """Lyapunov exponents along the sequence, in nats per step, (N, m) descending, by QR at every step (Benettin et al. 1980).

    exp of the largest is the factor by which gradients change with a step back in the long run.  The Jacobians are applied
    as backward applies them, transposed and from the last step to the first; their product has the same singular values.
    leading: m, the first so many; None: all S*H.  warmup: steps, counted from the end, in which the directions settle and
    which do not count.  -inf where a step leads nowhere, as with dead relu units.
    Costs m backward products and a QR of (S*H, m) on the host a step; memory for N of those, whatever T.
    """
    tape = steps_of(model, layer, x, state)
    width, T = _width(tape), len(tape.steps)
    count = width if leading is None else whole("leading", leading)
    if count > width or whole("warmup", warmup, 0) >= T:
        raise ValueError(f"expected leading <= S*H = {width} and warmup < T = {T}, got {leading} and {warmup}")
    return exponents_of(tape, count, warmup)


def exponents_of(tape: Tape, count: int, warmup: int = 0) -> np.ndarray:
    """The first `count` Lyapunov exponents of the steps of one layer, (N, count)."""
    N, width, T = len(tape.steps[0][3][0]), _width(tape), len(tape.steps)
    sums = np.zeros((N, count))
    # Random directions, always the same: unit vectors could all be blind to the leading one.
    start = np.random.default_rng(0).standard_normal((count, N, width)).transpose(1, 2, 0)
    with one_blas_thread, np.errstate(divide="ignore"):  # at such sizes threads do little but wait for each other
        q = np.linalg.qr(start)[0]
        for place in range(T - 1, -1, -1):
            ((_, rows, exponents),) = _walk(tape, place, 1, _split(tape, q))
            q, r = np.linalg.qr(_matrix(rows).swapaxes(1, 2))
            if place < T - warmup:
                sums += np.log(np.abs(np.diagonal(r, axis1=1, axis2=2))) + exponents[:, None] * np.log(2)
    return -np.sort(-sums / (T - warmup), axis=1)


def _width(tape: Tape) -> int:
    return tape.job.cell.states * (tape.job.weights.weight_ih.shape[0] // tape.job.cell.gates)


def _place(tape: Tape, t: int) -> int:
    """Where step t stands in the order in which the layer ran."""
    return len(tape.steps) - 1 - t if tape.job.reverse else t


def _last(tape: Tape, step: int | None) -> int:
    """The place of the step that a span ends with."""
    return len(tape.steps) - 1 if step is None else _place(tape, step_number(step, len(tape.steps)))


def _lag(lag: Any, last: int) -> int:
    if whole("lag", lag) > last + 1:
        raise ValueError(f"lag: expected at most {last + 1}, the steps that were run until there, got {lag}")
    return int(lag)


def _units(tape: Tape, N: int) -> tuple[Array, ...]:
    """Unit vectors of the whole state as gradients: S arrays (S*H, N, H)."""
    width = _width(tape)
    return _split(tape, np.broadcast_to(np.eye(width), (N, width, width)))


def _split(tape: Tape, columns: np.ndarray) -> tuple[Array, ...]:
    """columns (N, S*H, m) -> S arrays (m, N, H) of the backend."""
    dtype = tape.job.x.dtype
    parts = np.split(columns.transpose(2, 0, 1), tape.job.cell.states, axis=2)
    return tuple(backend.asarray(np.ascontiguousarray(part, dtype), dtype, "gradients") for part in parts)


def _matrix(rows: tuple[Array, ...], exponents: np.ndarray | None = None) -> np.ndarray:
    """S arrays (m, N, H) -> (N, m, S*H) float64 on the host, times 2**exponents (N,)."""
    joined = np.concatenate([backend.to_numpy(part) for part in rows], axis=2).transpose(1, 0, 2).astype(np.float64)
    return joined if exponents is None else np.ldexp(joined, exponents[:, None, None])


def _walk(
    tape: Tape, last: int, count: int, rows: tuple[Array, ...]
) -> Iterator[tuple[int, tuple[Array, ...], np.ndarray]]:
    """Gradients (m, N, H) of the states behind step number `last`, taken back over 1, 2, ... count steps.

    Yields lag, gradients and the exponents (N,) of 2 by which they are still to be multiplied: a power of 2 is exact, and
    what float32 cannot hold vanishes or explodes in the result alone.
    """
    N = rows[0].shape[1]
    exponents = np.zeros(N, np.int64)
    for lag in range(1, count + 1):
        with np.errstate(all="ignore"):  # what is not finite is told below
            _, _, rows, _ = step_backward(tape, tape.steps[last + 1 - lag], rows)
        peaks = np.max([backend.to_numpy(abs(part).max(axis=(0, 2))) for part in rows], axis=0)
        if not np.isfinite(peaks).all():
            raise FloatingPointError(f"dstate_t/dstate_(t-{lag}): expected finite values, got {peaks.max()}")
        shifts = np.where(peaks > 0, np.frexp(peaks)[1], 0)
        shifts = np.clip(np.where(abs(shifts) > SAFE_EXPONENT, shifts, 0), -LARGEST_SHIFT, LARGEST_SHIFT)
        if shifts.any():
            factors = backend.asarray(np.ldexp(1.0, -shifts)[:, None], tape.job.x.dtype, "factors")
            rows = tuple(part * factors for part in rows)
            exponents = exponents + shifts
        yield lag, rows, exponents
