"""Global, shared and local memory: bytes, and for each byte whether it exists and whether it was ever written."""

import bisect

import numpy as np

from tests.ptx.errors import BarrierMisuse, Misaligned, OutOfBounds, Uninitialised
from tests.ptx.parse import Module
from tests.ptx.types import UNSIGNED

ALIGNMENT = 256  # of a span, as from CUDA's allocators; also the least gap between two spans
FIRST_GLOBAL = 7 << 32  # beyond 32 bits, so that an address cut to 32 bits is found out
FIRST_SHARED, FIRST_LOCAL = 1024, 256  # in their own spaces: 0 is nobody's address
SHARED_WINDOW, LOCAL_WINDOW = 1 << 40, 1 << 44  # where generic addresses see the two

ALLOCATED, WRITTEN, MBARRIER = 1, 3, 4  # states of a byte, the last one no data; 0: outside of every span


def _each_byte(state: int) -> dict[int, int]:
    """The state in every byte of a word, by the word's size."""
    return {size: int.from_bytes(bytes([state] * size), "little") for size in (1, 2, 4, 8)}


ALL_ALLOCATED, ALL_WRITTEN, ALL_MBARRIER = _each_byte(ALLOCATED), _each_byte(WRITTEN), _each_byte(MBARRIER)


class Words:
    """Bytes seen as words of 1 to 16 bytes, by word index."""

    def __init__(self, data: np.ndarray):
        self.views = {size: data.view(dtype) for size, dtype in UNSIGNED.items()}
        self.views[16] = data.view(np.complex128)  # only ever copied

    def gather(self, size: int, words: np.ndarray) -> np.ndarray:
        """As unsigned words of `size` bytes, or pairs of 8-byte words, one after another, where size is 16."""
        found = self.views[size][words]
        return found.view(np.uint64) if size == 16 else found

    def scatter(self, size: int, words: np.ndarray, values: np.ndarray) -> None:
        self.views[size][words] = values.view(self.views[size].dtype)


