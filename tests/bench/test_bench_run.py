"""The benchmarks' own correctness: reference, check, statistics, results file, floors; nothing here judges a time."""

import itertools
import json
import math
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest

from bench import cases, check, floors, harness, memory, peers, problem, quiet, results, run, statistics, telemetry
from bench.__main__ import main
from bench.cases import Case
from bench.peers import Implementation, numpy_loop, numpy_model
from bench.peers.workload import Workload
from gpurnn import backend

SMALL = Case("cpu", "lstm", 5, 3, 4, 6)
MACHINE = floors.Machine("cpu", {"float32": 1e11}, 1e10, 1 << 20)
FAST = harness.Settings(rounds=4, target_s=0.0, warm_s=0.0, retries=0)
STAMP = {"run": "r", "date": "2026-01-01T00:00:00Z", "commit": "c", "environment": {}}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr(quiet, "settle", lambda: None)
    monkeypatch.setattr(run, "QUICK", FAST)
    monkeypatch.setattr(floors, "measure", lambda *arguments, **options: MACHINE)


def test_names_are_unique_and_found_again():
    every = [case for group in cases.GROUPS.values() for case in group]
    assert len({case.name for case in every}) == len(every)
    assert all(cases.find(case.name) == case for case in every)
    assert all(cases.find(case.name) for case in cases.QUICK)
    with pytest.raises(ValueError, match="did you mean cpu/lstm/T64"):
        cases.find("lstm/T64")


def test_important_cases_come_first_and_groups_take_turns():
    chosen = cases.select(None, None, "cuda")
    ranks = [case.rank for case in chosen]
    assert ranks == sorted(ranks)
    assert {case.group for case in chosen[:6]} == set(cases.ON_CUDA) - {"deepbench"}
    assert all(case.dtype == "float32" for case in cases.select(None, None, "cpu"))
    assert [case.cell for case in cases.select(["cpu"], "cpu/*/T64-*", "cpu")] == ["lstm", "gru", "rnn"]
    with pytest.raises(ValueError, match=r"expected one of cpu, .*got 'gpu'"):
        cases.select(["gpu"], None, "cpu")
    with pytest.raises(ValueError, match="no case"):
        cases.select(None, "nothing*", "cpu")


def test_rounding_to_half_precisions():
    values = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-7, 3.0, 1e-30], np.float32)
    expected = np.array([1, 1 + 4 * 2**-8, -1 - 2**-7, 3, 1e-30], np.float32)  # ties to even
    np.testing.assert_allclose(problem.rounded(values, "bfloat16"), expected, rtol=2**-8)
    assert problem.rounded(values, "bfloat16")[:4].tolist() == expected[:4].tolist()
    assert problem.rounded(np.float32([1 + 2**-11, 1 + 3 * 2**-11]), "float16").tolist() == [1, 1 + 2**-9]
    assert problem.rounded(values, "tf32") is values


def test_problem_with_lengths():
    case = Case("lengths", "gru", 50, 7, 3, 5, lengths="uniform")
    made = problem.make(case, sets=3)
    assert made.lengths.min() >= 5 and made.lengths.max() == 50 and made.tokens == made.lengths.sum()
    behind = np.arange(50)[:, None] >= made.lengths
    assert all((part[behind] == 0).all() and (part[~behind] != 0).any() for part in (*made.x, *made.dy))
    assert not np.array_equal(made.x[0], made.x[1])
    first = made.first(8)
    assert first.x[0].shape == (8, 7, 3) and first.case.T == 8 and first.lengths.max() == 8


