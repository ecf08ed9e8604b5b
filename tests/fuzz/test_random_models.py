"""Layers whose options meet at random, in models: kept in files and copies, cut in time, pooled, and looked at."""

import copy
import pickle

import numpy as np
import pytest

import gpurnn
from gpurnn import diagnose
from tests.fuzz.cases import each_case, seeds
from tests.fuzz.random_layers import numbers, random_case, told, turned, worst

C, EPSILON = 3, 1e-5


def squares(out, targets):
    return float(((out - targets) ** 2).sum() / 2), out - targets


def model_of(drawn, pooling=None, **changed):
    layer = drawn.layer(executor="compiled", **changed)
    head = gpurnn.Linear(layer.directions * layer.hidden_size, C, dtype="float64", rng=1)
    return gpurnn.SequenceModel(None, layer, head, pooling=pooling)


def certain(drawn, **changed):
    """The model with every random number's mean in its place."""
    model = model_of(drawn, dropout=0.0, **changed)
    model.recurrent.weight_dropout, model.recurrent.cell = 0.0, model.recurrent.cell.mean
    return model


@pytest.mark.parametrize("seeds", seeds(4, one_in=5))
def test_copies_and_files_go_on_alike(seeds, tmp_path):
    """The same bits, those of the random numbers that come next as well."""

    def case(seed: int) -> str | None:
        drawn = random_case(seed, most=8)
        layer = drawn.layer(executor=None)
        drawn.call(layer)
        path = tmp_path / "model"
        gpurnn.save(layer, path)
        others = {"load": gpurnn.load(path), "pickle": pickle.loads(pickle.dumps(layer)), "copy": copy.deepcopy(layer)}
        gpurnn.save(gpurnn.SequenceModel(None, copy.deepcopy(layer), None), path)
        others["load of a model"] = gpurnn.load(path).recurrent
        right = drawn.results(layer)
        for name, other in others.items():
            if repr(other) != repr(layer):
                return f"{name}: {other!r} instead of {layer!r}"
            if worst(drawn.results(other), right)[0]:
                return f"{name}: other results; {told(drawn)}"
        return None

    each_case(case, seeds, tmp_path)


@pytest.mark.parametrize("seeds", seeds(8, one_in=2))
def test_full_bptt_along_a_direction(seeds, tmp_path):
    """All gradients of a model at once, pooled or not: their product with a direction is the loss's slope there."""

    def case(seed: int) -> str | None:
        drawn, rng = random_case(seed, most=6, smooth=True), np.random.default_rng(seed)
        pooling = [None, "last", "mean"][rng.integers(3)]
        model = model_of(drawn, pooling)
        layer, (T, N, _, _) = model.recurrent, drawn.sizes
        targets = rng.standard_normal((N, C)) if pooling else turned(layer, rng.standard_normal((T, N, C)))
        resets = None if drawn.given["resets"] is None else turned(layer, drawn.given["resets"])
        x, at, before = turned(layer, drawn.given["x"]), model.params.flat, model.params.flat.copy()

        def loss(step: float) -> float:
            at[...] = before + step * way
            with layer.masks.held():
                return gpurnn.full_bptt(model, x, targets, squares, lengths=drawn.given["lengths"], resets=resets).loss

        way = rng.standard_normal(before.shape)
        loss(0)
        slope, terms = float(model.grads.flat @ way), float(abs(model.grads.flat * way).sum())
        found = (loss(EPSILON) - loss(-EPSILON)) / (2 * EPSILON)
        return (
            f"slope {found} by differences, {slope} by backward; {told(drawn)}"
            if abs(found - slope) > 1e-6 * max(1, terms)
            else None
        )

    each_case(case, seeds, tmp_path)


@pytest.mark.parametrize("seeds", seeds(8, one_in=2))
def test_windows_that_reach_back_to_the_start_are_full_bptt(seeds, tmp_path):
    """With resets and lengths, and a truncation that is kept and restored between its windows."""

    def case(seed: int) -> str | None:
        drawn, rng = random_case(seed, most=6, smooth=True), np.random.default_rng(seed)
        model, (T, N, _, _) = certain(drawn, bidirectional=False, batch_first=False), drawn.sizes
        x, lengths, resets = (drawn.given[name] for name in ("x", "lengths", "resets"))
        targets = rng.standard_normal((T, N, C))
        full = gpurnn.full_bptt(model, x, targets, squares, lengths=lengths, resets=resets).loss
        right, k1, total = model.grads.flat.copy(), int(rng.integers(1, T + 1)), 0.0
        model.zero_grad()
        bptt = gpurnn.TruncatedBPTT(model, squares, k1, k1 + T)
        for start in range(0, T, k1):
            cut = slice(start, min(T, start + k1))
            kept, bptt = bptt.state_dict(), gpurnn.TruncatedBPTT(model, squares, k1, k1 + T)
            bptt.load_state_dict(kept)
            valid = None if lengths is None else np.clip(lengths - start, 0, cut.stop - start)
            again = None if resets is None else resets[cut]
            total += bptt.step(x[cut], targets[cut], lengths=valid, resets=again)
        error = max(abs(total - full), abs(model.grads.flat - right).max()) / max(1, abs(full), abs(right).max())
        return f"differs by {error:.2g}, k1 = {k1}; {told(drawn)}" if error > 1e-9 else None

    each_case(case, seeds, tmp_path)


