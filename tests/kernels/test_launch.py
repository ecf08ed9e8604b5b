"""Kernels launched where there is no GPU, on stand-ins: what is passed on, and what is refused before it could hang."""

import re
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from gpurnn.kernels import build
from gpurnn.kernels import launch as launching
from gpurnn.kernels.launch import Launcher

KERNEL = build.Kernel(
    "gpurnn_tried", b"\x7fELF machine code", 3, threads=64, shared=0, static_shared=0, registers=40, spilled=0
)
WAITING = KERNEL._replace(cooperative=True)
CLUSTERED = KERNEL._replace(cluster=4, shared=1 << 17)
SMS = 132


class Machine:
    """Device 3 as cupy, cuda.core and cuda.bindings show it; `asked` is what was asked of it, in order."""

    def __init__(self):
        self.asked = []
        self.blocks_per_sm, self.clusters, self.stream, self.code = 2, 30, 0, "CUDA_SUCCESS"

    def note(self, what, answer=None):
        def asked(*arguments, **named):
            self.asked.append((what, *arguments, *named.values()))
            return answer(*arguments, **named) if callable(answer) else answer

        return asked

    def of(self, what):
        return [entry[1:] for entry in self.asked if entry[0] == what]

    def modules(self):
        find = self.note("occupancy", lambda threads, shared: self.blocks_per_sm)
        count = self.note("clusters", lambda config, *, stream: self.clusters)
        occupancy = SimpleNamespace(max_active_blocks_per_multiprocessor=find, max_active_clusters=count)
        entry = SimpleNamespace(occupancy=occupancy, handle="handle")
        code = SimpleNamespace(get_kernel=self.note("kernel", entry))
        properties = SimpleNamespace(multiprocessor_count=SMS)
        device = SimpleNamespace(name="Imaginary GPU", properties=properties, set_current=self.note("current"))
        core = SimpleNamespace(
            Device=self.note("device", device),
            LaunchConfig=self.note("config", lambda **options: options),
            ObjectCode=SimpleNamespace(from_cubin=self.note("cubin", code)),
            Stream=SimpleNamespace(from_handle=self.note("stream", lambda handle: f"stream {handle}")),
            launch=self.note("launch"),
        )
        cuda = SimpleNamespace(
            Device=lambda: SimpleNamespace(id=3), get_current_stream=lambda: SimpleNamespace(ptr=self.stream)
        )
        driver = SimpleNamespace(
            CUfunction_attribute=SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="dynamic shared"),
            CUresult=SimpleNamespace(CUDA_SUCCESS="CUDA_SUCCESS"),
            CUdevice=lambda number: f"device {number}",
            cuKernelSetAttribute=self.note("attribute", lambda *_: (Code(self.code),)),
        )
        return {"cupy": SimpleNamespace(cuda=cuda), "cuda.core": core, "cuda.bindings": SimpleNamespace(driver=driver)}


class Code(str):
    """A result of the driver, which has a name."""

    @property
    def name(self):
        return str(self)


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    for name, module in machine.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    launching._wrapped.cache_clear()
    yield machine
    launching._wrapped.cache_clear()


def test_a_launch_passes_its_arguments_as_they_are(machine):
    launcher = Launcher(KERNEL)
    assert machine.of("device") == [(3,)] and machine.of("cubin") == [(KERNEL.cubin,)]
    assert machine.of("kernel") == [(KERNEL.name,)]
    launcher(7, 1 << 40, 5, np.float32(0.25))
    ((stream, config, entry, *arguments),) = machine.of("launch")
    assert config == {"grid": 7, "block": 64, "shmem_size": 0, "is_cooperative": False}
    assert arguments == [1 << 40, 5, np.float32(0.25)] and type(arguments[2]) is np.float32
    assert entry.handle == "handle" and stream == "stream 1", "CUDA's handle of the default stream is 1, CuPy's is 0"


