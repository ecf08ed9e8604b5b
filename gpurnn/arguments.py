"""Checks of the arguments of the library: each returns the value, or names it, what was expected and what came."""

import functools
import inspect
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.types import Array

DTYPES = ("float32", "float64")


GENERATORS = np.random.Generator | np.random.BitGenerator | np.random.RandomState | np.random.SeedSequence
MOST_SEEDS = 1 << 16
LARGEST = (1 << 63) - 1  # what 64 bits hold


def whole(name: str, value: Any, least: int = 1) -> int:
    """`value` if it is a whole number from `least`, one of 64 bits; ValueError otherwise."""
    if not _is_real(value, int | np.integer) or value < least:
        raise ValueError(f"{name}: expected a whole number from {least}, got {value!r}")
    if value > LARGEST:
        raise ValueError(f"{name}: expected a whole number of 64 bits, got {_short(value)}")
    return int(value)


def number(name: str, value: Any, fits: Callable[[Any], bool] = lambda value: True, where: str = "") -> float:
    """`value` if it is a finite number that `fits`, which `where` says in words; ValueError otherwise."""
    try:
        found = float(value) if _is_real(value, int | float | np.integer | np.floating) else math.nan
    except OverflowError:
        found = math.inf
    if not (math.isfinite(found) and fits(found)):
        raise ValueError(f"{name}: expected a finite number{where and ' ' + where}, got {_short(value)}")
    return found


def _is_real(value: Any, kinds: Any) -> bool:
    """Whether it is one of these numbers; True is none, nor is a time, which NumPy counts among its integers."""
    return isinstance(value, kinds) and not isinstance(value, bool | np.timedelta64)


def _short(value: Any) -> str:
    """As a message shows it; Python refuses to write out a whole number of thousands of digits."""
    if isinstance(value, int) and value.bit_length() > 1000:
        return f"a whole number of {value.bit_length()} bits"
    return f"{value!r:.80}"


def positive(name: str, value: Any) -> float:
    """`value` if it is above 0; ValueError otherwise."""
    return number(name, value, lambda v: v > 0, "above 0")


def at_least_0(name: str, value: Any) -> float:
    """`value` if it is 0 or more; ValueError otherwise."""
    return number(name, value, lambda v: v >= 0, "from 0")


def probability(name: str, value: Any) -> float:
    """`value` if it is a number in [0, 1); ValueError otherwise."""
    return number(name, value, lambda v: 0 <= v < 1, "in [0, 1)")


def fitting(name: str, value: float, dtype: np.dtype) -> float:
    """`value` if it is finite in `dtype`, too; ValueError otherwise."""
    if abs(value) > float(np.finfo(dtype).max):
        raise ValueError(f"{name}: expected a number that {dtype} can hold, got {value!r}")
    return value


def switch(name: str, value: Any) -> bool:
    """`value` if it is True or False; ValueError otherwise, since "no" would count as yes."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def one_of(name: str, value: Any, choices: Sequence[str]) -> str:
    """`value` if it is one of these words; ValueError otherwise."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r:.80}")
    return value


def function(name: str, value: Any) -> Any:
    """`value` if it can be called; TypeError otherwise."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {type(value).__name__}")
    return value


def word(name: str, value: Any) -> str:
    """`value` if it is a str; TypeError otherwise."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {type(value).__name__}")
    return value


def listed(name: str, values: Any, what: str) -> list:
    """The members of `values`; TypeError where it has none, as a number has none."""
    try:
        return list(values)
    except TypeError:
        raise TypeError(f"{name}: expected {what}, got {type(values).__name__}") from None


def mapping(values: Any) -> Mapping[str, Any]:
    """`values` if it is a mapping, as a state that was saved is; TypeError otherwise."""
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a mapping from names to arrays, got {type(values).__name__}")
    return values


def length(name: str, value: Any) -> int:
    """How many steps `value` has, time first; TypeError where it has no length."""
    try:
        return len(value)
    except TypeError:
        raise TypeError(f"{name}: expected an array, time first, got {type(value).__name__}") from None


def returned(name: str, value: Any, parts: str) -> tuple:
    """What a function of the caller's returned, if it is a tuple of these parts; TypeError otherwise."""
    if not isinstance(value, tuple | list) or len(value) != len(parts.split(", ")):
        came = f"{len(value)} values" if isinstance(value, tuple | list) else type(value).__name__
        raise TypeError(f"{name}: expected it to return {parts}, got {came}")
    return tuple(value)


def trained(model: Any, name: str = "model") -> Any:
    """`model` if it has parameters and gradients, as a layer has; TypeError otherwise."""
    if not (hasattr(model, "params") and hasattr(model, "grads")) or isinstance(model, type):
        raise TypeError(f"{name}: expected a layer or a model with params and grads, got {type(model).__name__}")
    return model


def supported(dtype: Any) -> np.dtype:
    """The NumPy dtype of a layer; ValueError unless it is one that layers can have."""
    try:
        found = np.dtype(dtype) if dtype is not None else None
    except Exception:  # NumPy's own parser of dtypes raises what it comes upon
        found = None
    if found is None or found.name not in DTYPES:
        raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {repr(dtype) if found is None else found.name}")
    return np.dtype(found.name)


