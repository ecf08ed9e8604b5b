"""What a training step runs on a device beside recurrent layers, in the interpreter, against NumPy: losses, embeddings,
norms, optimisers.

Every launch is checked for bounds, alignment, races and reads of memory that nobody wrote as well.
"""

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from gpurnn.cuda import device
from gpurnn.cuda.moves import Moves
from gpurnn.parameters import Parameters
from tests import fake_cupy
from tests.fake_cupy.compare import assert_same, on_host, on_numpy
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

SEEDS = (None, 0)  # of the order of warps
LONG = 1100  # classes: more than a warp keeps in registers


def put(array):
    return backend.xp.asarray(array)


# Softmax cross-entropy


def rows(C, R, dtype, seed=0):
    rng = np.random.default_rng(seed)
    return (3 * rng.standard_normal((R, C))).astype(dtype), rng.integers(0, C, R)


CLASSES = (2, 31, 33, 65, 515, LONG)  # each has kernels of its own, which take seconds to build


@pytest.mark.parametrize(
    ("C", "dtype"),
    [(C, "float32") for C in CLASSES]
    + [(33, "float16"), (LONG, "float16"), (515, "float64"), (LONG, "float64")]
    + [pytest.param(C, "float16", marks=pytest.mark.slow) for C in (2, 31, 65, 515)]
    + [pytest.param(C, "float64", marks=pytest.mark.slow) for C in (2, 31, 33, 65)],
)
def test_cross_entropy(C, dtype):
    logits, targets = rows(C, 11, dtype)
    some = np.where(np.arange(11) % 5 == 4, -7, targets)

    def work():
        none = gpurnn.softmax_cross_entropy(logits, targets, reduction="none")
        return none, gpurnn.softmax_cross_entropy(logits, some, ignore_index=-7)

    assert_same(work, dtype)


def test_any_order_of_warps():
    logits, targets = rows(LONG, 3, "float32")
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits, targets), "float32", seed=1)
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits[:, :40], targets % 40), "float32", seed=1)


def test_one_class_is_certain():
    with interpreted("numpy"):
        losses, dlogits = gpurnn.softmax_cross_entropy(*rows(1, 11, "float32"), reduction="none")
        assert not losses.get().any() and not dlogits.get().any()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("C", [3, LONG])
def test_logits_that_are_extreme_or_not_finite(C, dtype):
    largest, inf = np.finfo(dtype).max, np.inf
    starts = [
        [1e4, -1e4, 9999], [-1e4] * 3, [0.5, -inf, 0.5], [0, -inf, -inf], [-largest] * 3, [largest, 0, -largest],
        [inf, 0, 1], [-inf] * 3, [np.nan, 0, 1], [0, -inf, 1], [inf, inf, -inf],
    ]  # fmt: skip
    logits = np.full((len(starts), C), -inf, dtype)
    logits[:, :3] = starts

    def work():
        with np.errstate(over="ignore"):
            return gpurnn.softmax_cross_entropy(logits, np.arange(len(starts)) % 3, reduction="none")

    assert_same(work, dtype)


@pytest.mark.parametrize("C", [5, LONG])
def test_ignored_rows_are_not_read(C):
    logits, targets = rows(C, 9, "float32")
    targets[2:5] = -1
    logits[2:5] = np.nan
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits, targets, ignore_index=-1), "float32")
    assert_same(lambda: gpurnn.softmax_cross_entropy(logits[2:5], targets[2:5], ignore_index=-1), "float32")


@pytest.mark.parametrize("kind", ["uint8", "int32", "int64"])
def test_targets_of_every_type_and_logits_of_any_layout(kind):
    logits, targets = rows(7, 12, "float32")
    turned = np.ascontiguousarray(logits.reshape(4, 3, 7).transpose(1, 0, 2))

    def work():
        given = put(turned).transpose(1, 0, 2) if backend.name == "cuda" else turned.transpose(1, 0, 2)
        return gpurnn.softmax_cross_entropy(given, targets.reshape(4, 3).astype(kind), reduction="sum")

    assert_same(work, "float32")


def test_a_float64_loss_of_float32_logits():
    """A float32 E would not see the small rows beside the large one."""
    logits = np.zeros((1, 3, 2), np.float32)
    logits[0, 0, 1] = 2.0**24
    with interpreted("numpy"):
        total, _ = gpurnn.softmax_cross_entropy(logits, np.zeros((1, 3), int), reduction="sum")
        assert float(total) == pytest.approx(2**24 + 2 * np.log(2), abs=1e-6)


