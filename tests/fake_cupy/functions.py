"""The stand-in's functions, each with the arguments that CuPy's has; also what NumPy's functions dispatch to."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .graphs import recorded, refused
from .memory import allocations as _allocations
from .memory import counters, poisoned, supported
from .ndarray import NAMESPACE, Capsule, FakeArray, array_only, from_host, in_order_k, on_device, stored, unwrap

DIRECTLY, LARGE = 8, 2 << 20  # parts that CuPy joins one by one, as it does those of so many bytes each
ATOMIC = "ilqIQefd"  # the types that CuPy adds atomically


def dispatched(function: Callable) -> Callable:
    """Makes NumPy's function of this name come here when it is given a device array."""
    NAMESPACE[function.__name__] = node = recorded(function)
    return node


class Ufunc:
    """An elementwise function: device arrays and scalars in, a new device array in C order out."""

    def __init__(self, name: str):
        self.__name__, self._ufunc = name, getattr(np, name)
        self.nin = self._ufunc.nin
        NAMESPACE[name] = NAMESPACE[self._ufunc.__name__] = self

    @recorded
    def __call__(self, *inputs: Any, out: Any = None, dtype: Any = None, casting: str = "same_kind") -> FakeArray:
        if len(inputs) != self.nin:
            raise TypeError(f"{self.__name__} takes {self.nin} arguments, got {len(inputs)}")
        hosts = [unwrap(self._item_of_a_scalar_array(value)) for value in inputs]
        target = None if out is None else array_only(out)
        with np.errstate(all="ignore"):  # a device warns of nothing
            result = self._ufunc(*hosts, out=target, dtype=dtype, casting=casting)
        return on_device(np.asarray(result)) if out is None else out

    def _item_of_a_scalar_array(self, value: Any) -> Any:
        """CuPy lets NumPy arrays of shape () into comparisons, and only there."""
        comparison = self.__name__ in ("less", "less_equal", "greater", "greater_equal", "equal", "not_equal")
        return value.item() if comparison and isinstance(value, np.ndarray) and value.ndim == 0 else value

    @recorded
    def at(self, target: FakeArray, rows: FakeArray, values: Any) -> None:
        """target[rows[k]] += values[k], in an order that changes from call to call, as that of atomics does."""
        if self.__name__ != "add" or array_only(target).dtype.char not in ATOMIC:
            raise TypeError(f"{self.__name__}.at is not supported for {target.dtype}")
        index = array_only(rows) % max(1, len(target))
        added = np.broadcast_to(unwrap(values), (*index.shape, *target.shape[1:]))
        order = np.random.default_rng().permutation(index.size)
        np.add.at(array_only(target), index.reshape(-1)[order], added.reshape(-1, *target.shape[1:])[order])


UFUNCS = {
    name: Ufunc(name)
    for name in (
        "absolute", "add", "bitwise_and", "bitwise_or", "bitwise_xor", "cos", "divide", "equal", "exp", "expm1",
        "floor", "floor_divide", "greater", "greater_equal", "invert", "isfinite", "isinf", "isnan", "less",
        "hypot", "less_equal", "log", "log1p", "log2", "logical_and", "logical_not", "logical_or", "maximum", "minimum",
        "multiply", "negative", "not_equal", "positive", "power", "remainder", "rint", "sign", "sin", "sqrt",
        "square", "subtract", "tan", "tanh", "true_divide",
    )
}  # fmt: skip


# Creation


@recorded
def empty(shape: Any, dtype: Any = float, order: str = "C") -> FakeArray:
    extents = tuple(shape) if np.iterable(shape) else (shape,)
    return FakeArray(poisoned(extents, supported(dtype)))


@recorded
def full(shape: Any, fill_value: Any, dtype: Any = None, order: str = "C") -> FakeArray:
    if dtype is None:
        dtype = fill_value.dtype if isinstance(fill_value, FakeArray) else np.array(fill_value).dtype
    array = empty(shape, dtype)
    array.fill(fill_value)
    return array


