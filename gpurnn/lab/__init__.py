"""The laboratory's experiments: the classic tasks, and a guided tour of vanishing and exploding gradients."""

from gpurnn.lab.tasks import adding_problem, at_the_end, copy_task, echo, fit
from gpurnn.lab.tour import tour

__all__ = ["adding_problem", "at_the_end", "copy_task", "echo", "fit", "tour"]
