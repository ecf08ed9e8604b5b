"""Parts together: models of any parts, one buffer behind them, parameter groups, freezing, tied weights."""

import copy
import gc
import pickle

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.backend import to_numpy

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="test_parts_captured is the device's")


def lstm_and_head(dtype="float32"):
    return gpurnn.LSTM(3, 5, rng=1, dtype=dtype), gpurnn.Linear(5, 2, rng=2, dtype=dtype)


def fill(parts, seed=0):
    rng = np.random.default_rng(seed)
    for part in parts:
        for grad in part.grads.values():
            grad[...] = rng.standard_normal(grad.shape)


# One buffer


def test_an_optimiser_of_parts_is_one_of_a_model_and_parts_stay_views():
    lstm, head = lstm_and_head()
    twins = lstm_and_head()
    optimizer, others = gpurnn.Adam([lstm, head], lr=0.1), [gpurnn.Adam(twin, lr=0.1) for twin in twins]
    assert optimizer.model.params.flat.size == lstm.params.flat.size + head.params.flat.size
    assert list(optimizer.state_dict())[-1] == "exp_avg_sq.1.bias"
    for k in range(3):
        optimizer.zero_grad()
        fill((lstm, head), k)
        fill(twins, k)
        optimizer.step()
        for other in others:
            other.step()
    assert all((part.params.flat == twin.params.flat).all() for part, twin in zip((lstm, head), twins, strict=True))
    assert np.shares_memory(lstm.params["weight_hh_l0"], optimizer.model.params.flat)
    assert np.shares_memory(head.grads["bias"], optimizer.model.grads.flat)


def test_models_of_the_same_parts_share_their_memory():
    lstm, head = lstm_and_head()
    optimizer = gpurnn.Adam([lstm, head])
    model = gpurnn.Model(head=head, encoder=lstm)
    assert model.params.flat.ctypes.data == optimizer.model.params.flat.ctypes.data and model.encoder is lstm
    model.params["head.bias"] += 7
    assert (head.params["bias"] == 7).all() and (optimizer.model.params["1.bias"] == 7).all()
    assert gpurnn.Model(head=head, encoder=lstm).params is model.params, "made once"
    again = gpurnn.Model(head=head)
    assert again.params.flat.ctypes.data == head.params.flat.ctypes.data
    sequence = gpurnn.SequenceModel(None, lstm, head)
    sequence.params["recurrent.bias_ih_l0"][...] = 3
    assert (lstm.params["bias_ih_l0"] == 3).all()


def test_parts_are_free_again_when_their_model_is_gone():
    lstm, head = lstm_and_head()
    gpurnn.Adam([lstm, head])
    gc.collect()
    other = gpurnn.Linear(2, 2)
    assert np.shares_memory(gpurnn.Model([head, other]).params.flat, head.params.flat)


def test_what_cannot_be_joined():
    lstm, head = lstm_and_head()
    model = gpurnn.Model(lstm=lstm, head=head)
    with pytest.raises(ValueError, match="0: belongs to another model already, and not all of 0, 1 lie side by side"):
        gpurnn.Adam([lstm, gpurnn.Linear(5, 2)])
    for parts in ([lstm, lstm], [model, head]):
        with pytest.raises(ValueError, match="the same values twice"):
            gpurnn.SGD(parts, 0.1)
        with pytest.raises(ValueError, match="the same values twice"):
            gpurnn.clip_grad_norm(parts, 1.0)
    with pytest.raises(TypeError, match="1: expected a layer or a model with params and grads, got int"):
        gpurnn.Adam([lstm, 3])
    with pytest.raises(ValueError, match="expected parts of one dtype, got no parts"):
        gpurnn.Model()
    for work in (gpurnn.Adam, gpurnn.zero_grad):
        with pytest.raises(TypeError, match="model: expected a layer or a model with params and grads, got list"):
            work([])
    with pytest.raises(ValueError, match="expected parts of other names, 'freeze' is a model's own"):
        gpurnn.Model(freeze=head)
    with pytest.raises(TypeError, match="0: expected a layer or a model with params and grads, got str"):
        gpurnn.Model("lstm")
    with pytest.raises(TypeError, match="0: expected a layer or a model with params and grads, got type"):
        gpurnn.Adam([gpurnn.LSTM, head])
    assert gpurnn.Model(lstm, head).params is gpurnn.Model([lstm, head]).params