@recorded
def zeros(shape: Any, dtype: Any = float, order: str = "C") -> FakeArray:
    return full(shape, 0, dtype)


@recorded
def ones(shape: Any, dtype: Any = float, order: str = "C") -> FakeArray:
    return full(shape, 1, dtype)


@dispatched
def empty_like(prototype: FakeArray, dtype: Any = None) -> FakeArray:
    array = in_order_k(array_only(prototype).astype(prototype.dtype if dtype is None else dtype))
    array._host[...] = poisoned(array.shape, array.dtype)
    return array


@dispatched
def full_like(a: FakeArray, fill_value: Any, dtype: Any = None) -> FakeArray:
    array = empty_like(a, dtype)
    array.fill(fill_value)
    return array


@dispatched
def zeros_like(a: FakeArray, dtype: Any = None) -> FakeArray:
    return full_like(a, 0, dtype)


@dispatched
def ones_like(a: FakeArray, dtype: Any = None) -> FakeArray:
    return full_like(a, 1, dtype)


@recorded
def arange(start: Any, stop: Any = None, step: Any = 1, dtype: Any = None) -> FakeArray:
    return on_device(np.arange(start, dtype=dtype) if stop is None else np.arange(start, stop, step, dtype))


@recorded
def asarray(a: Any, dtype: Any = None, order: Any = None, *, copy: Any = None, blocking: bool = False) -> FakeArray:
    if blocking:
        counters.wait("a copy from the host")
    if not isinstance(a, FakeArray):
        if not hasattr(a, "__cuda_array_interface__"):
            return from_host(a, dtype)
        a = _from_interface(a)
    same = dtype is None or a.dtype == supported(dtype)
    return a if same and not copy else a.astype(a.dtype if dtype is None else dtype)


@recorded
def array(obj: Any, dtype: Any = None, copy: bool = True) -> FakeArray:
    return asarray(obj, dtype, copy=copy)


def _from_interface(foreign: Any) -> FakeArray:
    """A view of another library's memory on the device."""
    interface = foreign.__cuda_array_interface__
    dtype, shape, address = np.dtype(interface["typestr"]), interface["shape"], interface["data"][0]
    if not address:
        return empty(shape, dtype)
    base, block, _ = _allocations.find(address)
    memory = np.ndarray(shape, dtype, block, address - base, interface.get("strides"))
    return FakeArray(memory, FakeArray(block))


def from_dlpack(array: Any) -> FakeArray:
    if array.__dlpack_device__()[0] != 2:  # kDLCUDA
        raise ValueError("from_dlpack of host memory is not modelled: asarray copies it")
    capsule = array.__dlpack__(stream=1)
    if not isinstance(capsule, Capsule) or capsule.array is None:
        raise ValueError("expected a DLPack capsule that was not taken before")
    taken, capsule.array = capsule.array, None
    return taken.view()


def asnumpy(a: Any) -> np.ndarray:
    return a.get() if isinstance(a, FakeArray) else np.asarray(a)


@dispatched
def ascontiguousarray(a: FakeArray, dtype: Any = None) -> FakeArray:
    wanted = array_only(a).dtype if dtype is None else supported(dtype)
    return a if a.flags.c_contiguous and a.dtype == wanted else on_device(a._host.astype(wanted))


# Joining and shapes


@dispatched
def concatenate(tup: Iterable[FakeArray], axis: int | None = 0, out: Any = None, *, dtype: Any = None) -> FakeArray:
    hosts = [array_only(part) for part in tup]
    if _one_kernel(hosts, out.dtype if out is not None else dtype):
        counters.transfer()
    return stored(np.concatenate(hosts, axis, dtype=dtype), out)


def _one_kernel(hosts: list, dtype: Any) -> bool:
    """Whether CuPy copies the parts by one kernel, which reads their addresses from an array made on the host."""
    if len(hosts) <= DIRECTLY or len({host.dtype for host in hosts}) > 1 or dtype not in (None, hosts[0].dtype):
        return False
    return sum(host.nbytes for host in hosts) < LARGE * len(hosts)


