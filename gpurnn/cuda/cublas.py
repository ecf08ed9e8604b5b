"""cuBLAS's matrix product by ctypes, for the one thing that CuPy's refuses: to be captured in a CUDA graph.

CuPy raises NotImplementedError for every call of cuBLAS on a stream that is capturing; cuBLAS itself allows it, and wants
its workspace to be there before.  The library is the one that CuPy has loaded, the handle and the workspace are our own.
"""

import ctypes
import functools
from typing import Any

from gpurnn import backend

WORKSPACE = 32 << 20  # bytes: what cuBLAS takes for itself on Hopper

_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_longlong
_ARGUMENTS = {
    "cublasCreate_v2": (ctypes.POINTER(_POINTER),),
    "cublasSetStream_v2": (_POINTER, _POINTER),
    "cublasSetWorkspace_v2": (_POINTER, _POINTER, ctypes.c_size_t),
    "cublasGemmEx": (
        *(_POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _POINTER, _INT, _INT, _POINTER),
        *(_POINTER, _INT, _INT, _INT, _INT),
    ),
    "cublasGemmStridedBatchedEx": (
        *(_POINTER, _INT, _INT, _INT, _INT, _INT, _POINTER, _POINTER, _INT, _INT, _LONG, _POINTER, _INT, _INT, _LONG),
        *(_POINTER, _POINTER, _INT, _INT, _LONG, _INT, _INT, _INT),
    ),
}


@functools.cache
def library() -> Any:
    """cuBLAS with the types of what is called here.  Raises what says that it cannot be found."""
    from cuda.pathfinder import load_nvidia_dynamic_lib

    found = ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    for name, arguments in _ARGUMENTS.items():
        getattr(found, name).argtypes = arguments
    return found


class Handle:
    """A handle for one stream of CuPy's; it lives as long as the process."""

    def __init__(self, stream: Any):
        self._library, self._handle = library(), _POINTER()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        self._call("cublasSetStream_v2", self._handle, stream.ptr)
        self._workspace = backend.xp.cuda.alloc(WORKSPACE)
        self._call("cublasSetWorkspace_v2", self._handle, self._workspace.ptr, WORKSPACE)

    def gemmEx(self, handle: int, *arguments: int) -> None:
        """As `cupy.cuda.cublas.gemmEx`, on this handle instead of CuPy's."""
        self._call("cublasGemmEx", self._handle, *arguments)

    def gemmStridedBatchedEx(self, handle: int, *arguments: int) -> None:
        """As `cupy.cuda.cublas.gemmStridedBatchedEx`."""
        self._call("cublasGemmStridedBatchedEx", self._handle, *arguments)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} failed with status {code}")
