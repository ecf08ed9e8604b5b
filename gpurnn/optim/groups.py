"""What an optimiser does to each parameter: its part of the learning rate and its weight decay, or nothing at all.

Groups are given by pattern, `{"*bias*": {"weight_decay": 0}}`; parameters are frozen in the model, `model.freeze("head")`.
A parameter that was frozen has missed updates, and its moments are that much younger: its clock counts its own.
"""

from collections.abc import Mapping
from typing import Any

from gpurnn.arguments import at_least_0
from gpurnn.parameters import Parameters
from gpurnn.parameters.buffers import Portion, padded, size_of

SETTINGS = ("lr", "weight_decay")


class Groups:
    """Of each parameter by name: what lr is multiplied by, its own weight decay, and the updates that it has missed.

    What is not in `rates` has 1, what is not in `decays` the optimiser's weight decay, what is not in `skipped` 0.
    since: of what is frozen now, the number of the last update it took part in.
    """

    def __init__(self, params: Parameters, given: Any, lr: float):
        self.rates: dict[str, float] = {}
        self.decays: dict[str, float] = {}
        self.skipped: dict[str, int] = {}
        self.since: dict[str, int] = {}
        if not isinstance(given, Mapping | None):
            raise TypeError(f"groups: expected settings by pattern, such as {EXAMPLE}, got {type(given).__name__}")
        for pattern, settings in (given or {}).items():
            self._take(params, pattern, settings, lr)

    def _take(self, params: Parameters, pattern: Any, settings: Any, lr: float) -> None:
        if not isinstance(settings, Mapping) or not settings or not set(settings) <= set(SETTINGS):
            raise ValueError(f"groups[{pattern!r}]: expected lr or weight_decay, as in {EXAMPLE}, got {settings!r:.80}")
        names = [name for name in params.matching((pattern,)) if name in params.shapes]
        if not names:
            tied = params.matching((pattern,))[0]
            raise ValueError(f"groups[{pattern!r}]: expected names that are not tied, {tied} {params.meaning(tied)}")
        if "lr" in settings:
            own = at_least_0(f"groups[{pattern!r}] lr", settings["lr"])
            if lr == 0:
                raise ValueError(f"groups[{pattern!r}]: expected lr > 0, of which a group's is a multiple, got {lr}")
            self.rates |= dict.fromkeys(names, own / lr)
        if "weight_decay" in settings:
            decay = at_least_0(f"groups[{pattern!r}] weight_decay", settings["weight_decay"])
            self.decays |= dict.fromkeys(names, decay)

    def look(self, frozen: list[str], steps: Any) -> None:
        """Notes what was frozen or set free since the last look.  steps(): the updates done, asked for where it matters."""
        if set(frozen) == set(self.since):
            return
        done = steps()
        for name in [name for name in self.since if name not in frozen]:
            self.skipped[name] = self.skipped.get(name, 0) + done - self.since.pop(name)
        self.since |= {name: done for name in frozen if name not in self.since}

    def clocks(self, names: Any, steps: int) -> dict[str, int]:
        """Of those parameters that have missed updates, how many they took part in."""
        clocks = {name: self.since.get(name, steps) - self.skipped.get(name, 0) for name in names}
        return {name: clock for name, clock in clocks.items() if clock != steps}

    def set_clocks(self, names: Any, clocks: Mapping[str, int], steps: int) -> None:
        self.skipped = {name: steps - clocks[name] for name in names if name in clocks}
        self.since = dict.fromkeys(self.since, steps)

    def portions(self, params: Parameters, decay: float) -> list[Portion]:
        """The buffer in stretches that are treated alike; what is frozen is in none."""
        portions: list[Portion] = []
        for name, start, shape in params.places:
            end = start + padded(size_of(shape), params.dtype)
            if name in self.since or start == end:
                continue
            own = self.rates.get(name, 1.0), self.decays.get(name, decay), self.skipped.get(name, 0)
            if portions and portions[-1].stop == start and portions[-1][2:] == own:
                portions[-1] = portions[-1]._replace(stop=end)
            else:
                portions.append(Portion(start, end, *own))
        return portions


EXAMPLE = '{"*bias*": {"weight_decay": 0.0}}'
