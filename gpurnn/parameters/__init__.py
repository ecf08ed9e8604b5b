"""Flat buffers of parameters: joined, tied, frozen (`flat`), how they are laid out (`buffers`), what is loaded (`values`)."""

from gpurnn.parameters.flat import Parameters, Trainable, side_by_side

__all__ = ["Parameters", "Trainable", "side_by_side"]
