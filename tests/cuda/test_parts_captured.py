"""Parameter groups, freezing and tied weights on a device, in the interpreter, against NumPy; and in captured steps."""

import contextlib

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn import backend
from tests import fake_cupy
from tests.fake_cupy.backend import no_waiting
from tests.fake_cupy.compare import assert_same
from tests.interpreted import interpreted

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

GROUPS = {"*bias*": {"weight_decay": 0.0}, "head": {"lr": 0.003}}


def put(array):
    return backend.xp.asarray(array)


def model(dtype="float32"):
    return gpurnn.Model(body=gpurnn.Linear(9, 5, rng=1, dtype=dtype), head=gpurnn.Linear(5, 3, rng=2, dtype=dtype))


def fill(model, rng):
    for grad in model.grads.values():
        grad[...] = put(rng.standard_normal(grad.shape).astype(grad.dtype))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (gpurnn.AdamW, {"lr": 0.1, "weight_decay": 0.3}),
        (gpurnn.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (gpurnn.RMSprop, {"centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    ],
)
def test_groups_and_frozen_parts_are_those_of_numpy(kind, options):
    def work():
        trained, rng = model(), np.random.default_rng(3)
        optimizer = kind(trained, **options, groups=GROUPS)
        for k in range(6):
            if k == 2:
                trained.freeze("body.weight")
            if k == 4:
                trained.unfreeze()
                trained.freeze("head.bias")
            fill(trained, rng)
            optimizer.lr = 0.05 * 0.9**k
            norm = gpurnn.clip_grad_norm(trained, 2.0)
            optimizer.step()
        clocks = {name: int(value) for name, value in optimizer.state_dict().items() if name.startswith("step")}
        assert clocks == {"step": 6, "step.body.weight": 4, "step.head.bias": 4}
        return dict(trained.params), norm, [dict(moment) for moment in optimizer.moments.values()]

    assert_same(work, "float32")


def test_norms_of_parts_that_are_not_joined():
    def work():
        parts, rng = [gpurnn.Linear(9, 5, rng=1), gpurnn.Linear(5, 3, rng=2)], np.random.default_rng(3)
        for part in parts:
            fill(part, rng)
        return gpurnn.clip_grad_norm(parts, 1.0), [dict(part.grads) for part in parts], gpurnn.grad_norm(parts)

    assert_same(work, "float32")


def test_losses_scores_and_pooling_are_those_of_numpy():
    rng = np.random.default_rng(0)
    logits, targets = rng.standard_normal((4, 3, 5)).astype("float32"), rng.integers(0, 5, (4, 3))
    weight, lengths = rng.random(5), [4, 2, 0]

    def work():
        z, y = put(logits), put(targets)
        options = {"weight": put(weight), "label_smoothing": 0.1, "ignore_index": 3}
        found = [gpurnn.softmax_cross_entropy(z, y, lengths=own, **options) for own in (None, lengths)]
        found += [gpurnn.binary_cross_entropy(z, put(np.float32(logits > 0))), gpurnn.huber(z, 2 * z)]
        found += [gpurnn.accuracy(z, y, lengths=lengths), gpurnn.perplexity(z, y)]
        for how in ("last", "mean", "max"):
            for own in (None, lengths):
                pooled, backward = gpurnn.Pool(how)(z, lengths=own)
                found += [pooled, backward(2 * pooled)]
        return found

    assert_same(work, "float32")


def test_losses_wait_for_nothing():
    with interpreted("step"):
        z, y, weight = put(np.ones((2, 3, 5), "float32")), put(np.ones((2, 3), int)), put(np.ones(5))

        def step(z, y):
            one = gpurnn.softmax_cross_entropy(z, y, weight=weight, label_smoothing=0.1, ignore_index=0)
            other, pool = gpurnn.binary_cross_entropy(z, z), gpurnn.Pool("max")(z)[0]
            return *one, *other, *gpurnn.huber(z, z), gpurnn.accuracy(z, y), gpurnn.perplexity(z, y), pool

        recorded = gpurnn.captured(step)
        for _ in range(4):
            with no_waiting():
                found = recorded(z, y)
        assert recorded.reason is None and len(found) == 9
        assert all((a.get() == b.get()).all() for a, b in zip(found, step(z, y), strict=True))


def test_freezing_reaches_a_step_that_was_captured():
    """Recorded anew: with the bits of the step that is launched kernel by kernel, and without waiting in between."""
    tokens = np.random.default_rng(0).integers(0, 5, (40, 2))

    def run(wrap):
        trained = gpurnn.SequenceModel(
            gpurnn.Embedding(5, 5, rng=1), gpurnn.RNN(5, 5, rng=2), gpurnn.Linear(5, 5, rng=3)
        )
        trained.tie("head.weight", "embedding.weight")
        optimizer = gpurnn.Adam(trained, lr=0.05, groups={"*bias*": {"lr": 0.01}})
        bptt = gpurnn.TruncatedBPTT(trained, gpurnn.softmax_cross_entropy, 2)

        def step(x, targets):
            trained.zero_grad()
            loss = bptt.step(x, targets)
            gpurnn.clip_grad_norm(trained, 0.5)
            optimizer.step()
            return loss

        do, losses = wrap(step, bptt), []
        for k in range(12):
            if k == 5:
                trained.freeze("recurrent", "head.weight")
                still = trained.params.flat.get()
            if k == 9:
                assert (trained.params["embedding.weight"].get().ravel() == still[:25]).all()
                trained.unfreeze("recurrent")
            x, targets = fake_cupy.asarray(tokens[k : k + 2]), fake_cupy.asarray(tokens[k + 1 : k + 3])
            with no_waiting() if k not in (5, 9) else contextlib.nullcontext():  # then the updates done are asked for
                loss = do(x, targets)
            losses.append(float(loss))
        return losses, trained.params.flat.get(), optimizer.state_dict()

    with interpreted("step"):
        plain = run(lambda step, bptt: step)
        before = fake_cupy.counters.graphs
        captured = run(lambda step, bptt: gpurnn.captured(step, when=lambda: bptt.steady))
        assert fake_cupy.counters.graphs - before == 4
    assert plain[0] == captured[0] and (plain[1] == captured[1]).all()
    assert all((value == captured[2][name]).all() for name, value in plain[2].items())
    assert plain[2]["step.recurrent.weight_hh_l0"] == 8 and plain[2]["step.embedding.weight"] == 5
