"""What the stand-in offers and what the library uses is there in the real CuPy and cuda.core, and in the same form.

They can be imported where there is no GPU, and tell all that is compared here.
"""

import ast
import importlib
import importlib.util
import inspect
import warnings
from functools import reduce
from pathlib import Path

import pytest

import gpurnn
from tests import fake_cupy
from tests.fake_cupy import forms
from tests.fake_cupy.forms import Parameter

if importlib.util.find_spec("cupy") is None:
    pytest.skip("the real CuPy is not installed: pip install cupy-cuda13x", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it finds no device, or no toolkit
    import cupy

CLASSES = {
    "cuda.Device": fake_cupy.cuda.Device,
    "cuda.Event": fake_cupy.cuda.Event,
    "cuda.Graph": fake_cupy.cuda.Graph,
    "cuda.MemoryPool": fake_cupy.cuda.MemoryPool,
    "cuda.Stream": fake_cupy.cuda.Stream,
    "ndarray": fake_cupy.ndarray,
}
MODULES = {
    "": fake_cupy,
    "cuda": fake_cupy.cuda,
    "cuda.runtime": fake_cupy.cuda.runtime,
    "cuda.device": fake_cupy.cuda.device,
}
# The tests' own, and modules that are the stand-in's inside.
OURS = {"HostWait", "METHODS", "UFUNCS", "allocations", "counters", "backend", "compare", "forms", "functions"}
OURS |= {"graphs", "indexing", "memory", "private_pool", "is_pinned", "cublas", "runtime"}
OURS |= {"Capture", "CaptureError", "capturing", "poisoned", "recorded"}
OURS_OF_CLASSES = {"happen", "later", "run", "given", "done_until", "taken", "NODES", "operations"}
MADE_BY_OTHERS = {"cuda.Graph", "cuda.PinnedMemoryPointer", "ndarray"}  # nobody here calls them


def real(path):
    return reduce(getattr, [name for name in path.split(".") if name], cupy)


def public(module, name):
    value = getattr(module, name)
    return not name.startswith("_") and name not in OURS and not (inspect.ismodule(value) and name != "cuda")


def offered():
    """(path in CuPy, the stand-in's) of all that is public."""
    for prefix, module in MODULES.items():
        for name in sorted(vars(module)):
            if public(module, name) and getattr(getattr(module, name), "__module__", "tests").split(".")[0] in (
                "tests",
                "cuda",
            ):
                yield f"{prefix}.{name}".lstrip("."), getattr(module, name)


def members():
    for path, kind in CLASSES.items():
        for name, member in sorted(vars(kind).items()):
            special = name.startswith("__") and name in ("__cuda_stream__", "__dlpack__", "__dlpack_device__")
            if (special or not name.startswith("_")) and name not in OURS_OF_CLASSES:
                yield f"{path}.{name}", member


def held(path, stand_in, there):
    """Differences in form of two callables."""
    name = path.rpartition(".")[2]
    ours, theirs = forms.form(stand_in, name), forms.form(there, name)
    if type(there).__name__ == "_GUFunc":  # which takes anything, and its documentation says what
        theirs = forms.written(name, there.__doc__.replace("\\", "").replace("out=None", "*, out=None"))
    assert theirs is not None, f"{path}: its form cannot be read from the real one"
    return forms.differences(ours, theirs)


@pytest.mark.parametrize(("path", "stand_in"), [pytest.param(*found, id=found[0]) for found in offered()])
def test_functions_and_classes(path, stand_in):
    there = real(path)
    if isinstance(stand_in, fake_cupy.functions.Ufunc):
        assert type(there).__name__ in ("ufunc", "_GUFunc") and there.nin == stand_in.nin
        options = [parameter for parameter in forms.form(stand_in, path) if parameter.kind == forms.KEYWORD]
        given = [Parameter("", forms.BY_PLACE, forms.REQUIRED)] * stand_in.nin
        text = there.__doc__.replace("\\", "")  # it may be there under two names
        assert not forms.differences([*given, *options], forms.written(text.partition("(")[0], text))
    elif callable(stand_in) and path not in MADE_BY_OTHERS:
        assert not held(path, stand_in, there)
    else:
        assert callable(stand_in) == callable(there)


@pytest.mark.parametrize(("path", "member"), [pytest.param(*found, id=found[0]) for found in members()])
def test_methods_and_properties(path, member):
    there = real(path)
    if callable(member):
        assert not held(path, member, there)
    else:
        assert not callable(there)


@pytest.mark.parametrize(
    "path", [f"cuda.runtime.{name}" for name in vars(fake_cupy.cuda.runtime) if name[:4] in ("CUDA", "memc")]
)
def test_numbers(path):
    ours = reduce(getattr, path.split("."), fake_cupy)
    assert callable(ours) or ours == real(path)


@pytest.mark.parametrize("name", ["gemmEx", "gemmStridedBatchedEx", "sgemm", "dgemm", "setPointerMode", "setMathMode"])
def test_cublas(name):
    """Its module needs cuBLAS itself; where that is missing the form stands in the file."""
    assert not forms.differences(
        forms.form(getattr(fake_cupy.cuda.cublas, name), name), forms.shipped("cupy_backends.cuda.libs.cublas", name)
    )


def test_numbers_of_cublas():
    try:
        cublas = cupy.cuda.cublas
    except ImportError as error:
        pytest.skip(f"cuBLAS is not installed: {str(error).splitlines()[0]}")
    for name, value in vars(fake_cupy.cuda.cublas).items():
        if name.startswith("CUBLAS_"):
            assert getattr(cublas, name) == value, name


def test_flags_and_properties():
    assert set(fake_cupy.zeros(1).flags._fields) <= set(dir(cupy._core.flags.Flags))
    runtime = (Path(cupy.__file__).parents[1] / "cupy_backends/cuda/api").glob("runtime*.so")
    text = b"".join(path.read_bytes() for path in runtime)
    missing = [name for name in fake_cupy.cuda.runtime._PROPERTIES if name.encode() not in text]
    assert not missing, "of getDeviceProperties"
    attributes = fake_cupy.cuda.Device().attributes
    assert not [name for name in attributes if not hasattr(cupy.cuda.runtime, f"cudaDevAttr{name}")]


# What the library uses


def used():
    """Paths such as `cuda.Stream` that the library reads from its array module."""
    roots = {"xp": "", "cupy": "", "cuda": "cuda.", "cublas": "cuda.cublas.", "runtime": "cuda.runtime."}
    found = set()
    for path in sorted(Path(gpurnn.__file__).parent.rglob("*.py")):
        text = path.read_text()
        if "kernels" in path.parts or "numba import cuda" in text:
            continue
        for node in ast.walk(ast.parse(text)):
            chain = _chain(node)
            if chain and chain[0] == "backend" and chain[1:2] == ["xp"]:
                chain = chain[1:]
            if len(chain) > 1 and chain[0] in roots and not (chain[0] == "cublas" and path.name == "capture.py"):
                found.add(roots[chain[0]] + ".".join(chain[1:]))
    return sorted(found)


def _chain(node):
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) and names else []


