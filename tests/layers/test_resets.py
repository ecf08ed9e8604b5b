"""Resets inside a sequence, against the segments run by themselves; and all states of all steps."""

import itertools

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cells import CELLS
from gpurnn.cpu import costs, memory, sharing
from tests.conftest import USER_CELLS

ON_CPU = pytest.mark.skipif(backend.name == "cuda", reason="the executors of a CPU")
CELL_NAMES = ("rnn_tanh", "lstm", "gru", "sru", "lru", "indrnn")
T, N, I, H = 9, 5, 3, 6
LENGTHS = [9, 7, 4, 0, 9]


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def flags(T=T, N=N, seed=1, share=0.3):
    """Rows that begin again often, at their first and their last step too, and one that never does."""
    found = np.random.default_rng(seed).random((T, N)) < share
    found[:, -1] = False
    if T > 1 and N > 1:
        found[0, 0] = found[-1, 1] = found[0, 1] = True
    return found


def layer_of(cell, executor="numpy", dtype="float64", hidden=H, **options):
    layer = gpurnn.Recurrent(cell, I, hidden, executor=executor, dtype=dtype, rng=0, **options)
    rng = np.random.default_rng(2)
    for value in layer.params.values():
        value += backend.asarray(rng.normal(0, 0.4, value.shape), layer.dtype, "noise")
    return layer


def tuples(state):
    return state if isinstance(state, tuple) else (state,)


def in_one(layer, resets, lengths=None, given=True, all_states=False, keep=False):
    """Every tensor of a training pass, by name."""
    D, L, S, H = layer.directions, layer.num_layers, layer.cell.states, layer.hidden_size
    put = lambda array: backend.asarray(array, layer.dtype, "array")  # noqa: E731
    steps, rows = resets.shape
    x, dy = put(drawn(steps, rows, I)), [put(drawn(steps, rows, D * H, seed=3 + s)) for s in range(S)]
    state, dstate = ([put(drawn(L * D, rows, H, seed=seed + s)) for s in range(S)] for seed in (10, 20))
    packed = lambda parts: parts[0] if S == 1 else tuple(parts)  # noqa: E731
    layer.zero_grad()
    options = {"lengths": lengths, "resets": resets, "all_states": all_states}
    y, final, backward = layer(x, packed(state) if given else None, **options)
    for call in range(2 if keep else 1):
        layer.zero_grad()
        dx, dinitial = backward(packed(dy) if all_states else dy[0], packed(dstate), keep=keep and call == 0)
    found = {"y": y} if not all_states else {f"y {s}": part for s, part in enumerate(tuples(y))}
    found |= {"dx": dx} | {f"d{name}": value.copy() for name, value in layer.grads.items()}
    found |= {f"final {s}": part for s, part in enumerate(tuples(final))}
    found |= {f"dinitial {s}": part for s, part in enumerate(tuples(dinitial))}
    again = layer(x, packed(state) if given else None, training=False, **options)
    found |= {f"inference {s}": part for s, part in enumerate((*tuples(again[0]), *tuples(again[1])))}
    return {name: backend.to_numpy(value).copy() for name, value in found.items()}


