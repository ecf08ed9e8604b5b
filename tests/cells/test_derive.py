"""Backwards derived from forwards: as right as differences say, as small as hand-written ones, and finite where forward is."""

import copy
import itertools
import traceback

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cells import CELLS, Cell, abs, exp, log, maximum, minimum, relu, sigmoid, sqrt, tanh, where
from gpurnn.cells.derive import PRICES, SLOT, cheapest, derive
from gpurnn.cells.trace import COMPARISONS, Graph
from tests.cells.literature import LITERATURE
from tests.conftest import USER_CELLS
from tests.fuzz.random_cells import random_cell

ON_CPU = pytest.mark.skipif(backend.name == "cuda", reason="the executors of a CPU")


def derived(cell):
    """The same cell without its backward."""
    return Cell(cell.name, cell.gates, cell.states, lambda *given: cell.forward(*given)[0], params=cell.params)


def operations(cell):
    """Those of backward, how many values are kept, how many slots there are."""
    graph = cell.trace.backward
    parts = cell.trace.dx, cell.trace.dr, cell.trace.dstate, cell.trace.dparams
    needed = graph.reachable(symbol.index for symbols in parts for symbol in symbols)
    return sum(bool(graph.nodes[i].args) for i in needed), len(cell.trace.kept), cell.trace.slots


def of_one(function, states=1, params=()):
    """A cell of one gate around a function of x, r, the state and the parameters."""
    return Cell("one", 1, states, lambda x, r, state, p: (function(x[0], r[0], state[0], *p),), params=params)


def slope(function, at):
    """df/da at points, derived."""
    cell = of_one(lambda x, r, h: function(x))
    x, zero = np.asarray(at, float), np.zeros(np.shape(at))
    after, saved = cell.trace.run_forward((x,), (zero,), (zero,), ())
    (dx,), *_ = cell.trace.run_backward((np.ones(x.shape),), saved, (zero,), after, ())
    return np.broadcast_to(dx, x.shape)


@ON_CPU
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.parametrize("name", LITERATURE)
def test_cells_of_the_literature_are_right_at_once(name, executor):
    gpurnn.check_gradients(LITERATURE[name], executor=executor, T=3, N=2)


@pytest.mark.parametrize(
    ("name", "executor"),
    [("intersection", "step"), ("exponential_gates", "resident")]
    + [pytest.param("intersection", executor, marks=pytest.mark.slow) for executor in ("resident", "persistent")]
    + [pytest.param("exponential_gates", executor, marks=pytest.mark.slow) for executor in ("step", "persistent")],
)
def test_on_interpreted_kernels(name, executor):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.kernels.test_kernels import compare

    compare(LITERATURE[name], (3, 3, 2, 5), executor, inference=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rnn_tanh", (3, 0, 1)),
        ("rnn_relu", (2, 0, 1)),
        ("rnn_sigmoid", (3, 0, 1)),
        ("rnn_identity", (0, 0, 1)),
        ("lstm", (23, 4, 4)),
        ("gru", (15, 4, 4)),
    ],
)
def test_shipped_cells_are_as_small_as_by_hand(name, expected):
    assert CELLS[name].backward is None and operations(CELLS[name]) == expected


@pytest.mark.parametrize("name", sorted({*USER_CELLS} - {"every_function"}))
def test_no_larger_than_by_hand(name):
    mine, by_hand = operations(derived(USER_CELLS[name])), operations(USER_CELLS[name])
    assert all(a <= b for a, b in zip(mine, by_hand, strict=True)), (mine, by_hand)


def assert_same_gradients(cell, seed, size=20):
    rng = np.random.default_rng(seed)
    mine = derived(cell)
    x, r, state, dnext = (tuple(rng.standard_normal((n, size))) for n in (*(cell.gates,) * 2, *(cell.states,) * 2))
    params = tuple(0.5 + rng.random((len(cell.params), size)))
    with np.errstate(all="ignore"):
        after, saved = cell.forward(x, r, state, params)
        expected = cell.backward(dnext, saved, state, after, params)
        after, saved = mine.trace.run_forward(x, r, state, params)
        got = mine.trace.run_backward(dnext, saved, state, after, params)
    for what, theirs, ours in zip(("dx", "dr", "dstate", "dparams"), expected, got, strict=True):
        for k, (a, b) in enumerate(zip(theirs, ours, strict=True)):
            a, b = (np.broadcast_to(value, (size,)) for value in (a, b))
            close = np.allclose(a, b, rtol=1e-9, atol=1e-11 * max(1.0, np.abs(a).max()))
            assert close, f"seed {seed}: {what}[{k}] {a} {b}"


@pytest.mark.parametrize("name", USER_CELLS)
def test_gradients_are_those_by_hand(name):
    assert_same_gradients(USER_CELLS[name], seed=0)


@pytest.mark.parametrize("first", [0, *(pytest.param(k, marks=pytest.mark.slow) for k in range(100, 2000, 100))])
def test_of_random_cells_too(first):
    for seed in range(first, first + 100):
        assert_same_gradients(random_cell(np.random.default_rng(seed)), seed)


