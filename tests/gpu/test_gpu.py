"""On a GPU: what the interpreter proves on small shapes, on the chip and on large ones, and what only a device can show.

Every result of a layer is compared with the NumPy executor in float64 on the host.  A run builds some hundred kernels, up
to four seconds each; GPURNN_CACHE_DIR=folder keeps them from run to run, `python -m bench build --tests` builds them ahead.
"""

import contextlib
import itertools
import threading

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.app import checkpoint
from gpurnn.cells import CELLS, GRU_CELL, LSTM_CELL
from gpurnn.cli import main
from tests.stand_in import size

pytestmark = pytest.mark.gpu
chip = pytest.mark.chip("large")

# Largest error, relative to a tensor's largest entry, over up to 64 steps.  Over T of them sqrt(T / 64) times as much in
# the dtypes, where it comes from long sums; the others' comes from rounding factors, whose sums are of float32.
TOLERANCES = {"float64": 1e-10, "float32": 2e-5, "tf32": 5e-3, "float16": 5e-3, "bfloat16": 2e-2}
KINKED = ("rnn_relu", "every_function")  # bfloat16's rounding alone crosses their kinks, where gradients jump
KINDS = [
    *itertools.product(("step", "resident", "persistent"), ("float32", "bfloat16")),
    *itertools.product(("persistent",), ("float16", "tf32")),
]
by_kind = pytest.mark.parametrize(("executor", "precision"), KINDS, ids=["-".join(kind) for kind in KINDS])
RAGGED = [7, 0, 3, 7, 1]