def generator(rng: Any) -> np.random.Generator:
    """A random generator from a seed, a generator (itself), or None (a seed of the system's).

    A seed is a whole number, or a row or array of them: NumPy walks into whatever else is given until its stack is full.
    """
    try:
        if isinstance(rng, np.ndarray) and rng.size > MOST_SEEDS:
            raise ValueError(f"an array of {rng.size:,} numbers")
        seed = np.asarray(rng).ravel().tolist() if isinstance(rng, np.ndarray) else rng
        if isinstance(seed, Sequence) and not all(isinstance(part, int | np.integer) for part in seed):
            raise TypeError("some of it are no whole numbers")
        if not isinstance(seed, int | np.integer | Sequence | GENERATORS | None):
            raise TypeError("it is none of them")
        return np.random.default_rng(seed)
    except Exception as error:  # whatever NumPy meets on its way to a seed
        expected = "a seed, a numpy.random.Generator or None"
        raise ValueError(f"rng: expected {expected}, got {rng!r:.80}: {backend.one_line(error)}") from error


def checked(value: Array, dtype: np.dtype | None, name: str, shape: tuple[int, ...], form: str = "") -> Array:
    """`value` as the backend's array; ValueError unless it has this shape."""
    array = backend.asarray(value, dtype, name)
    if array.shape != shape:
        raise ValueError(f"{name}: expected {form and form + ' = '}{shape}, got {array.shape}")
    return array


def flow_array(flow: Any, shape: tuple[int | str, ...]) -> Array | None:
    """`flow` if it is None or an array to fill, of the backend and this shape, where a letter is any size; or ValueError."""
    ours = isinstance(flow, backend.xp.ndarray)  # on a GPU a NumPy array cannot be filled
    if flow is None or (ours and flow.dtype == np.float64 and _of_shape(flow, shape)):
        return flow
    came = type(flow).__name__
    if ours or isinstance(flow, np.ndarray):
        came = f"{flow.dtype} {flow.shape}" + ("" if ours else f" of {type(flow).__module__}")
    wanted = f"a float64 array of {backend.xp.__name__} (L*D, S, T) = ({', '.join(map(str, shape))})"
    raise ValueError(f"flow: expected {wanted}, got {came}")


def _of_shape(array: Array, shape: tuple[int | str, ...]) -> bool:
    sizes = zip(array.shape, shape, strict=False)
    return array.ndim == len(shape) and all(wanted in (came, str(wanted)) for came, wanted in sizes)


class Turn:
    """Who may go back along a tape: one thread at a time, and nobody once it is `gone`.  `with turn:` or RuntimeError."""

    def __init__(self) -> None:
        self.gone = False
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError("backward is running in another thread, on this same tape: call it from one at a time")
        if self.gone:
            self._lock.release()
            raise RuntimeError("backward was called before and its tape is gone: the first call needs keep=True")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def sequence_model(model: Any) -> Any:
    """`model` if it can be called as a recurrent layer is; TypeError otherwise."""
    if isinstance(model, type):
        raise TypeError(f"model: expected one that is made, got the class {model.__name__}")
    return _called_with("model", model, "(x, state, lengths=...)", None, None, lengths=None)


def time_first(model: Any) -> Any:
    """`model` if its steps come before its batch; ValueError otherwise."""
    if getattr(model, "batch_first", False):
        raise ValueError("model: expected one that takes (T, N, ...), got one with batch_first")
    return model


def loss_function(loss: Any) -> Any:
    """`loss` if it can be called with what a model gave and with targets; TypeError otherwise."""
    return _called_with("loss", loss, "(out, targets)", None, None)


def _called_with(name: str, value: Any, example: str, *arguments: Any, **options: Any) -> Any:
    function(name, value)
    try:
        inspect.signature(value).bind(*arguments, **options)
    except TypeError:
        raise TypeError(f"{name}: expected one that is called with {example}, got {type(value).__name__}") from None
    except ValueError:  # some functions written in C do not say what they take
        pass
    return value


@functools.cache
def _takes_copy(kind: Any) -> bool:
    return "copy" in inspect.signature(kind.__call__).parameters


def uncopied(layer: Any) -> dict[str, bool]:
    """What to call a layer with where x lives, unchanged, until backward: {"copy": False} if it has such an option."""
    kind: Any = type(layer)
    return {"copy": False} if _takes_copy(kind) else {}


# Errors that both backends raise, one of them late


def wrong_target(shape: tuple[int, ...], classes: int, position: int, value: int) -> ValueError:
    """For a target outside [0, C), the `position`-th of `shape`, counted flat."""
    at = place_of(position, shape)
    return ValueError(f"targets: expected values in [0, C) = [0, {classes}), got {value} at {at}")


def place_of(position: int, shape: tuple[int, ...]) -> str:
    where = tuple(int(i) for i in np.unravel_index(position, shape))
    return f"(t, n) = {where}" if len(where) == 2 else f"position {where}"


def wrong_update(parts: tuple, position: int) -> FloatingPointError:
    """For a parameter that would not be finite, at `position` of the flat buffer with these `places`."""
    return FloatingPointError(f"the update of {part_at(parts, position)} is not finite")


def part_at(parts: tuple, position: int) -> str:
    """The name of the part of a flat buffer that a position lies in, and where in it."""
    name, start, shape = next(part for part in reversed(parts) if part[1] <= position)
    where = tuple(int(i) for i in np.unravel_index(position - start, shape))
    return f"{name} at {where}" if where else name
