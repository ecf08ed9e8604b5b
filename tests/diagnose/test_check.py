"""Every gradient of every cell against central differences in float64, on both executors."""

import itertools

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.cells import CELLS, Cell, sigmoid, tanh
from gpurnn.diagnose.check import GradientError, check_gradients
from gpurnn.recurrent import GRU, LSTM, Recurrent

EXECUTORS = ["numpy"] if backend.name == "cuda" else ["numpy", "compiled"]
T, RAGGED = 3, [2, 0, 3]  # steps; lengths, unsorted and one of them 0


def _peephole_forward(x, r, state, params):
    """The output gate looks at c, the input gate at the previous c: two per-unit parameters, two split paths."""
    i, f = sigmoid(x[0] + r[0] + params[0] * state[1]), sigmoid(x[1] + r[1])
    g = tanh(x[2] + r[2])
    c = f * state[1] + i * g
    o = sigmoid(x[3] + r[3] + params[1] * c)
    return (o * tanh(c), c), (i, f, g, o)


def _peephole_backward(dnext, saved, state, next_state, params):
    i, f, g, o = saved
    dh, dc = dnext
    c = next_state[1]
    da_o = dh * tanh(c) * o * (1 - o)
    dc = dc + dh * o * (1 - tanh(c) * tanh(c)) + da_o * params[1]
    da_i = dc * g * i * (1 - i)
    da = (da_i, dc * state[1] * f * (1 - f), dc * i * (1 - g * g), da_o)
    return da, da, (0, dc * f + da_i * params[0]), (da_i * state[1], da_o * c)


PEEPHOLE = Cell("peephole", 4, 2, _peephole_forward, _peephole_backward, params=("w_ci", "w_co"))
SUBJECTS = {**CELLS, "peephole_by_hand": PEEPHOLE}


def _layer(cell, H=3, **options):
    """A layer whose biases, per-unit parameters and trained states are not 0, so that no gradient hides behind one."""
    rng = np.random.default_rng(5)
    layer = Recurrent(cell, 2, H, dtype="float64", rng=rng, **options)
    layer.params.flat[...] += backend.asarray(rng.normal(0, 0.3, layer.params.flat.size), "float64", "noise")
    return layer


COMPACT = {
    "plain": {},
    "given state, two layers, no bias, lengths": {"num_layers": 2, "bias": False, "lengths": RAGGED},
    "trained state, both directions, dropout, lengths": {
        "H": 2,
        "num_layers": 2,
        "bidirectional": True,
        "trainable_h0": True,
        "dropout": 0.4,
        "lengths": RAGGED,
    },
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("options", COMPACT.values(), ids=COMPACT.keys())
@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients(name, options, executor):
    options = dict(options)
    lengths = options.pop("lengths", None)
    layer = _layer(SUBJECTS[name], **options)
    errors = check_gradients(layer, T=T, lengths=lengths, executor=executor)
    states = {f"{state}_0" for state in layer.cell.state_names}
    assert set(errors) == {"x", *layer.params} | states


GRID = list(itertools.product((1, 2, 3), (False, True), (False, True), (False, True), (None, RAGGED, [0, 0, 0])))


@pytest.mark.slow
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("num_layers", "bidirectional", "bias", "trainable_h0", "lengths"), GRID)
@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_of_the_full_grid(name, num_layers, bidirectional, bias, trainable_h0, lengths, executor):
    dropout = 0.4 if num_layers > 1 else 0.0
    layer = _layer(
        SUBJECTS[name], 2, num_layers=num_layers, bidirectional=bidirectional, bias=bias, trainable_h0=trainable_h0,
        dropout=dropout,
    )  # fmt: skip
    check_gradients(layer, T=T, lengths=lengths, executor=executor)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("steps", "rows", "hidden"), [(1, 1, 1), (1, 3, 17), (9, 1, 2), (2, 7, 5)])
def test_gradients_of_odd_sizes(steps, rows, hidden, executor):
    check_gradients(_layer(CELLS["gru"], hidden), T=steps, N=rows, executor=executor)
    check_gradients(_layer(CELLS["lstm"], hidden), T=steps, N=rows, executor=executor)


def _wrong(change):
    """The GRU with one part of its backward's answer changed."""
    forward, right = CELLS["gru"].functions()

    def backward(*args):
        return change(*right(*args))

    return Cell("wrong", 3, 1, forward, backward)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda dx, dr, ds, dp: ((dx[0] * 1.001, *dx[1:]), dr, ds, dp), {"x", "weight_ih_l0", "bias_ih_l0"}),
        (lambda dx, dr, ds, dp: (dx, (*dr[:2], dr[2] * 1.001), ds, dp), {"weight_hh_l0", "bias_hh_l0", "h_0"}),
        (lambda dx, dr, ds, dp: (dx, dr, (0,), dp), {"h_0"}),
        (lambda dx, dr, ds, dp: ((dx[0] * np.nan, *dx[1:]), dr, ds, dp), {"x", "weight_ih_l0", "bias_ih_l0"}),
    ],
    ids=["dx", "dr", "dstate", "NaN"],
)
def test_a_wrong_backward_is_named(change, named):
    with pytest.raises(GradientError, match="wrong: gradients differ from central differences") as caught:
        check_gradients(_wrong(change), executor="numpy")
    assert all(name in str(caught.value) for name in named)


def test_an_error_is_a_part_of_the_largest_gradient():
    small = Cell(
        "small", 1, 1, lambda x, r, s, p: ((1e-5 * x[0],), ()), lambda d, *_: ((1.01e-5 * d[0],), (0,), (0,), ())
    )
    assert check_gradients(small, tolerance=1, executor="numpy")["x"] == pytest.approx(0.01, rel=1e-3)


def test_a_cell_is_checked_in_a_layer_of_its_own():
    assert max(check_gradients(LSTM(2, 2).cell, executor="numpy").values()) < 1e-6


def test_the_layer_comes_back_as_it_was():
    layer = GRU(2, 3, 2, dropout=0.5, dtype="float64", rng=1)
    layer.grads.flat[...] = 7
    layer.masks.calls, before = 4, layer.state_dict()
    for lengths in (None, [1, 2]):  # the second has too few lengths for N = 3
        if lengths is None:
            check_gradients(layer, T=2, executor="numpy")
        else:
            with pytest.raises(ValueError, match="lengths: expected 3 whole numbers"):
                check_gradients(layer, T=2, lengths=lengths, executor="numpy")
        assert all((backend.to_numpy(layer.params[name]) == value).all() for name, value in before.items())
        assert layer.masks.calls == 4
        assert (layer.grads.flat == 7).all()
        assert layer.executor is None


def test_bad_subjects():
    with pytest.raises(ValueError, match="layer: expected dtype float64, which central differences need, got float32"):
        check_gradients(LSTM(2, 2))
    with pytest.raises(TypeError, match=r"cell: expected a gpurnn\.Cell or one of rnn_tanh, .*, got 'nosuch'"):
        check_gradients("nosuch")


def test_the_batch_first():
    layer = LSTM(2, 3, batch_first=True, dtype="float64", rng=0)
    resets = np.zeros((2, 4), bool)
    resets[1, 2] = True
    assert max(check_gradients(layer, T=4, N=2, lengths=[4, 3], resets=resets).values()) < 1e-6