# Embedding


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("V", "dim", "count"), [(1, 1, 1), (3, 5, 40), (7, 128, 300), (4, 129, 33), (5, 300, 257)])
def test_embedding(V, dim, count, seed):
    rng = np.random.default_rng(0)
    tokens, dy = rng.integers(0, V, count) // 2 * 2, rng.standard_normal((count, dim)).astype("float32")

    def work():
        layer = gpurnn.Embedding(V, dim, rng=1)
        layer.grads["weight"][...] = 1
        y, backward = layer(tokens.astype("uint8"))
        backward(dy)
        return y, layer.grads["weight"]

    assert_same(work, "float32", seed)


def test_a_gradient_that_is_not_finite_stays_in_its_row():
    tokens, dy = np.array([0, 2, 1, 2, 3]), np.ones((5, 3), np.float32)
    dy[3, 1] = np.nan
    with interpreted("numpy"):
        target = fake_cupy.zeros((4, 3), np.float32)
        backend.ops.add_rows(target, put(tokens), put(dy))
        assert np.argwhere(np.isnan(target.get())).tolist() == [[2, 1]]


def test_rows_that_do_not_occur_are_not_touched():
    """The interpreter would find a read of what nobody wrote."""
    with interpreted("numpy"):
        target = fake_cupy.zeros((3, 2), np.float32)
        target[1] = np.nan
        backend.ops.add_rows(target, put(np.array([0, 2, 2])), put(np.ones((3, 2), np.float32)))
        assert np.nan_to_num(target.get(), nan=-1).tolist() == [[1, 1], [-1, -1], [2, 2]]


# Dropout


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3, 4, 1024, 2051])
def test_dropout_is_that_of_the_cpu(count, dtype):
    """Bit for bit, at addresses of any alignment."""
    x = np.random.default_rng(0).standard_normal(count + 1).astype(dtype)

    def work():
        layer = gpurnn.Dropout(0.3, dtype=dtype, rng=1)
        layer.masks.calls = (5 << 32) - 1
        found = []
        for start in (0, 1):
            y, backward = layer(put(x)[start:] if backend.name == "cuda" else x[start:])
            found += [y, backward(y)]
        return found, layer.masks.calls

    with on_numpy():
        expected, calls = on_host(work())
    with interpreted("numpy"):
        found, counted = on_host(work())
    assert counted == calls == (5 << 32) + 1
    assert all((one == other).all() for one, other in zip(found, expected, strict=True))


def test_dropout_of_nothing():
    with interpreted("numpy"):
        y, backward = gpurnn.Dropout(0.3, rng=1)(put(np.ones((0, 3), np.float32)))
        assert y.shape == backward(y).shape == (0, 3)


# Sums of columns, and small copies


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("rows", [1, 63, 1025])
def test_sums_of_columns_in_any_order_of_gates(rows, dtype):
    rng = np.random.default_rng(0)
    values = rng.standard_normal((rows, 4 * 5 + 3)).astype(dtype)
    a, b = rng.standard_normal(3 * 5).astype(dtype), rng.standard_normal(3 * 5).astype(dtype)
    sums = values[:, : 4 * 5].sum(0, dtype=float).reshape(4, 5)
    with interpreted("numpy", 0):
        mine, other = put(a), put(b)
        device.add_columns(put(values)[:, : 4 * 5], 5, mine, other, first=(2, 0, 1), second=(0, 2, 1), start=1)
        np.testing.assert_allclose(mine.get(), a + sums[[1, 2, 0]].reshape(-1), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other.get(), b + sums[[1, 3, 2]].reshape(-1), rtol=1e-5, atol=1e-5)


def test_a_long_sum_is_as_good_as_a_short_one():
    """As many float32 values of one sign, added up one by one, would lose a unit in the third place."""
    values = np.random.default_rng(0).random((300_000, 1), np.float32) + np.float32(1)
    with interpreted("numpy"):
        total = put(np.zeros(1, np.float32))
        device.add_columns(put(values), 1, total, first=(0,), second=(), start=0)
        assert float(total[0]) == pytest.approx(values.sum(dtype=float), rel=2e-7)


@pytest.mark.parametrize("kind", ["uint8", "int32", "float64"])
def test_moves_of_any_type_come_in_order(kind):
    x = np.arange(300).astype(kind)
    with interpreted("numpy", 0):
        a, b, c, moves = put(x[:77]), put(x[100:177]), put(x[200:277]), Moves()
        moves.copy(a, b)
        moves.copy(b, c)
        numbers, nothing = put(np.zeros(9, np.int64)), put(np.zeros(0))
        moves.fill(numbers, 5)
        moves.copy(nothing, nothing)
        targets = [put(np.zeros((3, 2), kind)) for _ in range(7)]
        for target in targets:
            moves.copy(target, put(x[:6].reshape(2, 3)).T)
        moves.run()
        assert (a.get() == x[100:177]).all() and (b.get() == x[200:277]).all() and (numbers.get() == 5).all()
        assert all((target.get() == x[:6].reshape(2, 3).T).all() for target in targets)
        moves.run()  # there is nothing left to do