@pytest.mark.parametrize("join", [False, True])
def test_norms_and_clipping_of_parts(join):
    parts = lstm_and_head()
    if join:
        optimizer = gpurnn.Adam(parts)
    fill(parts)
    before = [part.grads.flat.copy() for part in parts]
    together = np.sqrt(sum(float(np.square(grads.astype("float64")).sum()) for grads in before))
    assert gpurnn.grad_norm(parts) == pytest.approx(together, rel=1e-12)
    assert gpurnn.clip_grad_norm(parts, 2 * together) == pytest.approx(together)
    assert all((part.grads.flat == grads).all() for part, grads in zip(parts, before, strict=True))
    assert gpurnn.clip_grad_norm({"a": parts[0], "b": parts[1]}, together / 3) == pytest.approx(together)
    for part, grads in zip(parts, before, strict=True):
        np.testing.assert_allclose(part.grads.flat, grads / 3, rtol=1e-6)
    gpurnn.clip_grad_value(parts, 0.01)
    assert max(abs(part.grads.flat).max() for part in parts) == np.float32(0.01)
    gpurnn.zero_grad(parts)
    assert not any(part.grads.flat.any() for part in parts)
    if not join:
        assert all(part.params._place()[0] is part.params for part in parts), "nothing was moved"
    else:
        assert optimizer.steps == 0


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_keep_what_belongs_together(clone):
    lstm, head = lstm_and_head()
    optimizer = gpurnn.Adam([lstm, head], groups={"*bias*": {"lr": 1e-4}})
    shown = gpurnn.Model(a=lstm, b=head)
    shown.freeze("b")
    fill((lstm, head))
    optimizer.step()
    twin, twin_optimizer, twin_lstm = clone((shown, optimizer, lstm))
    assert twin.params.frozen == ["b.weight", "b.bias"]
    for own, model in ((optimizer, shown), (twin_optimizer, twin)):
        fill((model.a, model.b), 1)
        own.step()
    assert (twin.params.flat == shown.params.flat).all() and np.shares_memory(twin.params.flat, twin_lstm.params.flat)
    assert not np.shares_memory(twin.params.flat, shown.params.flat)
    alone = clone(head)
    assert np.shares_memory(gpurnn.Model([alone]).params.flat, alone.params.flat), "a part's copy is free"


def test_a_value_is_changed_in_place_or_not_at_all():
    head = gpurnn.Linear(3, 2, rng=1)
    before = head.params["weight"].copy()
    head.params["weight"] += 1
    assert (head.params["weight"] == before + 1).all()
    for wrong in (np.ones((3, 2)), "x", 1j):
        with pytest.raises((ValueError, TypeError)):
            head.params["weight"] += wrong
        assert (head.params["weight"] == before + 1).all()
    with pytest.raises(KeyError):
        head.params["wieght"] = 1


# Groups


