"""The options of a training run: one table for the command line, the TOML file and the run folder."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any, Self, get_args

from gpurnn.executors import PRECISIONS

CELL_NAMES = ("lstm", "gru", "rnn")
OPTIMIZERS = ("adam", "adamw", "rmsprop", "sgd")
SCHEDULES = ("cosine", "linear", "constant")


def _option(group: str, default: Any, text: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": text, "choices": choices})


@dataclass(frozen=True)
class TrainConfig:
    """Options by name; `None` means `not asked for`.  Raises ValueError naming the option, what came and what may come."""

    data: str | None = _option(
        "text", None, "file or folder to learn, - for standard input; none: Python's own standard library"
    )
    unit: str = _option("text", "chars", "what a symbol is", ("chars", "bytes"))
    encoding: str | None = _option("text", None, "encoding of the text; none: by its byte-order mark, else UTF-8")
    pattern: str = _option("text", "*", "in a folder, only files of such names")
    max_alphabet: int = _option("text", 512, "rarer characters than the most frequent so many become one")
    validation: float = _option("text", 0.05, "fraction of the text, its end, that is kept for validation")

    cell: str = _option("model", "lstm", "recurrent cell", CELL_NAMES)
    nonlinearity: str = _option("model", "tanh", "of the cell rnn", ("tanh", "relu", "sigmoid", "identity"))
    forget_bias: float | None = _option("model", None, "of the cell lstm: the forget gate's bias at the start; none: 1")
    update_bias: float | None = _option("model", None, "of the cell gru: the update gate's bias at the start; none: 0")
    hidden_size: int = _option("model", 256, "units in a layer")
    num_layers: int = _option("model", 1, "recurrent layers")
    embedding_size: int = _option("model", 64, "values that stand for a symbol")
    dropout: float = _option("model", 0.0, "between layers and behind the last")
    trainable_h0: bool = _option("model", False, "learn the initial states")
    dtype: str = _option("model", "float32", "of parameters and states", ("float32", "float64"))
    precision: str = _option("model", "float32", "of the recurrent layers' products on a GPU", PRECISIONS)

    k1: int = _option("truncated BPTT", 64, "time steps between updates")
    k2: int | None = _option("truncated BPTT", None, "time steps that a gradient goes back; none: k1")
    batch: int = _option("truncated BPTT", 16, "places in the text that are read side by side")

    optimizer: str = _option("optimisation", "adam", "optimiser", OPTIMIZERS)
    lr: float = _option("optimisation", 5e-3, "learning rate at its height")
    momentum: float = _option("optimisation", 0.0, "of sgd and rmsprop")
    weight_decay: float = _option("optimisation", 0.0, "weight decay")
    schedule: str = _option("optimisation", "cosine", "how the learning rate falls over the budget", SCHEDULES)
    warmup: float = _option("optimisation", 0.02, "fraction of the budget in which the learning rate rises")
    clip_norm: float = _option("optimisation", 1.0, "largest norm of the gradient; 0: no limit")
    clip_value: float = _option("optimisation", 0.0, "largest entry of the gradient; 0: no limit")
    clip_in_time: float = _option("optimisation", 0.0, "largest entry of what a step passes back in time; 0: no limit")

    steps: int | None = _option("budget", None, "updates in all (default 2500 where --minutes is not given)")
    minutes: float | None = _option("budget", None, "minutes of training in all")
    seed: int = _option("budget", 0, "of parameters and dropout")

    log_every: int = _option("run", 20, "steps between lines of metrics.jsonl")
    validate_every: int = _option("run", 200, "steps between looks at the validation text")
    save_every: int = _option("run", 200, "steps between checkpoints")
    reach: int = _option("run", 10, "warn where the gradient falls under 1% within so many steps back")

    def __post_init__(self) -> None:
        if self.steps is None and self.minutes is None:
            object.__setattr__(self, "steps", 2500)
        for option in fields(self):
            _check(option, getattr(self, option.name))
        if self.k2 is not None and self.k2 < self.k1:
            raise ValueError(f"k2: expected at least k1 = {self.k1}, got {self.k2}")
        if self.nonlinearity != "tanh" and self.cell != "rnn":
            raise ValueError(f"nonlinearity: only the cell rnn has a choice, got {self.nonlinearity} for {self.cell}")
        for name, cell in (("forget_bias", "lstm"), ("update_bias", "gru")):
            if getattr(self, name) is not None and self.cell != cell:
                raise ValueError(
                    f"{name}: only the cell {cell} has such a gate, got {getattr(self, name)} for {self.cell}"
                )
        if self.precision != "float32" and self.dtype != "float32":
            raise ValueError(f"precision: expected float32 for dtype {self.dtype}, got {self.precision}")
        if self.momentum and self.optimizer not in ("sgd", "rmsprop"):
            raise ValueError(f"momentum: {self.optimizer} has its own, expected 0, got {self.momentum}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], source: str) -> Self:
        """Options from a TOML file; a name that is no option is a ValueError that suggests the nearest."""
        names = [option.name for option in fields(cls)]
        for name in values:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                raise ValueError(
                    f"{source}: no option is called {name!r}" + (f"; did you mean {near[0]}?" if near else "")
                )
        try:
            return cls(**values)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def to_mapping(self) -> dict[str, Any]:
        return asdict(self)


POSITIVE = (
    "max_alphabet", "hidden_size", "num_layers", "embedding_size", "k1", "k2", "batch", "lr", "steps", "minutes", "log_every", "validate_every", "save_every", "reach",
)  # fmt: skip
LARGEST = 2**63 - 1  # a TOML file holds no larger integer
FROM_0 = ("weight_decay", "seed", "clip_norm", "clip_value", "clip_in_time")
FRACTIONS = ("validation", "dropout", "momentum", "warmup")


def value_type(option: Field) -> type:
    """str, int, float or bool, whether the option may be None or not."""
    return (get_args(option.type) or (option.type,))[0]


def _check(option: Field, value: Any) -> None:
    accepted: tuple[type, ...]
    name, kind, choices = option.name, value_type(option), option.metadata["choices"]
    if value is None and get_args(option.type):
        return
    accepted = (int, float) if kind is float else (kind,)
    number: Any = value  # by now one where it has to be
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        word = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
        raise ValueError(f"{name}: expected {word}, got {value!r}")
    if isinstance(value, int) and value > LARGEST:
        raise ValueError(f"{name}: expected a number up to {LARGEST}, got {value}")
    if isinstance(value, str) and any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(
            f"{name}: expected a text that UTF-8 can hold, for {value!r} cannot be recorded in a TOML file"
        )
    if choices and value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    if name in POSITIVE and not 0 < number < float("inf"):
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")
    if name in FRACTIONS and not 0 <= number < 1:
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    if name in FROM_0 and not 0 <= number < float("inf"):
        raise ValueError(f"{name}: expected a number from 0, got {value!r}")
    if kind is float and not math.isfinite(number):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
