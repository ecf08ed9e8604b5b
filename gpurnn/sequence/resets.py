"""Rows that begin again inside a sequence: done flags of episodes, borders of documents.

A reset before step t cuts a row in two.  Each direction sees each segment by itself: going forward the state is set back
before step t; in reverse, where the row comes from step t to step t-1, before step t-1.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.executors.contract import Resets
from gpurnn.types import Array

States = tuple[Array, ...]


def checked_resets(resets: Any, T: int, N: int, batch_first: bool = False) -> Array | None:
    """`resets` as an array (T, N) of the backend; ValueError unless it is that, or (N, T) for `batch_first`, and of bool."""
    if resets is None:
        return None
    given, shape = backend.asarray(resets, None, "resets"), (N, T) if batch_first else (T, N)
    if given.shape != shape or (given.dtype != np.bool_ and given.size):  # an empty list has no type
        axes = "(N, T)" if batch_first else "(T, N)"
        raise ValueError(f"resets: expected bool of shape {axes} = {shape}, got {given.dtype} of shape {given.shape}")
    given = given.astype(np.bool_, copy=False)
    return given.T if batch_first else given


class Restarts(NamedTuple):
    """The resets of a call.

    at     (T, N) bool, rows in the engine's order, False where a row does not live.
    fresh  the states that a sequence begins with by itself, S arrays (L*D, H): zeros, or what was trained.
    """

    at: Array
    fresh: States

    @classmethod
    def of(cls, resets: Array | None, fresh: Callable[[], States], lengths: Any) -> "Restarts | None":
        """None where there is none; on CUDA nobody looks."""
        if resets is None:
            return None
        at = resets if lengths is None else lengths.sorted(resets[..., None], lengths.padding)[..., 0]
        none = not at.size or (not backend.ops.LOOKING_WAITS and not at.any())
        return None if none else cls(at, fresh())

    def job(self, place: int, reverse: bool) -> Resets:
        """For one layer in one direction, `place` in L*D."""
        before = backend.xp.zeros(self.at.shape, np.bool_)
        if reverse:
            before[:-1] = self.at[1:]
        else:
            before[1:] = self.at[1:]
        return Resets(before, tuple(part[place] for part in self.fresh))

    def begun(self, state: States, place: int, reverse: bool) -> States:
        """The states of a row's first step, from those that were given, S arrays (N, H)."""
        if reverse:  # a row's last step has nothing behind it that could cut it off
            return state
        first = self.at[0][:, None]
        return tuple(backend.xp.where(first, part[place], own) for part, own in zip(self.fresh, state, strict=True))

    def returned(self, dstate: States, dfresh: Array, reverse: bool) -> States:
        """dL/d(what was given), from dL/d(the states of a row's first step); adds the others' to dfresh (S, N, H)."""
        if reverse:
            return dstate
        xp, first, nothing = backend.xp, self.at[0][:, None], backend.xp.zeros((), dfresh.dtype)
        for total, own in zip(dfresh, dstate, strict=True):
            total += xp.where(first, own, nothing)
        return tuple(xp.where(first, nothing.astype(own.dtype), own) for own in dstate)
