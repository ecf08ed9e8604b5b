"""Losses with their gradients (`basic`, `more`), of valid steps alone (`basic.evaluate`), and scores without (`scores`)."""

from gpurnn.losses.basic import Loss, evaluate, mean_squared_error, over_valid_steps, softmax, softmax_cross_entropy
from gpurnn.losses.more import binary_cross_entropy, huber
from gpurnn.losses.scores import accuracy, perplexity

__all__ = [
    "Loss",
    "accuracy",
    "binary_cross_entropy",
    "evaluate",
    "huber",
    "mean_squared_error",
    "over_valid_steps",
    "perplexity",
    "softmax",
    "softmax_cross_entropy",
]