def test_the_device_is_current_before_anything_is_loaded(machine):
    Launcher(KERNEL)
    assert [entry[0] for entry in machine.asked] == ["device", "current", "cubin", "kernel", "occupancy"]


def test_every_launch_goes_to_the_stream_that_is_current_then(machine):
    launcher = Launcher(KERNEL)
    for machine.stream in (0, 1 << 33, 0, 2, 1 << 33):
        launcher(1, 0, 0, 0)
    assert [entry[0] for entry in machine.of("launch")] == [f"stream {s}" for s in (1, 1 << 33, 1, 2, 1 << 33)]
    assert machine.of("stream") == [(1,), (1 << 33,), (2,)], "a handle is wrapped once"


def test_a_series_goes_to_one_stream_with_what_stays_put_together(machine):
    launcher = Launcher(KERNEL._replace(arguments=4))
    again = launcher.series((1 << 40, 7), (np.float32(0.5),))
    machine.stream = 2
    again(3, 1)
    again(5, 2)
    with pytest.raises(TypeError, match="gpurnn_tried: expected 1 arguments between, got 2"):
        again(5, 2, 2)
    first, second = machine.of("launch")
    assert first[0] == second[0] == "stream 1" and [first[1]["grid"], second[1]["grid"]] == [3, 5]
    assert first[3:] == (1 << 40, 7, 1, np.float32(0.5)) and second[3:] == (1 << 40, 7, 2, np.float32(0.5))


def test_a_grid_is_configured_once(machine):
    launcher = Launcher(KERNEL)
    for blocks in (4, 9, 4, 4, 9):
        launcher(blocks, 0, 0, 0)
    assert [grid for grid, *_ in machine.of("config")] == [4, 9]
    assert [config["grid"] for _, config, *_ in machine.of("launch")] == [4, 9, 4, 4, 9]


@pytest.mark.parametrize("given", [(), (1, 2), (1, 2, 3, 4)])
def test_a_wrong_number_of_arguments_is_not_launched(machine, given):
    launcher = Launcher(KERNEL)
    with pytest.raises(TypeError, match=f"gpurnn_tried: expected 3 arguments, got {len(given)}"):
        launcher(1, *given)
    assert not machine.of("launch"), "the driver would read what lies behind them"


@pytest.mark.parametrize("wrong", [True, np.int32(-1), np.int64(5), np.bool_(True), np.float16(1), 0.5, None, "1"])
def test_an_argument_that_has_another_size_is_not_launched(machine, wrong):
    launcher = Launcher(KERNEL)
    came = re.escape(f"got {type(wrong).__name__} {wrong!r}")
    with pytest.raises(TypeError, match=f"^gpurnn_tried: argument 2: expected int, np.float32 or np.float64, {came}$"):
        launcher(1, 5, wrong, np.float32(1))
    assert not machine.of("launch"), "the kernel would read what lies behind it"
    launcher(1, 5, np.float64(1), 1 << 62)


def test_a_thread_without_a_context_gets_one(machine):
    launcher = Launcher(KERNEL)
    machine.asked.clear()
    for _ in range(2):
        thread = threading.Thread(target=lambda: [launcher(1, 0, 0, 0) for _ in range(2)])
        thread.start()
        thread.join(60)
    launcher(1, 0, 0, 0)
    asked = [entry[0] for entry in machine.asked if entry[0] in ("device", "current", "launch")]
    assert asked == [*["device", "current", "launch", "launch"] * 2, "launch"]


def test_a_cooperative_launch_of_too_many_blocks_raises_before_it(machine):
    launcher = Launcher(WAITING)
    assert launcher.resident_blocks == 2 * SMS and not machine.of("clusters")
    launcher(2 * SMS, 0, 0, 0)
    assert machine.of("launch")[0][1]["is_cooperative"] is True
    with pytest.raises(RuntimeError, match=f"gpurnn_tried: {2 * SMS + 1} blocks .* only {2 * SMS} run at once"):
        launcher(2 * SMS + 1, 0, 0, 0)
    assert len(machine.of("launch")) == 1
    Launcher(KERNEL)(2 * SMS + 1, 0, 0, 0)
    assert len(machine.of("launch")) == 2, "blocks that do not wait for each other may be as many as they like"


