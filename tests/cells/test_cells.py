"""The cell contract: what the trace sees, what it refuses, and that every backward is the derivative of its forward."""

import copy
import dataclasses
import math
import traceback

import numpy as np
import pytest

import gpurnn
from gpurnn.cells import (
    CELLS,
    GRU_CELL,
    LSTM_CELL,
    Cell,
    abs,
    exp,
    log,
    maximum,
    minimum,
    relu,
    sigmoid,
    sqrt,
    tanh,
    where,
)


def elman(forward_value=lambda x, r, h: tanh(x + r), backward_value=lambda d, h: d * (1 - h * h), name="test"):
    """A cell with one gate and one state from the value of each function."""

    def forward(x, r, state, params):
        return (forward_value(x[0], r[0], state[0]),), ()

    def backward(dnext, saved, state, next_state, params):
        da = backward_value(dnext[0], next_state[0])
        return (da,), (da,), (0,), ()

    return Cell(name, gates=1, states=1, forward=forward, backward=backward)


def shown(error):
    return "".join(traceback.format_exception_only(error))


def split_gates(cell):
    return cell.trace.split, cell.trace.slots


def test_gates_are_joint_where_x_and_r_meet_only_in_a_sum_and_their_gradients_are_one(any_cell):
    expected = {"gru": (2,), "minimal_gated_unit": (0,), "three_states": (1,), "hoarder": (0,)}
    expected["every_function"] = (1,)
    assert any_cell.trace.split == expected.get(any_cell.name, ())


def test_values_that_are_known_by_another_name_are_not_kept_twice(any_cell):
    kept = {"lstm": 4, "gru": 4, "minimal_gated_unit": 3, "peephole_lstm": 4, "three_states": 4, "every_function": 3}
    kept |= {
        "hoarder": 4,
        "mingru": 2,
        "minlstm": 3,
        "sru": 4,
        "rglru": 4,
        "lru": 2,
        "paragru": 3,
        "paralstm": 3,
        "slstm": 8,
    }  # of the hoarder a, x, r and a*a of nine saved values
    expected = kept.get(any_cell.name, 0)
    assert len(any_cell.trace.kept) == expected, (
        f"{any_cell.name}: {expected} in the table above; a new cell takes a row"
    )
    assert any_cell.trace.slots == max(any_cell.gates + len(any_cell.trace.split), len(any_cell.trace.kept))


def test_equal_expressions_are_one_node():
    cell = elman(lambda x, r, h: tanh(x + r) * tanh(r + x) + 0.5 * tanh(x + r))
    assert cell.trace.text.count("= tanh") == 1
    assert split_gates(cell) == ((), 1)


def test_dead_code_changes_neither_layout_nor_key():
    def wasteful(x, r, h):
        value = tanh(x + r)
        exp(2 * x)
        return value

    plain, dead = elman(), elman(wasteful)
    assert plain.trace.text == dead.trace.text
    assert split_gates(plain) == split_gates(dead) == ((), 1)


def test_the_key_tells_next_states_from_saved_values_and_parameters():
    def first(x, r, state, params):
        return (x[0] + r[0],), (2 * x[0],)

    def second(x, r, state, params):
        return (x[0] + r[0], 2 * x[0]), ()

    def back_first(dnext, saved, state, next_state, params):
        return (dnext[0],), (dnext[0],), (0,), (0,)

    def back_second(dnext, saved, state, next_state, params):
        return (dnext[0],), (dnext[0],), (0, 0), ()

    one_state = Cell("a", 1, 1, first, back_first, params=("u",))
    two_states = Cell("b", 1, 2, second, back_second)
    assert one_state.trace.text != two_states.trace.text


@pytest.mark.parametrize("factor", [2, 2.0, np.float32(2), np.int64(2)])
def test_the_key_follows_the_mathematics_through_helpers_and_closures(factor):
    def cell(scale):
        def helper(a):
            return scale * a

        return elman(lambda x, r, h: tanh(helper(x + r)), lambda d, h: scale * d * (1 - h * h))

    assert cell(factor).trace.text == cell(2).trace.text != cell(3).trace.text
    gpurnn.check_gradients(cell(factor), executor="numpy")


def test_simplifications_keep_values():
    cell = elman(lambda x, r, h: ((x + r) * 1 + 0 - 0) / 1 + 0 * h + 0)
    assert cell.trace.text == elman(lambda x, r, h: x + r).trace.text
    assert elman(lambda x, r, h: 0 - (x + r)).trace.text != cell.trace.text


