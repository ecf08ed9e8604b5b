"""What `python -m bench model` predicts: every case of the table, by numbers that hang together."""

import json

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import cases, floors, model
from bench.__main__ import main
from bench.cases import Case

GROUPS = ("persistent", "gaps", "latency")
EVERY = [(group, gpu) for group in GROUPS for gpu in model.GPUS]
SOME = list(zip(GROUPS, model.GPUS, strict=False))  # each group, each GPU


@pytest.mark.parametrize(
    ("group", "name"), [pytest.param(*pair, marks=[pytest.mark.slow] * (pair not in SOME)) for pair in EVERY]
)
def test_every_case_is_predicted_above_its_floor(group, name):
    gpu = model.GPUS[name]
    for case in cases.GROUPS[group]:
        forward, backward = model.directions(case, gpu)
        assert forward.executor == backward.executor, "a tape is written and read by one plan"
        assert forward.flops == backward.flops == 2 * case.N * case.gates * case.H**2
        assert 0.1 < forward.microseconds <= 1.05 * backward.microseconds
        floor = 1e6 * floors.floor(case, "inference", "recurrence", gpu.machine, case.T * case.N)
        assert forward.microseconds > 0.9 * floor, case.name


def test_what_binds_shows():
    gpu = model.GPUS["h200"]

    def forward(**changes):
        case = Case(
            **{"group": "gaps", "cell": "lstm", "T": 9, "N": 64, "I": 4, "H": 1024, "dtype": "bfloat16"} | changes
        )
        return model.directions(case, gpu)[0]

    assert forward(H=64).executor == "resident" and forward(H=64).exchanges == 0 == forward(H=64).moved
    assert forward().executor == "persistent" and forward().exchanges == 1 and forward().moved > 0
    assert forward(H=4096).executor == "step"
    assert forward(N=16).microseconds < forward().microseconds < forward(N=512).microseconds


def test_products_of_16_bits_and_their_rounding():
    """LSTM, 64 rows, 1024 units: four products of 0.537 GFLOP; 6 bytes for each value of x, and again of x, h, gradients."""
    machine = model.GPUS["h200"].machine
    machine = machine._replace(flops={"bfloat16": 700e12, "float16": 700e12, "tf32": 300e12}, bandwidth=4.2e12)

    def us(dtype, training):
        return 1e6 * model._products(Case("gaps", "lstm", 512, 64, 1024, 1024, dtype), training, machine)

    product, rounding = 2 * 64 * 4096 * 1024 / 700e6, 6 * 64 * 1024 / 4.2e6
    assert us("bfloat16", False) == us("float16", False) == pytest.approx(product + rounding)
    assert us("bfloat16", True) == pytest.approx(4 * product + 7 * rounding) == pytest.approx(3.72, abs=0.01)
    assert us("float16", True) == pytest.approx(product + rounding + 3 * product * 700 / 300)
    assert us("tf32", True) == pytest.approx(4 * product * 700 / 300)


def test_the_table_and_what_was_measured(capsys, tmp_path):
    name = "latency/lstm/T1024-N64-I64-H64-float32"
    assert main(["model", "--case", name, "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    predicted = float(shown.split("inference ")[1].split()[0])
    assert shown.count(name) == 2 and "| resident |" in shown and "nothing here was measured" in shown

    def record(implementation, us):
        case = cases.find(name)
        shape = {key: getattr(case, key) for key in ("group", "cell", "T", "N", "I", "H", "dtype", "heads")}
        times = dict.fromkeys(("median_s", "p20_s", "p80_s", "tokens_per_s"), 1.0) | {"us_per_step": us}
        rest = {"phase": "inference", "part": "layer", "implementation": implementation, "samples_s": [1.0]}
        about = {"format": 1, "run": "a", "date": "b", "commit": "c", "case": name, "flags": [], "environment": {}}
        return about | shape | times | rest

    file = tmp_path / "measured.jsonl"
    lines = [record("gpurnn-step", 9.0), record("gpurnn-resident", 2 * predicted), record("torch-cudnn", 0.1)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["model", "--case", name, "--gpu", "h100", "--results", str(file)]) == 0
    assert f"{2 * predicted:.2f} us, " in capsys.readouterr().out
    assert main(["model", "--case", "nothing/like/this"]) == 2