@contextlib.contextmanager
def on_the_host():
    """gpurnn as on a machine without a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "name", "numpy")
        patch.setattr(backend, "xp", np)
        yield


def results(cell, shape, *, dtype="float32", lengths=None, given=True, flow=False, keep=False, **options):
    """Every tensor of a training and an inference pass of a layer, by name, on the host.

    The same numbers for every dtype.  keep: backward twice.  flow: the norms of dL/dstate are asked for.
    """
    T, N, I, H = shape
    rng, xp = np.random.default_rng(0), backend.xp
    layer = gpurnn.Recurrent(cell, I, H, dtype=dtype, rng=1, **options)
    LD, width = layer.num_layers * layer.directions, layer.directions * H

    def draw(*size, scale=1.0):
        return xp.asarray((scale * rng.standard_normal(size)).astype("float32").astype(dtype))

    for name, value in layer.params.items():
        value[...] = draw(*value.shape, scale=0.7 * value.shape[1] ** -0.5 if "weight" in name else 0.4)
    x, dy = draw(T, N, I), draw(T, N, width)
    state, dstate = (tuple(draw(LD, N, H, scale=0.5) for _ in range(cell.states)) for _ in range(2))
    if cell.states == 1:
        state, dstate = state[0], dstate[0]
    if lengths is not None:  # what stands behind a row's end is nobody's business
        behind = xp.asarray(np.arange(T)[:, None] >= np.asarray(lengths))
        x[behind] = dy[behind] = np.nan
    state = state if given else None
    y, final, backward = layer(x, state, lengths=lengths)
    norms = xp.zeros((LD, cell.states, T)) if flow else None
    found = {"y": y, "final": final}
    for call in range(2 if keep else 1):
        found[f"back {call}"] = backward(dy, dstate, keep=keep and call == 0, flow=norms)
    found["inference"] = layer(x, state, lengths=lengths, training=False)[:2]
    found |= {f"d{name}": value for name, value in layer.grads.items()} | ({"flow": norms} if flow else {})
    return dict(named(found))


def named(found, prefix=""):
    """(name, NumPy array) of every array in nested dicts and tuples."""
    if isinstance(found, dict | tuple):
        for key, value in found.items() if isinstance(found, dict) else enumerate(found):
            yield from named(value, f"{prefix} {key}".strip())
    else:
        yield prefix, backend.to_numpy(found)


def compare(cell, shape, executor, precision="float32", dtype="float32", **options):
    with on_the_host():
        expected = results(cell, shape, dtype="float64", executor="numpy", **options)
    got = results(cell, shape, dtype=dtype, executor=executor, precision=precision, **options)
    assert got.keys() == expected.keys()
    growth = 1 if precision != "float32" else max(1, shape[0] / 64) ** 0.5
    tolerance = TOLERANCES["float64" if dtype == "float64" else precision] * growth
    for name, reference in expected.items():
        assert got[name].shape == reference.shape and got[name].dtype == ("float64" if name == "flow" else dtype), name
        if reference.size:
            error = np.abs(got[name] - reference).max() / max(np.abs(reference).max(), 1e-30)
            assert error <= tolerance, f"{name}: off by {error:.1e} of its largest entry, {tolerance:.1e} is allowed"


def skip_where_it_does_not_fit(cell, shape, executor, precision):
    if executor != "step":
        from gpurnn import executors

        engine = executors.executor(executor)
        if engine.cycles(cell, shape[3], shape[1], np.dtype("float32"), precision) is None:
            pytest.skip(f"{cell.name} with {shape[3]} units does not fit this GPU's SMs in {precision}: {executor}")


# Results


@by_kind
def test_every_cell(any_cell, executor, precision):
    if executor != "step" and not any_cell.recurrent:
        pytest.skip("it has no matrix to keep on chip")
    if precision != "float32" and any_cell.name in KINKED:
        pytest.skip("its kinks are crossed by rounding alone")
    compare(any_cell, (7, 5, 4, 33), executor, precision, bidirectional=True, lengths=RAGGED)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        pytest.param((3, 300, 1, 1), marks=chip),
        (20, 1, 3, 7),
        pytest.param((9, 131, 5, 17), marks=chip),
        pytest.param((5, 200, 40, 64), marks=chip),
        pytest.param((12, 600, 3, 33), marks=chip),
        pytest.param((6, 33, 129, 128), marks=chip),
    ],
    ids=str,
)
@by_kind
def test_sizes(shape, executor, precision):
    """One row and one unit; more rows than SMs, twice and four times as many; the largest LSTM that one SM holds."""
    skip_where_it_does_not_fit(LSTM_CELL, shape, executor, precision)
    compare(LSTM_CELL, shape, executor, precision)


@pytest.mark.parametrize(
    ("cell", "H"), [("rnn_tanh", 256), ("rnn_tanh", 255), ("gru", 128), ("gru", 100)], ids=lambda value: str(value)
)
@by_kind
def test_weights_that_fill_an_sm(cell, H, executor, precision):
    shape = (size(10, 2), 9, 3, H)
    skip_where_it_does_not_fit(CELLS[cell], shape, executor, precision)
    compare(CELLS[cell], shape, executor, precision)


@pytest.mark.parametrize("cell", [LSTM_CELL, GRU_CELL], ids=lambda cell: cell.name)
@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@by_kind
def test_two_thousand_steps(cell, ragged, executor, precision):
    T = size(2000, 20)
    compare(cell, (T, 5, 4, 33), executor, precision, lengths=[T, 0, 1, T // 2 + 1, T // 30] if ragged else None)


@by_kind
def test_layers_directions_clipping_and_trained_states(executor, precision):
    common = {"num_layers": 2, "bidirectional": True, "lengths": RAGGED, "clip_in_time": 0.3}
    compare(LSTM_CELL, (7, 5, 4, 33), executor, precision, trainable_h0=True, given=False, **common)
    compare(GRU_CELL, (7, 5, 4, 33), executor, precision, bias=False, keep=True, **common)


@by_kind
def test_a_tape_serves_twice_and_shows_the_flow(executor, precision):
    for options in ({"keep": True}, {"flow": True}, {"flow": True, "keep": True, "lengths": RAGGED}):
        compare(LSTM_CELL, (7, 5, 4, 33), executor, precision, **options)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_relu", "peephole_lstm"])
def test_step_in_float64(cell, pytestconfig):
    cell = (CELLS | pytestconfig.user_cells)[cell]
    compare(cell, (40, 5, 4, 33), "step", dtype="float64", bidirectional=True, flow=True)
    compare(cell, (7, 5, 4, 33), "step", dtype="float64", lengths=RAGGED, clip_in_time=0.3, keep=True)


@pytest.mark.parametrize("H", [512, pytest.param(1024, marks=chip)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_step_where_products_are_large(H, precision):
    compare(LSTM_CELL, (size(8, 2), 64, 100, H), "step", precision)


@pytest.mark.parametrize("shape", [(0, 3, 2, 5), (3, 0, 2, 5), (0, 0, 2, 5)], ids=str)
@by_kind
def test_nothing_to_do(shape, executor, precision):
    compare(LSTM_CELL, shape, executor, precision)


@by_kind
def test_inference_in_pieces(executor, precision, monkeypatch):
    monkeypatch.setattr("gpurnn.cuda.sweeps.INFERENCE_BYTES", 3 * 5 * 4 * 33 * 4)
    compare(LSTM_CELL, (7, 5, 4, 33), executor, precision, bidirectional=True, lengths=RAGGED)


# What a device does


@by_kind
def test_the_same_bits_twice(executor, precision):
    for shape, lengths in (((size(50, 6), size(300, 9), 5, 33), None), ((7, 5, 4, 33), RAGGED)):
        first, second = (
            results(LSTM_CELL, shape, lengths=lengths, executor=executor, precision=precision) for _ in range(2)
        )
        assert all(first[name].tobytes() == second[name].tobytes() for name in first)


@by_kind
def test_another_stream(executor, precision):
    """Work goes to CuPy's current stream: a long product before it on that stream alone would be overtaken elsewhere."""
    cupy = backend.xp
    expected = results(LSTM_CELL, (7, 5, 4, 33), executor=executor, precision=precision)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        wide = cupy.ones((size(4096, 64),) * 2, np.float32)
        for _ in range(20):
            wide = wide @ wide * np.float32(1e-4)
        got = results(LSTM_CELL, (7, 5, 4, 33), executor=executor, precision=precision)
    stream.synchronize()
    assert all(got[name].tobytes() == expected[name].tobytes() for name in expected)