# Norms and clipping


class Model:
    """Parameters and gradients, several tensors of odd sizes; the padding between them is 0."""

    def __init__(self, dtype="float32", shapes=None, seed=0):
        shapes = {"weight": (5, 7), "bias": (3,), "scale": (), "wide": (1, 40)} if shapes is None else shapes
        self.params, self.grads = Parameters(shapes, dtype), Parameters(shapes, dtype)
        self.rng = np.random.default_rng(seed)
        for parameters in (self.params, self.grads):
            self.fill(parameters)

    def fill(self, parameters, scale=1.0):
        for view in parameters.values():
            view[...] = put((scale * self.rng.standard_normal(view.shape)).astype(view.dtype))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("shapes", [None, {"w": (2500,)}, {"w": (0,)}, {}], ids=["several", "blocks", "none", "empty"])
def test_clip_grad_norm(shapes, dtype):
    def work():
        model = Model(dtype, shapes)
        norm = gpurnn.grad_norm(model)
        far = gpurnn.clip_grad_norm(model, 1e6)
        near = gpurnn.clip_grad_norm(model, 0.5)
        return norm, far, near, dict(model.grads)

    assert_same(work, dtype)


@pytest.mark.parametrize(
    ("dtype", "values"),
    [
        ("float64", [1e200, 3e200]), ("float64", [1e-200, 3e-200]), ("float64", [1e200, 1.0, 1e-200]),
        ("float64", [1e-160, 1e-140]), ("float64", [1e160, 1e150, 7.0]), ("float64", [0.0]), ("float64", [1e308] * 3),
        ("float64", [5e-324] * 4), ("float32", [1e38, 3e38]), ("float32", [1e-45, 3e-39]), ("float32", [0.0]),
    ],
)  # fmt: skip
def test_norms_neither_overflow_nor_vanish(dtype, values):
    def work():
        model = Model(dtype, {"w": (9,), "v": (len(values),)})
        model.grads["w"][...] = 0
        model.grads["v"][...] = put(np.array(values, dtype))
        return gpurnn.grad_norm(model)

    assert_same(work, dtype)


# Optimisers

RULES = {
    "sgd": (gpurnn.SGD, {"lr": 0.1}),
    "momentum": (gpurnn.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    "nesterov": (gpurnn.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "rmsprop": (gpurnn.RMSprop, {}),
    "rmsprop, momentum": (gpurnn.RMSprop, {"momentum": 0.9, "weight_decay": 0.2}),
    "rmsprop, centered": (gpurnn.RMSprop, {"centered": True, "eps": 1e-3}),
    "rmsprop, all": (gpurnn.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "momentum": 0.5, "centered": True}),
    "adam": (gpurnn.Adam, {}),
    "adam, all": (gpurnn.Adam, {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-2, "weight_decay": 0.1}),
    "adamw": (gpurnn.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
}


MOST_OF_ALL = ("nesterov", "rmsprop, all", "adam, all", "adamw")  # the others do less of the same


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [(rule, "float32") for rule in RULES]
    + [pytest.param(rule, "float64", marks=[pytest.mark.slow] * (rule not in MOST_OF_ALL)) for rule in RULES],
)
def test_optimisers(rule, dtype):
    kind, options = RULES[rule]

    def work():
        model = Model(dtype)
        optimizer = kind(model, **options)
        for step in range(4):
            optimizer.lr = 0.05 * 0.9**step
            model.fill(model.grads)
            before = model.grads.flat.copy()
            optimizer.step()
            assert bool((model.grads.flat == before).all())
        return dict(model.params), [dict(moment) for moment in optimizer.moments.values()], optimizer.steps

    assert_same(work, dtype)


def test_an_empty_model_is_updated_too():
    def work():
        optimizer = gpurnn.Adam(Model("float32", {"w": (0, 3)}))
        optimizer.step()
        return optimizer.steps

    assert_same(work)


def test_an_optimiser_goes_on_where_its_state_was_taken():
    """Bit for bit, on a device too: the corrections of Adam are a function of the number of steps alone."""
    with interpreted("numpy"):
        whole, pieces = Model(), Model()
        first, second = gpurnn.Adam(whole), gpurnn.Adam(pieces)
        for step in range(37):
            if step in (5, 36):
                saved = second.state_dict()
                second = gpurnn.Adam(pieces)
                second.load_state_dict(saved)
            first.update()
            second.update()
        assert first.steps == second.steps == 37
        assert (whole.params.flat.get() == pieces.params.flat.get()).all()