def test_kinks():
    assert slope(relu, [-1, 0, 1]).tolist() == [0, 0, 1]
    assert slope(lambda a: maximum(2, a), [1, 2, 3]).tolist() == [0, 0, 1]
    assert slope(lambda a: minimum(a, 2), [1, 2, 3]).tolist() == [1, 0, 0]
    assert slope(abs, [-2, 0, 2]).tolist() == [-1, 0, 1]
    assert slope(sqrt, [0, 0.25, 4]).tolist() == [0, 1, 0.25]
    assert slope(lambda a: maximum(3 * a, a), [-1, 0, 1]).tolist() == [1, 2, 3]  # half of each where both are equal
    assert slope(lambda a: minimum(3 * a, a), [-1, 0, 1]).tolist() == [3, 2, 1]
    assert slope(lambda a: where(a < 0, -a, 3 * a), [-1, 0, 1]).tolist() == [-1, 3, 3]


@pytest.mark.parametrize("value", [-np.inf, -1e300, -800.0, -1.0, 0.0, 1e-320, 1.0, 800.0, 1e300, np.inf])
@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a: where(a > 0.5, log(a), 0), lambda a: 1 / a if a > 0.5 else 0),
        (lambda a: where(a > 0.5, sqrt(a) * 3, a), lambda a: 1.5 / np.sqrt(a) if a > 0.5 else 1),
        (lambda a: where(a <= 0.5, 2 * a, 1 / a), lambda a: -1 / a**2 if a > 0.5 else 2),
        (lambda a: where(a < 1, exp(a) - 1, a), lambda a: np.exp(a) if a < 1 else 1),
        (lambda a: where(a <= 0, where(a < -1, 0, a * exp(a)), 1 / (a + 1)),
         lambda a: 0 if a < -1 else (1 + a) * np.exp(a) if a <= 0 else -1 / (1 + a) ** 2),
        (lambda a: log(maximum(a, 0.5)), lambda a: 1 / a if a > 0.5 else 0),
        (lambda a: sqrt(maximum(a, 0)), lambda a: 0.5 / np.sqrt(a) if a > 0 else 0),
        (lambda a: where(a < 0, a, 0) - log(1 + exp(where(a < 0, a, -a))), lambda a: 1 / (1 + np.exp(a))),
    ],
)  # fmt: skip
def test_what_is_not_taken_leaks_nothing(function, expected, value):
    with np.errstate(all="ignore"):
        got, wanted = slope(function, [value, value])[0], expected(np.float64(value))
    assert np.isclose(got, wanted, rtol=1e-12, atol=0), (got, wanted)


@ON_CPU
@pytest.mark.parametrize("executor", ["numpy", "compiled"])
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_nothing_leaks_into_a_layer_either(executor):
    cell = of_one(lambda x, r, h, u: where(x + r > 1000, log(x) / u + sqrt(r), tanh(x + r) * u), params=("u",))
    layer = gpurnn.Recurrent(cell, 2, 5, executor=executor, rng=0)  # u is 0
    y, _, backward = layer(np.zeros((3, 2, 2), np.float32))
    dx, dh = backward(np.ones_like(y))
    assert all(np.isfinite(part).all() for part in (y, dx, dh, *layer.grads.values()))


def test_nan_is_not_hidden():
    with np.errstate(all="ignore"):
        for function in (sqrt, log, tanh, lambda a: a / (a + 1), lambda a: a * a):
            assert np.isnan(slope(function, [np.nan])).all()
        assert np.isnan(slope(sqrt, [-1.0])).all()


def test_a_gate_near_1_lets_the_rest_through_to_the_last_bit():
    cell, one = CELLS["gru"], np.float32(1 - 2**-20)
    saved = {"reset": np.float32(0.5), "z": one, "n": np.float32(0), "r": np.float32(0)}
    names = {symbol.index: value for symbol, value in zip(cell.trace.saved, _gru_kept(cell, saved), strict=True)}
    given = tuple(names[symbol.index] for symbol in cell.trace.saved)
    dh = np.float32(1 / 3)
    dx, *_ = cell.trace.run_backward((dh,), given, (np.float32(0),), (np.float32(0),), ())
    assert dx[2] == dh * np.float32(2**-20)


def _gru_kept(cell, values):
    """What the GRU keeps, in its order, told apart by the forward graph: r of the split gate, then reset, z, n."""
    graph = cell.trace.forward
    for symbol in cell.trace.saved:
        node = graph.nodes[symbol.index]
        if node.op == "input":
            yield values["r"]
        elif node.op == "tanh":
            yield values["n"]
        else:
            inputs = {graph.nodes[i].value for i in graph.reachable([symbol.index]) if graph.nodes[i].op == "input"}
            yield values["reset" if ("x", 0) in inputs else "z"]


def cost_of(kept, nodes, needed, free):
    total, seen, stack = SLOT * len(kept), {*kept, *free}, list(needed)
    while stack:
        index = stack.pop()
        if index not in seen:
            seen.add(index)
            if nodes[index].op == "input":
                return np.inf
            total += PRICES.get(nodes[index].op, 1)
            stack.extend(nodes[index].args)
    return total


