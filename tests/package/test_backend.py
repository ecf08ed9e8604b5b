"""The choice of a backend, with a fake driver and a fake CuPy, and the conversion of arrays."""

import ctypes
import importlib.machinery
import importlib.util
import os
import subprocess
import sys
import types

import numpy as np
import pytest

from gpurnn import backend
from tests import ROOT


class FakeDriver:
    """Answers like libcuda, whose functions write through the pointers they get."""

    def __init__(self, init=0, version=13000, count=1, query=0):
        self.init, self.version, self.count, self.query = init, version, count, query

    def cuInit(self, flags):
        return self.init

    def cuDriverGetVersion(self, pointer):
        pointer._obj.value = self.version
        return self.query

    def cuDeviceGetCount(self, pointer):
        pointer._obj.value = self.count
        return 0

    def cuGetErrorName(self, code, pointer):
        pointer._obj.value = {999: b"CUDA_ERROR_UNKNOWN"}.get(code)
        return 0


class DeviceArray:
    """As much of cupy.ndarray as the backend uses; like CuPy's it refuses to become a NumPy array by itself."""

    def __init__(self, values):
        self.values = np.array(values)
        self.dtype, self.shape, self.size = self.values.dtype, self.values.shape, self.values.size

    def __array__(self, *args, **kwargs):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __dlpack_device__(self):
        return 2, 0

    def __add__(self, other):
        return DeviceArray(self.values + other.values)

    def __matmul__(self, other):
        return DeviceArray(self.values @ other.values)

    def astype(self, dtype, copy=True):
        return self if self.dtype == dtype and not copy else DeviceArray(self.values.astype(dtype))

    def get(self):
        return self.values.copy()


def fake_cupy(toolkit=13000, devices=1):
    runtime = types.SimpleNamespace(
        runtimeGetVersion=lambda: toolkit,
        getDeviceCount=lambda: devices,
        getDeviceProperties=lambda index: {"name": b"NVIDIA Fake"},
    )
    cupy = types.ModuleType("cupy")
    cupy.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
    cupy.__version__ = "14.0.0"
    cupy.waits = []
    device = types.SimpleNamespace(id=0, synchronize=lambda: cupy.waits.append("waited"))
    cupy.cuda = types.SimpleNamespace(runtime=runtime, Device=lambda: device)
    cupy.ndarray = DeviceArray
    cupy.asarray = lambda array: array if isinstance(array, DeviceArray) else DeviceArray(array)
    cupy.asnumpy = lambda array: array.get() if isinstance(array, DeviceArray) else np.asarray(array)
    cupy.from_dlpack = lambda array: DeviceArray(array.get())
    return cupy


@pytest.fixture
def machine(monkeypatch):
    """Sets up a machine: its driver (None: no library), its CuPy (None: not installed), the GPUs that NVML sees."""

    def set_up(driver=None, cupy=None, gpus=()):
        def load(library):
            missing = driver is None if "cuda" in library else not gpus
            if missing:
                raise OSError(f"{library}: cannot open shared object file: No such file or directory")
            return driver

        nvml = types.ModuleType("pynvml")
        nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
        nvml.nvmlDeviceGetCount = lambda: len(gpus)
        nvml.nvmlDeviceGetHandleByIndex = lambda index: index
        nvml.nvmlDeviceGetName = lambda handle: gpus[handle]
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        monkeypatch.setattr(ctypes, "CDLL", load)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        found = importlib.machinery.ModuleSpec("cupy", None) if cupy else None
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
        monkeypatch.setitem(sys.modules, "cupy", cupy)  # None makes `import cupy` an ImportError

    return set_up


def fallen_back(expected):
    """`auto` takes NumPy for the expected reason, on one line, and `cuda` raises with the same one."""
    name, xp, reason = backend._choose("auto")
    assert (name, xp) == ("numpy", np)
    assert expected in reason and "\n" not in reason
    with pytest.raises(RuntimeError) as caught:
        backend._choose("cuda")
    assert str(caught.value) == f"GPURNN_BACKEND=cuda was asked for, but {reason}"
    return reason


def test_no_driver_library(machine):
    machine()
    fallen_back("there is no NVIDIA driver library (")


