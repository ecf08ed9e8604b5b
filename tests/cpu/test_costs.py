"""The measured constants of the CPU side: each with unit, experiment and user, chosen by CPU, and none elsewhere."""

import ast
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import gpurnn
from bench import calibrate
from bench.__main__ import main
from bench.calibrate import measure
from bench.calibrate.measure import Case, Experiment, Settings, Way
from gpurnn import backend, environment
from gpurnn.cpu import barrier, cache, combine, compiled, costs, crew, gemm, reduction

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

ROOM = Path(costs.__file__).parent
COSTS = calibrate.annotations()
# What capitals name beside costs: numbers that are no measure of time.
FACTS = {
    "barrier": {"CACHE_LINE"},
    "combine": {"SIDE_BY_SIDE"},
    "crew": {"ASLEEP", "IDLE", "HIRED", "CALLED", "JOB", "DONE", "FOR_EVER", "REST", "LOCK", "ACQUIRE", "RELEASE"},
    "cross_entropy": {"SAFE"},
    "dot": {"COLUMNS"},
    "dropout": {"EACH"},
    "gemm": {"TILE_ROWS"},
    "memory": {"KEPT", "FITS"},
    "records": {"WORD"},
    "reduction": {"SIDE_BY_SIDE"},
    "subnormals": {"X86", "ARM"},
    "sums": {"CHUNK"},
}


def source(module):
    return ast.parse((ROOM / f"{module}.py").read_text())


def numbers(module):
    """The names that a module gives numbers to, at its top."""
    found = set()
    for node in source(module).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        leaves = [
            leaf for leaf in ast.walk(node.value) if not isinstance(leaf, (ast.operator, ast.expr_context, ast.unaryop))
        ]
        plain = (ast.Constant, ast.BinOp, ast.UnaryOp, ast.Tuple)
        whole = all(isinstance(leaf, plain) and isinstance(getattr(leaf, "value", 0), (int, float)) for leaf in leaves)
        is_range = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "range"
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if (whole and not any(isinstance(getattr(leaf, "value", 0), bool) for leaf in leaves)) or is_range:
            found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def readers(constant):
    """The modules of the room that read `costs.CONSTANT`."""
    return {path.stem for path in ROOM.glob("*.py") if re.search(rf"\bcosts\.{constant}\b", path.read_text())}


def test_every_constant_is_in_the_table():
    assert set(COSTS) == set(costs.NAMES) == numbers("costs") and len(COSTS) > 20


@pytest.mark.parametrize("constant", costs.NAMES)
def test_a_constant_has_a_unit_an_experiment_and_its_users(constant):
    cost = COSTS[constant]
    assert cost.unit
    assert constant in calibrate.EXPERIMENTS[cost.experiment].constants
    assert set(cost.users.split()) == readers(constant) != set()


def test_every_experiment_is_some_constants():
    asked = [constant for experiment in calibrate.EXPERIMENTS.values() for constant in experiment.constants]
    assert sorted(asked) == sorted(costs.NAMES)


@pytest.mark.parametrize("module", sorted(path.stem for path in ROOM.glob("*.py") if path.stem != "costs"))
def test_no_other_module_has_a_measured_number(module):
    named = {name for name in numbers(module) if name.isupper() and not name.startswith(("EXP_", "LOG_", "TANH_"))}
    assert named == FACTS.get(module, set())


def test_another_cpu_has_what_its_family_and_its_model_say(monkeypatch):
    rows = {("AuthenticAMD", "25"): {"CHAINS": 2, "SUM_ROWS": 3}, ("AuthenticAMD", "25", "17"): {"CHAINS": 4}}
    monkeypatch.setattr(costs, "BY_CPU", rows)
    assert costs.differing(("AuthenticAMD", "25", "17")) == {"CHAINS": 4, "SUM_ROWS": 3}
    assert costs.differing(("AuthenticAMD", "25", "1")) == {"CHAINS": 2, "SUM_ROWS": 3}
    assert costs.differing(("GenuineIntel", "25", "17")) == costs.differing(("", "", "")) == {}


