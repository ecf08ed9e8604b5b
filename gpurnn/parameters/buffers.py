"""How a flat buffer of parameters is laid out, and whether memory holds it; what an optimiser is told of its parts."""

from typing import Any, NamedTuple

from gpurnn import backend

ALIGNMENT = 64  # bytes: one cache line, one AVX-512 vector


class Revision:
    """How often in this process parameters were joined, tied, frozen or given other settings.

    What was made for the parameters as they were, an optimiser's plan or a captured step, is made anew where it has grown.
    """

    number = 0


def revise() -> None:
    Revision.number += 1


class Portion(NamedTuple):
    """A stretch of the buffer that an optimiser treats alike: places start to stop.

    rate: what its learning rate is multiplied by.  decay: the weight decay.  skipped: updates that it has missed.
    """

    start: int
    stop: int
    rate: float
    decay: float
    skipped: int


def size_of(shape: tuple[int, ...]) -> int:
    """How many values an array has."""
    size = 1
    for extent in shape:
        size *= extent
    return size


def padded(size: int, dtype: Any) -> int:
    """How many values of the buffer a parameter of so many takes."""
    step = ALIGNMENT // dtype.itemsize
    return -(-size // step) * step


def check_memory(count: int, dtype: Any, what: str = "parameters") -> None:
    """MemoryError for what no memory holds: an allocation may seem to succeed, and its use then ends the process."""
    memory = backend.ops.memory_bytes()
    if count * dtype.itemsize > memory:
        needed, there = (f"{size / 2**30:,.0f} GiB" for size in (count * dtype.itemsize, memory))
        raise MemoryError(f"{count:,} {what} in {dtype} need {needed}, and there are {there} of memory")
