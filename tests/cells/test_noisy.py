"""Random numbers in cells: what they are, that every executor has the same, and what layers make of them."""

import copy
import os
import pickle
import subprocess
import sys
from statistics import NormalDist

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cells import CELLS, LSTM_CELL, RATE_CELLS, Cell, bernoulli, noisy, normal, rate, sigmoid, tanh
from gpurnn.cpu import costs
from gpurnn.executors import random
from gpurnn.kernels import deviates

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU test_noisy_kernels has the same numbers")

EXECUTORS = ("numpy", "compiled")
LENGTHS = [2, 5, 0, 4]


def raw(kind="normal", per="step", which=0, of=7):
    """A cell whose output is the `which`-th of its random numbers."""

    def forward(x, r, state, params):
        ask = normal if kind == "normal" else lambda per: bernoulli(0.3, per)
        return ([ask(per) for _ in range(of)][which],)

    return Cell("raw", 1, 1, forward)


def numbers(cell, T=5, N=4, H=37, calls=0, dtype="float32", lengths=None, **options):
    layer = gpurnn.Recurrent(cell, 2, H, dtype=dtype, rng=0, **options)
    layer.masks.calls = calls
    return layer(np.ones((T, N, 2), dtype), lengths=lengths)[0], layer


def by_the_book(layer, t, row, unit, call, at=0, kind="normal", per="step", which=0):
    """The same by the definition alone: one number."""
    low, high = random.words(layer.masks.seed, 2**64 - 1, 4 * at + 2)[-2:]
    place = (unit + (which // 4 << 28), row, 2**32 - 1 if per == "sequence" else t, call % 2**32)
    key = int(low), (int(high) + (call >> 32)) % 2**32
    word = random._words(*(np.array([number], np.uint32) for number in (*place, *key)))[which % 4][0]
    if kind == "bernoulli":
        return float(word < round(0.3 * 2**32))
    return NormalDist().inv_cdf((int(word) + 0.5) / 2**32)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("per", ["step", "sequence"])
@pytest.mark.parametrize("which", [0, 3, 5])
def test_a_number_is_a_function_of_its_place(executor, per, which):
    call = (3 << 32) + 9
    for kind, close in (("normal", 3e-6), ("bernoulli", 0)):
        asked = {"kind": kind, "per": per, "which": which}
        y, layer = numbers(raw(**asked), calls=call, executor=executor, bidirectional=True, num_layers=2)
        for t, row, unit in ((0, 0, 0), (4, 3, 36), (2, 1, 17)):
            for direction in (0, 1):  # of the last layer
                want = by_the_book(layer, t, row, unit, call, 2 + direction, **asked)
                assert y[t, row, 37 * direction + unit] == pytest.approx(want, abs=close)
        assert layer.masks.calls == call + 1


def test_normal_deviates_are_those_of_the_inverse_distribution():
    drawn = np.random.default_rng(0).integers(0, 1 << 32, 20_000, np.uint64)
    edges = [*range(8), *(2**31 + k for k in range(-4, 4)), *(2**32 - 1 - k for k in range(8))]
    word = np.array([*drawn, *edges, *(3 << k for k in range(30))], np.uint64).astype(np.uint32)
    found = deviates.normal(word, random.ON_ARRAYS)
    want = np.array([NormalDist().inv_cdf((int(each) + 0.5) / 2**32) for each in word])
    assert found.dtype == np.float32
    near = np.abs(want) < 5
    assert np.abs(found - want)[near].max() < 2e-6 and np.abs(found - want).max() < 3e-3
    np.testing.assert_array_equal(deviates.normal(~word, random.ON_ARRAYS), -found)


def test_moments_and_independence():
    y, _ = numbers(raw(of=1), T=40, N=50, H=256)
    other, _ = numbers(raw(of=2, which=1), T=40, N=50, H=256)
    later, _ = numbers(raw(of=1), T=40, N=50, H=256, calls=1)
    z = y.astype(float)
    count = z.size**0.5
    moments = [(z**k).mean() for k in (1, 2, 3, 4)]
    for found, want, width in zip(moments, (0, 1, 0, 3), (1, 2**0.5, 15**0.5, 96**0.5), strict=True):
        assert abs(found - want) < 4 * width / count
    pairs = (z[1:], z[:-1]), (z[:, 1:], z[:, :-1]), (z[..., 1:], z[..., :-1]), (z, other), (z, later)
    for a, b in pairs:
        assert abs((a * b).mean()) < 4 / a.size**0.5
    ones, _ = numbers(raw("bernoulli"), T=40, N=50, H=256)
    assert set(np.unique(ones)) == {0, 1} and abs(ones.mean(dtype=float) - 0.3) < 4 * 0.21**0.5 / count


def test_layers_directions_and_seeds_have_numbers_of_their_own():
    y, layer = numbers(raw(), bidirectional=True)
    assert (y[..., :37] != y[..., 37:]).all()
    assert len({layer.masks.draws()._replace(at=at).key for at in range(6)}) == 6
    other = gpurnn.Recurrent(raw(), 2, 37, rng=1)(np.ones((5, 4, 2)))[0]
    assert (other != y[..., :37]).all()


@pytest.mark.parametrize("kind", ["normal", "bernoulli"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("per", ["step", "sequence"])
def test_the_same_bits_everywhere(monkeypatch, kind, dtype, per):
    cell = raw(kind, per, which=5)
    first, _ = numbers(cell, dtype=dtype, executor="numpy", bidirectional=True)
    for executor in EXECUTORS:
        ragged, _ = numbers(cell, dtype=dtype, executor=executor, bidirectional=True, lengths=LENGTHS)
        valid = np.arange(5)[:, None] < np.array(LENGTHS)
        np.testing.assert_array_equal(ragged, first * valid[..., None], "a row's numbers are those of the caller's row")
        few, _ = numbers(cell, N=2, dtype=dtype, executor=executor, bidirectional=True)
        np.testing.assert_array_equal(few, first[:, :2])
    monkeypatch.setattr(costs, "LOOP_FLOPS", 0)
    for rows in (1, 1e18):  # threads share rows, units
        monkeypatch.setenv("GPURNN_NUM_THREADS", "3")
        for name in ("ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"):
            monkeypatch.setattr(costs, name, rows)
        y, _ = numbers(cell, dtype=dtype, executor="compiled", bidirectional=True)
        np.testing.assert_array_equal(y, first)
    wide, _ = numbers(cell, dtype="float64", executor="numpy", bidirectional=True)
    np.testing.assert_array_equal(wide, first, "float32 and float64 layers have the same numbers")


@pytest.mark.parametrize("width", ["16", "32"])
def test_vectors_of_any_width_have_the_same_bits(width):
    script = (
        "import numpy as np; from tests.cells.test_noisy import numbers, raw; import sys;"
        "sys.stdout.write(' '.join(numbers(raw(), dtype=d, executor='compiled')[0].tobytes().hex() for d in ('f4', 'f8')))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"GPURNN_VECTOR_BYTES": width},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    want = [numbers(raw(), dtype=dtype, executor="numpy")[0].tobytes().hex() for dtype in ("float32", "float64")]
    assert run.stdout.split() == want


def everything(x, r, state, params):
    """Random numbers that gradients read: of both kinds, for a step and a sequence, in products."""
    m, q = bernoulli(0.4), bernoulli(0.7, per="sequence")
    h = q * tanh(x[0] + r[0] + 0.3 * normal()) * (1 + 0.5 * normal(per="sequence") + 0.2 * normal())
    return (m * state[0] + (1 - m) * h * sigmoid(x[1] + m * r[1]),)


EVERYTHING = Cell("everything", 2, 1, everything)
OPTIONS = [{"zoneout": 0.3}, {"recurrent_dropout": 0.4}, {"noise": 0.5}]
ALL = {key: value for option in OPTIONS for key, value in option.items()}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_a_cell_with_all_of_them(executor):
    gpurnn.check_gradients(EVERYTHING, executor=executor)
    layer = gpurnn.Recurrent(EVERYTHING, 3, 4, 2, bidirectional=True, dropout=0.3, dtype="float64", rng=0)
    gpurnn.check_gradients(layer, executor=executor, lengths=[4, 2, 3])


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("lstm", option) for option in OPTIONS),
        *((name, ALL) for name in ("lstm", "gru", "mingru")),
        pytest.param("minlstm", ALL, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_of_layers_with_options(name, options, executor):
    layer = gpurnn.Recurrent(name, 3, 4, dtype="float64", rng=0, **options)
    gpurnn.check_gradients(layer, executor=executor, lengths=[4, 0, 3])


UNMARKED = [name for name, cell in CELLS.items() if not cell.trace.forward.candidates]


@pytest.mark.parametrize("name", UNMARKED)
def test_gradients_of_the_other_cells(name):
    layer = gpurnn.Recurrent(name, 3, 4, dtype="float64", rng=1, zoneout=0.3, noise=0.5)
    gpurnn.check_gradients(layer, executor="compiled" if name in ("rnn_tanh", "lru") else "numpy", T=3, N=2)
    with pytest.raises(ValueError, match=f"recurrent_dropout: expected 0 for {name}, which does not mark what it adds"):
        gpurnn.Recurrent(name, 3, 4, recurrent_dropout=0.1)


def test_a_backward_by_hand_stays_the_cells_own():
    """Its gradient is no true one: a straight-through step."""

    def forward(x, r, state, params):
        keep = bernoulli(0.5)
        drive = x[0] + r[0]
        return (keep * drive,), (keep,)

    def backward(dnext, saved, state, next_state, params):
        d = 7 * dnext[0] * saved[0]
        return (d,), (d,), (0,), ()

    cell = Cell("odd", 1, 1, forward, backward)
    for made in (cell, noisy(cell, zoneout=0.3, noise=0.2)):
        results = []
        for executor in EXECUTORS:
            layer = gpurnn.Recurrent(made, 3, 4, dtype="float64", rng=0, executor=executor)
            y, _, back = layer(np.ones((3, 2, 3)))
            results.append([y, back(np.ones_like(y))[0]])
        for a, b in zip(*results, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-14)
    with pytest.raises(ValueError, match="recurrent_dropout: expected 0 for odd"):
        noisy(cell, recurrent_dropout=0.2)


def test_the_same_numbers_in_every_backward_of_a_call():
    layer = gpurnn.LSTM(3, 8, rng=0, **ALL)
    y, _, backward = layer(np.ones((4, 2, 3)))
    layer(np.zeros((4, 2, 3)))
    first, _ = backward(np.ones_like(y), keep=True)
    np.testing.assert_array_equal(backward(np.ones_like(y))[0], first)


def lstm_step(layer, x, h, c, mask, keeps, noises):
    """An LSTM's step with its masks, as the papers have it."""
    p = {name: layer.params[f"{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
    a = x @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"]
    i, f, g, o = (part + noise for part, noise in zip(np.split(a, 4, 1), noises, strict=True))
    new_c = sigmoid(f) * c + sigmoid(i) * (mask * np.tanh(g))
    new_h = sigmoid(o) * np.tanh(new_c)
    return np.where(keeps[0], h, new_h), np.where(keeps[1], c, new_c)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_what_the_options_do_to_an_lstm(executor):
    """Numbers in the order in which the cell asks: noise of the gates, recurrent dropout, zoneout of h and of c."""
    layer = gpurnn.LSTM(
        3, 6, dtype="float64", rng=0, zoneout=(0.2, 0.5), recurrent_dropout=0.25, noise=0.3, executor=executor
    )
    assert layer.cell.name == "lstm with zoneout 0.2/0.5, recurrent_dropout 0.25, noise 0.3"
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    asked = sorted(layer.cell.trace.randoms, key=lambda each: each.number)
    assert [each.p for each in asked] == [0, 0, 0, 0, 0.75, 0.2, 0.5]
    y, (_, c_n), _ = layer(x)
    place = layer.masks.draws()._replace(call=0).numbers(4)
    h, c = np.zeros((2, 4, 6))
    for t in range(5):
        step = random.Step(place, t, 4, 6, np.float64)
        *noises, mask, keep_h, keep_c = (step[each] for each in asked)
        keeps = keep_h == 1, keep_c == 1
        h, c = lstm_step(layer, x[t], h, c, mask / 0.75, keeps, [0.3 * noise for noise in noises])
        np.testing.assert_allclose(y[t], h, atol=1e-14)
    np.testing.assert_allclose(c_n[0], c, atol=1e-14)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_without_training_numbers_are_their_means(executor):
    layer = gpurnn.LSTM(3, 6, dtype="float64", rng=0, executor=executor, **ALL)
    x = np.random.default_rng(0).standard_normal((5, 4, 3))
    y = layer(x, training=False)[0]
    h, c = np.zeros((2, 4, 6))
    for t in range(5):
        new_h, new_c = lstm_step(layer, x[t], h, c, 1, (False, False), (0,) * 4)
        h, c = 0.3 * h + 0.7 * new_h, 0.3 * c + 0.7 * new_c
        np.testing.assert_allclose(y[t], h, atol=1e-14)
    np.testing.assert_array_equal(layer(x, training=False)[0], y)
    assert layer.masks.calls == 0, "only calls that train count"


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_cell_whose_mean_reads_no_matrix(executor):
    cell = Cell("multiplied", 1, 1, lambda x, r, s, p: (x[0] + r[0] * normal(),))
    layer = gpurnn.Recurrent(cell, 2, 3, dtype="float64", rng=0, executor=executor)
    layer.params["bias_hh_l0"][...] = 5
    x = np.ones((3, 2, 2))
    np.testing.assert_allclose(layer(x, training=False)[0], x @ layer.params["weight_ih_l0"].T)
    gpurnn.check_gradients(layer)


def test_with_0_the_cell_is_the_plain_one_and_bad_values_are_told():
    assert gpurnn.LSTM(2, 3, zoneout=0, recurrent_dropout=0.0, noise=0).cell is LSTM_CELL
    assert gpurnn.LSTM(2, 3, zoneout={"c": 0.5}).cell == gpurnn.LSTM(2, 3, zoneout=(0, 0.5)).cell
    for options, message in (
        ({"zoneout": 1.0}, r"zoneout: expected a finite number in \[0, 1\), got 1.0"),
        ({"zoneout": (0.1, -1)}, r"zoneout of c: expected a finite number in \[0, 1\), got -1"),
        ({"zoneout": (0.1,)}, r"zoneout: expected one number, or one for each of h, c, got \(0.1,\)"),
        ({"zoneout": {"x": 0.1}}, "zoneout: expected states of lstm among h, c, got 'x'"),
        ({"recurrent_dropout": 1}, "recurrent_dropout: expected a finite number"),
        ({"noise": -0.1}, "noise: expected a finite number from 0, got -0.1"),
        ({"noise": "loud"}, "noise: expected a finite number from 0, got 'loud'"),
    ):
        with pytest.raises(ValueError, match=message):
            gpurnn.LSTM(2, 3, **options)


def test_where_numbers_may_be_asked_for():
    with pytest.raises(RuntimeError, match="normal: expected to be called by a cell's forward"):
        normal()
    for ask, message in (
        (lambda: bernoulli(1.5), r"p: expected a finite number in \[0, 1\], got 1.5"),
        (lambda: bernoulli(0.5, per="row"), "per: expected one of step, sequence, got 'row'"),
    ):
        with pytest.raises(ValueError, match=message):
            Cell("bad", 1, 1, lambda x, r, s, p, ask=ask: (x[0] * ask(),))
    sure = Cell("sure", 1, 1, lambda x, r, s, p: (x[0] * bernoulli(1) + r[0] * bernoulli(0),))
    assert not sure.random and not sure.recurrent


def test_a_text_tells_cells_apart():
    def made(p, per="step"):
        return Cell("one", 1, 1, lambda x, r, s, p_: (x[0] * bernoulli(p, per),))

    assert made(0.3) == made(0.3) and len({made(0.3), made(0.31), made(0.3, "sequence")}) == 3


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_go_on_alike_and_apart(clone):
    layer, x = gpurnn.GRU(3, 5, 2, rng=1, dropout=0.5, **ALL), np.ones((4, 2, 3))
    layer(x)
    other = clone(layer)
    assert other.cell == layer.cell and other.cell.name == layer.cell.name
    expected = layer(x)[0]
    np.testing.assert_array_equal(other(x)[0], expected)
    assert (layer(x)[0] != expected).any()
    resumed = gpurnn.GRU(3, 5, 2, rng=1, dropout=0.5, **ALL)  # parameters, and how many calls there were
    resumed.load_state_dict(layer.state_dict())
    resumed.masks.calls = layer.masks.calls
    np.testing.assert_array_equal(resumed(x)[0], layer(x)[0])


@pytest.mark.parametrize("name", RATE_CELLS)
def test_a_leaky_rate_network(name):
    cell = rate(0.5, 0.1, name)
    layer = gpurnn.Recurrent(cell, 3, 6, dtype="float64", rng=0)
    gpurnn.check_gradients(layer)
    layer.masks.calls = 0
    x = np.random.default_rng(0).standard_normal((4, 2, 3))
    y, _, _ = layer(x)
    (asked,) = cell.trace.randoms
    place, h = layer.masks.draws()._replace(call=0).numbers(2), np.zeros((2, 6))
    p = {each.removesuffix("_l0"): value for each, value in layer.params.items()}
    for t in range(4):
        xi = random.Step(place, t, 2, 6, np.float64)[asked]
        a = x[t] @ p["weight_ih"].T + p["bias_ih"] + h @ p["weight_hh"].T + p["bias_hh"] + 0.1 * (2 / 0.5) ** 0.5 * xi
        h = 0.5 * h + 0.5 * (np.tanh(a) if name == "tanh" else np.maximum(a, 0))
        np.testing.assert_allclose(y[t], h, atol=1e-14)
    shipped = gpurnn.Recurrent(f"rate_{name}", 3, 6, noise=0.2)
    assert shipped.cell.name == f"rate_{name} with noise 0.2" and not RATE_CELLS[name].random
    assert pickle.loads(pickle.dumps(cell)) == cell
    for options in ({"alpha": 0}, {"alpha": 1.1}, {"noise": -1}, {"nonlinearity": "sine"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            rate(**options)


def test_diagnosis_takes_the_means():
    layer = gpurnn.GRU(2, 4, dtype="float64", rng=0, **ALL)
    cell, x = layer.cell, np.ones((5, 2, 2))
    first, second = (gpurnn.diagnose.gradient_flow(layer, x).norms for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert layer.masks.calls == 0 and layer.cell is cell
