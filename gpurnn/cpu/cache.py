"""Compiled loops on disk, under our own key.

Numba's `cache=True` looks at one function's bytecode: it misses closures over intrinsics, and does not notice an edit
in another file.  Our key is everything that decides the machine code: the cell's traced mathematics, the element type,
the vector width, the sources of this package and of the trace, this CPU's `costs`, the versions of Numba, LLVM and
Python, and the CPU.
Processes may share the folder; a damaged entry is compiled again.
"""

import ctypes
import functools
import pickle
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.runtime import rtsys
from numba.extending import intrinsic

from gpurnn import locks
from gpurnn._version import __version__
from gpurnn.cpu import costs
from gpurnn.files import code_folder
from gpurnn.kernels import entries, garbage

_called_by_name: list[Any] = []  # Numba frees code with its dispatcher, and would free it under its callers


class Compiled:
    """A function of addresses and whole numbers, for other compiled functions to call by its name.

    address   where it begins, for those that are told whether to call it.
    python    the same function for Python, which lets go of the interpreter's lock; for an address it takes bytes as well.
    record    what it is given by `crew.run`, if it is one of its functions.
    """

    def __init__(self, symbol: str, address: int, count: int, record: Any = None):
        signature = types.void(*[types.intp] * count)
        self._numba_type_ = types.ExternalFunction(symbol, signature)  # what Numba asks of a value that it meets
        self.symbol, self.address, self.record = symbol, address, record
        self.python = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * count)(address)


def external(function: Callable, *key: Any, record: Any = None) -> Compiled:
    """`function` compiled once, or from the disk if an earlier process compiled it under the same key.

    Linked into its callers it would be optimised again in each, and compiled anew for each combination of constants passed.
    """
    with locks.building:
        return _external(function, key, record)


def _external(function: Callable, key: tuple, record: Any) -> Compiled:
    _name_apart(function, key)
    signature = types.void(*[types.intp] * function.__code__.co_argcount)
    dispatcher: Any = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_rewrites=True)(function)
    place = code_folder()
    if place is not None:
        text = "\n".join(map(str, (_environment_key(), function.__qualname__, signature, *key)))
        dispatcher._cache = _File(place / f"{function.__name__}-{entries.key(text)}.bin")
    with garbage.left_lying():
        dispatcher.compile(signature)
    dispatcher.disable_compile()
    _called_by_name.append(dispatcher)
    found = dispatcher.overloads[signature.args]
    address = found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)
    symbol = f"gpurnn_{function.__qualname__}"
    binding.add_symbol(symbol, address)
    return Compiled(symbol, address, len(signature.args), record)


@intrinsic
def call(typing, function, *numbers):
    """call(address, ...): in compiled code, calls a `Compiled` by its address."""
    signature = types.void(types.intp, types.StarArgTuple([types.intp] * len(numbers)))

    def codegen(context, builder, signature, args):
        numbers = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [number.type for number in numbers])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return signature, codegen


def _name_apart(function: Callable, key: tuple) -> None:
    """Gives `function` a name that is its own among closures of one definition.

    Numba names machine code after the qualified name, the argument types and a counter of the process.  Two closures
    compiled in two processes can so have one name, and a process that loads both would run one of them for both.
    """
    function.__qualname__ = f"{function.__name__}_{entries.key(repr(key))}"


@functools.cache
def _environment_key() -> str:
    parts = (
        ("gpurnn.cpu", ()),
        ("gpurnn.cells", ("traced", "trace")),
        ("gpurnn.kernels", ("philox", "deviates", "lanes")),
    )
    sources = [entries.sources(package, __version__, modules) for package, modules in parts]
    features = binding.get_host_cpu_features().flatten()
    versions = (numba.__version__, llvmlite.__version__, platform.python_implementation(), sys.version_info[:3])
    cpu = f"{binding.get_process_triple()} {binding.get_host_cpu_name()} {features} {costs.KEPT}"
    return f"{sources} {versions} {cpu}"


class _File(_Cache):
    """One compiled function in one entry, in Numba's own serialised form.

    It is unpickled, and so executed: see `files.code_folder` and `entries`.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def cache_path(self) -> str:
        return str(self.path.parent)

    def load_overload(self, sig, target_context):
        payload = entries.read(self.path)
        if payload is None:
            return None
        # Machine code needs Numba's run time.  What Numba would load beside it is for compiling, and takes 0.2 s.
        rtsys.initialize(target_context)
        return CompileResult._rebuild(target_context, *pickle.loads(payload))

    def save_overload(self, sig, data):
        entries.write(self.path, pickle.dumps(data._reduce(), protocol=pickle.HIGHEST_PROTOCOL))

    def enable(self):
        """Always on; part of Numba's interface."""

    def disable(self):
        """Always on; part of Numba's interface."""

    def flush(self):
        self.path.unlink(missing_ok=True)
