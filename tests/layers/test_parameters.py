"""Flat buffers and the views into them; loading by name."""

import copy
import pickle

import numpy as np
import pytest

from gpurnn.backend import to_numpy
from gpurnn.parameters import Parameters
from gpurnn.parameters.buffers import ALIGNMENT
from gpurnn.parameters.values import load

SHAPES = {"weight": (3, 5), "bias": (7,), "one": (1, 1)}


@pytest.fixture(params=["float32", "float64"])
def parameters(request):
    parameters = Parameters(SHAPES, request.param, {"weight": "(O, I)"})
    for k, view in enumerate(parameters.values()):
        view[...] = k + 1
    return parameters


def _same_memory(parameters):
    """Writes through the flat buffer show in every view, and the other way round."""
    parameters.flat[...] = 5
    assert all((view == 5).all() for view in parameters.values())
    for view in parameters.values():
        view[...] = 2
    assert parameters.flat.sum() == 2 * parameters.count + 5 * (parameters.flat.size - parameters.count)
    parameters.flat[...] = 0


def test_views_share_the_buffer(parameters):
    assert list(parameters) == list(SHAPES)
    assert {name: view.shape for name, view in parameters.items()} == SHAPES
    assert len(parameters) == 3
    assert parameters.count == 15 + 7 + 1
    assert parameters.flat.sum() == 15 * 1 + 7 * 2 + 3  # what lies between the views is 0
    _same_memory(parameters)


def test_views_are_aligned(parameters):
    """Also in a copy, and whatever place the allocator hands out."""
    many = [Parameters(SHAPES | {"more": (n,)}, parameters.dtype) for n in range(1, 40)]
    for made in (parameters, *many, *copy.deepcopy(many)):
        if isinstance(made.flat, np.ndarray):
            assert {view.ctypes.data % ALIGNMENT for view in made.values()} == {0}
        assert made.flat.size * made.dtype.itemsize % ALIGNMENT == 0


def test_no_parameters_at_all():
    empty = Parameters({}, "float32")
    assert (empty.flat.size, empty.count, list(empty)) == (0, 0, [])
    load(empty, {})


def test_repr_names_every_shape(parameters):
    assert f"Parameters(23 values, {parameters.dtype})\n  weight: (3, 5)" in repr(parameters)


def test_join_keeps_values_and_rebinds(parameters):
    other = Parameters({"bias": (2,)}, parameters.dtype, {"bias": "(C,)"})
    other["bias"][...] = 9
    whole = Parameters.join({"a": parameters, "b": other})
    assert list(whole) == ["a.weight", "a.bias", "a.one", "b.bias"]
    assert whole.symbols == {"a.weight": "(O, I)", "b.bias": "(C,)"}
    assert (to_numpy(whole["a.bias"]) == 2).all()
    assert (to_numpy(whole["b.bias"]) == 9).all()
    _same_memory(whole)
    whole.flat[...] = 4
    assert (parameters["weight"] == 4).all()
    assert (other.flat == 4).all()
    other["bias"][...] = 6
    assert (whole["b.bias"] == 6).all()


def test_join_of_a_join_reaches_the_innermost_parts(parameters):
    outer = Parameters.join({"outer": Parameters.join({"inner": parameters})})
    assert (to_numpy(outer["outer.inner.bias"]) == 2).all()
    outer.flat[...] = 8
    assert (parameters["bias"] == 8).all()


def test_join_refuses(parameters):
    with pytest.raises(ValueError, match="expected parts that differ, got the same values twice, in a and in b"):
        Parameters.join({"a": parameters, "b": parameters})
    with pytest.raises(ValueError, match="expected parts of one dtype, got a: float64, b: float32"):
        Parameters.join({"a": Parameters(SHAPES, "float64"), "b": Parameters(SHAPES, "float32")})
    whole, other = Parameters.join({"a": parameters}), Parameters({"one": (1,)}, parameters.dtype)
    with pytest.raises(ValueError, match="c: belongs to another model already, and not all of c, d lie side by side"):
        Parameters.join({"c": parameters, "d": other})
    with pytest.raises(ValueError, match="the same values twice, in p and in w"):
        Parameters.join({"w": whole, "p": parameters})


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_a_copy_has_a_buffer_of_its_own(parameters, clone):
    whole = Parameters.join({"a": parameters})
    twin = clone(whole)
    assert all((to_numpy(twin[name]) == to_numpy(whole[name])).all() for name in whole)
    _same_memory(twin)
    assert (to_numpy(whole["a.bias"]) == 2).all()
    _same_memory(whole)
    whole.flat[...] = 3
    assert (parameters["one"] == 3).all()  # and the parts stay with their own


def test_a_model_is_copied_with_its_parts_inside(parameters):
    whole, part = copy.deepcopy((Parameters.join({"a": parameters}), parameters))
    whole.flat[...] = 3
    assert (part["bias"] == 3).all()
    assert (parameters["bias"] == 2).all()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": np.ones((5, 3))}, ValueError, r"^weight: expected \(O, I\) = \(3, 5\), got \(5, 3\)$"),
        ({"one": np.ones(1)}, ValueError, r"^one: expected \(1, 1\), got \(1,\)$"),
        ({"one": [[np.nan]]}, ValueError, "^one: expected finite float.. values, got some that are not"),
        ({"one": [[np.inf]]}, ValueError, "^one: expected finite"),
        ({"one": [["1"]]}, TypeError, "^one: expected real numbers, got list"),
        ({"one": [[1j]]}, TypeError, "^one: expected real numbers, got list with dtype complex128"),
        ({"one": None}, TypeError, "^one: expected"),
        ({"extra": 1}, KeyError, r"missing \[\], unknown \['extra'\]"),
    ],
)
def test_load_is_all_or_nothing(parameters, change, error, message):
    before = to_numpy(parameters.flat).copy()
    with pytest.raises(error, match=message):
        load(parameters, {name: np.zeros(shape) for name, shape in SHAPES.items()} | change)
    assert (to_numpy(parameters.flat) == before).all()


def test_load_wants_every_name_and_a_mapping(parameters):
    with pytest.raises(KeyError, match=r"missing \['bias', 'one'\], unknown \['wieght'\]"):
        load(parameters, {"weight": 1, "wieght": 2})
    with pytest.raises(TypeError, match="expected a mapping from names to arrays, got list"):
        load(parameters, [1, 2])


def test_load_refuses_what_float32_cannot_hold():
    small = Parameters({"one": (1,)}, "float32")
    with pytest.raises(ValueError, match="one: expected finite float32 values"):
        load(small, {"one": [1e300]})
