"""Products with factors of 16 bits: how values are rounded, which arrays are and how often, and what comes out.

The oracle rounds on the host and multiplies in float64, so only sums in float32 may differ.
"""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.cells import GRU_CELL, LSTM_CELL
from gpurnn.cuda import device, sweeps
from gpurnn.executors import layout
from gpurnn.executors.contract import Job, Weights
from tests import fake_cupy
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

WORDS = np.array(
    [0x3F800000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0xBF808001, 0x7F7FFFFF, 0x7F800000, 0xFF800000,
     0x7F800001, 0xFFFFFFFF, 0x7FC00000, 0x00000001, 0x80000000, 0x00008000, 0x477FF000, 0x477FEFFF, 0x33000001,
     0x33000000, 0x38801000, 0x12345678],
    np.uint32,
)  # fmt: skip


def put(array):
    return backend.xp.asarray(array)


def on_host(values, kind):
    """float64: the nearest number of `kind`, ties to even, by looking at all neighbours; what is beyond the largest is inf."""
    if kind == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(float)
    bits = values.view(np.uint32).astype(np.uint64)
    low, even = bits & np.uint64(0xFFFF), bits >> np.uint64(16) & np.uint64(1)
    up = (low > 0x8000) | ((low == 0x8000) & (even == 1))
    upper = ((bits >> np.uint64(16)) + up).astype(np.uint32) << np.uint32(16)
    return np.where(np.isnan(values), np.nan, upper.view(np.float32)).astype(float)


def widened(array, kind):
    host = array.get()
    return (host.astype(np.uint32) << 16).view(np.float32).astype(float) if kind == "bfloat16" else host.astype(float)


@pytest.mark.parametrize("kind", device.SIXTEEN_BITS)
def test_to_the_nearest_and_what_is_no_number_stays_none(kind):
    rng = np.random.default_rng(0)
    values = np.concatenate([WORDS.view(np.float32), rng.standard_normal(4096 - 21).astype("f4")])
    with interpreted("numpy", 0):
        given = put(values)
        for start, count in ((0, 4096), (0, 7), (4, 8), (1, 1), (3, 33), (8, 2100), (0, 0)):
            part = given[start : start + count]
            found = device.rounded(part, kind)
            assert found.shape == part.shape and found.dtype.char == device.SIXTEEN_BITS[kind]
            np.testing.assert_array_equal(widened(found, kind), on_host(values[start : start + count], kind))
        turned = device.rounded(given.reshape(64, 64).T, kind)
        np.testing.assert_array_equal(widened(turned, kind), on_host(values.reshape(64, 64).T.copy(), kind))
    assert np.isinf(on_host(WORDS.view(np.float32)[6:7], kind)).all(), "beyond the largest number is no number"


class Products:
    """What cuBLAS was asked for: the types of factors and result; and how many arrays were rounded meanwhile."""

    def __init__(self, patch):
        self.types, self.rounded = [], []
        multiply, rounded = fake_cupy.cuda.cublas.gemmEx, device.rounded

        def gemm(*given):
            self.types.append((given[8], given[11], given[15]))
            return multiply(*given)

        def round_(array, kind):
            self.rounded.append(array.size)
            return rounded(array, kind)

        patch.setattr(fake_cupy.cuda.cublas, "gemmEx", gemm)
        patch.setattr(sweeps, "rounded", round_)


