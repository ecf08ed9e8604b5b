"""`python -m bench gpu`: parts that fail, hang or find no time; what is done again; the summary; cases that hang or die."""

import json
import re
import sys
import textwrap
import time

import numpy as np
import pytest

from bench import cases, gpu, gpu_parts, gpu_summary, results, smoke, watched
from bench.__main__ import main
from bench.gpu_parts import Part
from gpurnn import backend

FOUND = {"date": "2026-01-01T00:00:00Z", "commit": "c", "reason": "why", "device": None, "chip": None, "peers": None}


def python(text):
    return [sys.executable, "-c", textwrap.dedent(text)]


def looking(folder):
    return Part("about", 5, 1, [python(f"open({str(folder / gpu_parts.ABOUT)!r}, 'w').write({json.dumps(FOUND)!r})")])


@pytest.fixture
def given(monkeypatch):
    """The parts of the next call, to be filled in."""
    given = []
    monkeypatch.setattr(gpu_parts, "about", looking)
    monkeypatch.setattr(gpu_parts, "parts", lambda folder, found: list(given))
    monkeypatch.setattr(gpu, "_summary", lambda folder: "the summary")
    return given


def states(folder):
    return {name: state.state for name, state in gpu.read(folder).items()}


def test_parts_that_fail_or_hang_stop_nobody_else(given, tmp_path, capsys):
    late = tmp_path / "late"
    child = f"import time; time.sleep(1.5); open({str(late)!r}, 'w')"
    given += [
        Part("fails", 2, 1, [python("print('one of two is wrong'); raise SystemExit(1)"), python("print('after')")]),
        Part("hangs", 0.1, 0.3, [python(f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])")]),
        Part("cannot", 2, 1, [], "no such tool"),
        Part("long", 2, 1000, [python("raise AssertionError")]),
        Part("fine", 2, 1, [python("print('3 of 3 right')")]),
    ]  # fmt: skip
    folder = tmp_path / "out"
    assert main(["gpu", "--minutes", "0.6", "--out", str(folder)]) == 1
    shown = capsys.readouterr().out
    assert states(folder) == {
        "about": "ok", "fails": "failed", "hangs": "stopped", "cannot": "skipped", "long": "left out", "fine": "ok"
    }  # fmt: skip
    assert "no GPU: stand-in, nothing is measured (why)" in shown and shown.endswith("the summary\n")
    assert "exit status 1: one of two is wrong" in shown and "begun" in shown and "it takes 1000 s at least" in shown
    assert "after" in (folder / "fails.log").read_text(), "what failed first does not keep the rest from being tried"
    time.sleep(1.6)
    assert not late.exists(), "what a part started is killed with it"

    given[1] = Part("hangs", 5, 1, [python("print('not this time')")])
    given[0] = Part("fails", 5, 1, [python("raise AssertionError")])
    assert main(["gpu", "--minutes", "0.6", "--resume", str(folder)]) == 1, "one part is still wrong"
    assert states(folder)["hangs"] == "ok" and states(folder)["fails"] == "failed"
    assert "AssertionError" not in (folder / "fails.log").read_text(), "what came to its end is not run again"
    given[0] = Part("fails", 5, 1, [python("print('mended')")])
    assert main(["gpu", "--resume", str(folder), "--part", "fails"]) == 0 and states(folder)["fails"] == "ok"


def test_what_makes_no_sense(given, tmp_path, capsys):
    given.append(Part("fine", 2, 1, [python("pass")]))
    folder = str(tmp_path / "out")
    for wrong in (["--minutes", "0", "--out", folder], ["--resume", folder], ["--out", folder, "--part", "nothing"]):
        assert main(["gpu", *wrong]) == 2
    assert main(["gpu", "--out", folder]) == 2, "a folder that holds results"
    said = capsys.readouterr().err
    assert "--resume" in said and "got 'nothing'" in said and "expected a time above 0" in said


def test_a_machine_that_cannot_be_looked_at(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_parts, "about", lambda folder: Part("about", 5, 1, [python("raise OSError('no driver')")]))
    assert main(["gpu", "--out", str(tmp_path)]) == 1
    assert "no driver" in capsys.readouterr().out


def test_time_is_shared_by_what_parts_take_and_a_broken_device_is_tried_again(tmp_path):
    run = gpu.Run(tmp_path, time.monotonic() + 110)
    parts = [Part("a", 30, 1, []), Part("b", 10, 1, []), Part("c", 60, 1, []), Part("no", 900, 1, [], "why")]
    assert run.share(parts[0], parts) == pytest.approx(30, abs=1)
    assert run.share(parts[1], parts[1:]) == pytest.approx(100 / 7, abs=1)
    assert run.share(parts[2]._replace(least=500), parts[2:]) == 500
    count = tmp_path / "count"
    again = f"""
        import pathlib
        count = pathlib.Path({str(count)!r})
        count.write_text((count.read_text() if count.exists() else '') + 'x')
        raise SystemExit({gpu.BROKEN} if len(count.read_text()) < 3 else 0)
    """
    assert run.part(Part("again", 5, 1, [python(again)]), 50).state == "ok" and count.read_text() == "xxx"
    asked = Part("latency-0", 5, 1, [python("print('{budget}')")], None, ("latency", 0))
    state = run.part(asked, 50)
    assert state.state == "stopped" and (tmp_path / "latency-0.log").read_text().splitlines()[-1] == "40"
    assert "cases and phases are left" in state.why


def test_the_parts_of_a_gpu_are_in_order_of_worth_and_share_the_minutes(tmp_path):
    every = gpu_parts.parts(tmp_path, FOUND | {"device": "NVIDIA H200"})
    names = [part.name for part in every]
    assert names[:2] == ["smoke", "tests"] and names[2:6] == list(gpu_parts.SANITIZERS)
    assert names[6:13] == ["latency-0", "persistent-0", "gaps-0", "lengths-0", "train-0", "flashrnn-0", "tune"]
    assert names.index("deepbench-1") > names.index("latency-1") > names.index("tune")
    assert sum(part.seconds for part in every) < 12 * 60 and len(set(names)) == len(names)
    lacking = gpu_parts.parts(tmp_path, FOUND | {"device": "NVIDIA H200", "peers": "torch is not installed"})
    assert "torch is not installed" in next(part for part in lacking if part.name == "gaps-0").why_not


def record(case, phase, implementation, us, **changes):
    shape = {name: getattr(case, name) for name in ("group", "cell", "T", "N", "I", "H", "dtype", "heads")}
    peaks = {"device": "cuda", "flops": dict.fromkeys(cases.DTYPES, 5e14), "bandwidth": 3e12, "cache": 50 << 20, "sms": 132, "clock": 1.98e9}  # fmt: skip
    times = dict.fromkeys(("p20_s", "p80_s", "tokens_per_s"), 1.0) | {"us_per_step": us, "median_s": us * case.T / 1e6}
    rest = {"phase": phase, "part": "layer", "implementation": implementation, "samples_s": [1.0], "flags": []}
    about = {"format": 1, "run": "a", "date": "b", "commit": "c", "case": case.name}
    about["environment"] = {"machine peaks": peaks}
    return about | shape | times | rest | {"percent_of_floor": 40.0} | changes


def test_the_summary_says_what_counts(tmp_path):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    about = FOUND | {"device": "NVIDIA H200", "chip": [0, [9, 0], 132, 227 << 10]}
    (tmp_path / gpu_parts.ABOUT).write_text(json.dumps(about))
    (tmp_path / gpu.STATES).write_text(json.dumps(["tests", "failed", 3.0, "exit status 1: 1 failed"]) + "\n")
    smoke = [["a", "HUNG", "no answer", 60.0], ["b", "ok", "", 1.0], ["a", "WRONG", "y off by 3e-01", 2.0]]
    lines = [json.dumps(dict(zip(watched.Outcome._fields, line, strict=True))) for line in smoke]
    (tmp_path / "smoke.jsonl").write_text("\n".join(lines))
    (tmp_path / "tests.log").write_text(
        "[gw1] [ 50%] PASSED tests/gpu/test_gpu.py::test_sizes[step-float32-(1, 1, 1, 1)] \n"
        "tests/gpu/test_gpu.py::test_two FAILED [ 60%]\nFAILED tests/gpu/test_gpu.py::test_two - assert 1 == 2\n"
    )
    first, second = (case for case in cases.GROUPS["gaps"] if case.rank == 0 and case.cell in ("lstm", "gru") and case.dtype == "bfloat16")  # fmt: skip
    for one in (
        record(first, "training", "gpurnn-persistent", 2.0),
        record(first, "training", "gpurnn-step", 20.0),
        record(first, "training", "torch-cudnn", 5.999),
        record(second, "training", "gpurnn-persistent", 4.0),
        record(second, "training", "torch-cudnn", 2.0),
        record(second, "inference", "gpurnn-persistent", 4.0, failure="RuntimeError: hung", median_s=None),
    ):
        results.append(tmp_path / gpu_parts.RESULTS, one)
    (tmp_path / "tune.log").write_text(
        "| case | direction | how | predicted us | measured us |\n"
        "| x | forward | 8 SMs a group, Mma(..), clustered | 1.50 | 1.00 |\n"
        "| x | forward | 8 SMs a group, Mma(..), flagged | 1.40 | 2.00 |\n"
        "| x | backward | 8 SMs a group, Mma(..), flagged | 1.40 | 1.00 |\n"
    )
    gpu_summary.main(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "failed: tests (exit status 1: 1 failed)" in text
    assert "1 of 2 right; a WRONG: y off by 3e-01" in text
    assert "1 passed, 1 failed; tests/gpu/test_gpu.py::test_two" in text
    assert "1 of 6; gpurnn-persistent: RuntimeError: hung" in text
    assert f"training 1.22 x over 2 (least 0.50: {second.name}), 40% of the floor" in text
    assert "over 2, " in text.split("measured / predicted")[1]
    assert "the fastest in 1 of 2; the fastest takes 1/1.41 of its time" in text
    found = [json.loads(line) for line in (tmp_path / "summary.jsonl").read_text().splitlines()]
    assert next(line for line in found if line["what"] == "tests")["bad"] == ["tests/gpu/test_gpu.py::test_two"]


WORKER = """
import json, os, sys, time
for line in sys.stdin:
    name = line.strip()
    print("a library says something")
    if name == "hangs":
        time.sleep(60)
    if name == "dies":
        print("illegal address", file=sys.stderr)
        os._exit(7)
    print(json.dumps([name, "ERROR" if name == "breaks" else "ok", str(os.getpid()), 0.1]), flush=True)
"""


def test_cases_that_hang_or_die_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    (tmp_path / "worker_of_a_test.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names = ["one", "hangs", "two", "dies", "three", "breaks", "four"]
    found = {outcome.case: outcome for outcome in watched.watched("worker_of_a_test", names, 1, 1.0)}
    assert {name: outcome.verdict for name, outcome in found.items()} == {
        "one": "ok", "hangs": "HUNG", "two": "ok", "dies": "DIED", "three": "ok", "breaks": "ERROR", "four": "ok"
    }  # fmt: skip
    assert found["dies"].text == "exit status 7: illegal address"
    assert len({found[name].text for name in ("one", "two", "three", "four")}) == 4, "each in a new process"


def test_smoke_sees_what_is_wrong(monkeypatch):
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    from tests.fake_cupy.backend import as_backend

    name, real = "usual/lstm/numpy/float32", smoke.on_device
    with as_backend(None):
        right = smoke.judged(name)
        assert right.verdict == "ok", right
        for spoil, text in ((1.01, "dx off by 1e-02"), (np.nan, "dx off by nan")):
            monkeypatch.setattr(smoke, "on_device", lambda case, s=spoil: (f := real(case)) | {"dx": f["dx"] * (s if case.precision == "float32" else 1)})  # fmt: skip
            assert smoke.judged(name)[1:3] == ("WRONG", text)
        monkeypatch.setattr(smoke, "on_device", lambda case: {}["y"])
        assert smoke.judged(name).verdict == "ERROR"
    assert len(smoke.select("small/*")) == 11 and len({case.name for case in smoke.select(None)}) == len(smoke.CASES)
    kinds = {(case.how, case.precision) for case in smoke.CASES.values()}
    assert {(f"persistent-{x}", p) for x in smoke.EXCHANGES for p in smoke.PRECISIONS} <= kinds


@pytest.mark.slow
@pytest.mark.parametrize("how", ["resident", *(f"persistent-{exchange}" for exchange in smoke.EXCHANGES)])
@pytest.mark.parametrize("kind", ["rnn/{}/float32", "lstm/{}/bfloat16"])
def test_every_small_case_is_right_in_the_interpreter(kind, how):
    from tests.interpreted import interpreted

    with interpreted():
        outcome = smoke.judged(f"small/{kind.format(how)}")
    assert outcome.verdict == "ok", outcome


def test_the_whole_command_without_a_gpu(tmp_path, capsys):
    """On the stand-in and the interpreter, as small as can be."""
    if backend.name == "cuda":
        pytest.skip("on a GPU it is the command itself")
    pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")
    folder = tmp_path / "out"
    assert main(["gpu", "--minutes", "8", "--out", str(folder)]) == 0, capsys.readouterr().out
    shown = capsys.readouterr().out
    assert "no GPU: stand-in, nothing is measured (there is no NVIDIA driver" in shown
    found = states(folder)
    assert found["smoke"] == found["groups"] == "ok" and found["memcheck"] == "skipped"
    assert "right" in (folder / "summary.md").read_text() and "1 of 1 right" in shown
    assert [record["flags"][-1] for record in results.read(folder / gpu_parts.RESULTS)] == ["stand-in"] * 2
    built = re.search(r"(\d+) kernels, \d+ of them new", (folder / "smoke.log").read_text())
    assert built and int(built[1]) >= 4, "kernels are built for the chip that is not there"
    assert "% of the floor" not in shown and "stand-in, not measured" in shown