@pytest.mark.parametrize("cell", cases.GATES)
@pytest.mark.parametrize(("lengths", "heads"), [(None, 1), ("uniform", 1), (None, 3)])
def test_reference_against_central_differences(cell, lengths, heads):
    made = problem.make(Case("cpu", cell, 5, 3, 4, 6, lengths=lengths, heads=heads), sets=1)
    got = numpy_loop.reference(made, training=True)
    weights = {name: value.astype(np.float64) for name, value in numpy_loop.named(made.weights).items()}
    x, state = made.x[0].astype(np.float64), tuple(part.astype(np.float64) for part in made.state)
    inputs = {"x": x, **weights, **dict(zip(cases.STATES[cell], state, strict=True))}
    rng = np.random.default_rng(0)
    for name, array in inputs.items():
        direction = rng.standard_normal(array.shape)
        values = []
        for sign in (1, -1):
            array += sign * 1e-5 * direction
            y = numpy_loop.layer(made.case, weights, x, state, made.lengths, None)["y"]
            values.append(float((y * made.dy[0]).sum()))
            array -= sign * 1e-5 * direction
        numeric = (values[0] - values[1]) / 2e-5
        assert float((got[f"d{name}"] * direction).sum()) == pytest.approx(numeric, rel=1e-6, abs=1e-8), name


def test_heads_are_a_block_diagonal_matrix():
    made = problem.make(Case("cpu", "lstm", 4, 2, 3, 6, heads=3), sets=1)
    dense = np.zeros((4, 6, 6), np.float32)
    blocks = made.weights["weight_hh_l0"].reshape(4, 3, 2, 2)
    for head in range(3):
        dense[:, 2 * head : 2 * head + 2, 2 * head : 2 * head + 2] = blocks[:, head]
    whole = problem.Problem(
        Case("cpu", "lstm", 4, 2, 3, 6),
        made.weights | {"weight_hh_l0": dense.reshape(24, 6)},
        made.x,
        made.dy,
        made.state,
        None,
    )
    a, b = numpy_loop.reference(made, True), numpy_loop.reference(whole, True)
    for name in a.keys() - {"dweight_hh"}:
        np.testing.assert_allclose(a[name], b[name], atol=1e-12, err_msg=name)


def _here(case, part):
    return [
        i for i in peers.implementations("cpu") if i.missing() is None and i.refuses(case, "training", part) is None
    ]


@pytest.mark.parametrize("lengths", [None, "uniform"])
@pytest.mark.parametrize("cell", cases.GATES)
def test_every_implementation_here_gives_the_reference(cell, lengths):
    case = Case("cpu", cell, 7, 3, 5, 33, lengths=lengths)
    made = problem.make(case)
    expected = check.Expected(made)
    tried = [i for i in _here(case, "layer") if i.name != "torch-compile"]  # it takes a C++ compiler and its time
    assert {"gpurnn-compiled", "gpurnn-numpy", "numpy-loop"} <= {i.name for i in tried}
    for implementation in tried:
        workload = implementation.build(made, "training", "layer")
        assert expected.error(workload.results(), check.REQUIRED["layer"]) < 1e-5, implementation.name
        assert workload.results().keys() == expected.values.keys(), implementation.name
        assert set(implementation.build(made, "inference", "layer").results()) == {"y"}


def test_every_character_model_here_takes_the_same_three_steps():
    case = Case("train", "lstm", 6, 3, 5, 33)
    expected = check.Expected(problem.make(case))
    assert (expected.values["norms"] > problem.CLIP_NORM).all(), "clipping is not exercised"
    for implementation in _here(case, "model"):
        got = implementation.build(problem.make(case), "training", "model").results()
        assert expected.error(got, check.REQUIRED["model"]) < 1e-5, implementation.name


@pytest.fixture
def on_a_gpu():
    """The CUDA backend with interpreted kernels."""
    if backend.name == "cuda":
        pytest.skip("on a GPU the kernels run on the GPU")
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.interpreted import interpreted

    with interpreted():
        yield


def _ours_on_cuda():
    return {i.name: i for i in peers.implementations("cuda") if i.ours}


