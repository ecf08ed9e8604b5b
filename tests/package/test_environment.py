"""What is recorded about a machine, with and without an NVIDIA driver, and what counts as a difference."""

import json
import re
import sys
import types
from importlib import metadata

import pytest

from gpurnn import backend, environment


def fake_nvml(**replaced):
    nvml = types.ModuleType("pynvml")
    nvml.nvmlInit = nvml.nvmlShutdown = lambda: None
    nvml.nvmlSystemGetDriverVersion = lambda: "580.82.07"
    nvml.nvmlSystemGetCudaDriverVersion = lambda: 12040
    nvml.nvmlDeviceGetCount = lambda: 2
    nvml.nvmlDeviceGetHandleByIndex = lambda index: index
    nvml.nvmlDeviceGetName = lambda handle: f"NVIDIA H200 {handle}"
    nvml.nvmlDeviceGetCudaComputeCapability = lambda handle: (9, handle)
    nvml.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=140 * 2**30, free=3 * 2**29)
    vars(nvml).update(replaced)
    return nvml


def fail(*_):
    raise RuntimeError("Driver/library\nversion mismatch")


def test_description_is_flat_and_complete():
    entries = environment.describe()
    assert json.loads(json.dumps(entries)) == entries and all(isinstance(value, str) for value in entries.values())
    assert list(entries)[:4] == ["gpurnn", "python", "platform", "cpu"]
    assert entries["numpy"] == metadata.version("numpy") and entries["numba"] == metadata.version("numba")
    assert (entries["backend"], entries["reason"]) == (backend.name, backend.reason)
    assert re.search(r"\d+\.\d+.* \d+ threads?$", entries["blas"])
    assert (entries["device"] == "none") == (backend.name == "numpy")


def test_packages_that_are_not_installed(monkeypatch):
    def version(name):
        if name == "cupy-cuda12x":
            return "14.1"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    entries = environment.describe()
    assert (entries["cupy"], entries["numba"]) == ("14.1", "not installed")


def test_gpus_through_nvml(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    entries = environment.describe()
    assert (entries["driver"], entries["driver's cuda"]) == ("580.82.07", "12.4")
    assert entries["gpu 1"] == "NVIDIA H200 1"
    assert entries["gpu 1 compute capability"] == "9.1"
    assert entries["gpu 1 memory"] == "140.0 GiB, 1.5 GiB free"


def test_one_refused_answer_hides_no_other(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetMemoryInfo=fail))
    entries = environment.describe()
    assert entries["gpu 0 memory"] == "unknown: Driver/library version mismatch"
    assert entries["gpu 0"] == "NVIDIA H200 0"


@pytest.mark.parametrize("function", ["nvmlInit", "nvmlSystemGetDriverVersion", "nvmlDeviceGetCount", "nvmlShutdown"])
def test_broken_nvml_is_a_line(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(**{function: fail}))
    assert environment.describe()["nvml"] == "not usable: Driver/library version mismatch"


def test_absent_nvml_is_a_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert environment.describe()["nvml"].startswith("not usable: import of pynvml halted")


def test_report_is_aligned(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    entries = environment.describe()
    lines = environment.report().splitlines()
    column = max(map(len, entries)) + 2
    assert [(line[:column].rstrip(), line[column:]) for line in lines] == list(entries.items())


def test_cpu_family(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n\nmodel\t: 18\n")
    assert environment.cpu_family(cpuinfo) == ("AuthenticAMD", "25", "17")
    cpuinfo.write_text("processor : 0\nCPU implementer : 0x41\nCPU architecture: 8\nCPU part : 0xd0c\n")
    assert environment.cpu_family(cpuinfo) == ("0x41", "8", "0xd0c")
    assert environment.cpu_family(tmp_path / "absent") == ("", "", "")


def test_cpu_model(tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel\t\t: 17\nmodel name\t: Vendor: Fast 9\n\nmodel name\t: other\n")
    assert environment._cpu_model(cpuinfo) == "Vendor: Fast 9"
    cpuinfo.write_text("processor : 0\nCPU part : 0xd0c\n")
    assert environment._cpu_model(cpuinfo) == environment._cpu_model(tmp_path / "absent") != ""


def test_threads(monkeypatch):
    monkeypatch.delenv("GPURNN_NUM_THREADS", raising=False)
    monkeypatch.setattr(environment, "_usable_cpus", lambda: 5)
    assert environment.cpu_threads() == 5
    monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
    assert environment.cpu_threads() == 3
    assert environment.describe()["threads"] == "3"


@pytest.mark.parametrize("given", ["0", "-1", "1.5", "two", " 2", "1025", "٣", "9" * 5000])
def test_threads_that_make_no_sense(monkeypatch, given):
    monkeypatch.setenv("GPURNN_NUM_THREADS", given)
    with pytest.raises(ValueError, match="GPURNN_NUM_THREADS: expected a whole number from 1 to 1024, got '"):
        environment.cpu_threads()


def test_a_machine_does_not_differ_from_itself(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml())
    assert environment.differences(environment.describe()) == []


@pytest.mark.parametrize("name", ["gpurnn", "python", "cpu", "threads", "numpy", "numba", "cupy", "blas", "device"])
def test_each_entry_that_matters_is_one_line(name):
    now = environment.describe()
    assert environment.differences({**now, name: "old"}, now) == [f"{name}: recorded old, now {now[name]}"]


def test_entries_may_be_missing_on_either_side():
    now = environment.describe()
    recorded = {name: value for name, value in now.items() if name != "numba"}
    assert environment.differences(recorded, now) == [f"numba: recorded nothing, now {now['numba']}"]
    assert environment.differences(now, recorded) == [f"numba: recorded {now['numba']}, now nothing"]


def test_what_cannot_change_bits_is_not_compared():
    now = {**environment.describe(), "backend": "numpy", "driver": "580", "gpu 0 memory": "9.0 GiB, 1.0 GiB free"}
    elsewhere = {**now, "driver": "570", "gpu 0 memory": "9.0 GiB, 2.0 GiB free", "reason": "another"}
    assert environment.differences(now, elsewhere) == []


def test_the_driver_matters_on_a_gpu():
    now = {**environment.describe(), "backend": "cuda", "driver": "580"}
    assert environment.differences({**now, "driver": "570"}, now) == ["driver: recorded 570, now 580"]
