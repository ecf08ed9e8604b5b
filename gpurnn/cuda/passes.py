"""One pass through time by a persistent kernel: built, its weights packed, and launched for all rows of a batch."""

import functools
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.cuda import device, faults
from gpurnn.executors.layout import Tape
from gpurnn.kernels import exchange, packing, plan, tiles
from gpurnn.kernels.launch import DoesNotFit, Launcher
from gpurnn.kernels.plan import Chip, Choice
from gpurnn.kernels.tiles import Mma, Shape
from gpurnn.types import Array


class Pass(NamedTuple):
    """A kernel, weight_hh in the order in which it reads it, and how the batch is spread over its blocks."""

    kernel: Launcher
    packed: Array
    choice: Choice
    N: int
    mail: int  # 32-bit words of a group
    heads: int  # each a group of its own for the same rows

    @classmethod
    def prepare(
        cls, choice: Choice, factory: Any, tape: Tape, weight_hh: Array, transposed: bool, **constants: bool
    ) -> "Pass":
        cell, (N, H), heads = tape.job.cell, tape.h.shape[1:], tape.job.heads
        given = tuple(constants.items())
        kernel, choice = fitted(factory, cell, H, choice, transposed, device.chip(), given, heads)
        shape = Shape(H // heads, cell.gates, transposed, choice.blocks)
        words = heads * tiles.packed_words(shape, choice.tile)
        packed = backend.xp.empty(words, np.uint32 if isinstance(choice.tile, Mma) else np.float32)
        pack = device.kernel(packing.pack, shape=shape, tile=choice.tile, **_of_heads(heads))
        pack(device.grid(words, packing.THREADS), weight_hh.data.ptr, packed.data.ptr)
        return cls(kernel, packed, choice, N, exchange.mail_words(choice.exchange, shape, choice.tile), heads)

    def __call__(
        self, arrays: tuple[Array | None, ...], resets: list[int], before: tuple[Any, ...], after: tuple[Any, ...]
    ) -> None:
        """Launches: arrays and the pointers `resets`, then `before`, groups of launches before, `after`.

        As many groups at a time as can wait for each other.
        """
        rows, blocks = self.choice.tile.rows, self.choice.blocks
        groups = self.heads * device.grid(self.N, rows)
        running = self.kernel.resident_blocks // blocks if self.kernel.kernel.cooperative else max(1, groups)
        pointers = [*(0 if array is None else array.data.ptr for array in (self.packed, *arrays)), *resets]
        for group in range(0, groups, running):
            count = min(running, groups - group)
            given_up = faults.record().data.ptr
            mail, at = None, given_up  # an exchange without mail does not look there
            if self.mail:
                mail = backend.xp.full(count * self.mail, exchange.beginning(self.choice.exchange), np.uint32)
                at = mail.data.ptr
            self.kernel(count * blocks, *pointers, at, given_up, *before, group, *after)


@functools.lru_cache(maxsize=512)
def fitted(
    factory: Any, cell: Cell, H: int, choice: Choice, transposed: bool, chip: Chip, constants: tuple, heads: int = 1
) -> tuple[Launcher, Choice]:
    """Built with fewer weights in registers where a cell needs more of them than the plan thought.

    Raises DoesNotFit where the chip cannot run even one of the choice's groups, whatever the plan thought.
    """
    shape = Shape(H // heads, cell.gates, transposed, choice.blocks)
    built: dict[int, tuple[Launcher, Choice]] = {}  # by what it spills
    for tile in plan.relaxed(shape, choice.tile, choice.exchange, chip):
        options = {"H": H, "tile": tile, "blocks": choice.blocks, "exchange": choice.exchange, **dict(constants)}
        options |= {"newer": chip.capability >= (9, 0), **_of_heads(heads)}
        kernel = device.kernel(factory, cell.trace, **options)
        built.setdefault(kernel.kernel.spilled, (kernel, choice._replace(tile=tile)))
        if not kernel.kernel.spilled:
            break
    kernel, choice = built[min(built)]
    if kernel.kernel.cooperative and kernel.resident_blocks < choice.blocks:
        what = f"blocks of a group wait for each other, but only {kernel.resident_blocks} run at once"
        raise DoesNotFit(f"{kernel.kernel.name}: {choice.blocks} {what}")
    return kernel, choice


def _of_heads(heads: int) -> dict[str, int]:
    """What a kernel for several heads is told; one for a single head has one name whether it is told or not."""
    return {"heads": heads} if heads > 1 else {}
