"""One flat buffer for all parameters, one for all gradients; named views into both.

An optimiser then updates a whole model with a handful of vector operations, a global gradient norm is one dot product,
and a checkpoint is a walk over names.  Views start on 64-byte boundaries; the padding between them stays zero in both
buffers, so that whole-buffer operations need no mask.

Parts are joined: their values move into one buffer, and they stay alive as views of it.  Parts that lie side by side in a
buffer already are shown under other names, without a move, so that `Adam([lstm, head])` and `Model(a=lstm, b=head)` have
the same memory.  A tied name has no place of its own: it shows the values of another.
"""

import copy
import fnmatch
import itertools
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from gpurnn import backend
from gpurnn.parameters.buffers import Revision, check_memory, padded, revise, size_of
from gpurnn.types import Array

Shapes = Mapping[str, tuple[int, ...]]


class Parameters(Mapping[str, Array]):
    """Arrays by name, all views of one buffer: `parameters[name]`, and `parameters.flat` for the whole of it.

    shapes: of what has a place in the buffer.  tied: names that have none, and whose they are.
    """

    def __init__(self, shapes: Shapes, dtype: Any, symbols: Mapping[str, str] | None = None):
        """`symbols` says shapes in letters, such as `(4*H, I)`, for the messages of `load`."""
        self.shapes = dict(shapes)
        self.symbols = dict(symbols or {})
        self.dtype = backend.xp.dtype(dtype)
        self.tied: dict[str, tuple[Parameters, str]] = {}
        self._frozen: set[str] = set()
        self._parts: dict[str, Parameters] = {}
        self._begin_alone()
        self._shows: Parameters | None = None  # the whole in whose buffer all this lies, under other names
        self._start = 0  # where it begins there, or in the whole that it was joined into
        check_memory(self.count, self.dtype)
        self._bind(backend.ops.zeros(self.extent, self.dtype))

    def _begin_alone(self) -> None:
        self._whole: Any = lambda: None  # a weak reference to what it was joined into: gone with that, it is free again
        self._ranges: tuple[int, list[tuple[int, int]]] = (-1, [])  # see `frozen_ranges`, of which revision
        self._shown: dict[tuple, Parameters] = {}  # what shows parts of this buffer under other names

    def _bind(self, flat: Array) -> None:
        """Makes `flat` the buffer behind every name, here and in the parts; the values become those of `flat`."""
        self.flat = flat
        self._views: dict[str, Array] = {}
        places = []
        start = 0
        for name, shape in self.shapes.items():
            size = size_of(shape)
            self._views[name] = flat[start : start + size].reshape(shape)
            places.append((name, start, shape))
            start += padded(size, self.dtype)
        self.places = tuple(places)  # each name, where in `flat` its values begin, its shape
        if self._shows is None:  # else they are bound by what they were joined into
            start = 0
            for part in self._parts.values():
                part._start = start
                part._bind(flat[start : start + part.extent])
                start += part.extent
        for shown in self._shown.values():
            shown._show()

    def _show(self) -> None:
        """Binds this one, of parts that lie side by side in another whole's buffer, to their place there."""
        top, self._start = next(iter(self._parts.values()))._place()
        self._bind(top.flat[self._start : self._start + self.extent])

    def _place(self) -> tuple["Parameters", int]:
        """The whole in whose buffer these values lie, and where they begin there."""
        whole = self._shows or self._whole()
        if whole is None:
            return self, 0
        top, start = whole._place()
        return top, start + self._start

    def __copy__(self) -> "Parameters":
        return copy.deepcopy(self)  # a second buffer needs parts of its own

    def __getstate__(self) -> dict[str, Any]:
        """For copy and pickle, which know nothing of views: they take the buffer, and the views are made anew.

        A copy of a part alone belongs to no whole; with its whole it is part of that one's copy.
        """
        return {name: value for name, value in self.__dict__.items() if name not in ("_views", "_whole", "_shown")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_alone()
        if self._shows is not None:
            self._shows._shown[self._key()] = self
            self._show()
            return
        flat = backend.ops.zeros(self.flat.size, self.dtype)
        flat[...] = self.flat
        self._bind(flat)
        self._adopt()

    def _adopt(self) -> None:
        for part in self._parts.values():
            part._whole = weakref.ref(self)

    def __getitem__(self, name: str) -> Array:
        view = self._views.get(name)
        if view is None:
            whose, own = self.tied[name]
            return whose[own]
        return view

    def __setitem__(self, name: str, value: Any) -> None:
        """Copies `value` into the view: `parameters[name] += 1`, or an array of its shape.  ValueError for another shape."""
        view = self[name]
        if value is view:  # as augmented assignment has it, done in place already
            return
        array = backend.asarray(value, self.dtype, name)
        if array.shape != view.shape:
            raise ValueError(f"{name}: expected {view.shape}, got {array.shape}")
        view[...] = array

    def __iter__(self) -> Iterator[str]:
        yield from self._views
        yield from self.tied

    def __len__(self) -> int:
        return len(self._views) + len(self.tied)

    __eq__, __hash__ = object.__eq__, object.__hash__  # a mapping's would compare arrays

    def __repr__(self) -> str:
        lines = [f"  {name}: {shape}" for name, shape in self.shapes.items()]
        lines += [f"  {name}: {self.meaning(name)}" for name in self.tied]
        return "\n".join((f"Parameters({self.count} values, {self.dtype})", *lines))

    @property
    def count(self) -> int:
        """How many values there are, padding left out and tied ones counted once."""
        return sum(size_of(shape) for shape in self.shapes.values())

    @property
    def extent(self) -> int:
        """How many values the buffer has, padding included."""
        return sum(padded(size_of(shape), self.dtype) for shape in self.shapes.values())

    # Parts

    @classmethod
    def join(cls, parts: Mapping[str, "Parameters"]) -> "Parameters":
        """Several parts as one; names become `part.name`.  The parts stay alive, as views.

        Parts that belong to no living whole move into a new buffer.  Parts that lie side by side in one are shown there, in
        the order in which they lie.  Raises ValueError for anything else, for parts that overlap or differ in dtype.
        """
        dtypes = {str(part.dtype) for part in parts.values()}
        if len(dtypes) != 1:
            given = ", ".join(f"{name}: {part.dtype}" for name, part in parts.items())
            raise ValueError(f"expected parts of one dtype, got {given or 'no parts'}")
        beside = side_by_side(parts)
        taken = [name for name, part in parts.items() if part._place()[0] is not part]
        if taken and not beside:
            which = "belongs" if len(taken) == 1 else "belong"
            raise ValueError(
                f"{', '.join(taken)}: {which} to another model already, and not all of {', '.join(parts)} lie side by side "
                "in its buffer: give that model itself, and freeze what is not to learn"
            )
        order = sorted(parts, key=lambda name: parts[name]._place()[1]) if taken else list(parts)
        whole = cls({}, dtypes.pop())
        whole._parts = {name: parts[name] for name in order}
        whole._collect()
        if taken:
            whole._shows = next(iter(parts.values()))._place()[0]
            shown = whole._shows._shown.setdefault(whole._key(), whole)
            if shown is whole:
                whole._show()
            return shown
        flat = backend.ops.zeros(whole.extent, whole.dtype)
        flat[...] = backend.joined([part.flat for part in parts.values()])
        whole._bind(flat)
        whole._adopt()
        revise()
        return whole

    def _key(self) -> tuple:
        return tuple((name, id(part)) for name, part in self._parts.items())

    def _collect(self) -> None:
        """Takes names and shapes from the parts, and so do those that show them."""
        for part in self._parts.values():
            part._collect()
        if self._parts:
            each = [(f"{prefix}.{name}", part, name) for prefix, part in self._parts.items() for name in part]
            self.shapes = {full: part.shapes[name] for full, part, name in each if name in part.shapes}
            self.symbols = {full: part.symbols[name] for full, part, name in each if name in part.symbols}
            self.tied = {full: (part, name) for full, part, name in each if name not in part.shapes}
        for shown in self._shown.values():
            shown._collect()

    def owner(self, name: str) -> tuple["Parameters", str]:
        """The part that a name's values have their place in, and what they are called there.  KeyError for no such name."""
        if name in self.tied:
            whose, own = self.tied[name]
            return whose.owner(own)
        if name not in self.shapes:
            raise KeyError(f"{name}: expected one of {', '.join(self)}")
        for prefix, part in self._parts.items():
            if name.startswith(f"{prefix}."):
                own = name.removeprefix(f"{prefix}.")
                if own in part.shapes:
                    return part.owner(own)
        return self, name

    def meaning(self, name: str) -> str:
        """Whose values a tied name shows."""
        owner = self.owner(name)
        return next((f"that is {other}" for other in self.shapes if self.owner(other) == owner), "tied")

    def tie(self, name: str, to: str) -> None:
        """Makes `name` show the values of `to`, of the same shape; its own go, and its place in the buffer.

        Raises KeyError for no such name, ValueError where shapes differ or both are one already.
        """
        (part, own), (whose, other) = self.owner(name), self.owner(to)
        if (part, own) == (whose, other):
            raise ValueError(f"{name}: expected another parameter than {to}, they are one")
        if part[own].shape != whose[other].shape:
            raise ValueError(f"{name}: expected the shape of {to}, {whose[other].shape}, got {part[own].shape}")
        top = self._place()[0]
        before = dict(top._views)
        part.shapes.pop(own)
        part.tied[own] = whose, other
        part._frozen.discard(own)
        top._collect()
        top._bind(backend.ops.zeros(top.extent, top.dtype))
        for name, view in top._views.items():
            view[...] = before[name]
        revise()

    # What does not learn

    @property
    def frozen(self) -> list[str]:
        """The names, in order, of what optimisers leave as it is."""
        return [name for name in self if self._is_frozen(name)]

    def _is_frozen(self, name: str) -> bool:
        part, own = self.owner(name)
        return own in part._frozen

    def freeze(self, *patterns: str) -> None:
        """Optimisers leave what matches as it is from now on; see `matching`.  Without a pattern: everything."""
        for part, own in [self.owner(name) for name in self.matching(patterns)]:
            part._frozen.add(own)
        revise()

    def unfreeze(self, *patterns: str) -> None:
        """What matches learns again.  Without a pattern: everything."""
        for part, own in [self.owner(name) for name in self.matching(patterns)]:
            part._frozen.discard(own)
        revise()

    def matching(self, patterns: tuple[str, ...]) -> list[str]:
        """The names that match: "head.bias", "*bias*", or the name of a part, "head".  All, where no pattern is given.

        Raises TypeError for a pattern that is not a str, ValueError for one that matches nothing.
        """
        found = []
        for pattern in patterns or ("*",):
            if not isinstance(pattern, str):
                raise TypeError(f"expected names or patterns such as 'head.*', got {pattern!r:.80}")
            names = [name for name in self if name.startswith(f"{pattern}.") or fnmatch.fnmatchcase(name, pattern)]
            if not names and patterns:
                raise ValueError(f"{pattern!r} matches none of the parameters {', '.join(self)}")
            found += names
        return list(dict.fromkeys(found))

    def frozen_ranges(self) -> list[tuple[int, int]]:
        """Where in `flat` what is frozen begins and ends; found anew where something may have been frozen since."""
        if self._ranges[0] != Revision.number:
            places = [(start, size_of(shape)) for name, start, shape in self.places if self._is_frozen(name)]
            self._ranges = Revision.number, [(start, start + padded(size, self.dtype)) for start, size in places]
        return self._ranges[1]


def side_by_side(parts: Mapping[str, Parameters]) -> bool:
    """Whether parts lie one behind another in one buffer that is larger than any; ValueError where two are not apart."""
    places = sorted((id(part._place()[0]), part._place()[1], part.extent, name) for name, part in parts.items())
    for (whole, start, extent, name), (next_whole, next_start, _, next_name) in itertools.pairwise(places):
        same = parts[name] is parts[next_name]
        if same or (whole == next_whole and start + extent > next_start):
            raise ValueError(f"expected parts that differ, got the same values twice, in {name} and in {next_name}")
    joined = all(part._place()[0] is not part for part in parts.values())
    return joined and all(a[0] == b[0] and a[1] + a[2] == b[1] for a, b in itertools.pairwise(places))


class Trainable(Protocol):
    """Anything that can be trained: a layer, a model, an object of your own."""

    @property
    def params(self) -> Parameters: ...

    @property
    def grads(self) -> Parameters: ...
