"""The stand-in itself: it refuses what CuPy refuses, and where it computes it computes as NumPy does."""

import copy
import gc
import pickle

import numpy as np
import pytest

from tests import fake_cupy as cp
from tests.fake_cupy.backend import no_waiting
from tests.fake_cupy.cublas import CUBLASError
from tests.fake_cupy.memory import ALIGNMENT

HOST = np.arange(12, dtype="float32").reshape(3, 4) - 5


@pytest.mark.parametrize(
    "work",
    [
        lambda a: np.asarray(a),
        lambda a: np.array([a, a]),
        lambda a: HOST.copy().__setitem__(slice(None), a),
        lambda a: np.linalg.norm(a),
        lambda a: np.fft.fft(a),
        lambda a: np.median(a),
        lambda a: range(a[0, 0]),
        lambda a: [1, 2, 3][a[0, 0]],
        lambda a: a[: cp.asarray(2)],
        lambda a: hash(a),
        lambda a: memoryview(a),
    ],
)
def test_it_never_becomes_a_numpy_array_unasked(work):
    with pytest.raises(TypeError):
        work(cp.asarray(HOST))


@pytest.mark.parametrize(
    "work",
    [
        lambda a: a + HOST,
        lambda a: HOST + a,
        lambda a: a @ HOST.T,
        lambda a: HOST.T @ a,
        lambda a: a.__iadd__(HOST),
        lambda a: HOST.copy().__iadd__(a),
        lambda a: a < HOST,
        lambda a: a + np.array(2.0),
        lambda a: a - [1.0],
        lambda a: np.maximum(a, HOST),
        lambda a: np.add(a, a, out=HOST.copy()),
        lambda a: np.where(a > 0, a, HOST),
        lambda a: cp.where(HOST > 0, a, a),
        lambda a: cp.where(True, a, a),
        lambda a: cp.concatenate([a, HOST]),
        lambda a: np.stack([HOST, a]),
        lambda a: cp.broadcast_to(0, (3, 4)),
        lambda a: cp.clip(HOST, 0, 1),
        lambda a: cp.dot(a, HOST.T),
        lambda a: cp.add.at(a, np.array([0]), a[:1]),
        lambda a: cp.add.at(cp.zeros(3, np.int16), cp.asarray([0]), 1),
        lambda a: cp.exp(a, where=a > 0),
        lambda a: a.sum(where=a > 0),
        lambda a: a.astype(int, casting="safe"),
        lambda a: cp.asarray([1, 2]).__iadd__(a[0, 0]),
    ],
)
def test_host_and_device_do_not_mix(work):
    with pytest.raises(TypeError):
        work(cp.asarray(HOST))


def test_scalars_of_the_host_are_fine():
    a = cp.asarray(HOST)
    for scalar in (2, 2.5, True, np.float32(2), np.float64(2), np.int64(3)):
        for work in (lambda x, s: x * s, lambda x, s: s - x, lambda x, s: np.maximum(x, s), lambda x, s: x >= s):
            expected = work(HOST, scalar)
            got = work(a, scalar)
            assert got.dtype == expected.dtype
            assert (got.get() == expected).all()
    assert ((a < np.array(1.0)).get() == (HOST < 1)).all(), "comparisons take arrays of shape ()"


def test_assignment_takes_scalars_and_device_arrays():
    a = cp.zeros((3, 4))
    a[...] = 2
    a[1] = cp.asarray(HOST)[1]
    a[0, 0] = np.float32(7)
    assert (a.get() == np.stack([[7, 2, 2, 2], HOST[1], [2] * 4])).all()
    for value in (HOST, [1.0] * 4):
        with pytest.raises(ValueError, match="non-scalar"):
            a[:] = value
    with pytest.raises(RuntimeError, match="undefined"):
        a[cp.asarray([1, 1])] = cp.asarray(HOST)[:2]
    a[cp.asarray([1, 1])] = 5
    assert (a[1].get() == 5).all()


