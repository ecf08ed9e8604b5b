"""The one door to `numba.cuda`: everything here, and every test, imports it through this module.

numba-cuda 0.30, the last of its line, builds its table of NumPy functions at the first compilation and looks up
`np.row_stack`, which NumPy 2.5 removed; on the way there it makes a `timedelta64` without a unit, which NumPy 2.5 warns
of.  So the module that does both is imported here, once, with a `row_stack` lent to NumPy meanwhile, and no warning.
Where it is loaded already there is nothing to do.
"""

import contextlib
import importlib.util
import sys
import warnings
from collections.abc import Iterator

import numpy as np

TABLE, LENT = "numba.cuda.np.arrayobj", "row_stack"


@contextlib.contextmanager
def _as_numba_expects() -> Iterator[None]:
    """NumPy as numba-cuda knows it.  Python imports this module once, whatever the number of threads that want it."""
    lacking = TABLE not in sys.modules and not hasattr(np, LENT)
    if lacking:
        setattr(np, LENT, lambda arrays: np.vstack(arrays))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        if lacking:
            delattr(np, LENT)


try:
    with _as_numba_expects():
        from numba import cuda
        from numba.cuda import cgutils, dispatcher, types
        from numba.cuda.extending import intrinsic
        from numba.cuda.np import arrayobj as _table  # noqa: F401
        from numba.cuda.typing import signature
except ImportError as error:  # Numba alone has a numba.cuda too, an older one
    if importlib.util.find_spec("numba_cuda") is not None:
        raise
    raise ModuleNotFoundError(
        "CUDA kernels need numba-cuda, which is not installed: pip install 'gpurnn[cuda13]', or 'gpurnn[test]' "
        "to build them without a GPU",
        name="numba-cuda",
    ) from error

__all__ = ["cgutils", "cuda", "dispatcher", "intrinsic", "signature", "types"]
