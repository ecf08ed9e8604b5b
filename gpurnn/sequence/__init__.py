"""Layers over a sequence: lengths, rows that begin again, the passes forward and back."""

from gpurnn.sequence.lengths import checked_lengths, prepare_lengths
from gpurnn.sequence.passes import run
from gpurnn.sequence.resets import checked_resets

__all__ = ["checked_lengths", "checked_resets", "prepare_lengths", "run"]