def test_what_is_missing_is_missing():
    for name in ("random", "linalg", "errstate", "fuse", "ElementwiseKernel", "testing"):
        assert not hasattr(cp, name)
    for name in ("ctypes", "itemset", "setflags", "__array_interface__", "__index__", "resize"):
        assert not hasattr(cp.zeros(3), name)
    with pytest.raises(AttributeError):
        cp.zeros(3).flags.writeable = False
    for dtype in ("longdouble", "object", "U3", "datetime64[s]"):
        with pytest.raises(ValueError, match="Unsupported dtype"):
            cp.zeros(3, dtype)


def test_new_memory_is_aligned_and_poisoned():
    for dtype in ("float32", "float64", "float16"):
        assert np.isnan(cp.empty((5, 3), dtype).get()).all()
    assert (cp.empty(7, np.int32).get() == np.frombuffer(b"\xab" * 4, np.int32)).all()
    assert np.isnan(cp.empty_like(cp.zeros((2, 3))).get()).all()
    for size in (1, 3, 1000):
        assert cp.empty(size, np.int8).data.ptr % ALIGNMENT == 0
    a = cp.zeros((3, 4), "float32")
    assert a[1, 2:].data.ptr == a.data.ptr + 24
    assert a.nbytes == 48 and a.T.strides == (4, 16) and cp.empty(0).data.ptr == 0


def test_results_stay_on_the_device():
    a = cp.asarray(HOST)
    before = cp.counters.synchronisations
    for value in (a.sum(), a.max(), a[1, 2], a.any(), a.argmax(), cp.dot(a[0], a[0]), np.tanh(a).mean()):
        assert isinstance(value, cp.ndarray) and value.shape == ()
    assert [part.shape for part in a] == [(4,)] * 3
    assert cp.counters.synchronisations == before
    assert float(a.sum()) == HOST.sum() and int(a.max()) == 6 and bool(a.any())
    assert a[2, 3].item() == 6 and f"{a.min()}" == "-5.0" and a.tolist() == HOST.tolist()
    assert cp.counters.synchronisations == before + 6
    a[a > 0] = 0
    assert cp.counters.synchronisations == before + 7, "a mask has to be counted"
    with pytest.raises(ValueError, match="ambiguous"):
        bool(a)


@pytest.mark.parametrize(
    "work",
    [
        lambda a: a.get(),
        lambda a: a[0, 0].item(),
        lambda a: float(a[0, 0]),
        lambda a: bool(a.any()),
        lambda a: int(a.argmax()),
        lambda a: a.tolist(),
        lambda a: f"{a.max()}",
        lambda a: cp.asnumpy(a),
        lambda a: a[a > 0],
        lambda a: a.nonzero(),
        lambda a: cp.where(a > 0),
        lambda a: cp.flatnonzero(a),
        lambda a: cp.asarray(HOST, blocking=True),
        lambda a: a.set(HOST),
        lambda a: cp.cuda.Device().synchronize(),
        lambda a: cp.cuda.Stream.null.synchronize(),
        lambda a: cp.cuda.get_current_stream().record().synchronize(),
    ],
)
def test_a_wait_can_be_forbidden(work):
    a = cp.asarray(HOST)
    with no_waiting():
        (a * 2 + cp.asarray(HOST)).sum()
        with pytest.raises(cp.HostWait):
            work(a)
    work(a)


def test_copies_on_another_stream_come_as_late_as_they_may():
    cuda, a = cp.cuda, cp.zeros((3, 4), "float32")
    stream, event = cuda.Stream(non_blocking=True), cuda.Event(disable_timing=True)
    memory = cuda.alloc_pinned_memory(HOST.nbytes)
    pinned = np.frombuffer(memory, np.float32, HOST.size).reshape(HOST.shape)
    pinned[...] = HOST
    a.set(pinned, stream=stream)
    event.record(stream)
    assert not a.any() and not event.done, "nobody has waited for it"
    pinned[0] = 7
    cuda.get_current_stream().wait_event(event)
    assert event.done and (a.get() == pinned).all(), "the memory was in use until now"
    a.set(HOST)
    assert (a.get() == HOST).all()
    for wrong in (HOST.T, HOST.astype("float64"), a):
        with pytest.raises(TypeError):
            a.set(wrong)