def test_rows_of_cpus_name_constants_and_differ_from_what_stands_above():
    tree = {node.target.id: ast.unparse(node.value) for node in source("costs").body if isinstance(node, ast.AnnAssign)}
    for cpu, row in costs.BY_CPU.items():
        assert len(cpu) in (2, 3) and all(isinstance(part, str) for part in cpu)
        assert row and set(row) <= set(costs.NAMES)
        assert all(type(value) is type(getattr(costs, name)) for name, value in row.items())
        assert all(value != eval(tree[name]) for name, value in row.items())


def test_this_process_has_its_cpus_row():
    tree = {node.target.id: node.value for node in source("costs").body if isinstance(node, ast.AnnAssign)}
    own = costs.differing(environment.cpu_family())
    for name in costs.NAMES:
        assert costs.KEPT[name] == own.get(name, eval(ast.unparse(tree[name]))), name


def test_the_compile_cache_tells_constants_apart(monkeypatch):
    before = cache._environment_key.__wrapped__()
    monkeypatch.setattr(costs, "KEPT", costs.KEPT | {"SUM_ROWS": costs.SUM_ROWS + 1})
    assert cache._environment_key.__wrapped__() != before


FLOAT32 = np.dtype(np.float32)
COMPILED_IN = [
    ("CHAINS", gemm.make_gemm, FLOAT32),
    ("COMBINE_COLUMNS", combine.combine, FLOAT32),
    ("SUM_ROWS", reduction.reduction, FLOAT32),
    ("SUM_COLUMNS", reduction.reduction, FLOAT32),
    ("FEW_SUM_COLUMNS", reduction.reduction, FLOAT32),
    ("LINGER_TURNS", crew._serve),
    ("LINGER_TURNS", crew._make_hire),
    ("SPIN_TURNS", barrier.make_pause),
    ("SPIN_TURNS", barrier.make_meet),
]


@pytest.mark.parametrize("constant, factory, given", [(name, factory, given) for name, factory, *given in COMPILED_IN])
def test_what_is_compiled_in_is_in_the_functions_key(monkeypatch, constant, factory, given):
    factory(*given)  # what it calls is made here
    keys = []

    def external(function, *key, record=None):
        keys.append(key)
        return SimpleNamespace(python=None)

    monkeypatch.setattr(cache, "external", external)
    for value in (costs.KEPT[constant], costs.KEPT[constant] + 1):
        measure.fresh(factory, *given, **{constant: value})
    assert len(keys) == 2 and keys[0] != keys[1]


def training_step():
    model = gpurnn.SequenceModel(None, gpurnn.LSTM(24, 48, 2, dropout=0.5, rng=0), gpurnn.Linear(48, 7, rng=1))
    optimizer, x = gpurnn.Adam(model, lr=1e-2), np.random.default_rng(0).standard_normal((12, 5, 24), dtype=np.float32)
    for _ in range(3):
        model.zero_grad()
        gpurnn.full_bptt(model, x, np.ones((12, 5), int), gpurnn.softmax_cross_entropy)
        optimizer.step()
    return model.params.flat.tobytes()


@pytest.mark.parametrize(
    "constant", [name for name in costs.NAMES if not COSTS[name].order and name not in {row[0] for row in COMPILED_IN}]
)
def test_what_is_not_said_to_change_the_order_of_sums_leaves_all_bits(monkeypatch, constant):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "2")
    expected = training_step()
    for value in (1, 1000, 1 << 40):
        monkeypatch.setattr(costs, constant, value)
        assert training_step() == expected


@pytest.mark.parametrize("constant, shape", [("COMBINE_COLUMNS", (1, 1, 40, 80)), ("FEW_SUM_COLUMNS", (4, 1, 40, 80))])
def test_nor_do_the_sizes_of_blocks_that_are_compiled_in(monkeypatch, constant, shape):
    T, N, I, H = shape

    def gradients():
        layer = gpurnn.LSTM(I, H, rng=0, executor="compiled")
        y, _, backward = layer(np.random.default_rng(0).standard_normal((T, N, I), dtype=np.float32))
        return backward(np.ones_like(y))[0].tobytes() + layer.grads.flat.tobytes()

    expected = gradients()
    for name, module in (("combine", combine), ("reduction", reduction)):
        made = measure.fresh(getattr(module, name), FLOAT32, **{constant: 16})
        monkeypatch.setattr(compiled, name, measure.always(made))
    monkeypatch.setattr(costs, constant, 16)
    assert gradients() == expected


