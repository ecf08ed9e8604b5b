"""Values that are taken into parameters by name, and whether values are finite."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import mapping
from gpurnn.parameters.flat import Parameters
from gpurnn.types import Array


def load(parameters: Parameters, values: Mapping[str, Any]) -> None:
    """Copies `values` into `parameters`, name by name; every shape is checked before the first value is written.

    Raises TypeError for anything but a mapping of arrays, KeyError where names are missing or unknown, ValueError where
    a shape differs or a value is not finite (in the dtype of `parameters`).  A tied name may be missing; where it is there
    its values have to be those of the name that it is tied to.
    """
    mapping(values)
    missing = [name for name in parameters if name not in values and name not in parameters.tied]
    unknown = [name for name in values if name not in parameters]
    if missing or unknown:
        raise KeyError(f"expected the names {list(parameters)}; missing {missing}, unknown {unknown}")
    arrays: dict[tuple, tuple[str, Array]] = {}
    for name in [name for name in parameters if name in values]:
        view = parameters[name]
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
            array = backend.asarray(values[name], parameters.dtype, name)
        if array.shape != view.shape:
            meaning = f"{parameters.symbols[name]} = " if name in parameters.symbols else ""
            raise ValueError(f"{name}: expected {meaning}{view.shape}, got {array.shape}")
        if not bool(backend.xp.isfinite(array).all()):
            raise ValueError(f"{name}: expected finite {parameters.dtype} values, got some that are not")
        first, known = arrays.setdefault(parameters.owner(name), (name, array))
        if first != name and not bool((known == array).all()):
            raise ValueError(f"{name}: expected the values of {first}, to which it is tied, got others")
    for name, array in arrays.values():
        parameters[name][...] = array


def unprefixed(values: Mapping[str, Any], prefix: Any) -> Mapping[str, Any]:
    """Of `values` those behind a prefix, under the names behind it; several prefixes by what stands in their place.

    Raises TypeError for other prefixes, KeyError where nothing has one.
    """
    if prefix == "":
        return values
    wanted = {"": prefix} if isinstance(prefix, str) else prefix
    if not isinstance(wanted, Mapping) or not all(isinstance(text, str) for pair in wanted.items() for text in pair):
        raise TypeError(f"prefix: expected a text, or texts by part, got {prefix!r:.80}")
    found: dict[str, Any] = {}
    for own, theirs in wanted.items():
        before, after = (text + "." if text and not text.endswith(".") else text for text in (theirs, own))
        names = [name for name in values if name.startswith(before)]
        if not names:
            raise KeyError(f"prefix: no name begins with {before!r}; there are {', '.join(values)}")
        found |= {after + name.removeprefix(before): values[name] for name in names}
    return found


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