def test_groups_by_pattern_are_optimisers_of_their_own():
    model, twin = (gpurnn.Model(dict(zip(("lstm", "head"), lstm_and_head("float64"), strict=True))) for _ in range(2))
    groups = {"*bias*": {"weight_decay": 0.0}, "head": {"lr": 0.01}}
    optimizer = gpurnn.AdamW(model, lr=0.1, weight_decay=0.3, groups=groups)
    alone = {(lr, decay): gpurnn.AdamW(twin, lr=lr, weight_decay=decay) for lr in (0.1, 0.01) for decay in (0.3, 0.0)}
    for k in range(4):
        fill((model,), k)
        fill((twin,), k)
        before, after = twin.params.flat.copy(), {}
        for which, other in alone.items():
            other.lr = which[0] * 0.5**k
            twin.params.flat[...] = before
            other.step()
            after[which] = dict(zip(twin.params, map(np.copy, twin.params.values()), strict=True))
        for name in twin.params:
            which = 0.01 if name.startswith("head") else 0.1, 0.0 if "bias" in name else 0.3
            twin.params[name][...] = after[which][name]
        optimizer.lr = 0.1 * 0.5**k
        optimizer.step()
    for name in model.params:
        np.testing.assert_allclose(model.params[name], twin.params[name], rtol=1e-14, atol=1e-16, err_msg=name)


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"wieght": {"lr": 1}}, ValueError, "'wieght' matches none of the parameters weight, bias"),
        ({"bias": {"momentum": 1}}, ValueError, r"groups\['bias'\]: expected lr or weight_decay, as in"),
        ({"bias": {}}, ValueError, "expected lr or weight_decay"),
        ({"bias": 0.1}, ValueError, "expected lr or weight_decay"),
        ({"bias": {"lr": -1}}, ValueError, r"groups\['bias'\] lr: expected a finite number from 0, got -1"),
        ([("bias", {})], TypeError, "groups: expected settings by pattern, such as"),
        ({3: {"lr": 1}}, TypeError, "expected names or patterns"),
    ],
)
def test_groups_are_checked(groups, error, message):
    with pytest.raises(error, match=message):
        gpurnn.Adam(gpurnn.Linear(3, 2), groups=groups)


def test_a_group_s_lr_is_a_multiple_of_one_that_is_not_0():
    with pytest.raises(ValueError, match="expected lr > 0, of which a group's is a multiple"):
        gpurnn.SGD(gpurnn.Linear(3, 2), lr=0, groups={"bias": {"lr": 0.1}})


# Freezing


KINDS = [
    (gpurnn.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    (gpurnn.RMSprop, {"lr": 0.01, "centered": True}),
    (gpurnn.Adam, {"lr": 0.1, "weight_decay": 0.1}),
    (gpurnn.AdamW, {"lr": 0.1}),
]


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_what_is_frozen_stands_still_and_goes_on_as_if_nothing_had_been(kind, options):
    """Frozen for three updates, set free for two: it has learnt what two updates teach, the others five."""
    (_, head), (_, twin) = lstm_and_head("float64"), lstm_and_head("float64")
    optimizer, other = kind(head, **options), kind(twin, **options)
    fill((head,), 0)
    optimizer.step()
    head.freeze("weight")
    still = head.params["weight"].copy(), [moment["weight"].copy() for moment in optimizer.moments.values()]
    for k in (1, 2, 3):
        fill((head,), k)
        head.grads["weight"][...] = np.nan  # it has none
        optimizer.step()
        assert (head.params["weight"] == still[0]).all()
    for moment, before in zip(optimizer.moments.values(), still[1], strict=True):
        assert (moment["weight"] == before).all()
    head.unfreeze()
    fill((head,), 4)
    optimizer.step()
    for k in (0, 4):
        fill((twin,), k)
        other.step()
    np.testing.assert_array_equal(head.params["weight"], twin.params["weight"])
    assert optimizer.steps == 5 and not np.allclose(head.params["bias"], twin.params["bias"])


@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_frozen_parameters_and_groups_resume_bit_for_bit(kind, options):
    groups = {"bias": {"lr": 0.003, "weight_decay": 0.02}}

    def train(head, optimizer, steps):
        for k in steps:
            if k == 2:
                head.freeze("weight")
            if k == 5:
                head.unfreeze("weight")
            fill((head,), k)
            optimizer.lr = 0.05 / (k + 1)
            optimizer.step()

    whole, pieces = gpurnn.Linear(5, 2, rng=2), gpurnn.Linear(5, 2, rng=2)
    one = kind(whole, **options, groups=groups)
    train(whole, one, range(8))
    optimizer = kind(pieces, **options, groups=groups)
    for steps in ((0,), (1, 2, 3), (4,), (5, 6), (7,)):
        train(pieces, optimizer, steps)
        state, frozen, weights = optimizer.state_dict(), pieces.params.frozen, pieces.state_dict()
        pieces = gpurnn.Linear(5, 2)
        pieces.load_state_dict(weights)
        if frozen:
            pieces.freeze(*frozen)
        optimizer = kind(
            pieces, lr=1.0, **{name: options[name] for name in ("momentum", "centered") if name in options}
        )
        optimizer.load_state_dict(state)
    assert (whole.params.flat == pieces.params.flat).all()
    first, second = one.state_dict(), optimizer.state_dict()
    assert first.keys() == second.keys() and all((second[name] == value).all() for name, value in first.items())
    assert first["step.weight"] == 5 and first["step"] == 8 and "step.bias" not in first
    assert first["rate.bias"] == 0.003 / options["lr"] and first["weight_decay.bias"] == 0.02
    assert first["lr"] == 0.05 / 8


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "options"), KINDS)
def test_freezing_groups_and_settings_against_torch(kind, options):
    torch = pytest.importorskip("torch")
    head = gpurnn.Linear(5, 2, rng=2, dtype="float64")
    theirs = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in head.params.items()}
    lists = [{"params": [theirs["weight"]]}, {"params": [theirs["bias"]], "lr": 0.02, "weight_decay": 0.05}]
    other = getattr(torch.optim, kind.__name__)(lists, **options)
    optimizer = kind(head, **options, groups={"bias": {"lr": 0.02, "weight_decay": 0.05}})
    for k in range(9):
        if k in (2, 7):
            head.freeze("weight")
        if k == 5:
            head.unfreeze("weight")
        fill((head,), k)
        for name, value in theirs.items():
            frozen = name in head.params.frozen
            value.grad = None if frozen else torch.tensor(head.grads[name])
        ours = gpurnn.clip_grad_norm(head, 0.5)
        assert ours == pytest.approx(float(torch.nn.utils.clip_grad_norm_(theirs.values(), 0.5)), rel=1e-6)
        for name, value in theirs.items():
            if value.grad is not None:
                value.grad.copy_(torch.tensor(head.grads[name]))
        optimizer.step()
        other.step()
    for name, value in theirs.items():
        np.testing.assert_allclose(head.params[name], value.detach().numpy(), rtol=1e-12, atol=1e-14, err_msg=name)