def by_segments(layer, resets, lengths=None, given=True, all_states=False):
    """The same, each segment of each row a call of its own, layer by layer, and no resets anywhere."""
    cell, D, L, S = layer.cell, layer.directions, layer.num_layers, layer.cell.states
    x, dys = drawn(T, N, I), [drawn(T, N, D * H, seed=3 + s) for s in range(S)]
    state, dstate = ([drawn(L * D, N, H, seed=seed + s) for s in range(S)] for seed in (10, 20))
    lengths = [T] * N if lengths is None else lengths
    h0 = [layer.params[f"{n}_0"] if layer.trainable_h0 else np.zeros((L * D, H)) for n in cell.state_names]
    found = {f"d{name}": np.zeros_like(value) for name, value in layer.params.items()}
    final, dinitial = [np.zeros_like(p) for p in state], [np.zeros_like(p) for p in state]
    everything, level, backs = [], x, []
    for place in range(L):
        outputs = [np.zeros((T, N, D * H)) for _ in range(S)]
        calls = []
        for n, direction in np.ndindex(N, D):
            at = place * D + direction
            end = lengths[n]
            cuts = [0, *(t for t in range(1, end) if resets[t, n]), end]
            pieces = [(a, b) for a, b in itertools.pairwise(cuts) if a < b]
            if not pieces:
                for s in range(S):
                    final[s][at, n] = state[s][at, n] if given else h0[s][at]
            for a, b in pieces:
                begins = a == 0 if direction == 0 else b == end
                ends = b == end if direction == 0 else a == 0
                own = begins and given and not (direction == 0 and resets[0, n])
                one = gpurnn.Recurrent(cell, level.shape[2], H, executor="numpy", dtype="float64")
                suffix = f"_l{place}" + ("_reverse" if direction else "")
                for name in one.params:
                    one.params[name][...] = layer.params[name.replace("_l0", suffix)]
                start = tuple((state if own else h0)[s][at, n] if own else h0[s][at] for s in range(S))
                piece = level[a:b, n : n + 1][:: -1 if direction else 1]
                packed = tuple(part[None, None] for part in start)
                y, last, back = one(piece, packed if S > 1 else packed[0], all_states=True)
                for out, part in zip(outputs, tuples(y), strict=True):
                    out[a:b, n, direction * H : (direction + 1) * H] = part[:: -1 if direction else 1, 0]
                if ends:
                    for whole, part in zip(final, tuples(last), strict=True):
                        whole[at, n] = part[0, 0]
                calls.append((one, back, (a, b, n, direction, at), own, ends, suffix, begins))
        backs.append((calls, level.shape[2]))
        level, everything = outputs[0], outputs
    above = [dys[0], *(dys[1:] if all_states else [None] * (S - 1))]
    for place in reversed(range(L)):
        calls, width = backs[place]
        below = np.zeros((T, N, width))
        for one, back, (a, b, n, direction, at), own, ends, suffix, begins in calls:
            cut = slice(direction * H, (direction + 1) * H)
            step = -1 if direction else 1
            dy = tuple(None if part is None else part[a:b, n : n + 1, cut][::step] for part in above)
            dlast = tuple(part[at, n][None, None] if ends else np.zeros((1, 1, H)) for part in dstate)
            dx, dstart = back(dy if S > 1 else dy[0], dlast if S > 1 else dlast[0])
            below[a:b, n] += dx[::step, 0]
            for name, value in one.grads.items():
                found[f"d{name.replace('_l0', suffix)}"] += value
            for s, part in enumerate(tuples(dstart)):
                reset = direction == 0 and a == 0 and resets[0, n]
                if begins and not reset:
                    dinitial[s][at, n] = part[0, 0]
                if layer.trainable_h0 and not own:
                    found[f"d{cell.state_names[s]}_0"][at] += part[0, 0]
        for n, direction in np.ndindex(N, D):
            if lengths[n] == 0:
                for s in range(S):
                    at = place * D + direction
                    dinitial[s][at, n] = dstate[s][at, n]
                    if layer.trainable_h0 and not given:
                        found[f"d{cell.state_names[s]}_0"][at] += dstate[s][at, n]
        above = [below, *[None] * (S - 1)]
    found |= {f"y {s}": part for s, part in enumerate(everything)} if all_states else {"y": everything[0]}
    found |= {"dx": below} | {f"final {s}": part for s, part in enumerate(final)}
    return found | {f"dinitial {s}": part for s, part in enumerate(dinitial)}


def agree(got, expected, tolerance=1e-12):
    for name, reference in expected.items():
        assert got[name].shape == reference.shape, name
        error = np.abs(got[name] - reference).max() / max(1.0, np.abs(reference).max())
        assert error <= tolerance, f"{name}: off by {error:.1e}"