@pytest.mark.parametrize("seeds", seeds(4, one_in=5))
def test_instruments(seeds, tmp_path):
    """They see the model without its random numbers, and leave it, and what it draws next, as it was."""

    def case(seed: int) -> str | None:
        drawn, rng = random_case(seed, most=6, smooth=True), np.random.default_rng(seed)
        T, N = drawn.sizes[:2]
        x, lengths, resets = (drawn.given[name] for name in ("x", "lengths", "resets"))
        targets = rng.standard_normal((T, N, C))
        model, plain = model_of(drawn, batch_first=False), certain(drawn, batch_first=False)
        found = {"flow": diagnose.gradient_flow(model, x, targets, squares, lengths=lengths).norms}
        found |= diagnose.decompose(model, x, targets, squares).gradients
        flow = np.zeros(found["flow"].shape)
        gpurnn.full_bptt(plain, x, targets, squares, lengths=lengths, flow=flow)
        plain.zero_grad()
        gpurnn.full_bptt(plain, x, targets, squares)
        right = {name: plain.grads[name] for name in found if name != "flow"} | {"flow": flow}
        error, name = worst(numbers(found), numbers(right))
        if error > 1e-9:
            return f"{name} differs by {error:.2g}; {told(drawn)}"
        alone = model_of(drawn, batch_first=False)
        watched = gpurnn.Monitor(model, every=1, reach=2)
        for each in (alone, watched, alone, watched):
            each.zero_grad()
            gpurnn.full_bptt(each, x, targets, squares, lengths=lengths, resets=resets)
        same = np.array_equal(alone.grads.flat, model.grads.flat)
        return None if same else f"watched, its gradients are others; {told(drawn)}"

    each_case(case, seeds, tmp_path)


@pytest.mark.parametrize(
    "look",
    [
        lambda model, x, y: gpurnn.Monitor(model),
        lambda model, x, y: diagnose.decompose(model, x, y, squares),
        lambda model, x, y: diagnose.influence(model, x),
        lambda model, x, y: diagnose.verdicts(model, x, y, squares),
        lambda model, x, y: diagnose.clipping_bias(model, x, y, squares, norm=1.0),
        lambda model, x, y: diagnose.gradient_flow(model, x, y, squares, step=0),
        lambda model, x, y: diagnose.gradient_flow(model, x, y, squares, rows=True),
    ],
)
def test_what_follows_single_steps_refuses_pooling(look):
    model = gpurnn.SequenceModel(None, gpurnn.RNN(2, 4), gpurnn.Linear(4, C), pooling="mean")
    with pytest.raises(ValueError, match="model: expected an answer at every step, got one with pooling 'mean'"):
        look(model, np.ones((5, 2, 2), "f4"), np.ones((2, C), "f4"))


def test_zoneout_is_kept_as_it_was_given():
    rates = [0.1, 0.2]
    layer = gpurnn.LSTM(2, 4, zoneout=rates)
    rates[0] = 0.9
    assert layer.zoneout == (0.1, 0.2)


def test_gradients_of_a_layer_whose_batch_comes_first():
    layer = gpurnn.GRU(2, 3, batch_first=True, dtype="float64", rng=0)
    gpurnn.check_gradients(layer, T=4, N=2, resets=np.arange(8).reshape(2, 4) % 3 == 0)


def test_where_it_began_with_resets():
    """Without the reset the state would overflow at step 3; what is wrong is an input at step 5."""
    layer = gpurnn.RNN(1, 1, nonlinearity="identity", rng=0)
    layer.params["weight_hh_l0"] = layer.params["weight_ih_l0"] = [[1e15]]
    x, resets = np.ones((6, 1, 1), "f4"), np.ones((6, 1), bool)
    x[5] = 1e30
    model = gpurnn.Monitor(layer)
    y, _, backward = model(x, resets=resets)
    with pytest.raises(FloatingPointError, match=r"h of l0.* at step 5"):
        backward(y)