def test_names_and_patterns_of_what_is_frozen():
    lstm, head = lstm_and_head()
    model = gpurnn.Model(lstm=lstm, head=head)
    lstm.freeze("weight_*")
    assert model.params.frozen == ["lstm.weight_ih_l0", "lstm.weight_hh_l0"]
    model.freeze("head", "lstm.bias_ih_l0")
    assert head.params.frozen == ["weight", "bias"] and len(model.params.frozen) == 5
    assert gpurnn.SequenceModel(None, lstm, head).params.frozen[-1] == "head.bias"
    model.unfreeze("*weight*")
    assert model.params.frozen == ["lstm.bias_ih_l0", "head.bias"]
    fill((model,))
    bias = head.grads["bias"].copy()
    assert gpurnn.grad_norm(model) ** 2 + float((bias**2).sum()) < 1e3 and not head.grads["bias"].any()
    model.unfreeze()
    assert model.params.frozen == []
    model.freeze()
    optimizer, before = gpurnn.AdamW(model), model.params.flat.copy()
    fill((model,))
    optimizer.step()
    assert optimizer.steps == 1 and (model.params.flat == before).all()
    with pytest.raises(ValueError, match=r"'tail' matches none of the parameters lstm.weight_ih_l0"):
        model.freeze("tail")
    with pytest.raises(TypeError, match=r"expected names or patterns such as 'head"):
        model.freeze(3)


# Tied weights


def tied(tie=True):
    embedding, lstm = gpurnn.Embedding(7, 5, rng=1, dtype="float64"), gpurnn.LSTM(5, 5, rng=2, dtype="float64")
    model = gpurnn.SequenceModel(embedding, lstm, gpurnn.Linear(5, 7, rng=3, dtype="float64"))
    if tie:
        model.tie("head.weight", "embedding.weight")
    else:
        model.head.params["weight"][...] = model.embedding.params["weight"]
    return model


