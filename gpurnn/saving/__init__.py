"""Models in one file each (`models`), and the files of tensors that they and checkpoints are (`tensors`)."""

from gpurnn.saving.models import load, save

__all__ = ["load", "save"]
