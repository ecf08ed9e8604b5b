"""Loads and stores, and the fences that order them."""

import numpy as np

from tests.ptx.clocks import BLOCK, CLUSTER, DEVICE, EVERY, SHARED
from tests.ptx.convert import EIGHTS
from tests.ptx.elementwise import BITS, INTEGERS
from tests.ptx.memory import LOCAL_WINDOW, SHARED_WINDOW
from tests.ptx.parse import Address, Variable
from tests.ptx.registers import Active, Modifiers, Operands
from tests.ptx.types import DTYPE

u8, u64 = np.uint8, np.uint64

ANY = (*INTEGERS, *EIGHTS, *BITS, "b8", "f32", "f64")
SPACES = ("global", "shared", "shared::cta", "shared::cluster", "local", "const")
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first")
CACHE += ("L1::evict_last", "L1::no_allocate", "L2::64B", "L2::128B", "L2::256B")
SCOPES = {"cta": BLOCK, "cluster": CLUSTER, "gpu": DEVICE, "sys": DEVICE}


class Semantics:
    """How an access takes part in ordering."""

    def __init__(self, m: Modifiers, default: str):
        self.order = m.one("weak", "relaxed", "acquire", "release", "acq_rel", "volatile", default=default)
        scope = SCOPES[m.one(*SCOPES, default="gpu")] if self.order not in ("weak", "volatile") else DEVICE
        self.scope = scope
        self.strength = 0 if self.order == "weak" else scope
        self.acquires, self.releases = self.order in ("acquire", "acq_rel"), self.order in ("release", "acq_rel")


class Place:
    """Which memory an instruction goes to; a generic address says so itself, thread by thread."""

    def __init__(self, m: Modifiers, x: Operands):
        self.spaces = x.spaces
        self.name = m.one(*SPACES, default="generic").removesuffix("::cta").replace("const", "global")

    def parts(self, addresses: np.ndarray, active: Active):
        """(space, addresses in it, threads, which of the active ones: a slice or a mask)."""
        if self.name != "generic":
            yield self.spaces[self.name], addresses, active.threads, slice(None)
            return
        for name, low, high in (
            ("global", 0, SHARED_WINDOW),
            ("shared", SHARED_WINDOW, LOCAL_WINDOW),
            ("local", LOCAL_WINDOW, 1 << 64),
        ):
            inside = (addresses >= u64(low)) & (addresses <= u64(high - 1))
            base = u64(low)
            if inside.all():
                yield self.spaces[name], addresses - base, active.threads, slice(None)
            elif inside.any():
                yield self.spaces[name], addresses[inside] - base, active.threads[inside], inside


def elements(m: Modifiers, dtype: np.dtype) -> int:
    """Of .v2 and .v4; 16 bytes are the most."""
    count = {"v2": 2, "v4": 4, "v1": 1}[m.one("v2", "v4", default="v1")]
    if count * dtype.itemsize > 16:
        raise m.unknown(f"expected at most 16 bytes, got {count * dtype.itemsize}")
    return count


def _each(keys: np.ndarray, threads: np.ndarray, dtype: np.dtype, count: int):
    """Every element of a strong vector is an access of its own."""
    if count == 1:
        return threads, keys
    return np.repeat(threads, count), (keys[:, None] + np.arange(count, dtype=u64) * u64(dtype.itemsize)).reshape(-1)


class Torn:
    """The elements of a strong vector are loaded one by one: in a random order, some at a second visit."""

    def __init__(self, x: Operands, dtype: np.dtype, count: int):
        self.x, self.held = x, np.zeros((x.threads, count), dtype)
        self.waiting = np.zeros(x.threads, bool)

    def visit(self, active: Active, values: np.ndarray) -> np.ndarray:
        """Returns which of the threads have to come again; the others have got all values."""
        came, random = self.waiting[active.at], self.x.random
        again = ~came & (random.random() < 0.5)
        late = random.random(values.shape) < 0.5
        values[:] = np.where(late | ~came[:, None], values, self.held[active.at])
        self.held[active.at], self.waiting[active.at] = values, again
        return again


def load(m: Modifiers, x: Operands):
    dtype = DTYPE[kind := m.type(*ANY)]
    count = elements(m, dtype)
    destination, source = m.operands(2)
    parts = destination if isinstance(destination, tuple) else (destination,)
    if len(parts) != count or not isinstance(source, Address):
        raise m.unknown(f"expected {count} registers and an address")
    writes = [x.write(part, kind, wider=True) for part in parts]
    if m.flag("param"):
        m.flag("func")
        return _load_param(x, source, dtype, writes)
    how, constant = Semantics(m, "weak"), m.flag("nc")
    m.flag(*CACHE)
    place, address = Place(m, x), x.address(source)
    x.yields = how.strength > 0
    torn = Torn(x, dtype, count) if how.strength and count > 1 else None

    def execute(active):
        addresses = address(active)
        if how.strength:
            x.poll(active, addresses)
        values = None
        for space, there, threads, which in place.parts(addresses, active):
            found = space.load(there, dtype, count, threads, how.strength, constant)
            if isinstance(which, slice):
                values = found
            else:
                values = np.empty((len(active), count), dtype) if values is None else values
                values[which] = found
            if how.strength:
                learn = x.clocks.acquire if how.acquires else x.clocks.relaxed_read
                learn(*_each(space.keys(there, threads), threads, dtype, count), how.scope)
        again = torn.visit(active, values) if torn and x.random else None
        for k, write in enumerate(writes):
            write(active, values[:, k])
        return again

    return execute