def test_transfers_are_counted():
    a = cp.asarray(HOST)
    before = cp.counters.transfers
    cp.asarray(a)
    assert cp.counters.transfers == before
    cp.asarray(HOST)
    a[[0, 1]]
    a[np.array([2])] = HOST[:1]
    assert cp.counters.transfers == before + 4


@pytest.mark.parametrize(
    "key",
    [
        1, -1, (1, 2), (slice(None), 1), slice(None, None, 2), (None, 1), ..., (..., 0), (slice(0, 2), None, slice(1, 3)),
        [0, 2], ([0, 2], [1, 3]), ([[0], [2]], [1, 3]), (slice(None), [3, 0, 0]), (1, [0, 1]), ([1, 0], slice(1, 3)),
        (None, [2, 0], None, 1), [], np.int64(2), np.array([1, 0], np.uint8), (0, slice(3, 0, -1)),
    ],
)  # fmt: skip
def test_items(key):
    got = cp.asarray(HOST)[key]
    assert isinstance(got, cp.ndarray) and got.shape == HOST[key].shape
    assert (got.get() == HOST[key]).all()
    written, expected = cp.asarray(HOST), HOST.copy()
    written[key] = 9
    expected[key] = 9
    assert (written.get() == expected).all()


def test_masks():
    a = cp.asarray(HOST)
    assert (a[a > 0].get() == HOST[HOST > 0]).all()
    assert (a[:, cp.asarray(HOST[0] < -3)].get() == HOST[:, HOST[0] < -3]).all()
    with pytest.raises(IndexError):
        a[cp.asarray([True, False])]


def test_indices_out_of_range():
    a = cp.asarray(HOST)
    assert (a[cp.asarray([3, -4, 7])].get() == HOST[[0, 2, 1]]).all(), "index arrays wrap around"
    assert float(a[cp.asarray([4]), cp.asarray([-5])][0]) == HOST[1, 3]
    a[cp.asarray([5])] = 0
    assert (a[2].get() == 0).all()
    for key in (3, -4, (0, 4), (0, 0, 0)):
        with pytest.raises(IndexError):
            a[key]
    with pytest.raises(IndexError):
        a[cp.asarray([0.0])]
    with pytest.raises(IndexError):
        cp.zeros((0, 2))[cp.asarray([0])]


def test_views_share_memory_and_results_are_in_c_order():
    a = cp.asarray(HOST)
    a.reshape(2, 6)[0, 0] = 100
    a.T[3, 2] = 200
    a[1:].ravel()[0] = 300
    assert a.get().max() == 300 and a[0, 0].item() == 100 and a[2, 3].item() == 200
    assert (a.T + 1).flags.c_contiguous and a.T.astype("float64").flags.f_contiguous
    assert a.T[cp.asarray([0, 1])].flags.c_contiguous and not a.T.reshape(-1).base
    with pytest.raises(ValueError, match="read-only"):
        cp.broadcast_to(a[:1], (3, 4))[0, 0] = 1


def test_additions_by_index_come_in_no_order():
    rng = np.random.default_rng(0)
    rows, values = rng.integers(0, 2, 5000), rng.standard_normal((5000, 3)).astype("float32")
    results = set()
    for _ in range(5):
        target = cp.zeros((2, 3), "float32")
        cp.add.at(target, cp.asarray(rows), cp.asarray(values))
        expected = np.stack([values[rows == r].sum(0, dtype=float) for r in (0, 1)])
        np.testing.assert_allclose(target.get(), expected, rtol=1e-3)
        results.add(target.get().tobytes())
    assert len(results) > 1


def test_exchange_with_others():
    a = cp.asarray(HOST)

    class Foreign:
        __cuda_array_interface__ = a.T[1:].__cuda_array_interface__

    assert (cp.asarray(Foreign()).get() == HOST.T[1:]).all()
    assert cp.asarray(Foreign()).data.ptr == a.data.ptr + 4
    assert cp.from_dlpack(a).data.ptr == a.data.ptr
    with pytest.raises(ValueError, match="host memory"):
        cp.from_dlpack(HOST)
    for again in (copy.deepcopy(a), copy.copy(a), pickle.loads(pickle.dumps(a))):
        assert (again.get() == HOST).all() and again.data.ptr != a.data.ptr


