"""One flat buffer for all parameters, one for all gradients; named views into both.

An optimiser then updates a whole model with a handful of vector operations, a global gradient norm is one dot product,
and a checkpoint is a walk over names.  Views start on 64-byte boundaries; the padding between them stays zero in both
buffers, so that whole-buffer operations need no mask.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np

from gpurnn import backend
from gpurnn.arguments import mapping
from gpurnn.types import Array

Shapes = Mapping[str, tuple[int, ...]]

ALIGNMENT = 64  # bytes: one cache line, one AVX-512 vector


class Parameters(Mapping[str, Array]):
    """Arrays by name, all views of one buffer: `parameters[name]`, and `parameters.flat` for the whole of it."""

    def __init__(self, shapes: Shapes, dtype: Any, symbols: Mapping[str, str] | None = None):
        """`symbols` says shapes in letters, such as `(4*H, I)`, for the messages of `load`."""
        self.shapes = dict(shapes)
        self.symbols = dict(symbols or {})
        self.dtype = backend.xp.dtype(dtype)
        self._joined = False
        self._parts: list[Parameters] = []
        check_memory(self.count, self.dtype)
        self._bind(backend.ops.zeros(_extent(self.shapes, self.dtype), self.dtype))

    def _bind(self, flat: Array) -> None:
        """Makes `flat` the buffer behind every name, here and in the parts; the values become those of `flat`."""
        self.flat = flat
        self._views: dict[str, Array] = {}
        places = []
        start = 0
        for name, shape in self.shapes.items():
            size = _size(shape)
            self._views[name] = flat[start : start + size].reshape(shape)
            places.append((name, start, shape))
            start += _padded(size, self.dtype)
        self.places = tuple(places)  # each name, where in `flat` its values begin, its shape
        start = 0
        for part in self._parts:
            part._bind(flat[start : start + part.flat.size])
            start += part.flat.size

    def __copy__(self) -> "Parameters":
        return copy.deepcopy(self)  # a second buffer needs parts of its own

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which know nothing of views: they take the buffer, and the views are made anew."""
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        flat = backend.ops.zeros(self.flat.size, self.dtype)
        flat[...] = self.flat
        self._bind(flat)

    def __getitem__(self, name: str) -> Array:
        return self._views[name]

    def __setitem__(self, name: str, value: Any) -> None:
        """Copies `value` into the view: `parameters[name] += 1`, or an array of its shape.  ValueError for another shape."""
        view = self._views[name]
        if value is view:  # as augmented assignment has it, done in place already
            return
        array = backend.asarray(value, self.dtype, name)
        if array.shape != view.shape:
            raise ValueError(f"{name}: expected {view.shape}, got {array.shape}")
        view[...] = array

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)

    def __repr__(self) -> str:
        lines = (f"  {name}: {shape}" for name, shape in self.shapes.items())
        return "\n".join((f"Parameters({self.count} values, {self.dtype})", *lines))

    @property
    def count(self) -> int:
        """How many values there are, padding left out."""
        return sum(_size(shape) for shape in self.shapes.values())

    @classmethod
    def join(cls, parts: Mapping[str, "Parameters"]) -> "Parameters":
        """Moves several parts into one new buffer.  The parts stay alive, as views of it; names become `part.name`."""
        dtypes = {str(part.dtype) for part in parts.values()}
        if len(dtypes) != 1:
            given = ", ".join(f"{name}: {part.dtype}" for name, part in parts.items())
            raise ValueError(f"expected parts of one dtype, got {given}")
        if len({id(part) for part in parts.values()}) < len(parts):
            raise ValueError(f"expected parts that differ, got the same one twice among {', '.join(parts)}")
        taken = [name for name, part in parts.items() if part._joined]
        if taken:
            raise ValueError(
                f"{', '.join(taken)}: belongs to another model already; its values live in that model's buffer"
            )
        shapes = {f"{prefix}.{name}": s for prefix, part in parts.items() for name, s in part.shapes.items()}
        symbols = {f"{prefix}.{name}": s for prefix, part in parts.items() for name, s in part.symbols.items()}
        whole = cls(shapes, dtypes.pop(), symbols)
        whole.flat[...] = backend.xp.concatenate([part.flat for part in parts.values()])
        for part in parts.values():
            part._joined = True
        whole._parts = list(parts.values())
        whole._bind(whole.flat)
        return whole


class Model(Protocol):
    """Anything that can be trained: a layer, a SequenceModel, an object of your own."""

    @property
    def params(self) -> Parameters: ...

    @property
    def grads(self) -> Parameters: ...


def load(parameters: Parameters, values: Mapping[str, Any]) -> None:
    """Copies `values` into `parameters`, name by name; every shape is checked before the first value is written.

    Raises TypeError for anything but a mapping of arrays, KeyError where names are missing or unknown, ValueError where
    a shape differs or a value is not finite (in the dtype of `parameters`).
    """
    mapping(values)
    missing = [name for name in parameters if name not in values]
    unknown = [name for name in values if name not in parameters]
    if missing or unknown:
        raise KeyError(f"expected the names {list(parameters)}; missing {missing}, unknown {unknown}")
    arrays = {}
    for name, view in parameters.items():
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
            array = backend.asarray(values[name], parameters.dtype, name)
        if array.shape != view.shape:
            meaning = f"{parameters.symbols[name]} = " if name in parameters.symbols else ""
            raise ValueError(f"{name}: expected {meaning}{view.shape}, got {array.shape}")
        if not bool(backend.xp.isfinite(array).all()):
            raise ValueError(f"{name}: expected finite {parameters.dtype} values, got some that are not")
        arrays[name] = array
    for name, array in arrays.items():
        parameters[name][...] = array


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for extent in shape:
        size *= extent
    return size


def _padded(size: int, dtype: Any) -> int:
    step = ALIGNMENT // dtype.itemsize
    return -(-size // step) * step


def check_memory(count: int, dtype: Any, what: str = "parameters") -> None:
    """MemoryError for what no memory holds: an allocation may seem to succeed, and its use then ends the process."""
    memory = backend.ops.memory_bytes()
    if count * dtype.itemsize > memory:
        needed, there = (f"{size / 2**30:,.0f} GiB" for size in (count * dtype.itemsize, memory))
        raise MemoryError(f"{count:,} {what} in {dtype} need {needed}, and there are {there} of memory")


def _extent(shapes: Shapes, dtype: Any) -> int:
    return sum(_padded(_size(shape), dtype) for shape in shapes.values())


def all_finite(flat: Array) -> bool:
    """Whether all values are; without a temporary, for minimum and maximum hand NaN on."""
    return not flat.size or (math.isfinite(flat.max()) and math.isfinite(flat.min()))


def raise_where_not_finite(grads: Parameters, allow_inf: bool = False) -> None:
    """FloatingPointError with the name of the first gradient that has such a value."""
    for name, grad in grads.items():
        bad = np.isnan(grad) if allow_inf else ~np.isfinite(grad)
        count = int(bad.sum())
        if count:
            first = float(grad[bad][0])
            raise FloatingPointError(
                f"gradient of {name}: expected finite values, got {first} ({count} of {grad.size})"
            )