@dispatched
def stack(tup: Iterable[FakeArray], axis: int = 0, out: Any = None, *, dtype: Any = None) -> FakeArray:
    return concatenate([expand_dims(part, axis) for part in tup], axis, out, dtype=dtype)


@dispatched
def expand_dims(a: FakeArray, axis: int) -> FakeArray:
    host = np.expand_dims(array_only(a), axis)
    return a._view(host)


@dispatched
def broadcast_to(array: FakeArray, shape: tuple[int, ...]) -> FakeArray:
    """Read-only here.  CuPy's can be written to, and would change several values at once."""
    host = np.broadcast_to(array_only(array), shape)
    return array._view(host)


# Values


@dispatched
def where(condition: FakeArray, x: Any = None, y: Any = None) -> Any:
    if x is None or y is None:
        return condition.nonzero()
    return on_device(np.where(array_only(condition).astype(bool), unwrap(x), unwrap(y)))


@dispatched
def searchsorted(a: FakeArray, v: FakeArray, side: str = "left") -> FakeArray:
    return on_device(np.asarray(np.searchsorted(array_only(a), array_only(v), side)))


@dispatched
def flatnonzero(a: FakeArray) -> FakeArray:
    counters.wait("the number of nonzero values")
    return on_device(np.flatnonzero(array_only(a)))


@dispatched
def matmul(x1: FakeArray, x2: FakeArray, /, *, out: Any = None) -> FakeArray:
    refused("cuBLAS cannot be called through CuPy")
    with np.errstate(all="ignore"):
        return stored(np.matmul(array_only(x1), array_only(x2)), out)


def _method(name: str, call: Callable) -> Callable:
    @functools.wraps(call)
    def function(a: FakeArray, *arguments: Any, **options: Any) -> FakeArray:
        array_only(a)
        return call(a, *arguments, **options)

    function.__name__ = name
    return dispatched(function)


_FORMS: dict[str, Callable] = {
    "sum": lambda a, axis=None, dtype=None, out=None, keepdims=False: a.sum(axis, dtype, out, keepdims),
    "prod": lambda a, axis=None, dtype=None, out=None, keepdims=False: a.prod(axis, dtype, out, keepdims),
    "mean": lambda a, axis=None, dtype=None, out=None, keepdims=False: a.mean(axis, dtype, out, keepdims),
    "max": lambda a, axis=None, out=None, keepdims=False: a.max(axis, out, keepdims),
    "min": lambda a, axis=None, out=None, keepdims=False: a.min(axis, out, keepdims),
    "any": lambda a, axis=None, out=None, keepdims=False: a.any(axis, out, keepdims),
    "all": lambda a, axis=None, out=None, keepdims=False: a.all(axis, out, keepdims),
    "argmax": lambda a, axis=None, dtype=None, out=None, keepdims=False: a.argmax(axis, out, dtype, keepdims),
    "argmin": lambda a, axis=None, dtype=None, out=None, keepdims=False: a.argmin(axis, out, dtype, keepdims),
    "cumsum": lambda a, axis=None, dtype=None, out=None: a.cumsum(axis, dtype, out),
    "copy": lambda a, order="K": a.copy(order),
    "reshape": lambda a, newshape, order="C": a.reshape(newshape, order=order),
    "ravel": lambda a, order="C": a.ravel(order),
    "transpose": lambda a, axes=None: a.transpose(axes),
    "swapaxes": lambda a, axis1, axis2: a.swapaxes(axis1, axis2),
    "squeeze": lambda a, axis=None: a.squeeze(axis),
    "repeat": lambda a, repeats, axis=None: a.repeat(repeats, axis),
    "nonzero": lambda a: a.nonzero(),
    "clip": lambda a, a_min, a_max, out=None: a.clip(a_min, a_max, out),
    "take": lambda a, indices, axis=None: a.take(indices, axis),
    "argsort": lambda a, axis=-1, kind=None: a.argsort(axis, kind),
    "dot": lambda a, b, out=None: a.dot(b, out),
}
METHODS = {name: _method(name, call) for name, call in _FORMS.items()}
