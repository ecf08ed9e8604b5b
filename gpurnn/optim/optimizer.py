"""What optimisers have in common: the update of a model's flat buffer, groups, what is frozen, and their state.

They work on any object with `.params` and `.grads`, two `Parameters` of the same shapes, and on the two flat
buffers behind them, in place.  They are looked up anew at every call: a layer's are re-bound when it joins a model.

No finite gradient and no setting brings a value that is not finite into a parameter.  A gradient whose square would
overflow counts, for Adam and RMSprop, as the largest whose square does not.  A parameter whose update is not finite keeps
its value, and FloatingPointError names it.  What NumPy does about underflow, `np.errstate`, has no say in an update.

On CUDA nothing waits: a gradient that is not finite lets nothing change and is raised by `gpurnn.synchronize`.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from gpurnn import backend
from gpurnn.arguments import at_least_0, mapping
from gpurnn.cuda import faults
from gpurnn.optim.clipping import quieten
from gpurnn.optim.groups import Groups
from gpurnn.parameters import Parameters, Trainable
from gpurnn.parameters.buffers import Revision, revise
from gpurnn.types import Array

SQUARES = ("exp_avg_sq", "square_avg")  # moments that are means of squares
MOST_STEPS = 1 << 62


def _layout(params: Parameters) -> list[tuple]:
    return [place[1:] for place in params.places]


def _plain(name: str, value: Any) -> Any:
    """A setting in a state, a number, a list of numbers or a truth, as Python has it."""
    return backend.to_numpy(backend.asarray(value, None, name)).tolist()


def _count(name: str, value: Any, most: int) -> int:
    count = backend.to_numpy(backend.asarray(value, np.int64, name))
    if count.shape != () or count < 0 or count > most:
        below = f" and at most {most}" if (count > most).any() else ""
        raise ValueError(f"{name}: expected one integer >= 0{below}, got {count.tolist()}")
    return int(count)


def _moment(name: str, value: Any, view: Array) -> Array:
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes inf, and is refused below
        array = backend.asarray(value, view.dtype, name)
    if array.shape != view.shape:
        raise ValueError(f"{name}: expected {view.shape}, got {array.shape}")
    if not bool(backend.xp.isfinite(array).all()):
        raise ValueError(f"{name}: expected finite {view.dtype} values, got some that are not")
    if name.partition(".")[0] in SQUARES and bool((array < 0).any()):
        raise ValueError(f"{name}: expected values from 0, means of squares, got {array.min()}")
    return array


class Optimizer:
    """What the optimisers have in common.  `lr` is a plain attribute, free to be set: `opt.lr = base * schedule(step)`.

    model     a layer, a model, an object with `params` and `grads`, or a list or mapping of such, which are joined (see
              `gpurnn.Model`).
    groups    settings by pattern: `{"*bias*": {"weight_decay": 0.0}, "embedding": {"lr": 1e-4}}`, patterns as in
              `model.freeze`.  A parameter takes the settings of each pattern that it matches, of the last where they
              differ.  A group's lr keeps its ratio to `lr` when that is set.
    rule      its name in `cpu.updates` and `kernels.optim`, which take the settings from here.
    settings  what `state_dict` holds beside lr and moments, and what each has to be.

    What is frozen, `model.freeze("embedding")`, is left out of updates, decay and moments from the next step on.
    """

    rule: str
    settings: ClassVar[dict[str, Callable[[str, Any], Any]]] = {"weight_decay": at_least_0}

    def __init__(self, model: Any, lr: float, weight_decay: float, moments: tuple[str, ...], groups: Any):
        self.model: Trainable = model
        params = model.params
        self._updates = backend.ops.Updates(params)
        self.lr = lr
        self.weight_decay = at_least_0("weight_decay", weight_decay)
        self.moments = {name: Parameters(params.shapes, params.dtype) for name in moments}
        self.groups = Groups(params, groups, self.lr)
        self._layout = _layout(params)
        self._portions: Any = None
        self._plan()

    def __repr__(self) -> str:
        settings = [f"{name}={getattr(self, name)!r}" for name in ("lr", *self.settings)]
        own = len(self.groups.rates | self.groups.decays)
        groups = f", {own} parameters with settings of their own" if own else ""
        return f"{type(self).__name__}({', '.join(settings)}{groups}) of {self.model.params.count:,} parameters"

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr = self._updates.lr = at_least_0("lr", value)

    @property
    def weight_decay(self) -> float:
        return self._weight_decay

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        self._weight_decay = at_least_0("weight_decay", value)
        revise()

    @property
    def steps(self) -> int:
        """The updates done; on CUDA the device has to be asked, which waits."""
        return self._updates.steps

    def zero_grad(self) -> None:
        """Sets every gradient of the model to 0."""
        backend.ops.clear(self.model.grads.flat)

    def _plan(self) -> None:
        """Looks anew at groups and at what is frozen.  RuntimeError where the parameters' places are others."""
        params = self.model.params
        if _layout(params) != self._layout:
            raise RuntimeError("the model's parameters were tied since this optimiser was made: make it behind `tie`")
        self.groups.look([name for name in params.frozen if name in params.shapes], lambda: self.steps)
        portions = self.groups.portions(params, self.weight_decay)
        if portions != self._portions:
            self._updates.take(portions, params)
            self._portions = portions
        self._revision = Revision.number

    def step(self) -> None:
        """Updates `model.params` from `model.grads`, which it leaves as they are.

        A gradient that is not finite raises FloatingPointError with its name, and nothing has changed then; on CUDA
        `gpurnn.synchronize` raises it.  A parameter whose update is not finite raises it as well, and keeps its value.
        """
        quieten(self.model)
        backend.ops.check_finite(self.model.grads)
        self.update()

    def update(self, loss: Any = None) -> None:
        """`step` without a look at the gradients, for whoever has taken their norm, which looks at all of them.

        loss: a float64 scalar; where it is not finite, FloatingPointError says so and nothing has changed (on CUDA
        `gpurnn.synchronize` raises it).
        """
        if self._revision != Revision.number:
            self._plan()
        self._updates.run(self.rule, self, self.model, self.moments, loss)

    def numbers(self) -> tuple[tuple[float, float], tuple[float, float, float]]:
        """As `kernels.optim` takes them: the rule's a and b; beta1 and beta2 (0: none), and eps."""
        raise NotImplementedError

    def options(self) -> dict[str, bool]:
        """The constants of the rule's kernel."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, np.ndarray]:
        """All that an update depends on beside parameters and gradients; copies on the host.

        "step" (int64, shape ()); "lr" and the settings, such as "betas"; moments by parameter, such as
        "exp_avg.head.weight".  Where a parameter has them: "rate.head.weight", what lr is multiplied by,
        "weight_decay.head.weight", and "step.head.weight" if it was frozen and has taken part in fewer updates.
        Raises what `gpurnn.synchronize` raises.
        """
        faults.check()
        self._plan()
        state: dict[str, Any] = {"step": np.int64(self.steps), "lr": self.lr}
        state |= {name: getattr(self, name) for name in self.settings}
        for kind, values in (("rate", self.groups.rates), ("weight_decay", self.groups.decays)):
            state |= {f"{kind}.{name}": value for name, value in values.items()}
        clocks = self.groups.clocks(self.model.params.shapes, self.steps)
        state |= {f"step.{name}": np.int64(clock) for name, clock in clocks.items()}
        state |= {name: backend.to_numpy(view) for name, view in self._named().items()}
        return {name: np.array(value) for name, value in state.items()}

    def load_state_dict(self, values: Mapping[str, Any]) -> None:
        """Takes what `state_dict` gave, bit for bit.  Nothing is written unless all of it fits.

        A state without lr and settings leaves them as they are.  What is frozen is not part of a state, but of a model.
        Raises KeyError where names are missing or unknown; ValueError where a shape differs, a value is not finite or out of
        range, a mean of squares is negative, or "step" is; TypeError where a value is no array of numbers.
        """
        mapping(values)
        views, settings = self._named(), {"lr": at_least_0, **self.settings}
        own = [f"{kind}.{name}" for kind in ("rate", "weight_decay", "step") for name in self.model.params.shapes]
        expected = ["step", *(settings if "lr" in values else ()), *views]
        missing = [name for name in expected if name not in values]
        unknown = [name for name in values if name not in expected and name not in own]
        if missing or unknown:
            raise KeyError(f"expected the names {expected}; missing {missing}, unknown {unknown}")
        steps = _count("step", values["step"], MOST_STEPS)
        arrays = {name: _moment(name, values[name], view) for name, view in views.items()}
        found = {name: check(name, _plain(name, values[name])) for name, check in settings.items() if name in values}
        each: dict[str, dict[str, Any]] = {"rate": {}, "weight_decay": {}, "step": {}}
        for name in [name for name in own if name in values]:
            kind, _, parameter = name.partition(".")
            value = values[name]
            each[kind][parameter] = (
                _count(name, value, steps) if kind == "step" else at_least_0(name, _plain(name, value))
            )
        self._plan()
        for name, array in arrays.items():
            views[name][...] = array
        self._updates.steps = steps
        for name, value in found.items():
            setattr(self, name, value)
        if found:
            self.groups.rates, self.groups.decays = each["rate"], each["weight_decay"]
        self.groups.set_clocks(self.model.params.shapes, each["step"], steps)
        revise()

    def _named(self) -> dict[str, Array]:
        """Views of all moments, under the names the parameters have now."""
        return {f"{m}.{name}": view for m, moment in self.moments.items() for name, view in moment.items()}