def test_no_driver_library_beside_nvml_is_a_container_for_monitoring(machine):
    machine(gpus=["NVIDIA H200"])
    fallen_back("NVML sees NVIDIA H200: a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (35, "error 35 CUDA_ERROR_INSUFFICIENT_DRIVER: the driver is too old"),
        (100, "error 100 CUDA_ERROR_NO_DEVICE: the driver sees no device"),
        (803, "error 803 CUDA_ERROR_SYSTEM_DRIVER_MISMATCH: driver library and kernel module differ"),
        (999, "error 999 CUDA_ERROR_UNKNOWN"),
        (12345, "error 12345 of no known name"),
    ],
)
def test_driver_that_does_not_start(machine, code, expected):
    machine(FakeDriver(init=code), fake_cupy())
    fallen_back(expected)


@pytest.mark.parametrize("driver", [FakeDriver(init=100), FakeDriver(count=0)])
def test_hidden_devices_are_hinted_at(machine, monkeypatch, driver):
    machine(driver, fake_cupy())
    assert "CUDA_VISIBLE_DEVICES" not in fallen_back("no device")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    fallen_back("(CUDA_VISIBLE_DEVICES='' may hide it)")


def test_driver_that_stops_answering(machine):
    machine(FakeDriver(query=999), fake_cupy())
    fallen_back("the NVIDIA driver does not answer: error 999 CUDA_ERROR_UNKNOWN")


def test_library_that_is_no_driver(machine):
    machine(object(), fake_cupy())
    fallen_back("looking for CUDA failed: 'object' object has no attribute 'cuInit'")


def test_driver_older_than_every_extra(machine):
    machine(FakeDriver(version=11080), fake_cupy())
    fallen_back("supports only CUDA 11.8 and CUDA 12.0 is needed")


def test_driver_older_than_cupy(machine):
    machine(FakeDriver(version=12040), fake_cupy(toolkit=13000))
    fallen_back("CuPy 14.0.0 is built for CUDA 13.0 and the NVIDIA driver supports only CUDA 12.4: update the driver")


@pytest.mark.parametrize(("version", "extra"), [(12040, "cuda12"), (13000, "cuda13"), (14010, "cuda13")])
def test_cupy_is_not_installed(machine, version, extra):
    sentence = f"an NVIDIA GPU is here but CuPy is not installed: pip install 'gpurnn[{extra}]'"
    machine(FakeDriver(version=version))
    assert fallen_back(sentence) == sentence
    machine(FakeDriver(version=version), gpus=["NVIDIA H200"])
    assert fallen_back(sentence) == sentence + " (NVIDIA H200)"


def test_broken_nvml_costs_only_the_name(machine, monkeypatch):
    machine(FakeDriver(), gpus=["NVIDIA H200"])
    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", lambda: 1 / 0)
    assert fallen_back("CuPy is not installed").endswith("'gpurnn[cuda13]'")


def test_cupy_that_cannot_be_imported(machine, monkeypatch):
    machine(FakeDriver(), fake_cupy())
    monkeypatch.setitem(sys.modules, "cupy", None)
    fallen_back("CuPy is installed but does not work: import of cupy halted")


def test_cupy_that_fails_says_the_cause_shortly(machine):
    def fail(*_):
        advice = "=" * 80 + "\nFailed.\n" + "Try this.\n" * 50
        raise ImportError(advice) from OSError("libcublas.so.13:\n cannot open")

    cupy = fake_cupy()
    cupy.asarray = fail
    machine(FakeDriver(), cupy)
    reason = fallen_back("CuPy is installed but does not work: ")
    assert reason.endswith("libcublas.so.13: cannot open")


def test_long_messages_are_cut():
    assert len(backend.one_line(ValueError("many words " * 100))) == 200
    assert backend.one_line(ValueError()) == "ValueError"


def test_cupy_that_finds_no_device(machine):
    machine(FakeDriver(), fake_cupy(devices=0))
    fallen_back("CuPy is installed but does not work: it finds no device")


@pytest.mark.parametrize(("operation", "what"), [("__add__", "sum"), ("__matmul__", "product")])
def test_cupy_that_computes_rubbish(machine, monkeypatch, operation, what):
    monkeypatch.setattr(DeviceArray, operation, lambda self, other: self)
    machine(FakeDriver(), fake_cupy())
    fallen_back(f"it computes a wrong {what}")


@pytest.mark.parametrize("wanted", ["auto", "cuda"])
def test_cupy_that_works(machine, wanted):
    cupy = fake_cupy(toolkit=12090)
    machine(FakeDriver(version=12040), cupy)  # an older minor version is no hindrance
    assert backend._choose(wanted) == ("cuda", cupy, "CuPy 14.0.0 with CUDA 12.9 works on NVIDIA Fake")


