"""How parameters learn: optimisers, clipping of gradients, schedules of the learning rate."""

from gpurnn.optim.optimizer import Optimizer
from gpurnn.optim.optimizers import SGD, Adam, AdamW, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop"]