def test_allocations_are_found_by_address_until_they_go():
    a = cp.asarray(HOST)
    base, memory, name = cp.allocations.find(a.data.ptr + 13)
    assert base == a.data.ptr and name == "float32 (3, 4)"
    assert (memory.view("float32") == HOST.reshape(-1)).all()
    memory[...] = 0
    assert not a.any()
    part = a[1:]
    del a, memory
    gc.collect()
    assert cp.allocations.find(base)[0] == base, "a view keeps it"
    del part
    gc.collect()
    with pytest.raises(LookupError, match="no live allocation"):
        cp.allocations.find(base)


def test_device_and_runtime():
    assert cp.cuda.Device().compute_capability == "90"
    assert cp.cuda.Device(0).attributes["MultiProcessorCount"] == 132
    runtime, a, host = cp.cuda.runtime, cp.asarray(HOST), np.zeros(3, "float32")
    runtime.memsetAsync(a.data.ptr + 4, 0, 8, cp.cuda.get_current_stream().ptr)
    assert (a.get().reshape(-1)[:4] == [-5, 0, 0, -2]).all()
    runtime.memcpy(host.ctypes.data, a.data.ptr, 12, runtime.memcpyDeviceToHost)
    assert (host == [-5, 0, 0]).all()
    with pytest.raises(LookupError, match=r"8 bytes from byte 44 of float32 \(3, 4\) leave its 48 bytes"):
        runtime.memsetAsync(a.data.ptr + 44, 0, 8, 0)
    with cp.cuda.Stream() as stream:
        assert cp.cuda.get_current_stream().ptr == stream.ptr != 0
    assert cp.cuda.get_current_stream().ptr == 0


