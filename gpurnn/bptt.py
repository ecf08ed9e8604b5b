"""Backpropagation through time: full over a sequence, and truncated over a stream of windows.

Both only fill `model.grads`; clipping and the optimiser's step are the caller's.  A loss is any function
`loss(out, targets) -> value, dout`, such as `gpurnn.softmax_cross_entropy`; with reduction "sum" the gradient is that of
E = sum over the steps of E_t.  With lengths a loss is one of valid steps only: it is told them if it has a parameter
`lengths`; any other is given the valid positions alone, one behind another, (M, ...) for (T, N, ...).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import (
    flow_array,
    length,
    loss_function,
    mapping,
    returned,
    sequence_model,
    time_first,
    uncopied,
    whole,
)
from gpurnn.losses import Loss, evaluate
from gpurnn.sequence import checked_lengths, checked_resets
from gpurnn.types import Array

STATES = ("begin", "carried")


class Passed(tuple):
    """What `full_bptt` returns, `loss, state = ...`; .out is the model's output as well."""

    loss: Any
    state: Any
    out: Array

    def __new__(cls, loss: Any, state: Any, out: Array) -> "Passed":
        made = super().__new__(cls, (loss, state))
        made.loss, made.state, made.out = loss, state, out
        return made

    def __getnewargs__(self) -> tuple:
        return self.loss, self.state, self.out


def full_bptt(
    model: Any,
    x: Array,
    targets: Array,
    loss: Loss,
    state: Any = None,
    *,
    lengths: Any = None,
    resets: Any = None,
    flow: Array | None = None,
) -> Passed:
    """Forward over all T steps, backward over all T steps; adds the gradients, summed over steps, to `model.grads`.

    model: a SequenceModel, a recurrent layer, or whatever is called like one.  x and targets: as model and loss take
    them, time first, or the batch where the model is `batch_first`; beside lengths a loss is given time first always.
    lengths: as the model takes them; means are then over valid steps only.  resets: as the model takes
    them.  Returns the loss's value and the final state; what the model answered is their `.out`.
    """
    sequence_model(model), loss_function(loss)
    out, final, backward = _run(model, x, state, lengths, resets)
    answered = out
    if getattr(model, "pooling", None) is not None:  # one answer for a row, whatever its length
        lengths = None
    turned = lengths is not None and getattr(model, "batch_first", False)
    if turned:
        out = out.swapaxes(0, 1)
        targets = None if targets is None else backend.asarray(targets, None, "targets").swapaxes(0, 1)
    value, dout = evaluate(loss, out, targets, lengths)
    if turned:
        dout = dout.swapaxes(0, 1)
    backward(dout, flow=flow)
    return Passed(value, final, answered)


def _run(model: Any, x: Array, state: Any, lengths: Any, resets: Any) -> tuple:
    options = uncopied(model) if resets is None else {**uncopied(model), "resets": resets}
    return returned("model", model(x, state, lengths=lengths, **options), "out, state, backward")


