"""Optimisers' updates on a device: one kernel reads and writes each buffer once, and nothing waits.

The count of updates, the learning rate and the groups' settings lie on the device, where a captured update finds them.
"""

from typing import Any

import numpy as np

from gpurnn import backend
from gpurnn.cuda import device, faults
from gpurnn.cuda.faults import Site
from gpurnn.cuda.launches import done
from gpurnn.kernels import optim
from gpurnn.kernels.vectors import WIDTH
from gpurnn.parameters import Parameters
from gpurnn.parameters.buffers import ALIGNMENT, Portion
from gpurnn.types import Array

LOSS = ("the loss", 0, ())  # as errors call it


class Updates:
    """The updates of one optimiser: how many there were, and the learning rate, both on the device.

    steps: the updates done; the device has to be asked, which waits.  lr: a float.
    """

    def __init__(self, params: Parameters):
        xp = backend.xp
        self._steps, self._lr = xp.zeros(1, np.int64), xp.zeros(1)
        self.take([Portion(0, params.flat.size, 1.0, 0.0, 0)], params)

    @property
    def steps(self) -> int:
        return int(self._steps[0])

    @steps.setter
    def steps(self, value: int) -> None:
        self._steps.fill(value)

    @property
    def lr(self) -> float:
        return float(self._lr[0])

    @lr.setter
    def lr(self, value: float) -> None:
        self._lr.fill(value)

    def take(self, portions: list[Portion], params: Parameters) -> None:
        """From now on an update is one of these parts of the buffer.  Not while a step is captured."""
        xp, size = backend.xp, params.flat.size
        kinds = list(dict.fromkeys(portion[2:] for portion in portions)) or [(1.0, 0.0, 0)]
        self._groups = xp.asarray(np.array(kinds, np.float64))
        self._scalars = xp.zeros((len(kinds), 4), params.dtype)
        self._marks: Array | None = None  # of each line of the buffer its group; None: all of it is of the first
        if [portion[:2] for portion in portions] != [(0, size)]:
            line = ALIGNMENT // params.dtype.itemsize
            marks = np.full(size // line, -1, np.int32)
            for portion in portions:
                marks[portion.start // line : portion.stop // line] = kinds.index(portion[2:])
            self._marks = xp.asarray(marks)

    def run(self, rule: str, settings: Any, model: Any, moments: dict[str, Parameters], loss: Array | None) -> None:
        """One update of model.params from model.grads by `rule` of `kernels.optim`, unless the record holds a fault.

        settings.numbers() and settings.options(): see `optim.Optimizer`.  loss: None, or a float64 scalar that is a fault
        where it is not finite.
        """
        params = model.params
        (a, b), corrections = settings.numbers()
        flat, dtype, real = params.flat, params.dtype.name, params.dtype.type
        at = faults.pointers()
        pointers = [array.data.ptr for array in (self._steps, self._lr, self._groups)]
        looked_at = (0, at[1]) if loss is None else (faults.index_of(Site("scalar", parts=(LOSS,))), loss.data.ptr)
        begin = device.kernel(optim.begin_update, dtype=dtype)
        table = len(self._groups), self._scalars.data.ptr
        begin(1, *at, *looked_at, *pointers, *table, *map(np.float64, corrections))
        marks = 0 if self._marks is None else self._marks.data.ptr
        kernel = device.kernel(getattr(optim, rule), dtype=dtype, grouped=marks != 0, **settings.options())
        buffers = [buffer.flat.data.ptr for buffer in (params, model.grads, *moments.values())]
        buffers += [0] * (5 - len(buffers))
        blocks = max(1, device.grid(flat.size, optim.THREADS * WIDTH[dtype]))
        site = faults.index_of(Site("parameter", parts=params.places))
        kernel(
            blocks, *at, site, self._scalars.data.ptr, marks, *buffers, flat.size, *map(real, (a, b, 1 - a, 1 - b)),
            self._steps.data.ptr, done(),
        )  # fmt: skip