@pytest.mark.parametrize("name", ["rnn_sigmoid", "ugrnn", "star", "leaky_rate", "oscillators", "addition_subtraction"])
def test_what_is_kept_costs_least(name):
    """Against all choices there are."""
    trace = (CELLS | LITERATURE)[name].trace
    nodes = trace.forward.nodes
    free = {s.index for s in (*trace.state, *trace.params)} | {i for i, n in enumerate(nodes) if n.op == "const"}
    choices = [i for i, node in enumerate(nodes) if i not in free and node.op not in COMPARISONS]
    rng, kept = np.random.default_rng(0), []
    for needed in [[i for i, n in enumerate(nodes) if n.args], *(rng.choice(choices, 3).tolist() for _ in range(2))]:
        every = (set(some) for n in range(len(choices) + 1) for some in itertools.combinations(choices, n))
        kept.append(cheapest(nodes, needed, free))
        assert cost_of(set(kept[-1]), nodes, needed, free) == min(cost_of(some, nodes, needed, free) for some in every)
    assert any(kept)


def test_a_condition_has_no_slot():
    """Though to keep it would be cheaper than what both choices gave."""

    def forward(x, r, state, params):
        return state[0] * where(x[0] < r[0], 1, 2), state[1] * where(x[0] < r[0], 3, 4)

    cell = Cell("switched", 1, 2, forward)
    assert len(cell.trace.kept) == 2
    gpurnn.check_gradients(cell, executor="numpy", T=2, N=2)


def test_equal_forwards_are_one_cell_and_one_code():
    from gpurnn.cpu.rows import backward_rows, forward_rows

    def factory(rate, name="leaky", unused=False):
        def forward(x, r, state, params):
            if unused:
                _ = exp(x[0]) * 7
            return (rate * state[0] + (1 - rate) * tanh(r[0] + x[0]),)

        return Cell(name, 1, 1, forward)

    FLOAT = np.dtype("float32")
    cells = [factory(0.5, f"c{k}", unused=k % 2 == 1) for k in range(60)]
    assert len({*cells, copy.deepcopy(cells[0])}) == 1 and factory(0.25) != cells[0]
    assert len({id(part(cell, FLOAT)) for cell in cells for part in (forward_rows, backward_rows)}) == 2


rate = 0.5  # a global that a forward below reads


def test_a_derived_cell_is_what_it_was_when_it_was_made():
    global rate
    cell = of_one(lambda x, r, h: rate * h + tanh(x + r))
    expected = cell.trace.text
    try:
        rate = "nothing that multiplies"
        gpurnn.check_gradients(cell, executor="numpy", T=2, N=2)
    finally:
        rate = 0.5
    assert cell.trace.text == expected


def test_a_long_cell_is_derived_too():
    def long(x, r, h):
        for k in range(2000):
            h = h + 1e-4 * k * x
        return h

    assert operations(of_one(long))[0] > 0


@pytest.mark.parametrize(
    ("states", "returned", "says"),
    [
        (1, lambda h: h, "next_state as a tuple of 1 value, such as (h,), got a value"),
        (1, lambda h: None, "a tuple of 1 value, such as (h,), got NoneType"),
        (1, lambda h: (h, h), "a tuple of 1 value, such as (h,), got a tuple of 2"),
        (2, lambda h: (h,), "a tuple of 2 values, got a tuple of 1"),
        (1, lambda h: ((h,), (h, h)), "forward returns next_state alone, a tuple of 1 values, got (a tuple of 1, a tuple of 2)"),
        (2, lambda h: ((h, h), ()), "forward returns next_state alone, a tuple of 2 values, got (a tuple of 2, a tuple of 0)"),
    ],
)  # fmt: skip
def test_a_forward_that_returns_something_else_is_told(states, returned, says):
    with pytest.raises(ValueError) as caught:
        Cell("odd_one", 1, states, lambda x, r, state, params: returned(tanh(x[0])))
    assert f"cell odd_one: {'without a backward, ' if 'alone' in says else ''}" in str(caught.value)
    assert says in str(caught.value)


def test_what_is_no_number_is_told():
    with pytest.raises(TypeError, match="got str") as caught:
        of_one(lambda x, r, h: "h")
    assert "forward of cell one" in "".join(traceback.format_exception_only(caught.value))


def test_with_a_backward_forward_returns_what_it_saves():
    with pytest.raises(
        ValueError, match="forward returns next_state, saved, got a tuple of 1; without a backward, next"
    ):
        Cell("odd_one", 1, 1, lambda x, r, state, params: (x[0],), lambda *_: ())


def test_derive_says_what_it_kept():
    graph = Graph()
    x = graph.input("x", 0)
    y = sigmoid(x) * tanh(x)
    back, (dx,), kept = derive(graph, [y.index], [x.index], {y.index: ("next_state", 0)})
    names = {back.nodes[i].value for i in back.reachable([dx.index]) if back.nodes[i].op == "input"}
    assert names == {("dnext", 0), *(("saved", index) for index in kept)}
