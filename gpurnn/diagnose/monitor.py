"""A live look at the gradients of a training: whether they vanish or explode, and where the first value went wrong."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.arguments import checked, function, uncopied, whole
from gpurnn.diagnose.flow import Flow
from gpurnn.diagnose.non_finite import raise_where_it_began
from gpurnn.diagnose.subject import at_every_step, layer_names, recurrent_part
from gpurnn.diagnose.verdict import judge
from gpurnn.parameters.values import all_finite
from gpurnn.types import Array

FEWEST = 4  # lags from which a rate can be told
ADVICE = {
    "vanishes": "an LSTM, a GRU, a higher forget_bias or update_bias, or an orthogonal weight_hh carries it further",
    "explodes": "clip_grad_norm, clip_in_time or a smaller weight_hh holds it",
}


class GradientWarning(UserWarning):
    """A layer's gradient began to vanish or to explode."""


@dataclass(frozen=True, eq=False)
class Look:
    """What a `Monitor` saw at one update, layer by layer in the order l0, l0_reverse, l1, ...

    norms    by lag, lag 0 first: the L2 norm of dE/dstate, all states and rows together, for the loss E of one step.
    kinds    "vanishes", "holds" or "explodes".
    rates    the factor by which the norm changes with every step back.
    horizons steps back after which it is under 1%, or above 100 times, what it is at the loss.
    """

    update: int
    layers: tuple[str, ...]
    norms: tuple[np.ndarray, ...]
    kinds: tuple[str, ...]
    rates: tuple[float, ...]
    horizons: tuple[float, ...]

    def to_mapping(self) -> dict[str, Any]:
        """For a line of `metrics.MetricsLog`: {"flow": {"l0": {"kind": ..., "rate": ..., "horizon": ..., "norms": ...}}}."""
        columns = zip(self.kinds, self.rates, self.horizons, (norms.tolist() for norms in self.norms), strict=True)
        named = (dict(zip(("kind", "rate", "horizon", "norms"), column, strict=True)) for column in columns)
        return {"flow": dict(zip(self.layers, named, strict=True))}

    def __str__(self) -> str:
        return f"update {self.update}: " + "; ".join(self.line(at) for at in range(len(self.layers)))

    def line(self, at: int) -> str:
        """What is to be said about layer number `at`."""
        level = "under 1%" if self.rates[at] < 1 else "above 100 times"
        after = f", {level} after {self.horizons[at]:,.0f} steps" if math.isfinite(self.horizons[at]) else ""
        return f"the gradient of {self.layers[at]} {self.kinds[at]}, x {self.rates[at]:.3g} per step back{after}"


def look_at(flows: Sequence[Flow], update: int, reach: int) -> Look | None:
    """Judges flows of one step's loss: one where layers look back alone, else the second for the reverse directions.

    reach: a fall under 1% beyond so many steps back counts as holding; growth to 100 times counts at any distance.
    None where no layer has at least 4 lags, and where a norm is not finite, which `raise_where_it_began` can explain.
    """
    if not all(np.isfinite(flow.norms).all() for flow in flows):
        return None
    found = []
    for at, name in enumerate(flows[0].layers):
        flow = flows[at % len(flows)]
        norms = np.hypot.reduce(flow.by_lag(name), axis=0)
        if len(norms) >= FEWEST:
            kind, rate, horizon = judge(flow, name, len(norms) - 1)
            held = kind == "vanishes" and horizon > reach
            found.append((name, norms, "holds" if held else kind, rate, horizon))
    if not found:
        return None
    names, norms_by_lag, kinds, rates, horizons = zip(*found, strict=True)
    return Look(update, names, norms_by_lag, kinds, rates, horizons)


class Alarm:
    """Says of a layer that its gradient vanishes or explodes: once, and again only when it has held in between."""

    def __init__(self) -> None:
        self._raised: set[str] = set()

    def news(self, look: Look) -> list[str]:
        sentences = []
        for at, (name, kind) in enumerate(zip(look.layers, look.kinds, strict=True)):
            if kind != "holds" and name not in self._raised:
                sentences.append(f"update {look.update}: {look.line(at)}; {ADVICE[kind]}")
            (self._raised.discard if kind == "holds" else self._raised.add)(name)
        return sentences