class Space:
    """A memory in which every thread sees one window of `limit` bytes, from address `first` on.

    base: for each thread, where in `data` its window begins; None where all threads share one window.
    spans: (offset in the window, bytes, name), by offset.
    """

    def __init__(self, name, data, state, first, limit, spans, base=None):
        self.name, self.first, self.limit, self.base, self.spans = name, first, limit, base, spans
        self.words, self.state = Words(data), Words(state)
        self.tracker = None  # races.Tracker, where races are looked for

    def resolve(self, addresses: np.ndarray, threads: np.ndarray) -> tuple[np.ndarray, np.ndarray | int]:
        """Addresses in one window, and where in `data` each thread's begins."""
        return addresses, 0 if self.base is None else self.base[threads]

    def keys(self, addresses: np.ndarray, threads: np.ndarray) -> np.ndarray:
        """One number for each byte of the device, other than the same address in another block's shared memory."""
        addresses, base = self.resolve(addresses, threads)
        return addresses if self.base is None else addresses + np.uint64(SHARED_WINDOW) + base.astype(np.uint64)

    def locate(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> np.ndarray:
        """Byte indices into the data; `size` bytes will be accessed."""
        addresses, base = self.resolve(addresses, threads)
        offsets = addresses - np.uint64(self.first)  # wraps below the first address, to something huge
        outside = offsets > np.uint64(max(self.limit - size, 0))
        if outside.any() or self.limit < size:
            k = int(outside.argmax())
            raise OutOfBounds(f"{size} bytes at {self.place(int(offsets[k]))}", int(threads[k]))
        slanted = offsets & np.uint64(size - 1)
        if slanted.any():
            k = int(slanted.argmax())
            raise Misaligned(f"{size} bytes at {self.place(int(offsets[k]))}", int(threads[k]))
        return offsets.view(np.int64) + base

    def load(self, addresses, dtype: np.dtype, count: int, threads, strength=0, constant=False) -> np.ndarray:
        """(threads, count) values of the type; strength and constant as in races.py."""
        size = dtype.itemsize * count
        index = self.locate(addresses, size, threads)
        words = index // size
        self.expect(self.state.gather(size, words), ALL_WRITTEN, index, size, threads)
        if self.tracker is not None:
            self.tracker.read(index, size, threads, strength, constant)
        return self.words.gather(size, words).view(dtype).reshape(-1, count)

    def store(self, addresses, values: np.ndarray, threads, strength=0) -> bool:
        """values: (threads, count), contiguous.  Returns whether any byte changed."""
        size = values.dtype.itemsize * values.shape[1]
        index = self.locate(addresses, size, threads)
        words = index // size
        state = self.state.gather(size, words)
        self.expect(state, ALL_ALLOCATED, index, size, threads)
        if self.tracker is not None:
            self.tracker.write(index, size, threads, strength)
        full = state.dtype.type(ALL_WRITTEN[state.dtype.itemsize])
        if (state != full).any():
            self.state.scatter(size, words, np.full_like(state, full))
        values = values.reshape(-1)
        changed = strength == 0 or bool((self.words.gather(size, words) != values.view(state.dtype)).any())
        self.words.scatter(size, words, values)
        return changed

    def forget(self, addresses: np.ndarray, size: int, threads: np.ndarray) -> None:
        """The bytes are as if never written: an asynchronous copy is on its way to them."""
        index = self.locate(addresses, size, threads)
        state = self.state.gather(size, index // size)
        self.expect(state, ALL_ALLOCATED, index, size, threads)
        blank = np.full_like(state, ALL_ALLOCATED[state.dtype.itemsize])
        self.state.scatter(size, index // size, blank)

    def expect(self, state: np.ndarray, wanted: dict[int, int], index, size: int, threads) -> None:
        """Raises what it means that the bytes at an index are not in the state that they should be in."""
        want = state.dtype.type(wanted[state.dtype.itemsize])
        short = (state & want) != want
        if not short.any():
            return
        k = int(short.argmax()) * state.dtype.itemsize // size
        offset = int(index[k]) if self.base is None else int(index[k]) % self.limit
        existing = self.state.views[1][int(index[k]) : int(index[k]) + size]
        if not existing.all():
            raise OutOfBounds(f"{size} bytes at {self.place(offset)}", int(threads[k]))
        if (existing == MBARRIER).any():
            raise BarrierMisuse(f"{size} bytes at {self.place(offset)}, in which an mbarrier lives", int(threads[k]))
        unwritten = offset + int((existing != WRITTEN).argmax())
        raise Uninitialised(
            f"{size} bytes at {self.place(offset)}: {self.place(unwritten)} was never written", int(threads[k])
        )

    def place(self, offset: int) -> str:
        """An offset in the window, in words: a span's name and the offset in it."""
        if offset >= 1 << 63:
            offset -= 1 << 64
        k = bisect.bisect_right(self.spans, offset, key=lambda span: span[0]) - 1
        if k < 0:
            return f"{self.name} address {offset + self.first:#x}"
        start, size, name = self.spans[k]
        where = "" if offset - start < size else ", beyond its end"
        return f"{name}+{offset - start} ({self.name}, {size} bytes{where})"


class Memory:
    """The device's global memory.  Arrays are copied in and copied out; between them lie gaps that nobody may touch."""

    def __init__(self):
        self.data, self.state = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
        self.used = ALIGNMENT
        self.spans: list[tuple[int, int, str]] = []
        self.modules: list[tuple[Module, dict[str, int]]] = []

    def put(self, array, name: str | None = None, initialised: bool = True) -> int:
        """Its address.  Reading a byte of an array that is not initialised is an error until a kernel writes it."""
        array = np.asarray(array)
        start, size = self.used, array.nbytes
        self.used = -(-(start + size + ALIGNMENT) // ALIGNMENT) * ALIGNMENT
        while self.used > len(self.data):
            self.data, self.state = (np.concatenate([old, np.zeros_like(old)]) for old in (self.data, self.state))
        self.data[start : start + size] = np.frombuffer(array.tobytes(), np.uint8)
        self.state[start : start + size] = WRITTEN if initialised else ALLOCATED
        self.spans.append((start, size, name or f"array {len(self.spans)}"))
        return FIRST_GLOBAL + start

    def get(self, address: int, like: np.ndarray) -> np.ndarray:
        """The bytes from `address` on, as an array of like's shape and type."""
        start = address - FIRST_GLOBAL
        stop = start + like.nbytes
        if not 0 <= start <= stop <= len(self.data) or not self.state[start:stop].all():
            raise OutOfBounds(f"{like.nbytes} bytes at {self.space().place(start)}")
        return np.frombuffer(self.data[start:stop].tobytes(), like.dtype).reshape(like.shape).copy()

    def load(self, module: Module) -> dict[str, int]:
        """The addresses of the module's global variables, which live as long as this memory."""
        for known, symbols in self.modules:
            if known is module:
                return dict(symbols)
        symbols = {}
        for v in module.variables.values():
            if v.space in ("global", "const"):
                data = np.frombuffer(v.data or bytes(v.size), np.uint8)
                symbols[v.key] = self.put(data, name=v.key)
        self.modules.append((module, symbols))
        return dict(symbols)

    def space(self) -> Space:
        """As of now: a later put may move everything."""
        return Space("global", self.data, self.state, FIRST_GLOBAL, len(self.data), self.spans)


def windows(name: str, first: int, spans, size: int, owner: np.ndarray, count: int) -> Space:
    """`count` separate windows of `size` bytes; `owner` is each thread's.  Nothing in them was written.

    Unwritten bytes are 0xff, which is NaN in every floating-point type.
    """
    stride = -(-max(size, 1) // 16) * 16
    state = np.zeros((count, stride), np.uint8)
    for start, length, _ in spans:
        state[:, start : start + length] = ALLOCATED
    data = np.full(count * stride, 0xFF, np.uint8)
    return Space(name, data, state.reshape(-1), first, stride, spans, base=owner * stride)
