"""The operations of a training step: NumPy's and CUDA's have the same names and arguments, and give the same."""

import inspect

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn import backend
from gpurnn.cpu import ops as on_numpy
from gpurnn.parameters import Parameters
from tests.fake_cupy.compare import assert_same

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="compares with the stand-in for CuPy")


def public(module):
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and (not inspect.ismodule(value)) and name not in IMPORTED
    }


IMPORTED = {"Any", "ALIGNMENT", "Array", "Cell", "Moves", "Parameters", "all_finite", "annotations"} | {
    "column_sums", "compiles", "raise_where_not_finite", "segment_sums",
}  # fmt: skip


def parameters(function):
    target = function.run if inspect.isclass(function) else function
    return list(inspect.signature(target).parameters)


def test_both_have_the_same_names_and_arguments():
    from gpurnn.cuda import ops as on_cuda

    ours, theirs = public(on_numpy), public(on_cuda)
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if callable(value):
            assert parameters(value) == parameters(theirs[name]), name
        else:
            assert type(value) is type(theirs[name]), name


def values(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def gradients():
    grads = Parameters({"a": (3, 2), "b": (5,)}, "float32")
    for name, shape in grads.shapes.items():
        grads[name] = put(values(*shape))
    return grads


def put(array):
    return backend.xp.asarray(array)


def cleared():
    buffer = put(values(40))
    backend.ops.clear(buffer)
    return buffer


def added(operation, *given):
    target = put(np.ones((4, 3) if operation != "add_columns" else 3, "float32"))
    getattr(backend.ops, operation)(target, *map(put, given))
    return target


def clipped():
    grads = gradients()
    return backend.ops.clip_norm(grads, 2.0), grads.flat


def dropped():
    calls = put(np.array([7]))
    number = backend.ops.advance(calls)
    return calls, backend.ops.drop(put(values(6, 5)), 12345, number, 1 << 31, np.float32(2))


def kept():
    own = {}
    given = {"begin": (put(values(2)), put(values(3))), "carried": None, "stretch": put(values(4, 2))}
    found = backend.ops.kept(own, given, ("stretch",))
    assert found["carried"] is None and found["stretch"] is not given["stretch"]
    return (*found["begin"], found["stretch"])


CASES = {
    "zeros": lambda: backend.ops.zeros(5, np.dtype("float32")),
    "clear": cleared,
    "protected": lambda: backend.ops.protected(put(values(3))),
    "kept": kept,
    "product": lambda: backend.ops.product(put(values(4, 5)), put(values(3, 5, seed=1)).T),
    "add_product": lambda: added("add_product", values(4, 5), values(5, 3, seed=1)),
    "add_columns": lambda: added("add_columns", values(50, 3)),
    "gather": lambda: backend.ops.gather(put(values(4, 3)), put(np.array([[3, 0], [1, 3]]))),
    "add_rows": lambda: added("add_rows", np.array([3, 0, 3, 3]), values(4, 3)),
    "cross_entropy": lambda: backend.ops.cross_entropy(put(values(6, 4)), put(np.arange(6) % 4), 2, "mean"),
    "exponentials": lambda: backend.ops.exponentials(put(values(6, 4) + 40), -1),
    "norm": lambda: backend.ops.norm(gradients()),
    "clip_norm": clipped,
    "drop": dropped,
}


@pytest.mark.parametrize("name", CASES)
def test_both_give_the_same(name):
    assert_same(CASES[name], "float32")