def a_tape(cell, reverse, precision, shape=(5, 3, 4, 6)):
    """A tape whose slots are gradients, and what a pass forward begins with; all of random numbers."""
    (T, N, I, H), G, rng = shape, cell.gates, np.random.default_rng(1)

    def draw(*shape):
        return put(rng.standard_normal(shape).astype("f4"))

    weights = Weights(draw(G * H, I), draw(G * H, H), draw(G * H), draw(G * H), ())
    state = tuple(draw(N, H) for _ in range(cell.states))
    sweep = sweeps.begin(Job(cell, draw(T, N, I), weights, state, np.full(T, N), reverse, True, precision))
    sweep.tape.slots[...] = draw(*sweep.tape.slots.shape)
    sweep.tape.h[...] = draw(*sweep.tape.h.shape)
    return sweep


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("cell, reverse", [(LSTM_CELL, False), (GRU_CELL, True)], ids=["lstm", "gru reverse"])
def test_gradients_of_rounded_factors(monkeypatch, cell, reverse, steps):
    """In pieces of so many steps; every array is rounded once, and biases add up what was not rounded."""
    with interpreted("numpy"):
        sweep = a_tape(cell, reverse, "bfloat16")
        tape, (T, N, I), H, G = sweep.tape, sweep.tape.job.x.shape, sweep.tape.h.shape[2], cell.gates
        monkeypatch.setattr(sweeps, "PIECE_BYTES", steps * 2 * tape.slots[0].size + 1)
        grads = Weights(*(put(np.ones(part.shape, "f4")) for part in tape.job.weights[:4]), ())
        seen = Products(monkeypatch)
        dx = sweeps.weight_gradients(tape, tape.slots, grads)
        size = tape.slots.size + tape.job.x.size + T * N * H
        assert sum(seen.rounded) == size + tape.job.weights.weight_ih.size
        assert seen.types == [(14, 14, 0)] * (3 * -(-T // steps)), "cuBLAS has bfloat16 factors, and a float32 result"
        slots, x, h, w = (
            on_host(part.get(), "bfloat16") for part in (tape.slots, tape.job.x, tape.h, tape.job.weights.weight_ih)
        )
        exact = tape.slots.get().astype(float).reshape(T * N, -1, H).sum(0)
    gates, trace = slots.reshape(T * N, -1, H), cell.trace
    before, start = (h[1:] if reverse else h[:T]).reshape(T * N, H), trace.x_start
    expected = np.zeros((T * N, I))
    for found, order, first, other in (
        (grads.weight_hh, trace.r_order, 0, before),
        (grads.weight_ih, trace.x_order, start, x.reshape(T * N, I)),
    ):
        for k, gate in enumerate(order):
            want = 1 + gates[:, first + k].T @ other
            np.testing.assert_allclose(found.get()[gate * H : (gate + 1) * H], want, rtol=1e-5, atol=1e-5)
    for k, gate in enumerate(trace.x_order):
        expected += gates[:, start + k] @ w[gate * H : (gate + 1) * H]
    np.testing.assert_allclose(dx.get().reshape(T * N, I), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads.bias_ih.get().reshape(G, H)[list(trace.x_order)], 1 + exact[start : start + G], rtol=1e-5, atol=1e-5)  # fmt: skip


@pytest.mark.parametrize("kind, number", [("bfloat16", 14), ("float16", 2)])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
def test_x_is_projected_by_rounded_factors(monkeypatch, kind, number, reverse):
    with interpreted("numpy"):
        sweep = a_tape(GRU_CELL, reverse, kind)._replace(steps=2)
        seen = Products(monkeypatch)
        tape, starts = sweep.tape, []
        order, H = GRU_CELL.trace.x_order, tape.h.shape[2]
        weight = on_host(layout.ordered(tape.job.weights.weight_ih, order, H).get().copy(), kind)
        for t0, t1, slots in sweeps.pieces(sweep):
            starts.append(t0)
            want = on_host(tape.job.x[t0:t1].get(), kind) @ weight.T
            np.testing.assert_allclose(
                sweeps.x_slots(tape, slots).get().reshape(want.shape), want, rtol=1e-5, atol=1e-5
            )
        assert starts == ([4, 2, 0] if reverse else [0, 2, 4])
        assert seen.types == [(number, number, 0)] * 3
        assert sum(seen.rounded) == tape.job.x.size + tape.job.weights.weight_ih.size, "each array once"


@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
def test_gradients_too_small_for_float16_reach_the_weights(monkeypatch, precision):
    """1e-9 would be 0 in float16: these products keep float32 factors, in one piece."""
    with interpreted("numpy"):
        tape = a_tape(LSTM_CELL, False, precision).tape
        tape.slots.fill(1e-9)
        tape.h.fill(1)
        grads = Weights(*(put(np.zeros(part.shape, "f4")) for part in tape.job.weights[:4]), ())
        seen = Products(monkeypatch)
        sweeps.weight_gradients(tape, tape.slots, grads)
        np.testing.assert_allclose(grads.weight_hh.get(), 15e-9, rtol=1e-3)
        assert seen.types == [(0, 0, 0)] * 3 and not seen.rounded


def test_a_value_that_float16_does_not_have_is_told(monkeypatch):
    """It is inf in the product, as it is in what blocks of a kernel send each other: nothing looks right that is not."""
    with interpreted("step"):
        layer = gpurnn.RNN(2, 3, nonlinearity="relu", precision="float16", rng=1)
        x = np.ones((2, 1, 2), "f4")
        assert np.isfinite(layer(put(x))[0].get()).all()
        x[1, 0, 0] = 65520
        y = layer(put(x))[0].get()
        assert np.isfinite(y[0]).all() and not np.isfinite(y[1]).all()


def test_a_captured_step_rounds_what_it_is_given():
    """Rounded arrays are the graph's own memory: replays with other values are what a step by itself would be."""
    rng = np.random.default_rng(0)
    batches = [rng.standard_normal((3, 2, 4)).astype("f4") for _ in range(4)]

    def steps(layer, function):
        for x in batches:
            layer.zero_grad()
            function(put(x))
            yield layer.grads.flat.get()

    def work(layer):
        def step(x):
            y, _, backward = layer(x)
            backward(y)

        return step

    with interpreted("step"):
        one, other = (gpurnn.LSTM(4, 5, precision="bfloat16", rng=1) for _ in range(2))
        captured = gpurnn.captured(work(one))
        for got, want in zip(steps(one, captured), steps(other, work(other)), strict=True):
            np.testing.assert_array_equal(got, want)
        assert captured.reason is None and fake_cupy.counters.graphs