@pytest.mark.parametrize("executor", ["step", "resident", "persistent"])
def test_a_new_thread(executor):
    """It has no context of its own; twice, for the second finds everything loaded and memory in the pool."""
    shape, found = (7, 5, 4, 33), []
    expected = results(LSTM_CELL, shape, executor=executor)
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(results(LSTM_CELL, shape, executor=executor)))
        thread.start()
        thread.join(300)
    assert len(found) == 2
    assert all(got[name].tobytes() == expected[name].tobytes() for got in found for name in expected)


def test_two_threads_on_streams_of_their_own():
    shapes, found = [(40, 64, 5, 33), (50, 32, 5, 48)], {}
    shapes = size(shapes, [(3, 5, 5, 33), (3, 4, 5, 48)])
    expected = [results(LSTM_CELL, shape) for shape in shapes]
    barrier = threading.Barrier(2)

    def work(which):
        with backend.xp.cuda.Stream(non_blocking=True):
            barrier.wait(60)
            found[which] = [results(LSTM_CELL, shapes[which]) for _ in range(size(10, 2))]

    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for which in range(2):
        for got in found[which]:
            assert all(got[name].tobytes() == expected[which][name].tobytes() for name in got)


def test_where_no_cluster_runs_blocks_exchange_through_memory(monkeypatch):
    """As on a slice of a GPU."""
    from gpurnn.cuda import device, on_chip, passes, tuning
    from gpurnn.kernels.launch import DoesNotFit

    real = device._launcher

    def launcher(recipe, number):
        made = real(recipe, number)
        if made.kernel.cluster > 1:
            raise DoesNotFit("no cluster fits")
        return made

    def forget():
        for cached in (on_chip._choice, on_chip._load, passes.fitted):
            cached.cache_clear()

    shape = size((20, 16, 5, 200), (2, 4, 5, 48))
    monkeypatch.setattr(device, "_launcher", launcher)
    monkeypatch.setattr(tuning, "_too_many", {})
    forget()
    try:
        compare(LSTM_CELL, shape, "persistent")
        choice = on_chip.PERSISTENT.choice(LSTM_CELL, shape[3], shape[1], "float32", False)
        assert choice.exchange != "clustered"
    finally:
        forget()


