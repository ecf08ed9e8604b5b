"""Lengths: what stands behind a row's end is not read, not written, and costs nobody else a bit."""

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.backend import to_numpy
from gpurnn.executors.random import Masks
from gpurnn.recurrent import GRU, LSTM, RNN
from gpurnn.sequence import prepare_lengths

EXECUTORS = ["numpy"] if backend.name == "cuda" else ["numpy", "compiled"]
LAYERS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
T, N, I, H = 7, 5, 3, 11
LENGTHS = np.array([3, 0, 7, 1, 5])
ROUNDING = 1e-12  # float64: only the order of additions differs


@pytest.fixture(params=EXECUTORS)
def executor(request):
    return request.param


@pytest.fixture(params=LAYERS)
def layer(request, executor):
    layer = LAYERS[request.param](I, H, 2, bidirectional=True, dtype="float64", executor=executor, rng=3)
    layer.params.flat[...] += 0.1  # biases that are not 0 would show at padding
    return layer


def _data(layer, steps=T, rows=N):
    rng = np.random.default_rng(8)
    shape = (layer.num_layers * layer.directions, rows, H)
    states = [rng.standard_normal(shape) for _ in range(2 * layer.cell.states)]
    half = layer.cell.states
    x = rng.standard_normal((steps, rows, I))
    return x, _packed(states[:half]), rng.standard_normal((steps, rows, layer.directions * H)), _packed(states[half:])


def _packed(states):
    return states[0] if len(states) == 1 else tuple(states)


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _pass(layer, x, state, dy, dstate, lengths):
    """Every result of a forward and a backward pass, by name."""
    layer.zero_grad()
    y, final, backward = layer(x, state, lengths=lengths)
    dx, dinitial = backward(dy, dstate)
    named = {"y": y, "dx": dx, **layer.grads}
    named |= {f"final{s}": part for s, part in enumerate(_parts(final))}
    named |= {f"dinitial{s}": part for s, part in enumerate(_parts(dinitial))}
    return {name: to_numpy(value).copy() for name, value in named.items()}


def _equal(got, expected, tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=0, atol=tolerance, err_msg=name)


def test_a_batch_is_its_rows_each_at_its_own_length(layer):
    x, state, dy, dstate = _data(layer)
    whole = _pass(layer, x, state, dy, dstate, LENGTHS)
    sums = {name: np.zeros_like(whole[name]) for name in layer.grads}
    for n, length in enumerate(LENGTHS):
        row = slice(n, n + 1)
        alone = _pass(
            layer, x[:length, row], _packed([part[:, row] for part in _parts(state)]), dy[:length, row],
            _packed([part[:, row] for part in _parts(dstate)]), None,
        )  # fmt: skip
        for name, value in alone.items():
            if name in sums:
                sums[name] += value
                continue
            cut = whole[name][:length, row] if name in ("y", "dx") else whole[name][:, row]
            np.testing.assert_allclose(cut, value, rtol=0, atol=ROUNDING, err_msg=f"{name} of row {n}")
    for name, value in sums.items():
        np.testing.assert_allclose(whole[name], value, rtol=0, atol=20 * ROUNDING, err_msg=name)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nothing_behind_a_rows_end_is_read(layer, poison):
    x, state, dy, dstate = _data(layer)
    clean = _pass(layer, x, state, dy, dstate, LENGTHS)
    padding = np.arange(T)[:, None] >= LENGTHS
    x[padding], dy[padding] = poison, poison
    _equal(_pass(layer, x, state, dy, dstate, LENGTHS), clean, 0)
    y, final, _ = layer(x, state, lengths=LENGTHS, training=False)
    np.testing.assert_allclose(to_numpy(y), clean["y"], rtol=0, atol=ROUNDING)
    assert all(np.isfinite(to_numpy(part)).all() for part in _parts(final))
    assert not clean["y"][padding].any()
    assert not clean["dx"][padding].any()


def test_an_empty_row_hands_its_state_and_its_gradient_through(layer):
    x, state, dy, dstate = _data(layer)
    result = _pass(layer, x, state, dy, dstate, LENGTHS)
    for s, (given, dgiven) in enumerate(zip(_parts(state), _parts(dstate), strict=True)):
        assert (result[f"final{s}"][:, 1] == given[:, 1]).all()
        assert (result[f"dinitial{s}"][:, 1] == dgiven[:, 1]).all()


def test_full_lengths_are_the_plain_path(layer):
    data = _data(layer)
    _equal(_pass(layer, *data, [T] * N), _pass(layer, *data, None), 0)