def test_constants_fold_as_numpy_computes_them():
    cell = elman(lambda x, r, h: minimum(x + r, 1 / (0 * x)) + exp(0 * x + 1000) * 0 + maximum(log(0 * x), -1))
    assert "value inf" not in cell.trace.text
    assert " inf" in cell.trace.text
    assert "-1.0" in cell.trace.text


@pytest.mark.parametrize(
    ("ours", "numpys"),
    [
        (tanh, np.tanh),
        (exp, np.exp),
        (lambda a: abs(a), lambda a: np.absolute(a)),
        (lambda a: log(a * a + 1), lambda a: np.log(np.square(a) + 1)),
        (lambda a: sqrt(a * a + 1), lambda a: np.sqrt(np.add(np.multiply(a, a), 1))),
        (relu, lambda a: np.maximum(a, 0)),
        (lambda a: minimum(a, 1), lambda a: np.minimum(a, 1)),
        (lambda a: where(a > 0, a, 0), lambda a: np.where(np.greater(a, 0), a, 0)),
        (lambda a: where(a <= 0, a, 0), lambda a: np.where(np.less_equal(a, np.float32(0)), a, 0)),
        (lambda a: -a / 2 - a, lambda a: np.subtract(np.divide(np.negative(a), 2), a)),
        (lambda a: +(a**3), lambda a: a * a * a),
    ],
)
def test_numpys_functions_are_ours(ours, numpys):
    traces = [elman(lambda x, r, h, f=f: f(x + r)).trace.text for f in (ours, numpys)]
    assert traces[0] == traces[1]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (lambda x, r, h: x if x > 0 else r, "no `if`"),
        (lambda x, r, h: x and r, "no `if`"),
        (lambda x, r, h: x.sum(), "`sum`"),
        (lambda x, r, h: np.sum(x), "sum"),
        (lambda x, r, h: where(x == r, x, r), "=="),
        (lambda x, r, h: where(x != r, x, r), "=="),
        (lambda x, r, h: np.sin(x), "sin"),
        (lambda x, r, h: np.add(x, r, dtype=np.float32), "add"),
        (lambda x, r, h: float(x), "float"),
        (lambda x, r, h: math.tanh(x), "math"),
        (lambda x, r, h: x @ r, "@"),
        (lambda x, r, h: x**0.5, "0.5"),
        (lambda x, r, h: x * np.ones(3), "ndarray"),
        (lambda x, r, h: x * True, "bool"),
        (lambda x, r, h: x * None, "NoneType"),
        (lambda x, r, h: x > 0, "comparison"),
        (lambda x, r, h: tanh(x > 0), "comparison"),
        (lambda x, r, h: (x > 0) * x, "comparison"),
        (lambda x, r, h: where((x > 0) > r, x, r), "comparison"),
        (lambda x, r, h: where(x > 0, x > r, r), "comparison"),
        (lambda x, r, h: where(x, x, r), "condition of where"),
        (lambda x, r, h: where(True, x, r), "condition of where"),
        (lambda x, r, h: None, "NoneType"),
    ],
)
def test_what_is_not_elementwise_is_refused_by_name(value, says):
    with pytest.raises(TypeError) as caught:
        elman(value, name="my_cell")
    assert says in str(caught.value)
    assert "my_cell" in shown(caught.value)
    assert "forward" in shown(caught.value)


def test_a_value_smuggled_from_forward_to_backward_is_refused():
    stash = []
    with pytest.raises(TypeError, match="saved"):
        elman(lambda x, r, h: stash.append(x) or tanh(x + r), lambda d, h: d * stash[0])


@pytest.mark.parametrize(
    ("forward", "backward", "says"),
    [
        (((0,), ()), ((0, 0), (0,), (0,), ()), ("dx", "1", "2")),
        (((0,), ()), ((0,), (), (0,), ()), ("dr", "1", "0")),
        (((0,), ()), ((0,), (0,), (0, 0), ()), ("dstate", "1", "2")),
        (((0,), ()), ((0,), (0,), (0,), (0,)), ("dparams", "0", "1")),
        (((0,), ()), ((0,), (0,), (0,)), ("backward", "dparams", "tuple of 3")),
        (((0,), ()), 0, ("backward", "int")),
        (((0,), ()), (0, (0,), (0,), ()), ("dx", "int")),
        (((0, 0), ()), ((0,), (0,), (0,), ()), ("next_state", "1", "2")),
        ((0, ()), ((0,), (0,), (0,), ()), ("next_state", "int")),
        (((0,),), ((0,), (0,), (0,), ()), ("forward", "saved", "tuple of 1")),
        (((0,), 0), ((0,), (0,), (0,), ()), ("saved", "int")),
    ],
)
def test_wrong_counts_are_refused_by_name(forward, backward, says):
    with pytest.raises(ValueError, match="cell odd_one") as caught:
        Cell("odd_one", 1, 1, lambda *_: forward, lambda *_: backward)
    for word in says:
        assert word in str(caught.value)