OPTIONS = [
    {},
    {"trainable_h0": True},
    {"trainable_h0": True, "given": False, "lengths": LENGTHS, "bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "trainable_h0": True, "lengths": LENGTHS},
    {"all_states": True, "bidirectional": True, "lengths": LENGTHS},
]


def split(options):
    own = {name: options[name] for name in ("given", "lengths", "all_states") if name in options}
    return own, {name: value for name, value in options.items() if name not in own}


@ON_CPU
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_a_row_is_its_segments(cell, options):
    own, others = split(options)
    layer = layer_of(CELLS[cell], **others)
    agree(in_one(layer, flags(), **own), by_segments(layer, flags(), **own))


@ON_CPU
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("cell", CELL_NAMES)
def test_the_compiled_loop_agrees(cell, options):
    own, others = split(options)
    for dtype, tolerance in (("float64", 1e-12), ("float32", 2e-5)):
        got, expected = (
            in_one(layer_of(CELLS[cell], executor, kind, **others), flags(), keep=True, **own)
            for executor, kind in (("compiled", dtype), ("numpy", "float64"))
        )
        agree(got, expected, tolerance)


@ON_CPU
@pytest.mark.parametrize("way", ["rows", "units", "one"])
@pytest.mark.parametrize("cell", ["lstm", "lru"])
def test_threads_share_rows_or_units(monkeypatch, way, cell):
    """Chunks of few steps; memory that nobody wrote is NaN."""
    monkeypatch.setenv("GPURNN_NUM_THREADS", "1" if way == "one" else "3")
    costs_of = {"LOOP_FLOPS": 0, "UNITS_FLOPS": 1, "PROJECTED_ROWS": 10}
    costs_of |= dict.fromkeys(("ENOUGH_ROWS", "ENOUGH_ROWS_CACHED"), 1e18 if way == "units" else 1)
    for name, value in costs_of.items():
        monkeypatch.setattr(costs, name, value)
    empty = lambda shape, dtype: np.full(shape, 255 if dtype == np.uint8 else np.nan, dtype)  # noqa: E731
    monkeypatch.setattr(memory, "empty", empty)
    plan = sharing.plan_loop(CELLS[cell], np.full(T, N), T, N, I, 70, np.dtype("float64"))
    assert (len(plan.shares) > 1, plan.by_units) == {
        "rows": (True, False),
        "units": (True, True),
        "one": (False, False),
    }[way]
    for own in ({}, {"lengths": LENGTHS, "all_states": True}):
        got, expected = (
            in_one(
                layer_of(CELLS[cell], executor, hidden=70, trainable_h0=True, clip_in_time=0.4),
                flags(),
                keep=True,
                **own,
            )
            for executor in ("compiled", "numpy")
        )
        agree(got, expected, 1e-12)


@ON_CPU
def test_more_states_than_two():
    layers = [layer_of(USER_CELLS["three_states"], executor, trainable_h0=True) for executor in ("compiled", "numpy")]
    agree(*(in_one(layer, flags(), all_states=True) for layer in layers))


def interpreted_agrees(cell, executor, options, tolerance=1e-5, dtype="float32"):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.interpreted import Interpreted, interpreted

    own, others = split(options)
    expected = in_one(layer_of(cell, **others | {"precision": "float32"}), flags(), keep=True, **own)
    before = Interpreted.launches
    with interpreted():
        got = in_one(layer_of(cell, executor, dtype, **others), flags(), keep=True, **own)
    assert Interpreted.launches > before, "nothing ran in the interpreter"
    agree(got, expected, tolerance)


KERNELS = [
    {"trainable_h0": True, "bidirectional": True, "lengths": LENGTHS, "clip_in_time": 0.3},
    {"all_states": True, "bidirectional": True},
]


@ON_CPU
@pytest.mark.parametrize("options", KERNELS, ids=str)
@pytest.mark.parametrize(
    ("cell", "executor"),
    [("lstm", "step"), ("gru", "step"), ("sru", "step"), ("lru", "step"), ("lstm", "resident"), ("gru", "persistent")],
)
def test_on_interpreted_kernels(cell, executor, options):
    interpreted_agrees(CELLS[cell], executor, options)


@ON_CPU
@pytest.mark.parametrize("precision", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_in_groups_of_blocks(precision):
    """Units of a row are several blocks'; a state that is set back goes to all of them."""
    options = {"hidden": 33, "trainable_h0": True, "precision": precision}
    interpreted_agrees(CELLS["gru"], "persistent", options, 1e-5 if precision == "float32" else 4e-2)


# Training loops


def model_of(executor=None, dtype="float64", **options):
    recurrent = gpurnn.LSTM(I, H, rng=0, dtype=dtype, executor=executor, trainable_h0=True, **options)
    return gpurnn.SequenceModel(None, recurrent, gpurnn.Linear(H, 2, rng=1, dtype=dtype))


def summed(out, target):
    return ((out - target) ** 2).sum() / 2, out - target


@ON_CPU
@pytest.mark.parametrize("k1", [1, 4, 7, 20])
@pytest.mark.parametrize("share", [0.0, 0.2])
def test_windows_add_up_to_the_whole(k1, share):
    steps = 20
    model, x, target = model_of(), drawn(steps, N, I), drawn(steps, N, 2, seed=1)
    resets = flags(steps, share=share) & (share > 0)
    whole, _ = gpurnn.full_bptt(model, x, target, summed, resets=resets)
    expected = model.grads.flat.copy()
    for again in (False, True):
        model.zero_grad()
        bptt, total = gpurnn.TruncatedBPTT(model, summed, k1, k2=40), 0
        for t in range(0, steps, k1):
            cut = slice(t, t + k1)
            window = resets[cut].copy()
            total += bptt.step(x[cut].copy(), target[cut], resets=window if window.any() or not again else None)
            window[...] = True  # what is kept is a copy
            if again:  # and what a run goes on from is all there
                saved, bptt = bptt.state_dict(), gpurnn.TruncatedBPTT(model, summed, k1, k2=40)
                bptt.load_state_dict(saved)
        np.testing.assert_allclose(total, whole, rtol=1e-12)
        np.testing.assert_allclose(model.grads.flat, expected, rtol=1e-11, atol=1e-12)


@ON_CPU
def test_a_short_last_window_reaches_back_through_resets():
    model, x, target, resets = model_of(), drawn(9, N, I), drawn(9, N, 2, seed=1), np.zeros((9, N), bool)
    resets[2, 0] = resets[5, 1] = True  # the first where only the state that the last window begins with is made again
    found = []
    for k1, sizes in ((4, (4, 4, 1)), (1, (1,) * 9)):
        bptt, t = gpurnn.TruncatedBPTT(model, summed, k1, k2=6), 0
        for size in sizes:
            model.zero_grad()
            bptt.step(x[t : t + size], target[t : t + size], resets=resets[t : t + size])
            t += size
        found.append(model.grads.flat.copy())
    np.testing.assert_allclose(*found, rtol=1e-11, atol=1e-12)


@ON_CPU
def test_nothing_passes_a_reset():
    layer = layer_of(CELLS["lstm"], "compiled")
    resets = np.zeros((T, N), bool)
    resets[4] = True
    _, _, backward = layer(drawn(T, N, I), tuple(drawn(2, 1, N, H)), resets=resets)
    dy = drawn(T, N, H)
    dy[:4] = 0
    dx, dstate = backward(dy)
    assert dx[4:].all() and not dx[:4].any() and not any(part.any() for part in dstate)


@ON_CPU
def test_without_a_reset_the_bits_are_those_without_resets():
    layer = layer_of(CELLS["gru"], "compiled")
    plain, nothing = (in_one(layer, np.zeros((T, N), bool)), in_one(layer, np.zeros((T, N), bool), keep=True))
    y, final, _ = layer(drawn(T, N, I), drawn(1, N, H, seed=10))
    assert (plain["y"] == y).all() and (plain["final 0"] == final).all()
    assert all((plain[name] == nothing[name]).all() for name in plain)


@pytest.mark.parametrize(
    ("resets", "came"),
    [
        (np.zeros((3, 2)), "float64 of shape (3, 2)"),
        (np.full((3, 2), np.nan, np.float32), "float32 of shape (3, 2)"),
        (np.zeros((2, 3), bool), "bool of shape (2, 3)"),
        (np.zeros((3, 2, 1), bool), "bool of shape (3, 2, 1)"),
        (np.zeros((3, 2), int), "int64 of shape (3, 2)"),
        (True, "bool of shape ()"),
    ],
    ids=str,
)
def test_what_resets_must_be(resets, came):
    x, says = backend.asarray(drawn(3, 2, I), "float32", "x"), "resets: expected bool of shape (T, N) = (3, 2), got "
    layer = gpurnn.LSTM(I, H)
    bptt = gpurnn.TruncatedBPTT(layer, summed, 3)
    for call in (lambda: layer(x, resets=resets), lambda: bptt.step(x, x, resets=resets)):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == says + came
    assert layer(x, resets=[[False, True]] * 3)[0].shape == (3, 2, H)


def test_captured_windows_with_resets():
    """A stream of other resets in each window; the third and later calls are a graph."""
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.fake_cupy import counters
    from tests.interpreted import interpreted

    x, target = drawn(14, N, I), drawn(14, N, 2, seed=1)
    resets, found = flags(14), []
    for graphs in (True, False):
        with interpreted("step"):
            model = model_of(dtype="float32")
            bptt = gpurnn.TruncatedBPTT(model, gpurnn.mean_squared_error, 2, k2=4)

            def step(x, target, resets, model=model, bptt=bptt):
                model.zero_grad()
                loss = bptt.step(x, target, resets=resets)
                return loss, model.grads.flat

            run, before = gpurnn.captured(step, when=lambda bptt=bptt: bptt.steady) if graphs else step, counters.graphs
            for t in range(0, 14, 2):
                given = [
                    backend.asarray(part[t : t + 2], kind, "part")
                    for part, kind in ((x, "float32"), (target, "float32"), (resets, None))
                ]
                found.append([backend.to_numpy(part).copy() for part in run(*given)])
            assert not graphs or counters.graphs - before >= 2
    for got, expected in zip(found[:7], found[7:], strict=True):
        assert all((a == b).all() for a, b in zip(got, expected, strict=True))


# All states


@ON_CPU
@pytest.mark.parametrize("executor", ["compiled", "numpy"])
def test_all_states_of_an_lstm(executor):
    layer = layer_of(CELLS["lstm"], executor, num_layers=2)
    x, state = drawn(T, N, I), tuple(drawn(2, 2, N, H))
    for training in (True, False):
        (h, c), (_, c_last), _ = layer(x, state, all_states=True, training=training)
        assert (h == layer(x, state)[0]).all() and (c[-1] == c_last[1]).all()
        for t in range(1, T):
            assert np.allclose(layer(x[:t], state)[1][1][1], c[t - 1], rtol=1e-12)


@ON_CPU
def test_what_comes_back_for_all_states():
    layer = layer_of(CELLS["lstm"], "compiled")
    backward = lambda: layer(drawn(T, N, I), all_states=True)[2]  # noqa: E731
    dh, dc = drawn(2, T, N, H)
    alone = layer(drawn(T, N, I))[2](dh)[0]
    assert (backward()((dh, None))[0] == alone).all() and not backward()(None)[0].any()
    assert (backward()((None, dc))[0] == backward()((dh * 0, dc))[0]).all()
    with pytest.raises(
        ValueError, match=r"dy: expected a tuple of 2 arrays \(h, c\) of shape \(9, 5, 6\), got ndarray"
    ):
        backward()(dh)
    with pytest.raises(ValueError, match=r"dy c: expected \(T, N, D\*H\)"):
        backward()((dh, dc[1:]))
    with pytest.raises(ValueError, match="all_states: expected"):
        layer(drawn(T, N, I), all_states="yes")
    one = layer_of(CELLS["gru"], "compiled")
    y, _, back = one(drawn(T, N, I), all_states=True)
    assert y.shape == (T, N, H) and back(dh)[0].shape == (T, N, I)


@ON_CPU
@pytest.mark.parametrize("executor", ["compiled", "numpy"])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "gru", "lru"])
def test_gradients(cell, trained, executor):
    layer = layer_of(CELLS[cell], executor, hidden=3, trainable_h0=trained, bidirectional=True)
    resets = flags(4, 3)
    gpurnn.check_gradients(layer, resets=resets, all_states=True, lengths=[4, 2, 3])
    gpurnn.check_gradients(layer, resets=resets)