def test_numpy_asked_for_looks_for_nothing(monkeypatch):
    monkeypatch.setattr(backend, "_cuda", lambda: pytest.fail("looked for a device"))
    assert backend._choose("numpy") == ("numpy", np, "NumPy was asked for with GPURNN_BACKEND=numpy")


@pytest.mark.parametrize("wanted", ["gpu", "CUDA", ""])
def test_unknown_request(wanted):
    with pytest.raises(ValueError, match=f"GPURNN_BACKEND: expected one of auto, cuda, numpy, got '{wanted}'"):
        backend._choose(wanted)


def imported(wanted, code="print(backend.name, backend.reason, sep='\\n')"):
    environment = {key: value for key, value in os.environ.items() if key != "GPURNN_BACKEND"}
    if wanted is not None:
        environment["GPURNN_BACKEND"] = wanted
    command = [sys.executable, "-c", f"import sys; from gpurnn import backend; {code}"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


def test_the_variable_decides_at_import():
    name, reason = imported(None).stdout.splitlines()
    assert imported("auto").stdout.splitlines() == [name, reason]
    assert imported("numpy").stdout.splitlines()[0] == "numpy"
    forced = imported("cuda")
    if name == "cuda":
        assert forced.stdout.splitlines() == [name, reason]
    else:
        assert forced.returncode != 0 and forced.stderr.rstrip().endswith(f"RuntimeError: {forced_error(reason)}")
    assert "ValueError: GPURNN_BACKEND: expected one of auto, cuda, numpy, got 'tpu'" in imported("tpu").stderr


def forced_error(reason):
    return f"GPURNN_BACKEND=cuda was asked for, but {reason}"


def test_import_stays_light():
    heavy = "sorted({'numba', 'cupy', 'matplotlib', 'pynvml', 'torch'} & set(sys.modules))"
    assert imported("numpy", f"print({heavy})").stdout == "[]\n"


@pytest.fixture
def on_numpy(monkeypatch):
    monkeypatch.setattr(backend, "name", "numpy")
    monkeypatch.setattr(backend, "xp", np)


@pytest.fixture
def on_cuda(monkeypatch):
    """The backend with the fake CuPy, which is returned."""
    cupy = fake_cupy()
    monkeypatch.setattr(backend, "name", "cuda")
    monkeypatch.setattr(backend, "xp", cupy)
    return cupy


class OnlyDlpack:
    def __init__(self, values):
        self.values = values

    def __dlpack__(self, **kwargs):
        return self.values.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.values.__dlpack_device__()


class ForeignTensor:
    """A tensor of another library in device memory."""

    def __init__(self, place=2):
        self.place = place

    def __dlpack_device__(self):
        return self.place, 0


def test_right_arrays_are_not_copied(on_numpy):
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    for given in (values, OnlyDlpack(values)):
        for dtype in ("float32", None):
            assert np.shares_memory(backend.asarray(given, dtype, "x"), values)
    assert backend.to_numpy(values) is values
    assert backend.synchronize() is None and backend.device_name() is None


def test_memory_mapped_arrays_stay_on_disk(on_numpy, tmp_path):
    mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=(5,))
    assert np.shares_memory(backend.asarray(mapped, np.uint8, "x"), mapped)
    assert backend.asarray(mapped, np.int64, "x").dtype == np.int64


@pytest.mark.parametrize(
    ("given", "dtype", "expected"),
    [
        ([[1, 2], [3, 4]], "float32", np.array([[1, 2], [3, 4]], np.float32)),
        (0.5, "float64", np.array(0.5)),
        (np.float64(0.1), "float32", np.array(0.1, np.float32)),
        ([], "int32", np.array([], np.int32)),
        ([2**31 - 1], "int32", np.array([2**31 - 1], np.int32)),
        ([0, 1], "bool", np.array([False, True])),
        (np.array([1, 2], ">f4"), None, np.array([1, 2], np.float32)),
        (np.array([[1, 2], [3, 4]])[:, ::-1], None, np.array([[2, 1], [4, 3]])),
    ],
)
def test_conversions(on_numpy, given, dtype, expected):
    got = backend.asarray(given, dtype, "x")
    assert got.dtype == expected.dtype and got.dtype.isnative
    np.testing.assert_array_equal(got, expected, strict=True)