def test_a_launch_of_clusters_counts_them_instead_of_blocks(machine):
    launcher = Launcher(CLUSTERED)
    launcher(12, 0, 0, 0)
    (stream, config, *_), options = machine.of("launch")[0], {"block": 64, "shmem_size": 1 << 17, "cluster": 4}
    assert config == {"grid": 3, **options}, "of clusters; CUDA refuses one that is cooperative as well"
    assert stream == "stream 1" and len(machine.of("launch")) == 1


def test_how_many_clusters_run_at_once_is_asked_of_the_device(machine):
    machine.stream = 1 << 33
    assert Launcher(CLUSTERED).resident_blocks == 4 * 30
    (asked,) = machine.of("clusters")
    assert asked == ({"grid": 1, "block": 64, "shmem_size": 1 << 17, "cluster": 4}, f"stream {1 << 33}")
    assert [entry[0] for entry in machine.asked].index("attribute") < [entry[0] for entry in machine.asked].index(
        "clusters"
    )
    assert not machine.of("occupancy"), "blocks for themselves may lie where no cluster can"


def test_more_clusters_than_run_at_once_are_launched(machine):
    """Blocks wait for their own cluster only, which runs as a whole or not at all."""
    machine.clusters = 1
    Launcher(CLUSTERED)(400, 0, 0, 0)
    assert machine.of("launch")[0][1]["grid"] == 100


@pytest.mark.parametrize("blocks", [1, 3, 5, 11])
def test_half_a_cluster_is_not_launched(machine, blocks):
    launcher = Launcher(CLUSTERED)
    with pytest.raises(RuntimeError, match=f"^gpurnn_tried: expected whole clusters of 4 blocks, got {blocks}$"):
        launcher(blocks, 0, 0, 0)
    assert not machine.of("launch")


def test_a_kernel_of_which_no_block_fits_is_refused_with_its_numbers(machine):
    machine.blocks_per_sm = 0
    kernel = KERNEL._replace(threads=512, registers=200, shared=9000, static_shared=70)
    numbers = "512 threads of 200 registers and 9070 bytes of shared memory"
    with pytest.raises(RuntimeError, match=f"^gpurnn_tried: no block fits Imaginary GPU: {numbers}$"):
        Launcher(kernel)
    machine.clusters = 0
    with pytest.raises(RuntimeError, match=f"^gpurnn_tried: no cluster of 8 blocks fits Imaginary GPU: {numbers}$"):
        Launcher(kernel._replace(cluster=8))


@pytest.mark.parametrize(
    ("static", "dynamic", "asked"),
    [(0, 0, 0), (48 << 10, 0, 0), (1024, 47 << 10, 0), (1025, 47 << 10, 1), (0, 1 << 17, 1)],
)
def test_shared_memory_is_asked_for_only_beyond_48_kb(machine, static, dynamic, asked):
    launcher = Launcher(KERNEL._replace(shared=dynamic, static_shared=static))
    assert machine.of("attribute") == [("dynamic shared", dynamic, "handle", "device 3")] * asked
    assert machine.of("occupancy") == [(64, dynamic)]
    assert machine.asked[-1][0] == "occupancy", "without leave for the memory it would be 0"
    launcher(1, 0, 0, 0)
    assert machine.of("launch")[0][1]["shmem_size"] == dynamic


def test_shared_memory_that_is_refused(machine):
    machine.code = "CUDA_ERROR_INVALID_VALUE"
    with pytest.raises(RuntimeError, match="may not have 300000 bytes of shared memory: CUDA_ERROR_INVALID_VALUE"):
        Launcher(KERNEL._replace(shared=300_000))
