"""The cell contract: a recurrent cell is a few elementwise lines, forward and backward, for one unit at one time step."""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gpurnn.arguments import function, word
from gpurnn.cells.traced import Trace

STATE_NAMES = ("h", "c")
MATRICES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
MOST = 64  # gates, states or parameters: far more than any cell has, and few enough to be compiled


@dataclass(frozen=True, eq=False)
class Cell:
    """A recurrent cell.  The engine multiplies matrices, adds biases and walks through time; the cell does the rest.

    name      as shown to people.
    gates     G: weight_ih is (G*H, I), weight_hh is (G*H, H), of K heads (G*H, H/K); there is none where forward never reads r.
    states    how many values of shape (N, H) are carried from step to step; state[0] is h: the output, and what
              weight_hh multiplies.
    forward   (x, r, state, params) -> next_state, a tuple of `states` values.  x[g] is gate g of x_t weight_ih^T + bias_ih,
              r[g] of h_{t-1} weight_hh^T + bias_hh.
    backward  None: it is derived from forward (`gpurnn.cells.derive`, which says what gradients are at kinks).  Or written
              by hand, as the surrogate gradient of a spiking unit has to be:
              (dnext, saved, state, next_state, params) -> dx, dr, dstate, dparams.  Forward returns next_state, saved
              then; `saved` is whatever tuple backward wants to see again.  dnext[s] is dL/dnext_state[s], dx and dr are
              the gradients of x and r, `dstate` that of `state` by the direct path only (the path through weight_hh is
              the engine's), dparams that of the per-unit parameters.
    params    names of per-unit parameters of shape (H,): peephole weights, IndRNN's recurrent vector.  Names that a layer
              has of its own are refused: weight_ih, weight_hh, bias_ih, bias_hh, and h_0, c_0, ... for each state.
    init      where these begin: {name: function (rng, rows, columns) as in `gpurnn.initializers`}, H rows of one column; 0
              without one.

    Both functions are elementwise: tuples in and out, numbers, + - * /, comparisons, and `tanh sigmoid exp log sqrt abs
    maximum minimum where relu` of gpurnn (NumPy's own do as well).  forward may ask for random numbers, `bernoulli` and
    `normal` of gpurnn.cells; backward by hand has them where they are in `saved`.  They run on NumPy or CuPy arrays as they stand; the
    compiled executors trace them once.  The cell is traced when it is made, so a mistake in its shape shows at once:
    TypeError where it does something that is not elementwise, ValueError where it returns the wrong number of values.
    What the functions read at that moment, globals and closures, is part of the cell for good: a later change does not
    reach it on any executor, a new cell sees it.  Cells are equal where their mathematics is, whatever they are called.
    """

    name: str
    gates: int
    states: int
    forward: Callable
    backward: Callable | None = None
    params: tuple[str, ...] = ()
    init: Mapping[str, Callable] = field(default_factory=dict, repr=False)
    trace: Trace = field(init=False, repr=False)

    def __post_init__(self) -> None:
        word("name", self.name)
        function("forward", self.forward)
        if self.backward is not None:
            function("backward", self.backward)
        for what, given in (("gates", self.gates), ("states", self.states)):
            if not isinstance(given, int) or isinstance(given, bool) or not 1 <= given <= MOST:
                raise ValueError(
                    f"cell {self.name}: expected {what} to be a whole number from 1 to {MOST}, got {given!r}"
                )
        object.__setattr__(self, "params", self._checked_params())
        if not isinstance(self.init, Mapping):
            raise ValueError(f"cell {self.name}: expected init to be a mapping from names of params, got {self.init!r}")
        for name, start in self.init.items():
            if name not in self.params:
                listed = ", ".join(self.params) or "none, for it has no params"
                raise ValueError(f"cell {self.name}: expected names in init among {listed}, got {name!r}")
            function(f"init[{name!r}]", start)
        object.__setattr__(self, "trace", Trace(self))

    def __reduce__(self) -> Any:
        """A shipped cell is itself again, so that what was compiled for it serves; another is made anew."""
        from gpurnn.cells import CELLS

        if CELLS.get(self.name) is self:
            return _shipped, (self.name,)
        return Cell, (self.name, self.gates, self.states, self.forward, self.backward, self.params, self.init)

    def _checked_params(self) -> tuple[str, ...]:
        given: Any = self.params
        if isinstance(given, str) or not isinstance(given, Iterable):
            raise ValueError(f"cell {self.name}: expected params to be a tuple of names, got {given!r}")
        names = tuple(given)
        taken = {*MATRICES, *(f"{name}_0" for name in self.state_names)}
        for place, name in enumerate(names):
            if not isinstance(name, str) or not name.isidentifier():
                raise ValueError(f"cell {self.name}: expected names in params, such as 'leak', got {name!r}")
            if name in taken or name in names[:place]:
                whose = "belongs to every layer" if name in taken else "came before"
                raise ValueError(f"cell {self.name}: expected other names in params, {name!r} {whose}")
        if len(names) > MOST:
            raise ValueError(f"cell {self.name}: expected at most {MOST} params, got {len(names)}")
        return names

    def __eq__(self, other: object) -> bool:
        return self.trace == other.trace if isinstance(other, Cell) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.trace)

    def functions(self) -> tuple[Callable, Callable]:
        """forward, as (next_state, saved), and backward for arrays; of a `random` cell both take `random` as well, which
        gives the array of a `trace.Random`.

        They are the cell's own, or its trace where backward is derived or where what they read has changed since.
        """
        if self.backward is None or self.random:
            return self.trace.run_forward, self.trace.run_backward
        if all(getattr(f, "__module__", "").startswith(__package__ + ".") for f in (self.forward, self.backward)):
            return self.forward, self.backward  # a shipped cell's read nothing that changes
        try:
            as_made = Trace(self) == self.trace
        except Exception:  # whatever a changed function may raise
            as_made = False
        return (self.forward, self.backward) if as_made else (self.trace.run_forward, self.trace.run_backward)

    @property
    def recurrent(self) -> bool:
        """Whether forward reads r.  Where it does not, units are independent, and layers have no weight_hh and no bias_hh."""
        return self.trace.recurrent

    @property
    def random(self) -> bool:
        """Whether it asks for random numbers."""
        return bool(self.trace.randoms)

    @functools.cached_property
    def mean(self) -> "Cell":
        """The cell with each random number's mean in its place: what runs without training."""
        if not self.random:
            return self
        return Cell(self.name, self.gates, self.states, self.trace.run_mean, params=self.params, init=self.init)

    @property
    def state_names(self) -> tuple[str, ...]:
        """h, c, and s2, s3, ... for cells that carry more."""
        return (*STATE_NAMES, *[f"s{s}" for s in range(len(STATE_NAMES), self.states)])[: self.states]


def _shipped(name: str) -> Cell:
    from gpurnn.cells import CELLS

    return CELLS[name]