def test_the_cuda_table_refuses_what_ours_cannot_run(on_a_gpu):
    table = _ours_on_cuda()
    assert list(table) == ["gpurnn-resident", "gpurnn-persistent", "gpurnn-step", "gpurnn-numpy"]
    assert [i.default for i in table.values()] == [True, True, True, False]
    assert all(i.missing() is None for i in table.values())

    def refusals(**changes):
        case = Case(**{"group": "gaps", "cell": "lstm", "T": 5, "N": 3, "I": 4, "H": 64} | changes)
        parts = ("model",) if case.group == "train" else ("layer", "recurrence")
        names = ("gpurnn-resident", "gpurnn-step")
        return [table[name].refuses(case, "training", part) for part in parts for name in names]

    apart = "it does not run the recurrence apart from the input projection"
    fits = [None, None, apart, apart]
    for cell, dtype in itertools.product(cases.GATES, ("float32", "tf32", "float16", "bfloat16")):
        assert refusals(cell=cell, dtype=dtype, lengths="uniform") == fits
    assert refusals(group="train") == [None, None]
    assert refusals(heads=2) == fits
    large = refusals(H=512, dtype="bfloat16")
    assert large[:2] == ["weight_hh of lstm with 512 units does not fit one SM in bfloat16", None]
    assert refusals(cell="rnn", H=1024)[0] == "weight_hh of rnn with 1024 units does not fit one SM in float32"
    group = table["gpurnn-persistent"].refuses
    huge = Case("gaps", "lstm", 5, 64, 4, 2048)
    assert group(Case("gaps", "lstm", 5, 64, 4, 1024, "bfloat16"), "training", "layer") is None
    assert group(huge, "training", "layer") == "weight_hh of lstm with 2048 units does not fit the GPU in float32"


def test_the_cuda_table_away_from_a_gpu(monkeypatch):
    monkeypatch.setattr("gpurnn.backend.name", "numpy")
    table = _ours_on_cuda()
    assert all("gpurnn's backend is numpy" in i.missing() for i in table.values())
    assert "on a GPU only" in table["gpurnn-resident"].refuses(SMALL, "training", "layer")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gpurnn-resident", "float32"),
        ("gpurnn-resident", "bfloat16"),
        ("gpurnn-persistent", "float32"),
        pytest.param("gpurnn-persistent", "bfloat16", marks=pytest.mark.slow),
        ("gpurnn-step", "float32"),
        pytest.param("gpurnn-step", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_ours_on_cuda_gives_the_reference(on_a_gpu, name, dtype, monkeypatch):
    freed = []
    pool = SimpleNamespace(free_all_blocks=lambda: freed.append(name))
    monkeypatch.setattr("tests.fake_cupy.get_default_memory_pool", lambda: pool, raising=False)
    H = 5 if dtype == "float32" else 17  # whose kernels `test_kernels` has as well
    case = Case("lengths", "gru", 4, 3, 2, H, dtype, lengths="uniform")
    made = problem.make(case)
    expected = check.Expected(made)
    workload = _ours_on_cuda()[name].build(made, "training", "layer")
    assert workload.layer.executor == name.removeprefix("gpurnn-") and workload.layer.precision == dtype
    error = expected.error(workload.results(), check.REQUIRED["layer"])
    assert error < 1e-5 if dtype == "float32" else 1e-4 < error < check.TOLERANCE[dtype]
    assert workload.time(2) > 0
    workload.close()
    assert not vars(workload) and freed == [name], "the next implementation may want the memory"


HEADS = Case("flashrnn", "lstm", 4, 3, 2, 6, heads=3)


def test_ours_on_cuda_runs_heads(on_a_gpu):
    made = problem.make(HEADS)
    workload = _ours_on_cuda()["gpurnn-step"].build(made, "training", "layer")
    assert workload.layer.heads == 3
    assert check.Expected(made).error(workload.results(), check.REQUIRED["layer"]) < 1e-5


@pytest.mark.skipif(backend.name == "cuda", reason="the CPU's executors")
@pytest.mark.parametrize("name", ["gpurnn-compiled", "gpurnn-numpy"])
def test_ours_on_a_cpu_runs_heads(name):
    (ours,) = (each for each in peers.implementations("cpu") if each.name == name)
    made = problem.make(HEADS)
    assert ours.refuses(HEADS, "training", "layer") is None
    workload = ours.build(made, "training", "layer")
    assert check.Expected(made).error(workload.results(), check.REQUIRED["layer"]) < 1e-5


@pytest.mark.parametrize("name", ["gpurnn-resident", pytest.param("gpurnn-step", marks=pytest.mark.slow)])
def test_our_character_model_on_cuda_takes_the_same_three_steps(on_a_gpu, name):
    made = problem.make(Case("train", "lstm", 3, 2, 5, 5))
    workload = _ours_on_cuda()[name].build(made, "training", "model")
    assert check.Expected(made).error(workload.results(), check.REQUIRED["model"]) < 1e-5
    assert workload.captured._recorded and workload.flags() == [], "as `gpurnn train` runs it"
    workload.captured.reason = "cuBLAS cannot be called"
    assert workload.flags() == ["not captured"]


def test_model_reference_descends():
    model = numpy_model.NumpyModel(problem.make(Case("train", "gru", 6, 3, 5, 8)), "float64")
    losses = model.results()["losses"]
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda got: got | {"dx": got["dx"] * 1.001}, "wrong: dx is off by"),
        (lambda got: got | {"y": got["y"] * np.nan}, "wrong: y is off by nan"),
        (lambda got: got | {"dx": got["dx"][:-1]}, "dx: expected shape"),
        (lambda got: {"y": got["y"]}, "dx is missing"),
    ],
)
def test_check_sees_what_is_wrong(spoil, message):
    expected = check.Expected(problem.make(SMALL))
    right = dict(expected.values)
    assert expected.error(right, check.REQUIRED["layer"]) == 0
    with pytest.raises(ArithmeticError, match=message):
        expected.error(spoil(right), check.REQUIRED["layer"])


