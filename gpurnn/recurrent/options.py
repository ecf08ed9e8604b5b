"""What every recurrent layer takes by name, for those who check types."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from gpurnn.initializers import Initializer


class Options(TypedDict, total=False):
    """What every recurrent layer takes by name; see `Recurrent`."""

    bias: bool
    bidirectional: bool
    batch_first: bool
    dropout: float
    weight_dropout: float
    residual: bool
    zoneout: float | Sequence[float] | Mapping[str, float]
    recurrent_dropout: float
    noise: float
    trainable_h0: bool
    heads: int
    clip_in_time: float | None
    init: Mapping[str, str | Initializer] | None
    dtype: Any
    precision: str
    executor: str | None
    rng: Any
