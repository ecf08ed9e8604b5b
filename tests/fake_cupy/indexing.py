"""Indices as CuPy takes them: arrays of them wrap around instead of raising, a mask makes the host wait."""

from typing import Any

import numpy as np

from .memory import counters


def prepared(host: np.ndarray, parts: list) -> tuple[tuple, bool]:
    """The index of `host` that `parts` mean, and whether it holds arrays, so that the result is no view.

    parts: the entries of an index, with the memory of device arrays in their places.
    """
    parts = [_part(part) for part in parts]
    arrays = [part for part in parts if isinstance(part, np.ndarray)]
    masks = sum(part.dtype.kind == "b" for part in arrays)
    if masks > 1:
        raise NotImplementedError("CuPy does not support more than one boolean array in an index")
    if masks:
        counters.wait("the number of values under a mask")
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)  # with it, a single item is a view of shape () and no scalar
    taken = sum(_axes(part) for part in parts if part is not Ellipsis)
    axis, index = 0, []
    for part in parts:
        if isinstance(part, np.ndarray) and part.dtype.kind != "b" and axis < host.ndim:
            part = part.astype(np.int64) % max(1, host.shape[axis])
        index.append(part)
        axis += host.ndim - taken if part is Ellipsis else _axes(part)
    return tuple(index), bool(arrays)


def refuse_duplicates(host: np.ndarray, index: tuple) -> None:
    """Which of two values stored in one place is kept is undefined on a device."""
    places = np.arange(host.size).reshape(host.shape)[index]
    if np.unique(places).size < places.size:
        raise RuntimeError("two values for one place: which of them CuPy stores is undefined")


def _part(part: Any) -> Any:
    """An array for whatever is one, copied to the device where it lies on the host."""
    if part is None or part is Ellipsis or isinstance(part, slice):
        return part
    if isinstance(part, int | np.integer) and not isinstance(part, bool):
        return int(part)
    found = np.asarray(part)
    if not isinstance(part, np.ndarray) and not found.size:
        found = found.astype(np.int32)  # an empty list has no indices in it, rather than floats
    if found.dtype.kind not in "biu":
        raise IndexError(f"arrays used as indices must be of integer or boolean type. (actual: {found.dtype})")
    return found


def _axes(part: Any) -> int:
    """How many axes of the array an entry of the index takes."""
    if part is None:
        return 0
    return part.ndim if isinstance(part, np.ndarray) and part.dtype.kind == "b" else 1
