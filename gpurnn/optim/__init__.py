"""How parameters learn: optimisers, clipping of gradients, schedules of the learning rate."""

from gpurnn.optim.optimizers import SGD, Adam, AdamW, Optimizer, RMSprop

__all__ = ["SGD", "Adam", "AdamW", "Optimizer", "RMSprop"]