def _load_param(x: Operands, source: Address, dtype: np.dtype, writes):
    if not isinstance(source.base, Variable) or source.base.key not in x.params:
        raise x.unknown("expected a parameter")
    stop = source.offset + dtype.itemsize * len(writes)
    held = x.params[source.base.key]
    if not 0 <= source.offset < stop <= held.shape[1]:
        raise x.unknown(f"expected bytes within the parameter's {held.shape[1]}")

    def execute(active):
        values = (held if len(held) == 1 else held[active.at])[:, source.offset : stop]
        values = np.ascontiguousarray(values).view(dtype)
        for k, write in enumerate(writes):
            write(active, values[:, k])

    return execute


def gathered(x: Operands, parts, kind: str):
    """Active -> the values of the registers, (threads, registers)."""
    reads, dtype = [x.read(part, kind, wider=True) for part in parts], DTYPE[kind]

    def gather(active):
        values = np.empty((len(active), len(reads)), dtype)
        for k, read in enumerate(reads):
            values[:, k] = read(active)
        return values

    return gather


def store(m: Modifiers, x: Operands):
    dtype = DTYPE[kind := m.type(*ANY)]
    count = elements(m, dtype)
    target, source = m.operands(2)
    parts = source if isinstance(source, tuple) else (source,)
    if len(parts) != count or not isinstance(target, Address):
        raise m.unknown(f"expected an address and {count} registers")
    gather = gathered(x, parts, kind)
    if m.flag("param"):
        m.flag("func")
        return _store_param(x, target, dtype.itemsize * count, gather)
    how = Semantics(m, "weak")
    m.flag(*CACHE)
    place, address = Place(m, x), x.address(target)

    def execute(active):
        addresses, values = address(active), gather(active)
        for space, there, threads, which in place.parts(addresses, active):
            if how.strength:
                order(x, how, *_each(space.keys(there, threads), threads, dtype, count), replace=True)
            x.changes += space.store(there, values[which], threads, how.strength)

    return execute


def _store_param(x: Operands, target: Address, size: int, gather):
    if not isinstance(target.base, Variable) or target.base.key not in x.params:
        raise x.unknown("expected a parameter")
    held = x.params[target.base.key]
    if not 0 <= target.offset <= held.shape[1] - size:
        raise x.unknown(f"expected bytes within the parameter's {held.shape[1]}")

    def execute(active):
        held[active.at, target.offset : target.offset + size] = gather(active).view(u8).reshape(-1, size)

    return execute


def order(x: Operands, how: Semantics, threads, addresses, replace: bool) -> None:
    """The releasing side of a strong write."""
    if how.releases:
        for thread, address in zip(threads.tolist(), addresses.tolist(), strict=True):
            x.clocks.release(thread, address, how.scope, replace)
    else:
        x.clocks.relaxed_write(threads, addresses, how.scope, replace)


def fence(m: Modifiers, x: Operands):
    if m.flag("mbarrier_init"):
        m.one("release")
        m.one("cluster")
        m.operands(0)
        return lambda active: x.mbarriers.fence_inits(active.threads)
    if m.flag("proxy"):  # between generic and asynchronous accesses; st.async, the only one known here, is generic
        m.one("async")
        m.flag("global", "shared::cta", "shared::cluster")
        m.operands(0)
        return lambda active: None
    how = m.one("acq_rel", "sc", "acquire", "release", default="acq_rel")
    memory = EVERY
    for restriction, wanted in (("shared::cta", "release"), ("shared::cluster", "acquire")):
        if m.flag(f"sync_restrict::{restriction}"):
            memory = SHARED
            if how != wanted or not m.flag("cluster"):
                raise m.unknown(f"restricted to {restriction}, it is fence.{wanted} of scope cluster")
    scope = CLUSTER if memory == SHARED else SCOPES[m.one(*SCOPES)]
    m.operands(0)
    return _fence(x, scope, memory, acquires=how != "release", releases=how != "acquire")


def _fence(x: Operands, scope: int, memory: int = EVERY, acquires: bool = True, releases: bool = True):
    def execute(active):
        if acquires:
            x.clocks.acquire_fence(active.threads, scope, memory)
        if releases:
            x.clocks.release_fence(active.threads, scope, memory)

    return execute


def membar(m: Modifiers, x: Operands):
    scope = {"cta": BLOCK, "gl": DEVICE, "sys": DEVICE}[m.one("cta", "gl", "sys")]
    m.operands(0)
    return _fence(x, scope)


def nanosleep(m: Modifiers, x: Operands):
    x.read(m.operands(1)[0], m.type("u32"))
    x.yields = True
    return lambda active: None


TABLE = {
    **{"ld": load, "fence": fence, "membar": membar, "nanosleep": nanosleep},
}