class Monitor:
    """A model that watches its own gradients.  It stands in the model's place in a training loop of any kind:

        model = gpurnn.Monitor(model, every=100)
        for x, targets in batches:
            model.zero_grad()
            gpurnn.full_bptt(model, x, targets, loss)
            optimizer.step()

    model    a SequenceModel or a recurrent layer.
    every    updates from one look to the next; an update begins with `zero_grad`.
    reach    how many steps back the task needs the gradient to carry: a fall under 1% within them is warned of.  Growth
             to more than 100 times is, at any distance.  A layer is warned of again only when it has held in between.
    log      called with every `Look`, such as print; all of them are in `looks` as well.

    A look is one more backward pass, of the loss of the last step that has one (in a reverse direction, of the first).
    On a CPU every gradient is checked, on a GPU, where that would wait for the device, those of the looks: where one is
    not finite, backward raises FloatingPointError, which names the tensor, the layer and the time step where it began.
    """

    def __init__(self, model: Any, every: int = 100, *, reach: int = 10, log: Callable[[Look], Any] | None = None):
        self.layer = recurrent_part(at_every_step(model))
        self.model, self.every, self.reach, self.log = model, whole("every", every), whole("reach", reach), log
        if log is not None:
            function("log", log)
        self.update = 0
        self.looks: list[Look] = []
        self._due = False
        self._alarm = Alarm()

    def __getattr__(self, name: str) -> Any:
        """Whatever else a model has: params, grads, state_dict, ..."""
        if name == "model":  # before __init__, as copy and pickle ask for it
            raise AttributeError(name)
        return getattr(self.model, name)

    def zero_grad(self) -> None:
        self.update += 1
        self._due = self.update == 1 or self.update % self.every == 0
        self.model.zero_grad()

    def __call__(
        self,
        x: Array,
        state: Any = None,
        *,
        lengths: Any = None,
        resets: Any = None,
        training: bool = True,
        copy: bool = True,
    ) -> tuple[Array, Any, Callable | None]:
        """As the model's, and its backward looks."""
        options: dict[str, Any] = {} if copy else {**uncopied(self.model)}
        if resets is not None:
            options["resets"] = resets
        out, final, backward = self.model(x, state, lengths=lengths, training=training, **options)
        if backward is None:
            return out, final, None

        def watched(
            dout: Array, dstate: Any = None, keep: bool = False, flow: Array | None = None
        ) -> tuple[Array, Any]:
            # Where an update goes back through several stretches, the last of them in time comes first: the one to see.
            looks = self._due and dout is not None
            self._due = self._due and not looks
            try:
                if looks:
                    self._look(backward, checked(dout, None, "dout", out.shape))
                result = backward(dout, dstate, keep=keep, flow=flow)
                if (looks or not backend.ops.LOOKING_WAITS) and not all_finite(self.model.grads.flat):
                    raise_where_it_began(self.model, x, state, lengths, dout, dstate, resets)
            except FloatingPointError as error:
                raise FloatingPointError(f"update {self.update}: {error}") from None
            return result

        return out, final, watched

    def _look(self, backward: Callable, dout: Array) -> None:
        """Follows the loss of one step back, by the tape that is there; the gradients stay as they are."""
        steps = np.flatnonzero(backend.to_numpy(abs(dout).reshape(len(dout), -1).max(1)))
        if not len(steps):
            return
        sources = (int(steps[-1]), int(steps[0]))[: self.layer.directions]
        flows = [self._followed(backward, dout, step) for step in sources]
        look = look_at(flows, self.update, self.reach)
        if look is None:
            return
        self.looks.append(look)
        if self.log:
            self.log(look)
        for sentence in self._alarm.news(look):
            warnings.warn(sentence, GradientWarning, stacklevel=4)

    def _followed(self, backward: Callable, dout: Array, step: int) -> Flow:
        layer, xp = self.layer, backend.xp
        alone = xp.zeros_like(dout)
        alone[step] = dout[step]
        norms = xp.zeros((layer.num_layers * layer.directions, layer.cell.states, len(dout)))
        kept = self.model.grads.flat.copy()
        backward(alone, keep=True, flow=norms)
        self.model.grads.flat[...] = kept
        return Flow(backend.to_numpy(norms), layer_names(layer), layer.cell.state_names, step)
