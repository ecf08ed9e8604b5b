"""The stand-in for `cupy.ndarray`, as strict as CuPy 14 where NumPy and CuPy part ways.

What it refuses: becoming a NumPy array unasked, meeting one in an operation, methods and options that CuPy has not.
What it does otherwise than NumPy: reductions and items stay on the device as arrays of shape (), indices out of range
wrap around, results are laid out in C order, additions by index come in no order, nothing warns of overflow.
Where CuPy leaves a result undefined (two values stored in one place), it raises.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.mixins import NDArrayOperatorsMixin

from .graphs import recorded, refused
from .indexing import prepared, refuse_duplicates
from .memory import counters, poisoned, supported

NAMESPACE: dict[str, Callable] = {}  # what NumPy's functions and ufuncs become when they meet a device array


class Flags(NamedTuple):
    """CuPy has these three and no others; none of them can be set."""

    c_contiguous: bool
    f_contiguous: bool
    owndata: bool


class Pointer(NamedTuple):
    """`array.data`."""

    ptr: int
    device_id: int = 0


class Capsule:
    """What `__dlpack__` hands over; it may be taken once."""

    def __init__(self, array: "FakeArray"):
        self.array: FakeArray | None = array


def on_device(host: np.ndarray) -> "FakeArray":
    """A copy of `host` in new device memory, in C order."""
    memory = poisoned(host.shape, supported(host.dtype))
    memory[...] = host
    return FakeArray(memory)


def in_order_k(host: np.ndarray) -> "FakeArray":
    """A copy in the layout of `host`, or the nearest to it."""
    return on_device(host.T).T if host.flags.f_contiguous and not host.flags.c_contiguous else on_device(host)


def from_host(value: Any, dtype: Any = None) -> "FakeArray":
    """A copy of what is on the host: one transfer."""
    host = np.asarray(value, dtype)
    if host.shape:  # a scalar goes with the kernel that fills the array
        counters.transfer()
    return on_device(host)


def unwrap(value: Any) -> Any:
    """The memory behind a device array, or a scalar as it stands; TypeError for anything else, NumPy arrays first."""
    if isinstance(value, FakeArray):
        return value._host
    if type(value) in (bool, int, float, complex) or isinstance(value, np.generic):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def array_only(value: Any) -> np.ndarray:
    if not isinstance(value, FakeArray):
        raise TypeError(f"expected a device array, got {type(value)}")
    return value._host


class FakeArray(NDArrayOperatorsMixin):
    """An array on the pretended device.  It owns, or shows part of, the memory of `_host`."""

    __slots__ = ("__weakref__", "_base", "_host")

    def __init__(self, host: np.ndarray, base: "FakeArray | None" = None):
        self._host, self._base = host, base

    def _view(self, host: np.ndarray) -> "FakeArray":
        """`host` as a view of this array, or in memory of its own where NumPy had to copy."""
        if host.size and not np.may_share_memory(host, self._host):
            return on_device(host)
        return FakeArray(host, self if self._base is None else self._base)

    # What it is

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    itemsize = property(lambda self: self._host.itemsize)
    nbytes = property(lambda self: self._host.size * self._host.itemsize)
    strides = property(lambda self: self._host.strides)
    base = property(lambda self: self._base)
    T = property(lambda self: self._view(self._host.T))

    @property
    def data(self) -> Pointer:
        return Pointer(self._host.ctypes.data if self._host.size else 0)

    @property
    def flags(self) -> Flags:
        return Flags(self._host.flags.c_contiguous, self._host.flags.f_contiguous, self._base is None)

    @property
    def device(self) -> Any:
        from .cuda import Device

        return Device()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        strides = None if self._host.flags.c_contiguous else self.strides
        common = {"shape": self.shape, "typestr": self.dtype.str, "descr": [("", self.dtype.str)], "strides": strides}
        return common | {"data": (self.data.ptr, False), "version": 3, "stream": 1}

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __dlpack__(
        self, *, stream: Any = None, max_version: Any = None, dl_device: Any = None, copy: Any = None
    ) -> Any:
        return Capsule(self)

    # To the host: every way makes the host wait

    def get(self, stream: Any = None, order: str = "C", out: np.ndarray | None = None) -> np.ndarray:
        counters.wait("a copy to the host")
        if out is None:
            return np.array(self._host, order=order)
        out[...] = self._host
        return out

    def item(self) -> Any:
        if self.size != 1:
            raise ValueError("can only convert an array of size 1 to a Python scalar")
        return self.get().item()

    def tolist(self) -> Any:
        return self.get().tolist()

    def tobytes(self, order: str = "C") -> bytes:
        return self.get().tobytes(order)

    def __float__(self) -> float:
        return float(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __bool__(self) -> bool:
        if self.size != 1:
            raise ValueError(f"The truth value of an array of {self.size} elements is ambiguous")
        return bool(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, specification: str) -> str:
        return format(self.get(), specification)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()` to construct one.")

    # Dispatch: operators come in through NDArrayOperatorsMixin and __array_ufunc__

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        function = NAMESPACE.get(ufunc.__name__)
        if function is None or method not in ("__call__", "at"):
            return NotImplemented
        if "out" in options:
            (options["out"],) = options["out"]
        return (function if method == "__call__" else function.at)(*inputs, **options)

    def __array_function__(self, function: Callable, types: Any, args: Any, kwargs: Any) -> Any:
        own = NAMESPACE.get(function.__name__) if function.__module__ == "numpy" else None
        if own is None or any(kind not in (FakeArray, np.ndarray) for kind in types):
            return NotImplemented
        return own(*args, **kwargs)

    # A container

    def __len__(self) -> int:
        return len(self._host)

    def __iter__(self) -> Iterator["FakeArray"]:
        if not self.ndim:
            raise TypeError("iteration over a 0-d array")
        return (self[i] for i in range(len(self)))

    def _index(self, key: Any) -> tuple[tuple, bool]:
        parts = list(key) if isinstance(key, tuple) else [key]
        for part in parts:
            if isinstance(part, list | np.ndarray):
                counters.transfer()
        return prepared(self._host, [part._host if isinstance(part, FakeArray) else part for part in parts])

    def __getitem__(self, key: Any) -> "FakeArray":
        index, advanced = self._index(key)
        return on_device(np.asarray(self._host[index])) if advanced else self._view(self._host[index])

    def __setitem__(self, key: Any, value: Any) -> None:
        index, advanced = self._index(key)
        if isinstance(value, FakeArray):
            given = value._host
        elif advanced and not np.isscalar(value):
            given = from_host(value, self.dtype)._host
        else:
            given = _scalar(value, self.dtype)
        if advanced and given.size > 1:
            refuse_duplicates(self._host, index)
        with np.errstate(all="ignore"):
            self._host[index] = given

    def __copy__(self) -> "FakeArray":
        return self.copy()

    def __deepcopy__(self, memo: Any) -> "FakeArray":
        return self.copy()

    def __reduce__(self) -> Any:
        return from_host, (self.get(),)

    # Contents and layout

    def fill(self, value: Any) -> None:
        self._host.fill(array_only(value)[()] if isinstance(value, FakeArray) else _scalar(value, self.dtype))

    def set(self, arr: np.ndarray, stream: Any = None) -> None:
        """Copies from the host; on a stream that is not the current one, when somebody waits for that stream."""
        from . import cuda

        if not isinstance(arr, np.ndarray) or arr.dtype != self.dtype or arr.shape != self.shape:
            raise TypeError(f"expected a NumPy array {self.dtype} {self.shape}, got {arr!r}")
        if not cuda.is_pinned(arr):
            counters.wait("a copy from pageable memory")
        counters.transfer()
        stream = cuda.get_current_stream() if stream is None else stream
        stream.later(lambda: self._host.__setitem__(..., arr))

    def copy(self, order: str = "C") -> "FakeArray":
        return on_device(self._host.T).T if order == "F" else on_device(self._host)

    def astype(self, dtype: Any, order: str = "K", casting: Any = None, subok: Any = None, copy: bool = True) -> Any:
        if casting is not None or subok is not None:
            raise TypeError("casting and subok are not supported yet")
        wanted = supported(dtype)
        if wanted == self.dtype and not copy and order == "K":
            return self
        with np.errstate(all="ignore"):
            return in_order_k(self._host.astype(wanted, order=order))

    def view(self, dtype: Any = None) -> "FakeArray":
        return self._view(self._host.view() if dtype is None else self._host.view(supported(dtype)))

    def reshape(self, *shape: Any, order: str = "C") -> "FakeArray":
        return self._view(self._host.reshape(*shape, order=order))

    def ravel(self, order: str = "C") -> "FakeArray":
        return self._view(self._host.ravel(order=order))

    def flatten(self, order: str = "C") -> "FakeArray":
        return on_device(self._host.flatten(order=order))

    def transpose(self, *axes: Any) -> "FakeArray":
        return self._view(self._host.transpose(*axes))

    def swapaxes(self, axis1: int, axis2: int) -> "FakeArray":
        return self._view(self._host.swapaxes(axis1, axis2))

    def squeeze(self, axis: Any = None) -> "FakeArray":
        return self._view(self._host.squeeze(axis))

    def take(self, indices: Any, axis: int | None = None) -> "FakeArray":
        flat, at = (self.ravel(), 0) if axis is None else (self, axis % self.ndim)
        return flat[(slice(None),) * at + (indices,)].copy()

    def nonzero(self) -> tuple["FakeArray", ...]:
        counters.wait("the number of nonzero values")
        return tuple(on_device(part) for part in self._host.nonzero())

    def argsort(self, axis: int = -1, kind: str | None = None) -> "FakeArray":
        if kind not in (None, "stable"):
            raise ValueError("kind can only be None or 'stable'")
        return on_device(self._host.argsort(axis, kind="stable"))

    def repeat(self, repeats: int, axis: int | None = None) -> "FakeArray":
        if not isinstance(repeats, int | np.integer):
            raise NotImplementedError("one number of repeats for each value would be copied to the device")
        return on_device(self._host.repeat(repeats, axis))

    # Reductions

    def sum(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "sum", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def prod(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool | None = None) -> "FakeArray":
        return _reduced(self, "prod", out, axis=axis, dtype=dtype, keepdims=bool(keepdims))

    def mean(self, axis: Any = None, dtype: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "mean", out, axis=axis, dtype=dtype, keepdims=keepdims)

    def max(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "max", out, axis=axis, keepdims=keepdims)

    def min(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "min", out, axis=axis, keepdims=keepdims)

    def any(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "any", out, axis=axis, keepdims=keepdims)

    def all(self, axis: Any = None, out: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "all", out, axis=axis, keepdims=keepdims)

    def argmax(self, axis: Any = None, out: Any = None, dtype: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "argmax", out, axis=axis, keepdims=keepdims)

    def argmin(self, axis: Any = None, out: Any = None, dtype: Any = None, keepdims: bool = False) -> "FakeArray":
        return _reduced(self, "argmin", out, axis=axis, keepdims=keepdims)

    def cumsum(self, axis: int | None = None, dtype: Any = None, out: Any = None) -> "FakeArray":
        return _reduced(self, "cumsum", out, axis=axis, dtype=dtype)

    def clip(self, min: Any = None, max: Any = None, out: Any = None) -> "FakeArray":
        bounds = (None if bound is None else unwrap(bound) for bound in (min, max))
        return stored(np.clip(self._host, *bounds), out)

    def dot(self, b: "FakeArray", out: Any = None) -> "FakeArray":
        refused("cuBLAS cannot be called through CuPy")
        with np.errstate(all="ignore"):
            return stored(np.dot(self._host, array_only(b)), out)


NODES = (
    "__getitem__ __setitem__ fill copy astype view reshape ravel flatten transpose swapaxes squeeze take argsort repeat sum prod "
    "mean max min any all argmax argmin cumsum clip dot"
)
for _name in NODES.split():
    setattr(FakeArray, _name, recorded(getattr(FakeArray, _name)))


def stored(result: Any, out: "FakeArray | None") -> FakeArray:
    """`result` in new memory, or cast into `out`."""
    if out is None:
        return on_device(np.asarray(result))
    np.copyto(array_only(out), result, casting="same_kind")
    return out


def _reduced(array: FakeArray, name: str, out: Any, **options: Any) -> FakeArray:
    with np.errstate(all="ignore"):
        return stored(getattr(array._host, name)(**options), out)


def _scalar(value: Any, dtype: np.dtype) -> np.ndarray:
    """One value of the host's; CuPy fills with it, and refuses an array of them."""
    scalar = np.asarray(value, dtype)
    if scalar.shape != ():
        raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
    return scalar