class Fake(Workload):
    """Right results; takes `seconds` a step by its own clock, and fails at a given call of time()."""

    def __init__(self, made, seconds=1.0, fails_at=math.inf, factor=1.0):
        self.made, self.seconds, self.fails_at, self.factor, self.calls = made, seconds, fails_at, factor, 0

    def results(self):
        return {name: self.factor * value for name, value in numpy_loop.reference(self.made, True).items()}

    def time(self, steps):
        self.calls += 1
        if self.calls >= self.fails_at:
            raise MemoryError("no room")
        return self.seconds * steps

    def flags(self):
        return ["by hand"]


def _fake(name, refuses=None, missing=None, **options):
    def build(made, phase, part):
        if options.get("fails_at") == 0:
            raise RuntimeError("expected T below 65536, got 70000")
        return Fake(made, **options)

    def why_not(case, phase, part):
        return "not apart" if part == "recurrence" else refuses

    return Implementation(name, "cpu", build, lambda: missing, why_not)


def test_what_fails_is_a_line_and_the_others_go_on():
    entrants = [
        _fake("gpurnn-compiled", seconds=2e-6),
        _fake("slower", seconds=5e-6),
        _fake("unborn", fails_at=0),
        _fake("wrong", factor=1.01),
        _fake("dies", fails_at=7),
        _fake("refuses", refuses="it has no LSTM"),
    ]
    lines = harness.run(SMALL, "training", entrants, FAST, MACHINE, STAMP)
    records = {line["implementation"]: results.validate(json.loads(json.dumps(line))) for line in lines}
    assert list(records) == ["gpurnn-compiled", "slower", "unborn", "wrong", "dies"]
    ratio = records["slower"]["ratio"]
    assert ratio.pop("to") == "gpurnn-compiled" and ratio == pytest.approx({"median": 2.5, "low": 2.5, "high": 2.5})
    assert "ratio" not in records["gpurnn-compiled"]
    assert records["unborn"]["failure"] == "RuntimeError: expected T below 65536, got 70000"
    assert records["wrong"]["failure"].startswith("ArithmeticError: wrong: ")
    assert records["dies"]["failure"] == "MemoryError: no room"
    ours = records["gpurnn-compiled"]
    assert ours["us_per_step"] == pytest.approx(2 / 5 * 1.0, rel=1e-9) and len(ours["samples_s"]) == 4
    assert ours["tokens_per_s"] == pytest.approx(15 / 2e-6)
    assert ours["percent_of_floor"] == pytest.approx(100 * ours["floor_us_per_step"] / ours["us_per_step"])
    text = run.line(lines)
    assert "2.50x [2.50, 2.50]" in text and "dies FAILED: MemoryError: no room" in text