def forward_launch(N, T, H):
    """(begin, launch, outputs): the resident forward kernel in inference on buffers of its own; `launch()` does no more."""
    from gpurnn.cuda import on_chip, sweeps
    from gpurnn.cuda.passes import Pass
    from gpurnn.executors.contract import Job, Weights
    from gpurnn.kernels import persistent

    cupy, rng = backend.xp, np.random.default_rng(0)

    def draw(*shape):
        return cupy.asarray(rng.standard_normal(shape).astype("float32") * np.float32(0.3))

    weights = Weights(draw(4 * H, 3), draw(4 * H, H), draw(4 * H), draw(4 * H), ())
    state = draw(N, H), draw(N, H)
    sweep = sweeps.begin(Job(LSTM_CELL, draw(T, N, 3), weights, state, np.full(T, N), False, False, "float32"))
    tape, carried = sweep.tape, cupy.stack(state)
    final = carried.copy()
    choice = on_chip.RESIDENT.choice(LSTM_CELL, H, N, "float32", False)
    run = Pass.prepare(choice, persistent.forward, tape, sweep.weight_hh, False, training=False)
    ((_, _, slots),) = sweeps.pieces(sweep)
    arrays = slots, sweep.bias, tape.h, tape.rest, sweep.params, carried, final, tape.lengths, None

    def begin():
        final[...] = np.nan
        tape.h[1:] = np.nan

    def launch():
        run(arrays, [0, 0], (T, 0), (N, 0, tape.rest.strides[0] // 4))

    return begin, launch, (tape.h, final)


def test_a_captured_graph():
    cupy = backend.xp
    begin, launch, outputs = forward_launch(N=5, T=9, H=33)
    begin()
    launch()
    expected = [cupy.asnumpy(array) for array in outputs]
    assert all(np.isfinite(array).all() for array in expected)
    begin()
    cupy.cuda.Device().synchronize()
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    with stream, cupy.cuda.using_allocator(pool.malloc):  # what is captured keeps its memory
        stream.begin_capture()
        launch()
        graph = stream.end_capture()
    stream.synchronize()
    assert cupy.isnan(outputs[0][1:]).all(), "a captured launch does not run"
    for _ in range(2):
        begin()
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        for array, wanted in zip(outputs, expected, strict=True):
            assert cupy.asnumpy(array).tobytes() == wanted.tobytes()


@pytest.mark.chip("its memory has an end")
def test_out_of_memory_is_an_error_and_the_next_call_works():
    cupy = backend.xp
    pool = cupy.get_default_memory_pool()
    small, large = (cupy.ones((T, 64, 1), np.float32) for T in (10, 20_000))
    layers = [gpurnn.LSTM(1, 128, rng=1, executor=executor) for executor in ("step", "resident", "persistent")]
    for layer in layers:
        expected = cupy.asnumpy(layer(small)[0])
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + (64 << 20))
        try:
            with pytest.raises(cupy.cuda.memory.OutOfMemoryError):
                layer(large)
        finally:
            pool.set_limit(size=0)
        y, _, backward = layer(small)
        assert cupy.asnumpy(y).tobytes() == expected.tobytes()
        assert cupy.isfinite(backward(cupy.ones_like(y))[0]).all()


@pytest.mark.chip("the driver says how many run")
def test_blocks_that_wait_for_each_other_are_never_too_many():
    """Refused before the launch: the arguments here point nowhere."""
    from gpurnn.cuda import device
    from gpurnn.kernels import build, step
    from gpurnn.kernels.launch import Launcher

    kernel = build.build(build.recipe(step.forward, LSTM_CELL.trace, dtype="float32"), device.chip().capability)
    launcher = Launcher(kernel._replace(cooperative=True))
    most = launcher.resident_blocks
    assert most >= device.chip().multiprocessors and most % device.chip().multiprocessors == 0
    with pytest.raises(RuntimeError, match=f"{most + 1} blocks wait for each other, but only {most} run at once"):
        launcher(most + 1, *[0] * kernel.arguments)
    backend.synchronize()


@pytest.mark.chip("the driver says what a block may have")
def test_shared_memory_beyond_what_a_block_may_have():
    from gpurnn.cuda import device
    from gpurnn.kernels import build, step
    from gpurnn.kernels.launch import Launcher

    chip = device.chip()
    kernel = build.build(build.recipe(step.forward, LSTM_CELL.trace, dtype="float32"), chip.capability)
    assert Launcher(kernel._replace(shared=chip.shared)).resident_blocks == chip.multiprocessors
    with pytest.raises(RuntimeError, match=f"may not have {chip.shared + 1} bytes of shared memory"):
        Launcher(kernel._replace(shared=chip.shared + 1))


def test_the_choice_and_its_limits():
    from gpurnn.cuda import step
    from gpurnn.cuda.on_chip import PERSISTENT, RESIDENT
    from gpurnn.executors import choose

    float32 = np.dtype("float32")
    assert choose(None, LSTM_CELL, 64, 16, float32, "float32") is RESIDENT
    assert choose(None, LSTM_CELL, 1024, 16, float32, "bfloat16") is PERSISTENT
    assert choose(None, LSTM_CELL, 4096, 64, float32, "float32") is step
    assert choose(None, LSTM_CELL, 64, 16, np.dtype("float64"), "float32") is step
    x = backend.xp.zeros((2, 1, 3), np.float32)
    with pytest.raises(ValueError, match="lstm with 1024 units does not fit one SM in bfloat16"):
        gpurnn.LSTM(3, 1024, executor="resident", precision="bfloat16", rng=1)(x)
    with pytest.raises(ValueError, match="computes in float32, got float64"):
        gpurnn.LSTM(3, 4, executor="resident", dtype="float64", rng=1)(x)


# Groups of blocks


@pytest.mark.parametrize("kind", ["clustered", "flagged", "counted"])
@pytest.mark.parametrize(
    ("cell", "shape", "precision"),
    [
        ("lstm", size((40, 64, 8, 512), (4, 10, 8, 64)), "bfloat16"),
        ("gru", size((40, 33, 8, 500), (4, 5, 8, 50)), "float32"),
        ("rnn_tanh", size((200, 20, 3, 300), (9, 10, 3, 60)), "tf32"),
        pytest.param("lstm", (70, 300, 3, 96), "float32", marks=chip),  # more groups than run at once
    ],
)
def test_every_exchange(kind, cell, shape, precision, monkeypatch):
    """The cheapest plan of each kind, on lengths that make groups end at different steps, twice the same bits."""
    from gpurnn.cuda import device, on_chip, tuning

    chip = device.chip()
    if kind == "clustered" and chip.capability < (9, 0):
        pytest.skip("clusters came with sm_90")

    def choice(self, cell, H, N, precision, transposed):
        question = tuning.Question(cell, H, N, precision, transposed, False)
        return next(choice for choice in tuning.choices(question, chip) if choice.exchange == kind)

    monkeypatch.setattr(on_chip.OnChip, "choice", choice)
    lengths = (np.arange(shape[1]) * 7 % (shape[0] + 1)).tolist()
    compare(CELLS[cell], shape, "persistent", precision, lengths=lengths)
    found = [results(CELLS[cell], shape, executor="persistent", precision=precision, lengths=lengths) for _ in range(2)]
    assert all(found[0][name].tobytes() == found[1][name].tobytes() for name in found[0])


@pytest.mark.parametrize("executor", ["resident", "persistent"])
def test_a_hundred_thousand_steps(executor):
    T, N, H = size(100_000, 30), 3, 32
    x = backend.xp.asarray(np.random.default_rng(0).standard_normal((T, N, 1)).astype("float32"))
    layer = gpurnn.GRU(1, H, rng=1, executor=executor)
    y, _, backward = layer(x)
    dx, _ = backward(backend.xp.ones_like(y) / T)
    assert backend.xp.isfinite(y).all() and backend.xp.isfinite(dx).all()
    short, _, _ = gpurnn.GRU(1, H, rng=1, executor="step")(x[:300])
    np.testing.assert_allclose(backend.to_numpy(y[:300]), backend.to_numpy(short), rtol=1e-4, atol=1e-5)


# The command line


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the quick brown fox, die schnelle Füchsin.\n" * 60, "utf-8")
    return path


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_a_run_resumes_bit_for_bit(cell, text, tmp_path, capsys):
    pytest.importorskip("safetensors", reason="runs are kept in safetensors files")
    options = ["--cell", cell, "--hidden-size", str(size(40, 9)), "--batch", "3", "--k1", "6", "--validation", "0.2"]
    train = ["train", "--data", str(text), *options, "--num-layers", "2", "--dropout", "0.1", "--schedule", "constant"]
    most, part = str(size(30, 5)), str(size(17, 3))
    assert main([*train, "--steps", most, "--run", str(tmp_path / "whole")]) == 0
    assert main([*train, "--steps", part, "--run", str(tmp_path / "parts")]) == 0
    assert main(["train", "--resume", str(tmp_path / "parts"), "--steps", most]) == 0
    assert "backend cuda" in " ".join(capsys.readouterr().out.split())
    whole, parts = (checkpoint.load(tmp_path / name / checkpoint.MODEL) for name in ("whole", "parts"))
    for group in ("tensors", "optimizer", "state"):
        expected, got = getattr(whole, group), getattr(parts, group)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name].tobytes() == value.tobytes(), name
    sample = ["sample", str(tmp_path / "whole"), "--prompt", "the ", "--length", "40", "--seed", "1"]
    assert main(sample) == 0
    first = capsys.readouterr().out
    assert main(sample) == 0
    assert capsys.readouterr().out == first and first.startswith("the ") and len(first) > 40


# Tuning


def test_tuning_keeps_the_fastest(tmp_path, monkeypatch):
    from gpurnn.cuda import device, tuning

    monkeypatch.setenv("GPURNN_CACHE_DIR", str(tmp_path))
    for name, of_stand_in in (("MOST_STEPS", 1), ("CANDIDATES", 3), ("REPEATS", 1)):
        monkeypatch.setattr(tuning, name, size(getattr(tuning, name), of_stand_in))
    for transposed in (False, True):
        question = tuning.Question(LSTM_CELL, size(200, 40), 16, "bfloat16", transposed, False)
        measured = tuning.tune(question, device.chip())
        times = [microseconds for _, microseconds in measured]
        assert len(measured) >= 3 and times[0] > 0 and times == sorted(times)
        assert tuning.choice(question, device.chip()) == measured[0][0]
