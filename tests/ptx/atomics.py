"""Read-modify-write: atom and red."""

import numpy as np

from tests.ptx import numbers
from tests.ptx.access import ANY, Place, Semantics, order
from tests.ptx.clocks import BLOCK
from tests.ptx.elementwise import BITS
from tests.ptx.registers import Modifiers, Operands
from tests.ptx.types import DTYPE


def _increment(old, limit):
    return np.where(old >= limit, 0, old + old.dtype.type(1)).astype(old.dtype)


def _decrement(old, limit):
    return np.where((old == 0) | (old > limit), limit, old - old.dtype.type(1)).astype(old.dtype)


ATOMICS = {
    "add": (np.add, ("u32", "u64", "s32", "s64", "f32", "f64")),
    "min": (np.minimum, ("u32", "u64", "s32", "s64")),
    "max": (np.maximum, ("u32", "u64", "s32", "s64")),
    "and": (np.bitwise_and, BITS),
    "or": (np.bitwise_or, BITS),
    "xor": (np.bitwise_xor, BITS),
    "inc": (_increment, ("u32",)),
    "dec": (_decrement, ("u32",)),
    "exch": (lambda old, value: value, (*BITS, "u32", "u64", "s32", "s64", "f32", "f64")),
    "cas": (None, (*BITS, "u32", "u64", "s32", "s64")),
}


def atom(m: Modifiers, x: Operands, returns: bool = True):
    """Threads take their turns in order.  A float32 sum in global memory flushes denormals, as hardware does."""
    kind = m.type(*ANY)
    name = m.one(*ATOMICS)
    function, kinds = ATOMICS[name]
    if kind not in kinds or (not returns and name in ("exch", "cas")):
        raise m.unknown(f".{name} is not for {kind}")
    how, place = Semantics(m, "relaxed"), Place(m, x)
    operands = m.operands(returns + 2 + (name == "cas"))
    target, *sources = operands[returns:]
    write = x.write(operands[0], kind) if returns else None
    address, reads, dtype = x.address(target), [x.read(s, kind) for s in sources], DTYPE[kind]
    x.yields = returns

    def execute(active):
        values = [active.full(read(active)) for read in reads]
        result, addresses = np.empty(len(active), dtype), address(active)
        x.poll(active, addresses)
        for space, there, threads, which in place.parts(addresses, active):
            _order_atomics(x, how, threads, space.keys(there, threads))
            old = space.load(there, dtype, 1, threads, how.strength)[:, 0]
            flushes = kind == "f32" and name == "add" and space.name == "global"
            apply = (lambda a, b: numbers.flush(numbers.flush(a) + numbers.flush(b))) if flushes else function
            before, after = _in_turn(there, old, [value[which] for value in values], apply)
            x.changes += space.store(there, np.ascontiguousarray(after[:, None]), threads, how.strength)
            result[which] = before
        if write:
            write(active, result)

    return execute


def _in_turn(addresses, old, values, function):
    """What each thread finds, and what it leaves, where several may meet at one address."""
    if function is None:  # cas: expected, then new
        function = lambda now, expected, new: np.where(now == expected, new, now).astype(now.dtype)  # noqa: E731
    unique, which = np.unique(addresses, return_inverse=True)
    if len(unique) == len(addresses):
        return old, np.asarray(function(old, *values))
    before, after = np.empty_like(old), np.empty_like(old)
    now = dict(zip(which.tolist(), old, strict=True))
    for k, place in enumerate(which.tolist()):
        before[k] = now[place]
        now[place] = after[k] = function(now[place], *(value[k] for value in values))
    return before, after


def _order_atomics(x: Operands, how: Semantics, threads, addresses) -> None:
    """Each thread's turn sees what the turns before it published."""
    if not (how.acquires or how.releases or x.clocks.published or x.clocks.fenced[BLOCK][:, threads].any()):
        return
    for k in range(len(threads)):
        thread, address = threads[k : k + 1], addresses[k : k + 1]
        (x.clocks.acquire if how.acquires else x.clocks.relaxed_read)(thread, address, how.scope)
        order(x, how, thread, address, replace=False)


def red(m: Modifiers, x: Operands):
    return atom(m, x, returns=False)


TABLE = {
    **{"atom": atom, "red": red},
}