TOKENS = np.random.default_rng(0).integers(0, 7, (6, 3))


def test_tied_weights_are_one_matrix_and_their_gradient_is_the_sum():
    model, twin = tied(), tied(False)
    assert model.num_params == twin.num_params - 35 and model.params.flat.size < twin.params.flat.size
    assert model.head.params["weight"] is model.embedding.params["weight"]
    losses = [gpurnn.full_bptt(m, TOKENS, TOKENS, gpurnn.softmax_cross_entropy)[0] for m in (model, twin)]
    assert losses[0] == losses[1]
    total = twin.grads["head.weight"] + twin.grads["embedding.weight"]
    np.testing.assert_allclose(model.grads["embedding.weight"], total, rtol=1e-12)
    np.testing.assert_array_equal(model.grads["head.weight"], model.grads["embedding.weight"])
    squares = sum(float((model.grads[name] ** 2).sum()) for name in model.params.shapes)
    assert gpurnn.grad_norm(model) == pytest.approx(np.sqrt(squares), rel=1e-12)
    optimizer = gpurnn.Adam(model, lr=0.1)
    assert "exp_avg.head.weight" not in optimizer.state_dict()
    optimizer.step()
    assert (model.params["head.weight"] == model.params["embedding.weight"]).all()
    assert (model.params["head.weight"] != twin.params["head.weight"]).any()


def test_tied_weights_are_saved_loaded_copied_and_frozen_as_one():
    model = tied()
    state = model.state_dict()
    assert set(state) == set(tied(False).state_dict())
    for values in (state, {name: value for name, value in state.items() if name != "head.weight"}):
        other = tied()
        other.params.flat[...] = 0
        other.load_state_dict(values)
        assert (other.params.flat == model.params.flat).all()
    with pytest.raises(ValueError, match=r"head.weight: expected the values of embedding.weight, to which it is tied"):
        model.load_state_dict(state | {"head.weight": state["head.weight"] + 1})
    twin = copy.deepcopy(model)
    twin.params["head.weight"][...] = 4
    assert (twin.embedding.params["weight"] == 4).all() and (model.params["embedding.weight"] != 4).all()
    outer = gpurnn.Model(inner=model)
    assert outer.params["inner.head.weight"] is model.embedding.params["weight"]
    outer.freeze("inner.head.weight")
    assert model.params.frozen == ["embedding.weight", "head.weight"]
    assert "head.weight: that is embedding.weight" in repr(model.params)


def test_ties_that_cannot_be():
    model = tied()
    optimizer = gpurnn.SGD(model, 0.1)
    with pytest.raises(ValueError, match=r"head.bias: expected the shape of embedding.weight, \(7, 5\), got \(7,\)"):
        model.tie("head.bias", "embedding.weight")
    with pytest.raises(
        ValueError, match=r"head.weight: expected another parameter than embedding.weight, they are one"
    ):
        model.tie("head.weight", "embedding.weight")
    with pytest.raises(KeyError, match=r"tail: expected one of embedding.weight, "):
        model.tie("tail", "embedding.weight")
    with pytest.raises(ValueError, match=r"expected names that are not tied, head.weight that is embedding.weight"):
        gpurnn.SGD(model, 0.1, groups={"head.weight": {"lr": 1}})
    model.tie("recurrent.bias_hh_l0", "recurrent.bias_ih_l0")
    with pytest.raises(RuntimeError, match="the model's parameters were tied since this optimiser was made"):
        optimizer.step()


def test_a_chain_of_ties():
    model = gpurnn.Model([gpurnn.Linear(2, 2, rng=k) for k in range(3)])
    expected = to_numpy(model.params["2.weight"]).copy()
    model.tie("0.weight", "1.weight")
    model.tie("1.weight", "2.weight")
    assert all((model.params[f"{k}.weight"] == expected).all() for k in range(3)) and model.num_params == 4 + 6
    with pytest.raises(ValueError, match="they are one"):
        model.tie("2.weight", "0.weight")