@pytest.mark.parametrize("path", used())
def test_what_the_library_uses(path):
    if path.startswith("cuda.cublas"):  # which cannot be imported without cuBLAS itself
        file = Path(importlib.util.find_spec("cupy_backends.cuda.libs.cublas").origin)
        assert path.rpartition(".")[2].encode() in file.read_bytes()
    else:
        real(path)
    reduce(getattr, path.split("."), fake_cupy)


CORE = {  # how `kernels.launch` and `kernels.build` call them
    "cuda.core:Device": "device_id",
    "cuda.core:Device.set_current": "",
    "cuda.core:ObjectCode.from_cubin": "module",
    "cuda.core:ObjectCode.from_ptx": "module",
    "cuda.core:ObjectCode.get_kernel": "name",
    "cuda.core:LaunchConfig": "grid=, block=, shmem_size=, cluster=, is_cooperative=",
    "cuda.core:Stream.from_handle": "handle",
    "cuda.core:LinkerOptions": "arch=, verbose=",
    "cuda.core:Linker.link": "target_type",
    "cuda.core:Linker.get_info_log": "",
    "cuda.core._module:KernelOccupancy.max_active_blocks_per_multiprocessor": "block_size, dynamic_shared_memory_size",
    "cuda.core._module:KernelOccupancy.max_active_clusters": "config, stream=",
    "cuda.bindings.driver:cuKernelSetAttribute": "attrib, val, kernel, dev",
    "cuda.bindings.nvjitlink:version": "",
    "cuda.pathfinder:load_nvidia_dynamic_lib": "libname",
    "pynvml:nvmlDeviceGetHandleByIndex": "index",
    "pynvml:nvmlDeviceGetName": "handle",
    "pynvml:nvmlInit": "",
    "pynvml:nvmlDeviceGetCount": "",
    "pynvml:nvmlShutdown": "",
}


@pytest.mark.parametrize(("path", "call"), CORE.items(), ids=CORE)
def test_what_launches_use(path, call):
    module, _, name = path.partition(":")
    there = reduce(getattr, name.split("."), importlib.import_module(module))
    theirs = forms.form(there, name.rpartition(".")[2])
    assert theirs is not None
    given = [part.strip() for part in call.split(",") if part]
    ours = [
        Parameter(word.rstrip("="), forms.KEYWORD if word.endswith("=") else forms.POSITIONAL, None) for word in given
    ]
    wrong = [difference for difference in forms.differences(ours, theirs) if " here" not in difference]
    assert not wrong


def test_what_launches_read():
    from cuda.bindings import driver
    from cuda.core import Linker, ObjectCode
    from cuda.core._device import DeviceProperties
    from cuda.core._module import Kernel

    assert {"occupancy", "handle"} <= set(dir(Kernel)) and {"code"} <= set(dir(ObjectCode)) and callable(Linker)
    assert {"multiprocessor_count"} <= set(dir(DeviceProperties)) and callable(driver.CUdevice)
    assert driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.value == 8
    assert driver.CUresult.CUDA_SUCCESS.name == "CUDA_SUCCESS"