def test_what_a_value_costs_is_arithmetic(monkeypatch):
    """Four sizes; the second way pays from the third on, and the kept limit takes it from the second on."""
    monkeypatch.setattr(costs, "CLEAR_BYTES", 20)
    cases = [
        Case(f"size {n}", {True: Way(int), False: Way(int)}, lambda n=n: n >= costs.CLEAR_BYTES)
        for n in (10, 20, 30, 40)
    ]
    samples = [{True: [slow, slow], False: [1.0, 2.0]} for slow in (4.0, 2.0, 0.5, 0.25)]
    experiment = Experiment(("CLEAR_BYTES",), lambda quick: cases, {"CLEAR_BYTES": (5, 15, 25, 35, 45)})
    (line,) = measure.judged(experiment, cases, samples)
    assert line.constant == "CLEAR_BYTES" and line.best == (25, 25)
    assert line.costs == pytest.approx((2**0.25, 2**0.25, 1.0))
    assert (line.worst, line.where) == (2.0, "size 20")
    never = Experiment(("CLEAR_BYTES",), lambda quick: cases, {"CLEAR_BYTES": (5, 1000)})
    (line,) = measure.judged(never, cases[:1], samples[:1])
    assert line.best == (20, float("inf")) and line.costs == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("clock", [measure.by_the_wall, measure.by_its_own_time])
def test_each_way_is_timed_with_its_own_costs_and_they_come_back(monkeypatch, clock):
    monkeypatch.setattr(time, "thread_time", iter(range(1, 100)).__next__)
    kept, seen = costs.BLOCK_BYTES, []
    case = measure.sized("sizes", lambda: seen.append(costs.BLOCK_BYTES), "BLOCK_BYTES", (1, 2))
    samples = measure.timed(case, Settings(rounds=3, seconds=0.0), clock)
    assert {way: len(times) for way, times in samples.items()} == {1: 3, 2: 3}
    assert seen == [1, 1, 2, 2, 2, 2, 1, 1, 1, 1, 2, 2]  # untimed and timed, beginning with another way each round
    assert kept == costs.BLOCK_BYTES


def test_own_time_is_the_mean_of_all_runs_and_never_nothing(monkeypatch):
    """Of a run that the system has not booked yet there are more."""
    runs = []
    monkeypatch.setattr(time, "thread_time", iter([5.0, 5.0, 5.0, 5.6]).__next__)
    case = Case("one", {}, int)
    assert measure.by_its_own_time(case, lambda: runs.append(1), 0.0) == pytest.approx(0.2)
    assert len(runs) == 4  # one untimed


def test_calibrate_measures_every_constant(capsys):
    before = {name: getattr(costs, name) for name in costs.NAMES}
    assert main(["calibrate", "--quick"]) == 0
    out = capsys.readouterr().out
    for name in costs.NAMES:
        (line,) = re.findall(rf"^\| .*\b{name}\b.*\|$", out, re.M)
        assert COSTS[name].unit in line or "not measured" in line
    assert " ".join(environment.cpu_family()) in out.splitlines()[0]
    assert "other processes took" in out.splitlines()[-1]
    assert {name: getattr(costs, name) for name in costs.NAMES} == before


def test_calibrate_takes_an_experiment_or_a_constant_by_name(capsys):
    assert calibrate.selected(["UNITS_FLOPS", "loops", "chains"]) == ["loops", "chains"]
    assert main(["calibrate", "--quick", "--only", "speed"]) == 2
    assert "expected an experiment (loops, unitwise, sums," in capsys.readouterr().err
    assert main(["calibrate", "--rounds", "0"]) == 2


def test_with_one_thread_what_takes_two_is_said_not_to_be_measured(monkeypatch, capsys):
    monkeypatch.setenv("GPURNN_NUM_THREADS", "1")
    assert main(["calibrate", "--quick", "--only", "sums"]) == 0
    assert "| SUM_FLOPS | | | not measured: it takes 2 threads | | |" in capsys.readouterr().out


def test_costs_come_without_numba():
    code = "import sys, gpurnn.cpu.costs; assert 'numba' not in sys.modules and 'llvmlite' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOM.parents[1])
