"""What the states of a recurrent layer look like to its caller, and their gradients."""

from typing import Any

from gpurnn import backend
from gpurnn.arguments import checked
from gpurnn.cells import Cell
from gpurnn.layers import Layer
from gpurnn.types import Array


class Stateful(Layer):
    """The part of `Recurrent` that takes states and gives them: one array for a cell with one state, else a tuple."""

    cell: Cell
    num_layers: int
    directions: int
    hidden_size: int
    trainable_h0: bool
    batch_first: bool

    def unpacked(self, state: Any, N: int, what: str, trained: bool = False) -> tuple[Array, ...]:
        """One array (L*D, N, H) per state of the cell; for None, of the whole or of a part, zeros or what was trained."""
        S, shape = self.cell.states, (self.num_layers * self.directions, N, self.hidden_size)
        if state is None:
            state = (None,) * S
        elif S == 1:
            state = (state,)
        if not isinstance(state, tuple | list) or len(state) != S:
            came = f"{len(state)} of them" if isinstance(state, tuple | list) else type(state).__name__
            names = ", ".join(self.cell.state_names)
            raise ValueError(
                f"{what}: expected a tuple of {S} arrays ({names}) of shape (L*D, N, H) = {shape}, got {came}"
            )
        parts = []
        for name, part in zip(self.cell.state_names, state, strict=True):
            if part is not None:
                parts.append(checked(part, self.dtype, f"{what} {name}", shape, "(L*D, N, H)"))
            elif trained:
                parts.append(backend.xp.broadcast_to(self.params[f"{name}_0"][:, None, :], shape))
            else:
                parts.append(backend.xp.zeros(shape, self.dtype))
        return tuple(parts)

    def _given(self, state: Any) -> tuple[bool, ...]:
        """Of each state of the cell, whether the caller gave it."""
        if self.cell.states == 1 or state is None:
            return (state is not None,) * self.cell.states
        return tuple(part is not None for part in state)

    def _packed(self, states: tuple[Array, ...]) -> Any:
        return states[0] if self.cell.states == 1 else states

    def _above(self, dy: Any, states: int, shape: tuple[int, ...]) -> tuple[Array, ...]:
        """dL/d(every step's states), one array (T, N, D*H) each: of h alone, or of all that the cell has."""
        if states == 1 and dy is not None:
            return (self._above_one(dy, "dy", shape),)
        names = self.cell.state_names[:states]
        parts = (dy,) if states == 1 else (None,) * states if dy is None else dy
        if not isinstance(parts, tuple | list) or len(parts) != states:
            came = f"{len(parts)} of them" if isinstance(parts, tuple | list) else type(parts).__name__
            raise ValueError(
                f"dy: expected a tuple of {states} arrays ({', '.join(names)}) of shape {shape}, got {came}"
            )
        called = ["dy", *(f"dy {name}" for name in names[1:])]
        found = tuple(self._above_one(part, name, shape) for part, name in zip(parts, called, strict=True))
        return found[:1] if all(part is None for part in parts[1:]) else found

    def _above_one(self, dy: Any, name: str, shape: tuple[int, ...]) -> Array:
        if dy is None:
            return backend.xp.broadcast_to(backend.xp.zeros((), self.dtype), shape)
        T, N, width = shape
        if self.batch_first:
            dy = checked(dy, self.dtype, name, (N, T, width), "(N, T, D*H)").swapaxes(0, 1)
        return checked(dy, self.dtype, name, shape, "(T, N, D*H)")

    def _add_to_initial(
        self, dinitial: tuple[Array, ...], given: tuple[bool, ...], dfresh: tuple[Array, ...] | None
    ) -> None:
        """Adds to the gradients of trained initial states: of the rows that began with them, and of those set back."""
        for s, (name, part, was_given) in enumerate(zip(self.cell.state_names, dinitial, given, strict=True)):
            for value in ([] if was_given else [part]) + ([] if dfresh is None else [dfresh[s]]):
                self.grads[f"{name}_0"][...] += value.sum(1, dtype="float64").astype(self.dtype)

    def fresh(self) -> tuple[Array, ...]:
        """What a sequence begins with by itself, for each state of the cell (L*D, H)."""
        shape = self.num_layers * self.directions, self.hidden_size
        if self.trainable_h0:
            return tuple(self.params[f"{name}_0"] for name in self.cell.state_names)
        return tuple(backend.xp.zeros(shape, self.dtype) for _ in self.cell.state_names)

    def _turned(self, value: Array) -> Array:
        """(T, N, ...) for (N, T, ...) and the other way round, where the batch comes first."""
        return value.swapaxes(0, 1) if self.batch_first else value