def test_errors_of_python_itself_name_the_cell():
    def unpacks_too_much(dnext, saved, state, next_state, params):
        dh, dc = dnext
        return (dh,), (dc,), (0,), ()

    with pytest.raises(ValueError) as caught:
        Cell("short", 1, 1, lambda x, r, state, params: ((x[0],), ()), unpacks_too_much)
    assert "in backward of cell short" in shown(caught.value)


@pytest.mark.parametrize(("gates", "states"), [(0, 1), (1, 0), (1.0, 1), ("1", 1), (1, None)])
def test_gates_and_states_are_whole_numbers(gates, states):
    with pytest.raises(ValueError, match="cell bad: expected"):
        Cell("bad", gates, states, lambda *_: ((0,), ()), lambda *_: ((0,), (0,), (0,), ()))


def test_cells_are_frozen_hashable_and_can_be_copied():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LSTM_CELL.gates = 3
    assert hash(LSTM_CELL) == hash(dataclasses.replace(LSTM_CELL))
    assert LSTM_CELL != GRU_CELL
    assert copy.deepcopy(LSTM_CELL) == LSTM_CELL
    assert copy.deepcopy(LSTM_CELL).trace.text == LSTM_CELL.trace.text
    assert {cell.name for cell in CELLS.values()} == set(CELLS)


def test_states_have_names(user_cell):
    assert user_cell.state_names == ("h", "c", "s2")[: user_cell.states]


@pytest.mark.parametrize("executor", ["numpy", "compiled"])
def test_gradients_of_every_cell(any_cell, executor):
    errors = gpurnn.check_gradients(any_cell, executor=executor, T=3, N=2)
    assert {"x", "weight_ih_l0", "bias_ih_l0", "h_0"} <= set(errors)
    assert any_cell.recurrent == ("weight_hh_l0" in errors) == ("bias_hh_l0" in errors)
    assert {f"{name}_l0" for name in any_cell.params} <= set(errors)


def spoiled(cell, dx=None, dr=None, dstate=None, dparams=None):
    """`cell` with one part of its backward replaced by a function of it."""
    changes = (dx, dr, dstate, dparams)
    forward, derivative = cell.functions()

    def backward(*arguments):
        parts = derivative(*arguments)
        return tuple(change(part) if change else part for change, part in zip(changes, parts, strict=True))

    return dataclasses.replace(cell, forward=forward, backward=backward)


@pytest.mark.parametrize(
    ("name", "change", "wrong", "executor"),
    [
        ("lstm", {"dx": lambda d: (-d[0], *d[1:])}, "x by", "numpy"),
        ("lstm", {"dstate": lambda d: (d[0], 0)}, "c_0 by", "compiled"),
        ("gru", {"dr": lambda d: (d[0], 0.99 * d[1], d[2])}, "weight_hh_l0 by", "numpy"),
        ("gru", {"dr": lambda d: (d[0], 0.99 * d[1], d[2])}, "weight_hh_l0 by", "compiled"),
        ("gru", {"dr": lambda d: (*d[:2], d[0])}, "bias_hh_l0 by", "numpy"),
        ("gru", {"dstate": lambda d: (2 * d[0],)}, "h_0 by", "numpy"),
        ("peephole_lstm", {"dparams": lambda d: (d[0], d[2], d[1])}, "peephole_f_l0 by", "compiled"),
        ("tanh_indrnn", {"dparams": lambda d: (0,)}, "u_l0 by", "numpy"),
    ],
)
def test_planted_mistakes_are_caught_by_name(request, name, change, wrong, executor):
    cell = (CELLS | request.config.user_cells)[name]
    with pytest.raises(gpurnn.GradientError, match=wrong) as caught:
        gpurnn.check_gradients(spoiled(cell, **change), executor=executor, T=3, N=2)
    assert caught.match(f"^{name}: ")


def test_sigmoid_and_relu_at_the_ends():
    x = np.array([-1e4, -1.0, 0.0, 1.0, 1e4])
    with np.errstate(all="raise"):
        np.testing.assert_allclose(sigmoid(x), [0, 1 / (1 + np.e), 0.5, np.e / (1 + np.e), 1], rtol=1e-15)
    np.testing.assert_array_equal(relu(x), [0, 0, 0, 1, 1e4])