def gemm(a, b, c, alpha=1.0, beta=0.0, transposed=(0, 0), leading=(None, None, None), compute="CUBLAS_COMPUTE_32F"):
    """Column-major matrices, as device arrays of their transposes."""
    kind = {"float32": 0, "float64": 1, "uint16": 14}
    scale = np.array([alpha, beta], "float64" if "64" in compute else "float32")
    m, k = (a.shape[::-1]) if not transposed[0] else a.shape
    lda, ldb, ldc = (ld or array.strides[0] // array.itemsize for ld, array in zip(leading, (a, b, c), strict=True))
    cublas = cp.cuda.cublas
    cublas.gemmEx(
        cp.cuda.device.get_cublas_handle(), *transposed, m, c.shape[0], k, scale.ctypes.data,
        a.data.ptr, kind[a.dtype.name], lda, b.data.ptr, kind[b.dtype.name], ldb, scale.ctypes.data + scale.itemsize,
        c.data.ptr, kind[c.dtype.name], ldc, getattr(cublas, compute), cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip


@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gemm(dtype, transposed):
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype(dtype) for shape in ((5, 3), (3, 7), (5, 7)))
    wide = cp.zeros((7, 9), dtype)  # leading dimension 9, of which 5 rows are C
    stored = [cp.asarray(x if t else x.T.copy()) for x, t in zip((a, b), transposed, strict=True)]
    compute = "CUBLAS_COMPUTE_64F" if dtype == "float64" else "CUBLAS_COMPUTE_32F"
    wide[:, 2:7] = cp.asarray(c.T.copy())
    gemm(*stored, wide[:, 2:7], 2.0, 0.5, transposed, compute=compute)
    np.testing.assert_allclose(wide[:, 2:7].get().T, 2 * a @ b + 0.5 * c, rtol=1e-5)
    assert not wide[:, :2].any() and not wide[:, 7:].any()
    wide.fill(np.nan)
    gemm(*stored, wide[:, 2:7], transposed=transposed, compute=compute)
    np.testing.assert_allclose(wide[:, 2:7].get().T, a @ b, rtol=1e-5, atol=1e-6, err_msg="beta 0 must not read C")


def test_gemm_rounds_to_bfloat16_and_tf32():
    rng = np.random.default_rng(0)
    a, b = (cp.asarray(rng.standard_normal(shape).astype("float32")) for shape in ((16, 5), (7, 16)))
    results = {}
    for compute in ("CUBLAS_COMPUTE_32F", "CUBLAS_COMPUTE_32F_FAST_TF32", "CUBLAS_COMPUTE_32F_FAST_16BF"):
        c = cp.empty((7, 5), "float32")
        gemm(a, b, c, compute=compute)
        results[compute[14:]] = c.get()
    error = {name: np.abs(value - b.get() @ a.get()).max() for name, value in results.items()}
    assert error["_32F"] < 1e-5 < error["_32F_FAST_TF32"] < 5e-3 < error["_32F_FAST_16BF"] < 5e-2
    ties = np.array(
        [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, np.inf], "float32"
    )  # half a bfloat16 ulp of 1 is 2^-8
    c = cp.empty((4, 1), "float32")
    gemm(cp.ones((1, 1), "float32"), cp.asarray(ties[:, None]), c, compute="CUBLAS_COMPUTE_32F_FAST_16BF")
    assert c.get()[:, 0].tolist() == [1, 1 + 2**-6, 1 + 2**-7, np.inf]
    halves = cp.asarray((ties[:3, None].view("uint32") >> 16).astype("uint16"))  # bfloat16 in memory: cut off
    c = cp.empty((3, 1), "float32")
    gemm(cp.asarray(np.array([[0x4000]], "uint16")), halves, c)
    assert c.get()[:, 0].tolist() == [2, 2 * (1 + 2**-7), 2]


def test_gemm_refuses_what_leaves_its_memory():
    a, b, c = cp.ones((3, 5), "float32"), cp.ones((7, 3), "float32"), cp.ones((7, 5), "float32")
    with pytest.raises(CUBLASError, match=r"A \(5, 3\) with leading dimension 6: .* leave its 60 bytes"):
        gemm(a, b, c, leading=(6, None, None))
    with pytest.raises(CUBLASError, match="leading dimension of C is 4, it has 5 rows"):
        gemm(a, b, c, leading=(None, None, 4))
    with pytest.raises(CUBLASError, match="C overlaps A or B"):
        gemm(c[:3], b, c)
    with pytest.raises(CUBLASError, match="not supported"):
        gemm(a, b, c, compute="CUBLAS_COMPUTE_64F")
    with pytest.raises(CUBLASError, match="alpha lies in device memory"):
        cp.cuda.cublas.sgemm(1, 0, 0, 5, 7, 3, c.data.ptr, a.data.ptr, 5, b.data.ptr, 3, c.data.ptr, c.data.ptr, 5)


@pytest.mark.parametrize("join", [cp.stack, cp.concatenate])
def test_many_small_arrays_are_joined_by_addresses_from_the_host(join):
    """More than 8 of one dtype; larger ones and mixed ones are copied one by one."""
    small, large = [cp.zeros((2, 3))] * 9, [cp.zeros((512, 1024))] * 9
    for parts, transfers in ((small[:8], 0), (small, 1), ([*small, cp.zeros((2, 3), "float32")], 0), (large, 0)):
        before = cp.counters.transfers
        assert join(parts).size == sum(part.size for part in parts)
        assert cp.counters.transfers - before == transfers
    whole = cp.empty(join(small).shape, "float32")
    before = cp.counters.transfers
    join(small, out=whole)
    assert cp.counters.transfers == before, "into another dtype they go one by one"


def test_a_graph_counts_what_the_device_does():
    a, b, empty = cp.zeros(4), cp.ones((2, 2)), cp.zeros(0)
    stream, pool = cp.cuda.Stream(non_blocking=True), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        c = cp.empty(4) + a
        c[...] += a
        c[1:] = 0
        b.T.reshape(2, 2).copy()
        a.astype(float, copy=False).astype("f4")
        cp.ascontiguousarray(a)
        empty.copy()
        empty.fill(1)
        empty[...] = 2
        cp.zeros(3).sum()
        cp.square(a, out=a)
        graph = stream.end_capture()
    assert graph.operations == ["add", "add", "__setitem__", "copy", "astype", "zeros", "sum", "square"]