def test_a_fault_on_the_device_is_its_own_case_s_failure(monkeypatch):
    def gave_up():
        raise RuntimeError("a kernel gave up")

    (ours,) = (each for each in peers.implementations("cpu") if each.name == "gpurnn-numpy")
    monkeypatch.setattr("gpurnn.synchronize", gave_up)
    (line,) = harness.run(SMALL, "training", [ours], FAST, MACHINE, STAMP)
    assert line["failure"] == "RuntimeError: a kernel gave up"


def test_peers_alone_have_no_ratio():
    (record,) = harness.run(SMALL, "inference", [_fake("peer", seconds=1e-5)], FAST, MACHINE, STAMP)
    assert "ratio" not in record and record["median_s"] == pytest.approx(1e-5)
    assert "% of the floor" in run.line([record])


def test_a_time_below_the_floor_is_flagged():
    (record,) = harness.run(SMALL, "training", [_fake("peer", seconds=1e-9)], FAST, MACHINE, STAMP)
    assert record["flags"] == ["by hand", "beyond the floor"]


def _record(**changes):
    shape = {"T": 5, "N": 3, "I": 4, "H": 6, "heads": 1}
    names = {"case": SMALL.name, "group": "cpu", "cell": "lstm", "dtype": "float32", "lengths": None}
    how = {"phase": "training", "part": "layer", "implementation": "x", "flags": []}
    times = {"median_s": 1.0, "p20_s": 1.0, "p80_s": 1.0, "samples_s": [1.0], "us_per_step": 1.0, "tokens_per_s": 1.0}
    return {"format": 1, **STAMP, **names, **shape, **how, **times, **changes}


def test_a_half_written_line_is_left_out_and_cut_off(tmp_path):
    path = tmp_path / "new" / "r.jsonl"
    results.append(path, _record())
    with open(path, "ab") as file:
        file.write(path.read_bytes()[:40])
    assert len(results.read(path)) == 1
    results.append(path, _record(implementation="y"))
    assert [record["implementation"] for record in results.read(path)] == ["x", "y"]
    results.append(path, _record(median_s=2.0))
    assert [record["median_s"] for record in results.latest(results.read(path))] == [2.0, 1.0]


