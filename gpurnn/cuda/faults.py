"""What goes wrong on a device, told when somebody asks: looking at once would make the host wait in every step.

Kernels leave the first fault in their stream's record on the device (`kernels.faults`), in the order in which work was
given to it, so it is the same one every time.  From then on no optimiser on that stream changes a parameter: the model
stays as it was when the fault came up, as after an exception on NumPy.  `synchronize`, and whoever reads results for good
(a checkpoint, `state_dict`), reads the record, raises what NumPy would have raised, with the step, and clears it.

Faults: a target or token out of range; a loss, gradient or updated parameter that is not finite; a kernel that gave up.
"""

import threading
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend
from gpurnn.arguments import part_at, place_of, wrong_target, wrong_update
from gpurnn.types import Array


class Site(NamedTuple):
    """Where faults may come up: what is looked at (the keys of _TELL), and what it takes to say so.

    shape: of the tensor.  bound: what its values stay below.  parts: (name, start, shape) of a flat buffer's parts.
    """

    what: str
    shape: tuple[int, ...] = ()
    bound: int = 0
    parts: tuple[tuple[str, int, tuple[int, ...]], ...] = ()


class Fault(NamedTuple):
    """step: the update under way, counted from 1 over all that optimisers did since the start, or since `restart`.

    error: what NumPy would have raised.
    """

    step: int
    error: Exception


_lock = threading.Lock()
_records: dict[tuple[Any, int, int], Array] = {}  # by backend, device, and the stream's handle
_sites = {Site("waiting"): 1}  # `kernels.faults.GAVE_UP`


def index_of(site: Site) -> int:
    """The index under which the device knows a site."""
    found = _sites.get(site)
    if found is None:
        with _lock:
            found = _sites.setdefault(site, len(_sites) + 1)
    return found


def record() -> Array:
    """The record of the current stream, or of the stream on whose behalf a step runs aside.

    Each has its own: what one finds must not be taken for the other's, whose work comes in any order with it.
    """
    where = place()
    found = _records.get(where)
    return _records.setdefault(where, _new()) if found is None else found


def place() -> tuple[Any, int, int]:
    """Backend, device and stream: work of two places comes in any order."""
    cuda, stream = backend.xp.cuda, backend.thread.stream
    return backend.xp, cuda.Device().id, cuda.get_current_stream().ptr if stream is None else stream


def _new() -> Array:
    from gpurnn.kernels.faults import FIRST, NOWHERE, WORDS

    made = backend.xp.zeros(WORDS, np.int64)
    made[FIRST] = NOWHERE
    return made


def pointers() -> tuple[int, int]:
    """The record as kernels take it, for int64 and for float64."""
    address = record().data.ptr
    return address, address


def restart(step: int) -> None:
    """Makes `step` the number of updates that the current stream has done so far, for the messages; forgets a fault of
    it that nobody has read.
    """
    from gpurnn.kernels.faults import FIRST, NOW, NOWHERE, SITE

    for word, value in ((NOW, step), (SITE, 0), (FIRST, NOWHERE)):
        record()[word] = value


def take() -> Fault | None:
    """The first fault since the last time, or None; of several streams' one of them.  Waits for the device."""
    ours = [(number, found) for (xp, number, _), found in list(_records.items()) if xp is backend.xp]
    if not ours:  # as always on NumPy
        return None
    device = backend.xp.cuda.Device().id
    records = [found for number, found in ours if number == device]
    if len(records) > 1:
        backend.synchronize()
    faults = [fault for found in records if (fault := _taken(found)) is not None]
    return faults[0] if faults else None


def _taken(record: Array) -> Fault | None:
    from gpurnn.kernels.faults import NOW, POSITION, SITE, VALUE

    values = backend.to_numpy(record)
    if not values[SITE]:
        return None
    record[SITE] = 0
    site = list(_sites)[int(values[SITE]) - 1]
    error = _TELL[site.what](site, int(values[POSITION]), float(values.view(np.float64)[VALUE]))
    return Fault(int(values[NOW]) + 1, error)


def check() -> None:
    """Raises the first fault since the last time, its step in the message.  Waits for the device."""
    fault = take()
    if fault is not None:
        raise type(fault.error)(f"step {fault.step}: {fault.error}")


def synchronize() -> None:
    """Waits until the device has done all work given to it, and raises what went wrong in it.

    ValueError: a target or token out of range.  FloatingPointError: a loss, gradient or updated parameter that is not
    finite.  RuntimeError: a kernel gave up waiting for a block that did not run.  The message names the tensor and the
    step, counted in updates.  Of several faults the first is raised and the others are forgotten: they may follow from it.
    On NumPy there is nothing to wait for, and errors were raised where they came up.
    """
    backend.synchronize()
    check()


def _targets(site: Site, position: int, value: float) -> Exception:
    return wrong_target(site.shape, site.bound, position, int(value))


def _tokens(site: Site, position: int, value: float) -> Exception:
    at = place_of(position, site.shape)
    return ValueError(f"tokens: expected values from 0 to {site.bound - 1}, got {value:.0f} at {at}")


def _gradient(site: Site, position: int, value: float) -> Exception:
    return FloatingPointError(f"gradient of {part_at(site.parts, position)}: expected finite values, got {value}")


def _parameter(site: Site, position: int, value: float) -> Exception:
    return wrong_update(site.parts, position)


def _scalar(site: Site, position: int, value: float) -> Exception:
    return FloatingPointError(f"{site.parts[0][0]} is {value}")


def _waiting(site: Site, position: int, value: float) -> Exception:
    return RuntimeError("a kernel gave up waiting for a block that did not run; GPURNN_EXECUTOR=step waits for none")


_TELL = {
    "waiting": _waiting,
    "targets": _targets,
    "tokens": _tokens,
    "gradient": _gradient,
    "parameter": _parameter,
    "scalar": _scalar,
}
