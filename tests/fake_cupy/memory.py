"""The stand-in's device memory: host memory that is aligned, poisoned, and found again by its address.

Real addresses let raw pointers work: cuBLAS calls, `__cuda_array_interface__`, an interpreter of PTX.
"""

import weakref
from typing import Any

import numpy as np

ALIGNMENT = 512  # bytes, as CuPy's memory pool gives
POISON = 0xAB
SUPPORTED = frozenset("?bBhHiIlLqQefdFD")  # type characters of the dtypes that CuPy computes with


class HostWait(AssertionError):
    """The host waited for the device where it must not."""


class Counters:
    """What makes the host wait (`synchronisations`), what is copied to the device (`transfers`) and how many graphs are
    launched, since the start.  forbidden: a wait raises HostWait.
    """

    def __init__(self) -> None:
        self.synchronisations = self.transfers = self.graphs = 0
        self.forbidden = False

    def wait(self, what: str) -> None:
        from .graphs import refused

        refused(f"the host cannot wait for {what}")
        if self.forbidden:
            raise HostWait(f"the host waits for {what}")
        self.synchronisations += 1

    def transfer(self) -> None:
        from .graphs import refused

        refused("H2D transfers are disallowed")
        self.transfers += 1


class Allocations:
    """The live allocations by address.  An allocation lives as long as an array that shows some of it."""

    def __init__(self) -> None:
        self._blocks: dict[int, tuple[weakref.ref, int, str]] = {}

    def allocate(self, nbytes: int, name: str) -> np.ndarray:
        """`nbytes` > 0 poisoned bytes that begin on a multiple of ALIGNMENT."""
        raw = np.full(nbytes + ALIGNMENT, POISON, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        base = raw.ctypes.data + start

        def forget(owner: weakref.ref) -> None:
            if base in self._blocks and self._blocks[base][0] is owner:  # the address may have a new owner by now
                del self._blocks[base]

        self._blocks[base] = (weakref.ref(raw, forget), nbytes, name)
        return raw[start : start + nbytes]

    def snapshot(self) -> dict[int, np.ndarray]:
        """A copy of all live bytes, by address."""
        return {
            base: self.find(base)[1].copy() for base, (owner, _, _) in list(self._blocks.items()) if owner() is not None
        }

    def restore(self, snapshot: dict[int, np.ndarray]) -> None:
        """Puts them back; what was allocated since becomes NaN."""
        for base, (owner, _, _) in list(self._blocks.items()):
            if owner() is not None:
                memory, before = self.find(base)[1], snapshot.get(base)
                same = before is not None and before.size == memory.size  # the address may have a new owner by now
                memory[...] = before if same else 0xFF

    def find(self, address: int) -> tuple[int, np.ndarray, str]:
        """(base address, all bytes, name) of the allocation that `address` lies in; LookupError where there is none."""
        for base, (owner, nbytes, name) in list(self._blocks.items()):
            raw = owner()
            if raw is not None and base <= address < base + nbytes:
                start = base - raw.ctypes.data
                return base, raw[start : start + nbytes], name
        raise LookupError(f"address {address:#x} lies in no live allocation")

    def bytes_at(self, address: int, nbytes: int) -> np.ndarray:
        """The bytes [address, address + nbytes), a view; LookupError where they leave their allocation."""
        base, block, name = self.find(address)
        start = address - base
        if start + nbytes > block.size:
            raise LookupError(f"{nbytes} bytes from byte {start} of {name} leave its {block.size} bytes")
        return block[start : start + nbytes]


counters = Counters()
allocations = Allocations()


def supported(dtype: Any) -> np.dtype:
    """The dtype in native byte order; ValueError for those that CuPy has not."""
    found = np.dtype(dtype)
    if found.char not in SUPPORTED:
        raise ValueError(f"Unsupported dtype {found}")
    return found.newbyteorder("=")


def poisoned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """New memory that shows where nobody wrote: NaN in floats, 0xAB bytes in the rest.  C order."""
    from .graphs import check_allocation

    name = f"{dtype} {shape}"
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not nbytes:
        return np.empty(shape, dtype)
    check_allocation()
    array = allocations.allocate(nbytes, name).view(dtype).reshape(shape)
    if dtype.kind in "fc":
        array.fill(np.nan)
    elif dtype.kind == "b":
        array.fill(True)
    return array