class TruncatedBPTT:
    """Truncated backpropagation through time over a stream: BPTT(k2; k1) of Williams & Peng 1990.

    Every call of `step` takes the next k1 steps of the stream (a stream's last window may have fewer).  Their losses,
    and only theirs, are sent back through the last k2 >= k1 steps; beyond that the gradient is exactly 0.  The state is
    carried from window to window.  With k2 = k1 each step is computed once.  With k2 > k1 the k2 - k1 steps before the
    window are computed again, from the state that was carried into them, so that the gradient is exact for today's
    parameters and not a mixture of old and new.  With parameters held still and k2 >= T the sum over all windows is the
    gradient of full BPTT.

        bptt = TruncatedBPTT(model, gpurnn.softmax_cross_entropy, k1=64)
        for x, targets in windows:
            model.zero_grad()
            loss = bptt.step(x, targets)
            optimizer.step()

    Whatever is kept from call to call, inputs and states, is a copy: buffers may be filled anew.  A bidirectional model
    has no truncated BPTT, since a window's end is not its row's: ValueError.
    """

    def __init__(self, model: Any, loss: Loss, k1: int, k2: int | None = None):
        k1 = whole("k1", k1, 0)
        k2 = k1 if k2 is None else whole("k2", k2, 0)
        if k1 < 1 or k2 < k1:
            raise ValueError(f"expected 1 <= k1 <= k2, got k1 = {k1} and k2 = {k2}")
        loss_function(loss), sequence_model(model)
        time_first(model)
        if getattr(model, "pooling", None) is not None:
            raise ValueError(f"model: expected an answer at every step, got one with pooling {model.pooling!r}")
        if getattr(getattr(model, "recurrent", model), "directions", 1) != 1:
            raise ValueError("model: expected one direction, a stream of windows has no other; got a bidirectional one")
        self.model, self.loss, self.k1, self.k2 = model, loss, k1, k2
        self._own: dict[str, Array] = {}
        self._seen: set[bool] = set()  # whether windows came with resets
        self.reset()

    def reset(self, state: Any = None) -> None:
        """Starts a new sequence, from `state` or the model's own initial state."""
        self.stretch: Array | None = None  # the inputs of the last call's up to k2 steps
        self.lengths: np.ndarray | None = None  # of each row, how many of those steps are valid; None: all of them
        self.resets: Array | None = None  # at those steps
        state = _copied(state)
        self.begin = self.carried = state  # the states at its start, and where the next k1 steps' stretch begins

    def step(
        self, x: Array, targets: Array, *, lengths: Any = None, resets: Any = None, flow: Array | None = None
    ) -> Any:
        """The next 1..k1 steps: x (t, N, ...), targets (t, ...).  Adds to `model.grads`; returns the loss's value.

        lengths: N whole numbers in 0..t, of each row how many steps of this window are valid; means are over those only.
        A row that has ended stays at length 0 as long as its end lies within the k2 steps: ValueError where it does not.
        resets: (t, N) of bool, rows that begin again before a step of this window (see `Recurrent`); what is carried into the
        window's first step as well.
        flow: float64 (L*D, S, t) that receives the L2 norms of dL/dstate over the window (see `Recurrent`).
        """
        steps, given = length("x", x), length("targets", targets)
        if not 1 <= steps <= self.k1 or given != steps:
            raise ValueError(f"expected 1 to k1 = {self.k1} steps of x and of targets, got {steps} and {given}")
        flow_array(flow, ("L*D", "S", steps))
        x = backend.asarray(x, None, "x")
        if self.stretch is not None and x.shape[1:] != self.stretch.shape[1:]:
            wanted = ", ".join(map(str, ("t", *self.stretch.shape[1:])))
            raise ValueError(
                f"x: expected ({wanted}) as in the steps before, got {x.shape}; another batch: reset() first"
            )
        own = None if lengths is None else checked_lengths(lengths, len(x), x.shape[1] if x.ndim > 1 else 0)
        valid = self._valid(len(x), own)
        again = self._resets(len(x), checked_resets(resets, len(x), x.shape[1] if x.ndim > 1 else 0))
        begin, stretch = self.before(len(x))
        stretch = x if stretch is None else backend.xp.concatenate([stretch, x])
        before, cut = len(stretch) - len(x), self._dropped(len(stretch), self.k1)
        parts = [part for part in (slice(0, cut), slice(cut, len(stretch))) if part.start < part.stop]
        state, outputs, backwards, carried = begin, [], [], begin
        for part in parts:
            own_part = _within(valid, part.start, part.stop)
            out, state, backward = _run(
                self.model, stretch[part], state, own_part, None if again is None else again[part]
            )
            if part.stop == cut:
                carried = state
            outputs.append(out[max(0, before - part.start) :])
            backwards.append(backward)
        out = outputs[0] if len(outputs) == 1 else backend.xp.concatenate(outputs)
        value, dout = evaluate(self.loss, out, targets, own)
        self._back(parts, before, backwards, dout, flow)
        self._keep(stretch, begin, carried, again, borrowed=("stretch", "resets") if stretch is x else ())
        self.lengths = valid
        return value

    @property
    def steady(self) -> bool:
        """Whether the next k1 steps would be computed as the k1 steps before them were, and in the same memory.

        They are once k2 steps lie behind, and a captured step needs it: `gpurnn.captured(step, when=lambda: bptt.steady)`.
        """
        known = not any(part is None for part in (self.stretch, self.begin, self.carried))
        alike = len(self._seen) < 2 or self.k1 == self.k2  # else one kind of window would not keep what the other reads
        return known and alike and self.lengths is None and len(self.stretch) == self.k2  # type: ignore[arg-type]

    def _keep(
        self, stretch: Array | None, begin: Any, carried: Any, resets: Array | None, borrowed: tuple[str, ...] = ()
    ) -> None:
        """For the next window.  `begin` first: what was carried becomes it.  borrowed: what is the caller's."""
        values = {"begin": begin, "carried": carried, "stretch": stretch, "resets": resets}
        self.begin, self.carried, self.stretch, self.resets = backend.ops.kept(self._own, values, borrowed).values()

    def before(self, steps: int) -> tuple[Any, Array | None]:
        """The state and the inputs from which a window of `steps` steps starts its k2 steps; None: no inputs."""
        if self.stretch is None:
            return self.begin, None
        cut = self._dropped(len(self.stretch), steps)
        begin = self.carried
        if cut != self._dropped(len(self.stretch), self.k1):  # a shorter window, a stream's last, reaches further back
            valid = _within(self.lengths, 0, cut)
            options = {} if self.resets is None else {"resets": self.resets[:cut]}
            run = self.model(self.stretch[:cut], self.begin, lengths=valid, training=False, **options) if cut else None
            begin = run[1] if run else self.begin
        return begin, self.stretch[cut:] if cut < len(self.stretch) else None

    def _valid(self, steps: int, own: np.ndarray | None) -> np.ndarray | None:
        """Of each row, how many steps are valid of the past in reach and a window of `steps`, of which `own` are."""
        length = 0 if self.stretch is None else len(self.stretch)
        cut = self._dropped(length, steps)
        past = _within(self.lengths, cut, length) if cut < length else None
        if past is None and own is None:
            return None
        own = np.full_like(past, steps) if own is None else own
        past = np.full_like(own, max(0, length - cut)) if past is None else past
        again = (past < length - cut) & (own > 0)
        if again.any():
            row = int(again.argmax())
            raise ValueError(
                f"lengths: row {row} has ended within the last k2 steps, expected 0 for it, got {own[row]}"
            )
        return past + own

    def _resets(self, steps: int, own: Array | None) -> Array | None:
        """Those of the past in reach and of a window of `steps` steps, which has `own`; None: none at all."""
        self._seen.add(own is not None)
        reach = len(self.stretch[self._dropped(len(self.stretch), steps) :]) if self.stretch is not None else 0
        past = self.resets[-reach:] if reach and self.resets is not None else None
        if past is None and own is None:
            return None
        N = (past if own is None else own).shape[1]  # type: ignore[union-attr]
        parts = ((past, reach), (own, steps))
        found = [backend.xp.zeros((count, N), np.bool_) if part is None else part for part, count in parts if count]
        return found[0] if len(found) == 1 else backend.xp.concatenate(found)

    def _dropped(self, length: int, steps: int) -> int:
        """How many of the last `length` steps are out of reach for a window of `steps` more."""
        return max(0, length + steps - self.k2)

    def _back(self, parts: list[slice], before: int, backwards: list, dout: Array, flow: Array | None) -> None:
        """From the last part to the first; the steps before the window have no loss of their own."""
        dstate = None
        for part, backward in zip(reversed(parts), reversed(backwards), strict=True):
            first = max(before, part.start)
            if first >= part.stop:
                _, dstate = backward(None, dstate)
                continue
            own = dout[first - before : part.stop - before]
            if first > part.start:
                quiet = backend.xp.zeros((first - part.start, *own.shape[1:]), own.dtype)
                own = backend.xp.concatenate([quiet, own])
            if flow is None:
                _, dstate = backward(own, dstate)
                continue
            norms = backend.xp.zeros((*flow.shape[:2], part.stop - part.start))
            _, dstate = backward(own, dstate, flow=norms)
            flow[..., first - before : part.stop - before] = norms[..., first - part.start :]

    def state_dict(self) -> dict[str, np.ndarray]:
        """What a run needs to go on from here: the carried states, and the inputs that are still in reach."""
        states = {f"{name}{s}": part for name in STATES for s, part in enumerate(_parts(getattr(self, name)))}
        kept = {"stretch": self.stretch, "lengths": self.lengths, "resets": self.resets}
        arrays = states | {name: part for name, part in kept.items() if part is not None}
        return {name: backend.to_numpy(array).copy() for name, array in arrays.items()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes copies of what `state_dict` gave.  Nothing changes unless all of it fits.

        Raises TypeError for anything but a mapping; ValueError for other names, for states that are missing, misshapen or not finite, for more than k2 steps.
        """
        given = {name: backend.asarray(value, None, name).copy() for name, value in mapping(values).items()}
        stretch, valid, resets = (given.pop(name, None) for name in ("stretch", "lengths", "resets"))
        like = stretch if stretch is not None else given.get("carried0")
        N = like.shape[1] if like is not None and like.ndim > 1 else 0
        begin, carried = (self._loaded(given, name, N) for name in STATES)
        if given:
            names = "begin0, begin1, ..., carried0, ..., stretch, lengths, resets"
            raise ValueError(f"expected {names}; got {', '.join(values)}")
        length = 0 if stretch is None else len(stretch) if stretch.ndim > 1 else -1
        if not 0 <= length <= self.k2 or (stretch is not None and not length):
            raise ValueError(f"stretch: expected (t, N, ...) of 1 to k2 = {self.k2} steps, got {stretch.shape}")
        dropped = self._dropped(length, self.k1) if stretch is not None else 0
        if (carried is None) != (begin is None and not dropped):
            raise ValueError(f"expected begin and carried states that go with {length} steps, got {', '.join(values)}")
        if stretch is not None and not bool(backend.xp.isfinite(stretch).all()) and valid is None:
            raise ValueError("stretch: expected finite values, got some that are not")
        resets = checked_resets(resets, length, N)
        self.lengths = None if valid is None else checked_lengths(valid, length, N)
        self._keep(stretch, begin, carried, resets)

    def _loaded(self, given: dict[str, Array], name: str, N: int) -> Any:
        """Takes the states `name` out of `given`: None, one array or a tuple, as the model takes them."""
        layer = getattr(self.model, "recurrent", self.model)
        parts = [given.pop(f"{name}{s}") for s in range(len(given)) if f"{name}{s}" in given]
        if not parts:
            return None
        state = parts[0] if len(parts) == 1 else tuple(parts)
        if hasattr(layer, "unpacked"):
            parts = layer.unpacked(state, N, name)
        if not all(bool(backend.xp.isfinite(part).all()) for part in parts):
            raise ValueError(f"{name}: expected finite states, got some that are not")
        return parts[0] if len(parts) == 1 else tuple(parts)


def _within(lengths: np.ndarray | None, start: int, stop: int) -> np.ndarray | None:
    """Of each row, how many of the steps from start to stop are valid; None: all of them."""
    return None if lengths is None else np.clip(lengths - start, 0, stop - start)


def _copied(state: Any) -> Any:
    """A state in memory of our own: None, an array, or a tuple of such."""
    if isinstance(state, tuple | list):
        return tuple(map(_copied, state))
    return None if state is None else backend.asarray(state, None, "state").copy()


def _parts(state: Any) -> tuple:
    return () if state is None else state if isinstance(state, tuple) else (state,)
