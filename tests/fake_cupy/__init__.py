"""A strict stand-in for CuPy on NumPy, so that the library runs as on a GPU where there is none.

This package is the module `cupy` of the tests; `backend.as_backend()` makes it gpurnn's.  What it has behaves as in
CuPy 14; what it has not, CuPy has not either or gpurnn has no use for, and an AttributeError says so.
"""

# ruff: noqa: F401  (a module's contents, as CuPy's is)

from numpy import (
    bool_,
    dtype,
    finfo,
    float16,
    float32,
    float64,
    iinfo,
    inf,
    int8,
    int16,
    int32,
    int64,
    nan,
    ndindex,
    newaxis,
    pi,
    promote_types,
    uint8,
    uint16,
    uint32,
    uint64,
)

from . import cuda
from .functions import (
    METHODS,
    UFUNCS,
    arange,
    array,
    asarray,
    ascontiguousarray,
    asnumpy,
    broadcast_to,
    concatenate,
    empty,
    empty_like,
    expand_dims,
    flatnonzero,
    from_dlpack,
    full,
    full_like,
    matmul,
    ones,
    ones_like,
    searchsorted,
    stack,
    where,
    zeros,
    zeros_like,
)
from .memory import HostWait, allocations, counters
from .ndarray import FakeArray as ndarray

__version__ = "14.2.0"

globals().update(UFUNCS | METHODS)