def test_bad_lines_are_named(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("{}\n" + json.dumps(_record()) + "\n")
    with pytest.raises(ValueError, match=r"r\.jsonl, line 1: format: expected 1, got None"):
        results.read(path)
    for changes, message in (
        ({"phase": "test"}, "phase: expected one of inference, training, got 'test'"),
        ({"T": "5"}, "T: expected"),
        ({"median_s": math.nan}, "median_s: expected a finite number above 0, got nan"),
        ({"samples_s": []}, "samples_s: expected"),
    ):
        with pytest.raises(ValueError, match=message):
            results.append(path, _record(**changes))
    results.validate(_record(failure="no", median_s=None))


def test_ratio_is_of_pairs():
    drift = np.array([1.0, 1.5, 1.0, 2.0, 1.2, 1.0, 3.0])  # of the machine, the same for both within a round
    assert statistics.ratio(drift, 2 * drift) == (2, 2, 2)
    rng = np.random.default_rng(0)
    noisy = drift * rng.uniform(0.9, 1.1, 7)
    middle, low, high = statistics.ratio(drift, 2 * noisy)
    assert low <= middle <= high and low < 2 < high
    assert statistics.ratio(drift, 2 * noisy) == (middle, low, high)  # the same bits each time
    with pytest.raises(ValueError, match="got 7 of ours and 6 of theirs"):
        statistics.ratio(drift, drift[1:])
    with pytest.raises(ValueError, match="finite times above 0, got 0"):
        statistics.summary([1.0, 0.0])
    with pytest.raises(ValueError, match="one or more"):
        statistics.summary([])


def test_changed_tells_a_slowdown_from_noise():
    rng = np.random.default_rng(1)
    before, again = rng.normal(1, 0.02, (2, 11))
    assert statistics.changed(before, again).verdict == "same"
    assert statistics.changed(before, 1.1 * again).verdict == "slower"
    assert statistics.changed(1.1 * before, again).verdict == "faster"
    wild = rng.uniform(0.5, 1.5, (2, 5))
    assert statistics.changed(wild[0], 1.1 * wild[1]).verdict == "same"
    often, seldom = [1.0] * 3 + [2.0] * 5, [1.0] * 5 + [2.0] * 3  # medians of 2 and 1, and nobody knows
    assert statistics.changed(seldom, often).verdict == statistics.changed(often, seldom).verdict == "same"
    assert statistics.changed([1.0, 1.0], [2.0, 2.0]).verdict == "unknown"


def test_cpu_floor_by_hand():
    case = Case("cpu", "lstm", 50, 64, 512, 512)
    flops = 2 * 64 * 4 * 512 * (512 + 512)
    assert floors.floor(case, "inference", "layer", MACHINE, case.T * case.N) == pytest.approx(flops / 1e11)
    assert floors.floor(case, "training", "layer", MACHINE, case.T * case.N) == pytest.approx(3 * flops / 1e11)
    assert floors.floor(case, "inference", "layer", MACHINE, case.T * 32) == pytest.approx(
        flops / 2e11
    )  # half is padding
    tiny = Case("cpu", "rnn", 5, 1, 1, 1)
    assert floors.floor(tiny, "training", "layer", MACHINE, 5) == 2 * floors.CPU_CHAIN
    slow_memory = MACHINE._replace(bandwidth=1e6)
    moved = 4 * (64 * (512 + 512) + 4 * 512 * 1024 / 50)
    assert floors.floor(case, "inference", "layer", slow_memory, 3200) == pytest.approx(moved / 1e6)


def test_gpu_floor_orders_the_shapes():
    machine = floors.Machine("cuda", {"bfloat16": 8e14, "float32": 5e13}, 4.3e12, 50 << 20, 132, 1.98e9)

    def us(cell, N, H, dtype="bfloat16", phase="inference", heads=1):
        case = Case("gaps", cell, 512, N, H, H, dtype, heads=heads)
        return 1e6 * floors.floor(case, phase, "recurrence", machine, 512 * N)

    # Estimates of a persistent kernel's floor on an H200, with a matrix rate of 63% of the data sheet's
    assert us("rnn", 64, 256) == pytest.approx(0.29, rel=0.3)
    assert us("lstm", 16, 768) == pytest.approx(0.56, rel=0.3)
    assert us("rnn", 64, 1024) == pytest.approx(0.67, rel=0.3)
    assert us("lstm", 64, 1024) == pytest.approx(1.2, rel=0.3)
    assert us("lstm", 64, 1024, phase="training") > 2 * us("lstm", 64, 1024)
    assert us("rnn", 64, 1024, "float32") > us("rnn", 64, 1024)
    assert us("lstm", 16, 768, heads=12) < us("lstm", 16, 768)
    assert us("lstm", 1, 768) == us("lstm", 8, 768), "a tile has eight rows, whether they are used or not"


def test_disturbed_counts_what_others_took(monkeypatch):
    monkeypatch.setattr(quiet, "_cpus", lambda: {0, 1})
    before = quiet.Mark(0.0, 0.0, 0.0)
    assert not quiet.disturbed(before, quiet.Mark(1.0, 1.9, 1.95))
    assert quiet.disturbed(before, quiet.Mark(1.0, 1.0, 1.5))
    assert not quiet.disturbed(before, quiet.Mark(0.02, 0.02, 0.04)), "a tick of each CPU is no evidence"
    assert not quiet.disturbed(before, quiet.Mark(1.0, 0.1, None))


class FakeNvml:
    """Two GPUs by UUID; the second one is held back by its power limit and tells no temperature."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksEventReasonGpuIdle, nvmlClocksEventReasonSwPowerCap, nvmlClocksEventReasonAll = 1, 4, 5

    def __init__(self):
        self.ended = False

    def nvmlInit(self):
        pass

    def nvmlShutdown(self):
        self.ended = True

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return {"GPU-a": 0, "GPU-b": 1}[uuid]

    def nvmlDeviceGetClockInfo(self, handle, which):
        return (1980, 1200)[handle]

    def nvmlDeviceGetPowerUsage(self, handle):
        return 650_000

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=123)

    def nvmlDeviceGetTemperature(self, handle, which):
        raise self.NVMLError("not supported")

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return 1 + 4 * handle

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 5000


def test_telemetry_of_the_right_gpu():
    nvml = FakeNvml()
    with telemetry.Telemetry("b", nvml) as watched:
        while not watched.samples:
            time.sleep(0.001)
    start = watched.samples[0].time
    told = watched.summary([(start - 1, start + 10)])
    assert told.pop("samples") >= 1
    assert told == {
        "sm_clock_mhz": 1200, "sm_clock_lowest_mhz": 1200, "power_w": 650.0, "memory_bytes": 123,
        "throttle_reasons": ["SwPowerCap"],
    }  # fmt: skip
    assert watched.energy() == 5.0 and nvml.ended
    with telemetry.Telemetry("a", FakeNvml()) as idle:
        while not idle.samples:
            time.sleep(0.001)
    assert idle.summary([(0.0, 0.0)])["throttle_reasons"] == [], "the nearest sample stands in for a short span"


def test_a_throttled_case_is_flagged():
    with telemetry.Telemetry("b", FakeNvml()) as watched:
        while not watched.samples:
            time.sleep(0.001)
        (record,) = harness.run(SMALL, "training", [_fake("p", seconds=1e-5)], FAST, MACHINE, STAMP, watched)
    assert record["flags"] == ["by hand", "throttled"] and record["telemetry"]["power_w"] == 650.0


def test_no_nvml_is_a_reason_not_an_error():
    with telemetry.Telemetry("GPU-none", FakeNvml()) as nothing:
        assert "no telemetry" in nothing.reason
    assert nothing.summary([(0, 1)]) == {} and nothing.energy() is None


def test_run_keeps_its_lines_and_resumes(tmp_path, capsys):
    path = tmp_path / "r.jsonl"
    command = ["run", "--quick", "--device", "cpu", "--case", "cpu/gru/*", "--rounds", "2", "--out", str(path)]
    assert main([*command, "--only", "numpy-loop"]) == 0
    first = path.read_text()
    assert [results.key(record)[1:] for record in results.read(path)] == [
        ("training", "layer", "numpy-loop"),
        ("inference", "layer", "numpy-loop"),
    ]
    assert main([*command, "--only", "numpy-loop"]) == 0
    assert {len(record["samples_s"]) for record in results.read(path)} == {2}
    assert path.read_text() == first and "0 measured" in capsys.readouterr().out
    assert main([*command, "--only", "numpy-loop", "--only", "gpurnn-num*"]) == 0  # one of them is new: both again
    records = results.latest(results.read(path))
    assert len(records) == 4 and {r["ratio"]["to"] for r in records if "ratio" in r} == {"gpurnn-numpy"}
    assert records[0]["environment"]["machine peaks"]["flops"] == {"float32": 1e11}


def test_run_says_what_is_missing_and_what_makes_no_sense(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "implementations", lambda device: [_fake("gone", missing="gone is not installed")])
    assert main(["run", "--quick", "--device", "cpu"]) == 2
    captured = capsys.readouterr()
    assert "missing: gone: gone is not installed" in captured.out
    assert "the table has gone" in captured.err
    for wrong in (["--rounds", "0"], ["--case", "x"]):
        assert main(["run", "--quick", "--device", "cpu", *wrong]) == 2
    (tmp_path / "r.jsonl").write_text("no json\n{}\n")
    monkeypatch.setattr(run, "implementations", lambda device: [_fake("here")])
    assert main(["run", "--quick", "--device", "cpu", "--out", str(tmp_path / "r.jsonl")]) == 2
    assert "r.jsonl, line 1" in capsys.readouterr().err


def test_run_with_a_failing_line_exits_with_1(tmp_path, monkeypatch):
    fakes = [_fake("fine", seconds=1e-5), _fake("unborn", fails_at=0)]
    monkeypatch.setattr(run, "implementations", lambda device: fakes)
    path = tmp_path / "r.jsonl"
    command = ["run", "--quick", "--device", "cpu", "--group", "cpu", "--case", "cpu/gru/*", "--out", str(path)]
    assert main(command) == 1
    assert [bool(record.get("failure")) for record in results.read(path)] == [False, True] * 2
    assert main(command) == 0, "a failure is a result too, and is not tried again"
    assert main([*command, "--budget", "0.000001"]) == 0


def test_peak_memory_counts_what_the_tape_needs():
    case = cases.find("cpu/rnn/T100-N32-I128-H256-float32")
    try:
        found = memory.peak_bytes(case, "training", "numpy-loop")
    except RuntimeError as error:
        pytest.skip(f"no peak memory here: {error}")
    array = 4 * case.T * case.N * case.H
    assert 4 * array < found < 16 * array  # projections, states, two gradients and y among it
    with pytest.raises(RuntimeError, match="nobody"):
        memory.peak_bytes(case, "training", "nobody")


def _flashrnn_stand_in(torch):
    """flashrnn's interface (projected inputs (B, T, G, heads, D) to states (S, B, T, heads, D)) in plain PyTorch."""

    def flashrnn(Wx, R, b, states, function, backend, dtype):
        assert (function, backend) == ("lstm", "cuda_fused") and Wx.dtype == R.dtype == getattr(torch, dtype)
        h, c = states[:, :, 0]
        steps = []
        for t in range(Wx.shape[1]):
            i, f, g, o = (Wx[:, t] + torch.einsum("ghdp,bhp->bghd", R, h) + b).unbind(1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            steps.append(torch.stack((h, c)))
        return torch.stack(steps, 2), steps[-1][:, :, None]

    return SimpleNamespace(flashrnn=flashrnn)


@pytest.mark.oracle
@pytest.mark.parametrize("part", ["layer", "recurrence"])
def test_flashrnn_is_asked_in_its_own_layout(part, monkeypatch):
    torch = pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")
    monkeypatch.setitem(sys.modules, "flashrnn", _flashrnn_stand_in(torch))
    from bench.peers.flashrnn import FlashRNN

    monkeypatch.setattr(
        FlashRNN, "tensor", lambda self, array: torch.from_numpy(np.ascontiguousarray(array)).bfloat16()
    )
    monkeypatch.setattr(FlashRNN, "all_is_loaded", lambda self: None)
    made = problem.make(Case("flashrnn", "lstm", 6, 3, 8, 12, "bfloat16", heads=3))
    expected = check.Expected(made)
    got = FlashRNN(made, "training", part).results()
    assert expected.error(got, check.REQUIRED[part]) > 1e-4  # bfloat16
    assert {"dh_0", "dc_0", "dweight_hh", "dbias_hh"} < got.keys()


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_stays_within_its_tolerance(dtype):
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")
    from bench.peers.torch_nn import TorchLayer

    made = problem.make(Case("gaps", "lstm", 60, 4, 16, 32, dtype))
    error = check.Expected(made).error(TorchLayer(made, "training", "cpu", 1).results(), check.REQUIRED["layer"])
    assert 1e-5 < error < check.TOLERANCE[dtype]


@pytest.mark.gpu
def test_cudnn_baseline_on_a_gpu():
    pytest.importorskip("torch", reason="torch is not installed: pip install -e '.[oracle]'")
    case = Case("gaps", "lstm", 64, 16, 128, 128, "bfloat16")
    (cudnn,) = (i for i in peers.implementations("cuda") if i.name == "torch-cudnn")
    settings = harness.Settings(rounds=3, target_s=0.005, warm_s=0.001)
    machine = MACHINE._replace(device="cuda", flops={"bfloat16": 1e14}, sms=100, clock=1.5e9)
    (record,) = harness.run(case, "training", [cudnn], settings, machine, STAMP)
    assert record.get("failure") is None and record["kernels"] and record["peak_bytes"] > 0
