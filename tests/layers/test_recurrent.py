"""Recurrent layers: names and shapes, states, the tape, dropout, conversions, and what is refused."""

import contextlib
import copy

import numpy as np
import pytest

from gpurnn import backend
from gpurnn.backend import to_numpy
from gpurnn.cells import Cell
from gpurnn.recurrent import GRU, LSTM, RNN, Recurrent

EXECUTORS = ["numpy"] if backend.name == "cuda" else ["numpy", "compiled"]
LAYERS = {"rnn": RNN, "lstm": LSTM, "gru": GRU}
T, N, I, H = 6, 3, 4, 17
EXACT = 1e-12  # float64: only the order of additions differs


@pytest.fixture(params=EXECUTORS)
def executor(request):
    return request.param


@pytest.fixture(params=LAYERS)
def make(request, executor):
    """Makes a float64 layer of each kind, on each executor."""

    def build(**options):
        return LAYERS[request.param](I, H, **{"dtype": "float64", "executor": executor, "rng": 2} | options)

    return build


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _parts(state):
    return state if isinstance(state, tuple) else (state,)


def _packed(states):
    return states[0] if len(states) == 1 else tuple(states)


def _states(layer, rows=N, seed=1):
    shape = (layer.num_layers * layer.directions, rows, layer.hidden_size)
    return _packed([_normal(*shape, seed=seed + s) for s in range(layer.cell.states)])