@pytest.mark.parametrize(
    ("given", "dtype", "error", "message"),
    [
        (np.array([1j]), "float32", TypeError, "got numpy.ndarray with dtype complex128"),
        ("text", "float32", TypeError, "got str with dtype <U4"),
        (None, "float32", TypeError, "got NoneType with dtype object"),
        ([[1], [2, 3]], "float32", TypeError, "expected an array of numbers, got list: .*inhomogeneous"),
        ([1.0], "int32", TypeError, r"expected whole numbers \(int32\), got list with dtype float64"),
        ([2**31], "int32", ValueError, r"expected int32 values in -2147483648..2147483647, got list with 2147483648"),
        ([-1], "uint8", ValueError, r"expected uint8 values in 0..255, got list with -1..-1"),
        ([0, 2], "bool", ValueError, r"expected bool values in 0..1, got list with 0..2"),
        (np.ma.masked_array([1.0, 2.0], [False, True]), None, TypeError, "got numpy.ma.MaskedArray: its mask"),
    ],
)
@pytest.mark.parametrize("place", ["on_numpy", "on_cuda"])
def test_what_would_lose_values_is_refused(request, place, given, dtype, error, message):
    request.getfixturevalue(place)
    with pytest.raises(error, match=f"^weight_hh_l0: .*{message}"):
        backend.asarray(given, dtype, "weight_hh_l0")


@pytest.mark.parametrize("method", ["get", "cpu", "copy_to_host"])
@pytest.mark.parametrize("place", [2, 13, 8])
def test_device_tensors_come_to_numpy_by_their_own_means(on_numpy, method, place):
    tensor = ForeignTensor(place)
    with pytest.raises(TypeError, match=r"x: .* got .*ForeignTensor: it lies in device memory"):
        backend.asarray(tensor, "float32", "x")
    setattr(tensor, method, lambda: np.array([1.0, 2.0]))
    np.testing.assert_array_equal(backend.asarray(tensor, "float32", "x"), np.float32([1, 2]), strict=True)


def test_cuda_array_interface_alone(on_numpy, monkeypatch):
    tensor = types.SimpleNamespace(__cuda_array_interface__={}, copy_to_host=lambda: np.array([3]))
    np.testing.assert_array_equal(backend.asarray(tensor, None, "x"), [3])
    cupy = fake_cupy()
    cupy.asarray = lambda array: DeviceArray([7]) if array is tensor else array
    monkeypatch.setattr(backend, "xp", cupy)
    assert backend.asarray(tensor, None, "x").get() == 7


def test_cuda_arrays_stay_on_the_device(on_cuda):
    values = DeviceArray(np.float32([1, 2]))
    assert backend.asarray(values, "float32", "x") is values
    assert backend.asarray(values, "float64", "x").dtype == np.float64
    with pytest.raises(TypeError, match="x: expected whole numbers"):
        backend.asarray(values, "int32", "x")
    foreign = ForeignTensor()
    foreign.get = lambda: np.float32([3])
    for given in (foreign, [3.0], np.array([3])):
        uploaded = backend.asarray(given, "float32", "x")
        assert isinstance(uploaded, DeviceArray) and uploaded.dtype == np.float32 and uploaded.get() == 3
    np.testing.assert_array_equal(backend.to_numpy(values), values.values, strict=True)
    backend.synchronize()
    assert on_cuda.waits == ["waited"] and backend.device_name() == "NVIDIA Fake"


@pytest.mark.oracle
def test_torch_tensors(on_numpy):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    tensor = torch.arange(6.0).reshape(2, 3)
    assert np.shares_memory(backend.asarray(tensor, "float32", "x"), tensor.numpy())
    np.testing.assert_array_equal(backend.asarray(tensor.T, None, "x"), tensor.numpy().T, strict=True)
    assert backend.asarray(torch.tensor([True]), "bool", "x").dtype == np.bool_
    with pytest.raises(TypeError, match=r"w: .*torch.nn.parameter.Parameter that requires grad: detach\(\) it"):
        backend.asarray(torch.nn.Parameter(tensor), "float32", "w")
    for refused in (tensor.to(torch.bfloat16), tensor.to_sparse(), tensor.to("meta")):
        with pytest.raises(TypeError, match=r"^w: expected an array of numbers, got torch\.Tensor: "):
            backend.asarray(refused, "float32", "w")


@pytest.mark.gpu
@pytest.mark.skipif(backend.name != "cuda", reason=backend.reason)
def test_round_trip_on_the_device():
    values = np.arange(6).reshape(2, 3)
    array = backend.asarray(values, "float32", "x")
    assert isinstance(array, backend.xp.ndarray) and backend.asarray(array, "float32", "x") is array
    backend.synchronize()
    np.testing.assert_array_equal(backend.to_numpy(array), values.astype("float32"), strict=True)
    assert backend.device_name() in backend.reason
