"""What makes two cells one: their mathematics, as it was when each was made; and names that no parameter may have."""

import copy

import numpy as np
import pytest

import gpurnn
from gpurnn import Cell, tanh
from gpurnn.cpu.rows import backward_rows, forward_rows

FLOAT = np.dtype("float32")
leak = 0.5  # a global that `forward` and `backward` read


def forward(x, r, state, params):
    return (leak * state[0] + (1 - leak) * tanh(x[0] + r[0]),), (tanh(x[0] + r[0]),)


def backward(dnext, saved, state, next_state, params):
    d = dnext[0] * (1 - leak) * (1 - saved[0] * saved[0])
    return (d,), (d,), (dnext[0] * leak,), ()


def leaky(name="leaky", functions=(forward, backward)):
    return Cell(name, gates=1, states=1, forward=functions[0], backward=functions[1])


def closed(rate, unused=False):
    """The same cell from a closure; `unused`: with a value that nobody needs."""

    def forward(x, r, state, params):
        if unused:
            _ = state[0] * 3 + 0.25
        return (rate * state[0] + (1 - rate) * tanh(r[0] + x[0]),), (tanh(r[0] + x[0]),)

    def backward(dnext, saved, state, next_state, params):
        d = dnext[0] * (1 - rate) * (1 - saved[0] * saved[0])
        return (d,), (d,), (dnext[0] * rate,), ()

    return leaky("closed", (forward, backward))


def results(cell, executor):
    """Output, gradients and the input's gradient of a small layer; between forward and backward the global changes."""
    global leak
    layer = gpurnn.Recurrent(cell, 3, 5, rng=0, executor=executor)
    x = np.random.default_rng(0).standard_normal((6, 2, 3), dtype=np.float32)
    y, _, back = layer(x)
    before, leak = leak, leak / 3
    dx, _ = back(np.ones_like(y))
    leak = before
    return [y, dx, *layer.grads.values()]


def assert_close(got, expected):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


@pytest.fixture(autouse=True)
def restored():
    global leak
    yield
    leak = 0.5


def test_a_cell_of_functions_whose_global_changed_is_another():
    global leak
    cells = {}
    for leak in (0.1, 0.5, 0.9):
        cells[leak] = leaky()
    assert len(set(cells.values())) == 3
    leak = 0.7
    for rate, cell in cells.items():
        for executor in ("compiled", "numpy"):  # each is what it was when it was made, on every executor
            assert_close(results(cell, executor), results(closed(rate), "numpy"))


def test_a_change_that_breaks_a_function_does_not_reach_a_cell_either():
    global leak
    cell, expected = leaky(), results(closed(0.5), "numpy")
    leak = "not a number"
    layer = gpurnn.Recurrent(cell, 3, 5, rng=0, executor="numpy")
    x = np.random.default_rng(0).standard_normal((6, 2, 3), dtype=np.float32)
    np.testing.assert_allclose(layer(x)[0], expected[0], rtol=1e-6)


def test_closures_apart_are_cells_apart():
    assert closed(0.1) != closed(0.2)
    assert_close(results(closed(0.2), "compiled"), results(closed(0.2), "numpy"))


def test_equal_mathematics_is_one_cell_and_one_code():
    same = [leaky(), leaky("another name"), closed(0.5), closed(0.5, unused=True), copy.deepcopy(closed(0.5))]
    assert len(set(same)) == 1
    assert len({id(forward_rows(cell, FLOAT)) for cell in same}) == 1
    assert len({id(backward_rows(cell, FLOAT)) for cell in same}) == 1
    made = forward_rows.cache_info().misses
    for k in range(60):
        forward_rows(leaky(f"c{k}"), FLOAT)
    assert forward_rows.cache_info().misses == made


def test_the_trace_runs_on_arrays_as_the_functions_do(user_cell):
    rng, shape = np.random.default_rng(0), (2, 3)

    def drawn(count):
        return tuple(0.1 + rng.random(shape) for _ in range(count))

    x, r, state, params = (
        drawn(n) for n in (user_cell.gates, user_cell.gates, user_cell.states, len(user_cell.params))
    )
    given = x, r, state, params
    after, saved = user_cell.forward(*given)
    traced, kept = user_cell.trace.run_forward(*given)
    dnext = drawn(user_cell.states)
    with np.errstate(all="ignore"):
        expected = user_cell.backward(dnext, saved, state, after, params)
        got = user_cell.trace.run_backward(dnext, kept, state, traced, params)
    for mine, theirs in zip((traced, kept, *got), (after, saved, *expected), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_allclose(np.broadcast_to(a, shape), np.broadcast_to(b, shape), rtol=1e-12)


def with_params(*names, states=2):
    def forward(x, r, state, params):
        return (tanh(x[0] + r[0]), *state[1:]), ()

    def backward(dnext, saved, state, next_state, params):
        d = dnext[0] * (1 - next_state[0] * next_state[0])
        return (d,), (d,), (0, *dnext[1:]), (0,) * len(params)

    return Cell("c", gates=1, states=states, forward=forward, backward=backward, params=names)


TAKEN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "h_0", "c_0")


@pytest.mark.parametrize("name", [*TAKEN, "", "a.b", "1", "a b", 3, None, b"a", ("a",)])
def test_names_that_a_parameter_cannot_have(name):
    with pytest.raises(ValueError, match=r"cell c: expected (other )?names in params"):
        with_params("fine", name)


def test_duplicates_and_what_is_no_tuple_of_names_are_refused():
    with pytest.raises(ValueError, match="'a' came before"):
        with_params("a", "b", "a")
    for params in ("leak", 3, None):
        with pytest.raises(ValueError, match="expected params to be a tuple of names"):
            Cell("c", 1, 1, forward, backward, params=params)
    with pytest.raises(ValueError, match="'s2_0' belongs to every layer"):
        with_params("s2_0", states=3)
    assert with_params("s2_0", "weight_ih_l0", "h_1").params == ("s2_0", "weight_ih_l0", "h_1")


@pytest.mark.parametrize("count", [0, -1, 65, 10**9, True, 1.0, "1"])
def test_numbers_of_gates_and_states_have_limits(count):
    for given in ({"gates": count, "states": 1}, {"gates": 1, "states": count}):
        with pytest.raises(ValueError, match="to be a whole number from 1 to 64"):
            Cell("c", **given, forward=forward, backward=backward)


def test_every_name_that_is_taken_has_the_shape_that_its_layer_gives_it():
    layer = gpurnn.Recurrent(with_params("weight_ih_l0", "h_1"), 7, 5, 2, bidirectional=True, trainable_h0=True, rng=0)
    assert layer.params["weight_ih_l0"].shape == (5, 7) and layer.params["weight_ih_l0_l0"].shape == (5,)
    assert len(layer.params) == 4 * 6 + 2