def test_dropout_is_by_place_in_the_callers_order(executor):
    """Two layers at once are one, a mask, and the other: to the bit."""
    options = {"bidirectional": True, "dtype": "float64", "executor": executor}
    both = LSTM(I, H, 2, dropout=0.4, rng=5, **options)
    lower, upper = LSTM(I, H, **options), LSTM(2 * H, H, **options)
    for level, layer in enumerate((lower, upper)):
        for name in layer.params:
            layer.params[name][...] = both.params[name.replace("_l0", f"_l{level}")]
    masks = Masks(np.random.default_rng(0))
    masks.seed = both.masks.seed
    x, state, dy, dstate = _data(both)
    got = _pass(both, x, state, dy, dstate, LENGTHS)
    below, above = slice(0, 2), slice(2, 4)
    middle, _, lower_back = lower(x, tuple(part[below] for part in state), lengths=LENGTHS)
    dropped, mask = masks(middle, 0.4)
    y, _, upper_back = upper(dropped, tuple(part[above] for part in state), lengths=LENGTHS)
    dmiddle, dinitial = upper_back(dy, tuple(part[above] for part in dstate))
    dx, _ = lower_back(mask(dmiddle), tuple(part[below] for part in dstate))
    found = {"y": (got["y"], y), "dx": (got["dx"], dx), "dh_0": (got["dinitial0"][above], dinitial[0])}
    for level, layer in enumerate((lower, upper)):
        found |= {name: (got[name.replace("_l0", f"_l{level}")], layer.grads[name]) for name in layer.grads}
    for name, (value, expected) in found.items():
        np.testing.assert_array_equal(value, to_numpy(expected), err_msg=name)


@pytest.mark.parametrize("steps", [0, T])
def test_only_empty_rows(layer, steps):
    x, state, dy, dstate = _data(layer, steps)
    result = _pass(layer, x * np.nan, state, dy * np.nan, dstate, [0] * N)
    assert result["y"].shape == (steps, N, 2 * H)
    assert not any(result[name].any() for name in ("y", "dx", *layer.grads))
    for s, (given, dgiven) in enumerate(zip(_parts(state), _parts(dstate), strict=True)):
        assert (result[f"final{s}"] == given).all()
        assert (result[f"dinitial{s}"] == dgiven).all()


def test_trained_initial_states_learn_from_empty_rows_too(executor):
    layer = GRU(I, H, trainable_h0=True, dtype="float64", executor=executor)
    dstate = np.ones((1, N, H))
    _, _, backward = layer(np.ones((T, N, I)), lengths=[0] * N)
    backward(None, dstate)
    assert (to_numpy(layer.grads["h_0"]) == N).all()


@pytest.mark.parametrize("kind", [list, tuple, np.uint8, np.int32, np.int64, "uint64"])
def test_kinds_of_whole_numbers(executor, kind):
    layer = GRU(I, H, dtype="float64", executor=executor, rng=0)
    x = np.random.default_rng(0).standard_normal((T, N, I))
    lengths = kind(LENGTHS.tolist()) if kind in (list, tuple) else LENGTHS.astype(kind)
    y, _, _ = layer(x, lengths=lengths)
    assert (to_numpy(y) == to_numpy(layer(x, lengths=LENGTHS)[0])).all()


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([1, 2], r"lengths: expected 5 whole numbers, got int64 of shape \(2,\)"),
        ([[1, 2, 3, 4, 5]], r"of shape \(1, 5\)"),
        (3, r"of shape \(\)"),
        ([1.0, 2.0, 3.0, 4.0, 5.0], r"expected 5 whole numbers, got float64 of shape \(5,\)"),
        ([True] * 5, "expected 5 whole numbers, got bool"),
        ([1, 2, -1, 4, 5], "lengths: expected values from 0 to T = 7, got -1 to 5"),
        ([1, 2, 8, 4, 5], "lengths: expected values from 0 to T = 7, got 1 to 8"),
    ],
)
def test_bad_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        GRU(I, H, executor="numpy")(np.zeros((T, N, I)), lengths=lengths)


def test_prepared():
    prepared = prepare_lengths(LENGTHS, T, N)
    assert to_numpy(prepared.order).tolist() == [2, 4, 0, 3, 1]
    assert to_numpy(prepared.order)[to_numpy(prepared.inverse)].tolist() == list(range(N))
    assert prepared.rows.tolist() == [4, 3, 3, 2, 2, 1, 1]
    assert to_numpy(prepared.padding)[..., 0].sum(0).tolist() == (T - LENGTHS).tolist()
    assert prepare_lengths([], 4, 0) is None


@pytest.mark.parametrize("junk", [np.nan, np.inf])
def test_the_state_of_an_empty_row_goes_past_everything_else(layer, junk):
    x, state, dy, dstate = _data(layer)
    expected = _pass(layer, x, state, dy, dstate, LENGTHS)
    for part in (*_parts(state), *_parts(dstate)):
        part[:, 1] = junk
    got = _pass(layer, x, state, dy, dstate, LENGTHS)
    for name in list(expected):
        if name.startswith(("final", "dinitial")):
            assert not np.isfinite(got[name][:, 1]).any(), name
            expected[name] = np.delete(expected[name], 1, axis=1)
            got[name] = np.delete(got[name], 1, axis=1)
    _equal(got, expected, 0.0)