def _close(got, expected, tolerance=EXACT, name=""):
    np.testing.assert_allclose(to_numpy(got), to_numpy(expected), rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize(("kind", "gates"), [(RNN, 1), (GRU, 3), (LSTM, 4)])
def test_names_order_and_shapes_are_pytorchs(kind, gates):
    layer = kind(I, H, 2, bidirectional=True, trainable_h0=True)
    expected = {}
    for level, inputs in enumerate((I, 2 * H)):
        for suffix in ("", "_reverse"):
            expected |= {
                f"weight_ih_l{level}{suffix}": (gates * H, inputs),
                f"weight_hh_l{level}{suffix}": (gates * H, H),
                f"bias_ih_l{level}{suffix}": (gates * H,),
                f"bias_hh_l{level}{suffix}": (gates * H,),
            }
    expected |= {name: (4, H) for name in (("h_0", "c_0") if kind is LSTM else ("h_0",))}
    assert [(name, view.shape) for name, view in layer.params.items()] == list(expected.items())
    assert [(name, view.shape) for name, view in layer.grads.items()] == list(expected.items())
    without = kind(I, H, bias=False)
    assert list(without.params) == ["weight_ih_l0", "weight_hh_l0"]


def test_a_wrong_shape_is_said_in_letters():
    layer = LSTM(64, 128, 2, bidirectional=True)
    values = layer.state_dict()
    for name, form in [
        ("weight_hh_l0", r"\(4\*H, H\) = \(512, 128\), got \(128, 512\)"),
        ("weight_ih_l0", r"\(4\*H, I\) = \(512, 64\), got \(64, 512\)"),
        ("weight_ih_l1_reverse", r"\(4\*H, 2\*H\) = \(512, 256\), got \(256, 512\)"),
    ]:
        with pytest.raises(ValueError, match=f"^{name}: expected {form}$"):
            layer.load_state_dict(values | {name: values[name].T})


def test_gradient_buffers_keep_zeros_between_the_views(make):
    layer = make(bidirectional=True)
    _, _, backward = layer(_normal(T, N, I))
    backward(_normal(T, N, 2 * H), _states(layer))
    assert float((layer.grads.flat**2).sum()) == pytest.approx(sum(float((g**2).sum()) for g in layer.grads.values()))
    assert float(abs(layer.grads.flat).sum()) > 0


def test_trained_initial_states(make):
    layer = make(num_layers=2, bidirectional=True, trainable_h0=True)
    names = [f"{state}_0" for state in layer.cell.state_names]
    for k, name in enumerate(names):
        layer.params[name][...] = backend.asarray(_normal(4, H, seed=k), "float64", name)
    x, dy = _normal(T, N, I), _normal(T, N, 2 * H)
    y, final, backward = layer(x)
    _, dstate0 = backward(dy)
    trained = {name: to_numpy(layer.grads[name]).copy() for name in names}
    for name, dpart in zip(names, _parts(dstate0), strict=True):
        _close(trained[name], to_numpy(dpart).sum(1), name=name)
        assert trained[name].all()

    given = _packed([np.repeat(to_numpy(layer.params[name])[:, None], N, 1) for name in names])
    layer.zero_grad()
    y_given, final_given, backward = layer(x, given)
    _, dstate0_given = backward(dy)
    _close(y_given, y)
    for a, b in zip((*_parts(final_given), *_parts(dstate0_given)), (*_parts(final), *_parts(dstate0)), strict=True):
        _close(a, b)
    assert not any(layer.grads[name].any() for name in names)  # the state was given


def test_a_state_given_in_part_leaves_the_rest_trained(executor):
    layer = LSTM(I, H, trainable_h0=True, dtype="float64", executor=executor, rng=0)
    layer.params["c_0"][...] = 0.7
    x, h = _normal(T, N, I), _normal(1, N, H)
    y, _, backward = layer(x, (h, None))
    backward(_normal(T, N, H))
    _close(y, layer(x, (h, np.full((1, N, H), 0.7)), training=False)[0])
    assert layer.grads["c_0"].all()
    assert not layer.grads["h_0"].any()
    plain = LSTM(I, H, dtype="float64", executor=executor, rng=0)
    _close(plain(x, (h, None))[0], plain(x, (h, np.zeros((1, N, H))))[0], 0)


def test_missing_gradients_are_zeros(make):
    layer = make(num_layers=2)
    x, dy, dstate = _normal(T, N, I), _normal(T, N, H), _states(layer)
    _, _, backward = layer(x)
    zeros = _packed([np.zeros_like(part) for part in _parts(dstate)])

    def gradients(*arguments):
        layer.zero_grad()
        dx, dstate0 = backward(*arguments, keep=True)
        return np.concatenate([to_numpy(a).ravel() for a in (dx, *_parts(dstate0), layer.grads.flat)])

    _close(gradients(dy, None), gradients(dy, zeros), 0)
    _close(gradients(None, dstate), gradients(np.zeros_like(dy), dstate), 0)
    assert not gradients(None).any()
    if layer.cell.states == 2:
        _close(gradients(dy, (None, dstate[1])), gradients(dy, (zeros[0], dstate[1])), 0)
    _close(gradients(dy, dstate), gradients(dy, None) + gradients(None, dstate))  # backward is linear


def test_the_tape_serves_once_or_as_often_as_kept(make):
    layer = make(num_layers=2, bidirectional=True, dropout=0.3)
    dy, dstate = _normal(T, N, 2 * H), _states(layer)
    _, _, backward = layer(_normal(T, N, I), lengths=[4, 6, 0])
    results = []
    for keep in (True, True, False):
        layer.zero_grad()
        dx, dstate0 = backward(dy, dstate, keep=keep)
        results.append([to_numpy(a).copy() for a in (dx, *_parts(dstate0), layer.grads.flat)])
    for other in results[1:]:
        assert all((a == b).all() for a, b in zip(results[0], other, strict=True))
    with pytest.raises(RuntimeError, match=r"backward was called before and its tape is gone: .* keep=True"):
        backward(dy)
    assert (to_numpy(layer.grads.flat) == results[0][-1]).all()
    assert (dy == _normal(T, N, 2 * H)).all()  # what is given stays as it is
    assert all((a == b).all() for a, b in zip(_parts(dstate), _parts(_states(layer)), strict=True))


def test_a_refused_backward_may_be_called_again(make):
    layer = make()
    _, _, backward = layer(_normal(T, N, I))
    with pytest.raises(ValueError, match="dy: expected"):
        backward(np.zeros(3))
    assert not layer.grads.flat.any()
    backward(_normal(T, N, H))


def test_gradients_add_up_until_zero_grad(make):
    layer = make()
    for times in (1, 2, 3):
        _, _, backward = layer(_normal(T, N, I))
        backward(_normal(T, N, H))
        if times == 1:
            once = to_numpy(layer.grads.flat).copy()
        _close(layer.grads.flat, times * once, 1e-11)
    layer.zero_grad()
    assert not layer.grads.flat.any()


def test_two_calls_alive_at_once_do_not_meet(make):
    layer = make()
    x1, x2, dy = _normal(T, N, I), _normal(T, N, I, seed=5), _normal(T, N, H)
    alone = to_numpy(layer(x1)[2](dy)[0])
    _, _, first = layer(x1)
    _, _, second = layer(x2)
    second(dy)
    _close(first(dy)[0], alone, 0)


def test_without_training_the_same_and_no_tape(make):
    layer = make(num_layers=2, bidirectional=True)
    x, state = _normal(T, N, I), _states(layer)
    y, final, _ = layer(x, state)
    y_only, final_only, backward = layer(x, state, training=False)
    assert backward is None
    _close(y_only, y)
    for a, b in zip(_parts(final_only), _parts(final), strict=True):
        _close(a, b)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cut", [1, 4])
def test_a_carried_state_joins_two_halves(make, training, cut):
    layer = make(num_layers=2)
    x, state, dy, dstate = _normal(T, N, I), _states(layer), _normal(T, N, H), _states(layer, seed=7)
    y, final, backward = layer(x, state, training=training)
    y1, middle, backward1 = layer(x[:cut], state, training=training)
    y2, final2, backward2 = layer(x[cut:], middle, training=training)
    _close(np.concatenate([to_numpy(y1), to_numpy(y2)]), y)
    for a, b in zip(_parts(final2), _parts(final), strict=True):
        _close(a, b)
    if training:
        dx, dstate0 = backward(dy, dstate)
        whole = to_numpy(layer.grads.flat).copy()
        layer.zero_grad()
        dx2, dmiddle = backward2(dy[cut:], dstate)
        dx1, dstate1 = backward1(dy[:cut], dmiddle)
        _close(np.concatenate([to_numpy(dx1), to_numpy(dx2)]), dx)
        _close(layer.grads.flat, whole, 1e-11)
        for a, b in zip(_parts(dstate1), _parts(dstate0), strict=True):
            _close(a, b)


@pytest.mark.parametrize(("steps", "rows"), [(0, N), (T, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("lengths", [False, True])
def test_empty_and_smallest_batches(make, steps, rows, lengths):
    layer = make(num_layers=2, bidirectional=True, dropout=0.5, trainable_h0=True)
    for training in (True, False):
        state, dstate = _states(layer, rows), _states(layer, rows, seed=4)
        given = [steps] * rows if lengths else None
        y, final, backward = layer(np.ones((steps, rows, I)), state, lengths=given, training=training)
        assert y.shape == (steps, rows, 2 * H)
        if training:
            dx, dstate0 = backward(y, dstate)
            assert dx.shape == (steps, rows, I)
            assert [part.shape for part in _parts(dstate0)] == [(4, rows, H)] * layer.cell.states
        if not steps:
            for pair in (
                *zip(_parts(final), _parts(state), strict=True),
                *zip(_parts(dstate0), _parts(dstate), strict=True),
            ):
                _close(*pair, 0)
    if not steps or not rows:
        assert not layer.grads.flat.any()


def test_dropout_stands_between_layers_only(executor):
    """With an identity network every layer passes on what it gets: outputs show the masks."""
    init = {"weight_ih": "identity", "weight_hh": "zeros"}
    options = {"nonlinearity": "identity", "bias": False, "init": init, "dropout": 0.3, "executor": executor}
    x = np.ones((40, 20, 30), "float32")
    for num_layers, masks in ((1, 0), (2, 1), (3, 2)):
        with pytest.warns(UserWarning, match="means nothing") if num_layers == 1 else contextlib.nullcontext():
            layer = RNN(30, 30, num_layers, rng=4, **options)
        y = to_numpy(layer(x)[0])
        expected = {np.float32((1 / np.float32(0.7)) ** k) for k in (masks,)} | ({np.float32(0)} if masks else set())
        np.testing.assert_allclose(np.unique(y), sorted(expected), rtol=1e-6)
        assert (y == 0).mean() == pytest.approx(1 - 0.7**masks, abs=0.02)
        assert y.mean() == pytest.approx(1, abs=0.03)
    assert (to_numpy(RNN(30, 30, 3, rng=4, **options)(x, training=False)[0]) == 1).all()


def test_dropout_is_reproducible_by_its_seed(make):
    x = _normal(T, N, I)
    first, second, other = (make(num_layers=2, dropout=0.5, rng=seed) for seed in (2, 2, 3))
    other.load_state_dict(first.state_dict())
    runs = [[to_numpy(layer(x)[0]).copy() for _ in range(2)] for layer in (first, second, other)]
    assert (runs[0][0] == runs[1][0]).all()
    assert (runs[0][1] == runs[1][1]).all()
    assert (runs[0][0] != runs[0][1]).any()
    assert (runs[0][0] != runs[2][0]).any()


def test_training_outputs_cannot_be_spoilt(make):
    layer = make(num_layers=2)
    x, dy = _normal(T, N, I), _normal(T, N, H)
    expected = to_numpy(layer(x)[2](dy)[0])
    y, final, backward = layer(x)
    if backend.name == "numpy":
        with pytest.raises(ValueError, match="read-only"):
            y += 1
    for part in _parts(final):
        part[...] = np.nan  # the final state is the caller's own
    _close(backward(dy)[0], expected, 0)
    y, _, _ = layer(x, training=False)
    y += 1  # and so is y, without a tape


def test_initial_states_are_not_written_to(make):
    layer = make(num_layers=2, bidirectional=True)
    state = _states(layer)
    before = copy.deepcopy(state)
    for training in (True, False):
        layer(_normal(T, N, I), state, lengths=[2, 6, 0], training=training)
    assert all((a == b).all() for a, b in zip(_parts(state), _parts(before), strict=True))


def test_strides_and_kinds_of_input(make):
    """Transposed, reversed, broadcast and nested inputs are the same numbers."""
    layer = make()
    x, dy = np.round(_normal(T, N, I), 2), _normal(T, N, H)
    expected = [to_numpy(a).copy() for a in (layer(x)[0], layer(x)[2](dy)[0])]
    batch_first = np.ascontiguousarray(x.transpose(1, 0, 2)).transpose(1, 0, 2)
    backwards = np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1]
    strided = np.repeat(x, 2, axis=2)[..., ::2]
    for same_x in (batch_first, backwards, strided, x.tolist(), x.astype(">f8")):
        y, _, backward = layer(same_x)
        _close(y, expected[0])
        _close(backward(np.asfortranarray(dy))[0], expected[1])
        _close(layer(x)[2](np.repeat(dy, 2, axis=1)[:, ::2])[0], expected[1])
    one = np.ones(())
    _close(layer(x)[2](np.broadcast_to(one, dy.shape))[0], layer(x)[2](np.ones(dy.shape))[0], 0)


def test_input_is_converted_to_the_layers_dtype(executor):
    layer = LSTM(I, H, executor=executor)
    state = (np.zeros((1, N, H)), np.zeros((1, N, H), int))
    y, _, backward = layer(_normal(T, N, I), state)
    dx, dstate0 = backward(_normal(T, N, H))
    assert {str(a.dtype) for a in (y, dx, *dstate0)} == {"float32"}
    assert layer(np.ones((T, N, I), int))[0].dtype == np.float32
    assert layer(np.ones((T, N, I), np.float16))[0].dtype == np.float32


def test_executors_agree_on_flow_and_clipping(make):
    """flow: the L2 norms of dL/dstate_t over batch and units.  At the last step that is dy + dstate."""
    layer = make(num_layers=2, bidirectional=True, clip_in_time=0.05)
    x, dy, dstate = _normal(T, N, I), _normal(T, N, 2 * H), _states(layer)
    S, found = layer.cell.states, {}
    for name in EXECUTORS:
        layer.executor = name
        layer.zero_grad()
        flow = backend.xp.full((4, S, T), np.nan)
        _, dstate0 = layer(x)[2](dy, dstate, flow=flow)
        found[name] = np.concatenate([to_numpy(layer.grads.flat), to_numpy(flow).ravel()])
        _close(found[name], found["numpy"])
        assert all(abs(to_numpy(part)).max() == 0.05 for part in _parts(dstate0))
        flow = to_numpy(flow)
        last = [dy[T - 1, :, :H] + _parts(dstate)[0][2], dy[0, :, H:] + _parts(dstate)[0][3]]
        np.testing.assert_allclose([flow[2, 0, T - 1], flow[3, 0, 0]], [np.linalg.norm(part) for part in last])
    layer.zero_grad()
    layer.clip_in_time = 1e9
    layer(x)[2](dy, dstate)
    unlimited = to_numpy(layer.grads.flat).copy()
    layer.zero_grad()
    layer.clip_in_time = None
    layer(x)[2](dy, dstate)
    _close(layer.grads.flat, unlimited, 0)


def test_parameters_of_the_cell_may_have_any_name(executor):
    """A per-unit parameter is (H,), even where its name begins like a matrix's."""

    def forward(x, r, state, params):
        return (x[0] + r[1] + params[0] * state[0] + x[1],), ()

    def backward(dnext, saved, state, next_state, params):
        d = dnext[0]
        return (d, d), (0, d), (d * params[0],), (d * state[0],)

    cell = Cell("named", 2, 1, forward, backward, params=("weight_lag",))
    layer = Recurrent(cell, I, 5, 2, init={"weight_lag": "identity"}, executor=executor)
    assert layer.params["weight_lag_l1"].shape == (5,)
    layer(_normal(T, N, I))


def test_layers_can_be_copied(make):
    layer = make(num_layers=2, trainable_h0=True)
    twin = copy.deepcopy(layer)
    x = _normal(T, N, I)
    _close(twin(x)[0], layer(x)[0], 0)
    twin.params.flat[...] = 0
    assert layer.params["weight_hh_l0"].any()
    assert not twin.params["weight_hh_l0"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_size": 0}, "input_size: expected a whole number from 1, got 0"),
        ({"hidden_size": 2.5}, "hidden_size: expected a whole number from 1, got 2.5"),
        ({"num_layers": "2"}, "num_layers: expected a whole number from 1, got '2'"),
        ({"bias": None}, "bias: expected True or False, got None"),
        ({"bidirectional": 2}, "bidirectional: expected True or False, got 2"),
        ({"trainable_h0": "no"}, "trainable_h0: expected True or False, got 'no'"),
        ({"dropout": 1}, r"dropout: expected a finite number in \[0, 1\), got 1"),
        ({"dropout": "half"}, "dropout: expected a finite number in"),
        ({"clip_in_time": 0}, "clip_in_time: expected a finite number above 0, got 0"),
        ({"clip_in_time": float("nan")}, "clip_in_time: expected a finite number above 0, got nan"),
        ({"clip_in_time": "1"}, "clip_in_time: expected a finite number above 0, got '1'"),
        ({"dtype": "bfloat16"}, "dtype: expected float32 or float64, got 'bfloat16'"),
        ({"dtype": complex}, "dtype: expected float32 or float64, got complex128"),
        ({"executor": "gpu"}, "executor: expected one of compiled, numpy on the numpy backend, got 'gpu'"),
        ({"precision": "half"}, "precision: expected one of float32, tf32, bfloat16, float16, got 'half'"),
        ({"precision": "bfloat16", "dtype": "float64"}, "precision: expected float32 for a layer of float64"),
        ({"rng": -1}, "rng: expected a seed, a numpy.random.Generator or None, got -1"),
    ],
)
@pytest.mark.parametrize("kind", LAYERS.values())
def test_bad_options(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"input_size": 3, "hidden_size": 4} | options)


def test_options_of_one_kind():
    with pytest.raises(ValueError, match="nonlinearity: expected one of tanh, relu, sigmoid, identity, got 'gelu'"):
        RNN(3, 4, nonlinearity="gelu")
    with pytest.raises(ValueError, match=r"nonlinearity: expected one of .*, got None"):
        RNN(3, 4, nonlinearity=None)
    with pytest.raises(ValueError, match="forget_bias: expected a finite number, got None"):
        LSTM(3, 4, forget_bias=None)
    with pytest.raises(TypeError, match="proj_size"):
        GRU(3, 4, proj_size=2)
    with pytest.raises(TypeError, match=r"cell: expected a gpurnn\.Cell or one of rnn_tanh, .*, got type"):
        Recurrent(GRU, 3, 4)


def test_the_executor_is_looked_up_at_each_call(monkeypatch):
    layer = GRU(I, H)
    monkeypatch.setenv("GPURNN_EXECUTOR", "fast")
    with pytest.raises(ValueError, match="got 'fast'"):
        layer(np.zeros((T, N, I)))
    layer.executor = "numpy"
    layer(np.zeros((T, N, I)))


X = np.zeros((T, N, I))
STATE = np.zeros((1, N, H))
BAD_CALLS = [
    ("gru", (np.zeros((T, N, 5)),), ValueError, r"^x: expected \(T, N, I\) = \(T, N, 4\), got \(6, 3, 5\)$"),
    ("gru", (np.zeros((T, I)),), ValueError, r"^x: expected .* got \(6, 4\)$"),
    ("gru", (X * 1j,), TypeError, "^x: expected real numbers, .* complex128"),
    ("gru", (np.full((T, N, I), "1"),), TypeError, "^x: expected real numbers"),
    ("gru", (None,), TypeError, "^x: expected"),
    ("gru", ([[[1, 2], [3]]],), TypeError, "^x: expected an array of numbers, got list"),
    ("gru", (X, STATE[0]), ValueError, r"^state h: expected \(L\*D, N, H\) = \(1, 3, 17\), got \(3, 17\)$"),
    ("gru", (X, (STATE,)), ValueError, r"^state h: expected .*, got \(1, 1, 3, 17\)$"),
    ("gru", (X, STATE * 1j), TypeError, "^state h: expected real numbers"),
    ("lstm", (X, STATE), ValueError, r"^state: expected a tuple of 2 arrays \(h, c\) of shape .*, got ndarray$"),
    ("lstm", (X, (STATE,)), ValueError, "^state: expected a tuple of 2 arrays .*, got 1 of them$"),
    ("lstm", (X, (STATE, STATE[:, :2])), ValueError, r"^state c: expected .* = \(1, 3, 17\), got \(1, 2, 17\)$"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), BAD_CALLS)
def test_bad_calls(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        LAYERS[kind](I, H, executor="numpy")(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"dy": np.zeros((T, N, 2 * H))},
            ValueError,
            r"^dy: expected \(T, N, D\*H\) = \(6, 3, 17\), got \(6, 3, 34\)$",
        ),
        ({"dy": np.zeros((T, N, H)) * 1j}, TypeError, "^dy: expected real numbers"),
        ({"dy": None, "dstate": STATE}, ValueError, r"^dstate: expected a tuple of 2 arrays \(h, c\)"),
        ({"dy": None, "dstate": (None, STATE[0])}, ValueError, "^dstate c: expected"),
        (
            {"dy": None, "flow": np.zeros((1, 2, T), "float32")},
            ValueError,
            "^flow: expected a float64 array .* float32",
        ),
        (
            {"dy": None, "flow": np.zeros((1, 1, T))},
            ValueError,
            r"^flow: .* \(L\*D, S, T\) = \(1, 2, 6\), got .* \(1, 1, 6\)",
        ),
        ({"dy": None, "flow": [0.0]}, ValueError, "^flow: expected a float64 array .*, got list$"),
    ],
)
def test_bad_backward_calls(arguments, error, message):
    layer = LSTM(I, H, executor="numpy")
    _, _, backward = layer(X)
    with pytest.raises(error, match=message):
        backward(**arguments)
    assert not layer.grads.flat.any()


@pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("T", [0, 3])
def test_states_are_the_callers_own(executor, T):
    """A change to a state that was returned reaches neither the outputs, nor the tape, nor the state that was given."""
    layer, given = RNN(2, 3, executor=executor), np.ones((1, 2, 3), np.float32)
    y, final, backward = layer(np.ones((T, 2, 2), np.float32), given)
    before = y.copy()
    final[...] = np.nan
    _, dgiven = backward(np.ones_like(y), dstate := np.ones_like(given))
    dgiven[...] = np.nan
    assert (given == 1).all()
    assert (dstate == 1).all()
    np.testing.assert_array_equal(y, before)
    assert all(np.isfinite(grad).all() for grad in layer.grads.values())
