"""What `python -m bench sass` reads from machine code: which instructions a step has, and how long they take."""

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import sass
from bench.__main__ import main
from bench.disassembly import NONE, Instruction


def code(opcode, target=None, stall=1, sets=NONE, waits=(), always=True):
    return Instruction(opcode, "", target, always, stall, sets, NONE, waits)


def test_a_usual_step_polls_once_and_has_no_fence():
    """A loop from 1 to 9; a branch over the fence at 3, an inner loop from 6 to 8 that a branch at 7 leaves."""
    program = [
        code("MOV"), code("HMMA"), code("STG"), code("BRA", 5, always=False), code("MEMBAR.ALL.GPU"), code("FADD"),
        code("LDG.E.128.STRONG.GPU"), code("BRA", 9, always=False), code("BRA", 6), code("BSSY", 11), code("BRA", 1, always=False), code("EXIT"),
    ]  # fmt: skip
    step = sass.usual_step(program)
    assert [i.opcode.split(".")[0] for i in step] == ["HMMA", "STG", "BRA", "FADD", "LDG", "BRA", "BSSY", "BRA"]
    assert [sass.pipe(i) for i in step[:3]] == ["HMMA", "STG", "BRA"] and sass.pipe(program[0]) == "INT"


def test_a_step_takes_as_long_as_what_binds_it():
    stalls = [code("FFMA", stall=4)] * 10
    assert sass.replayed(stalls, 1) == 40, "one warp waits for itself"
    assert sass.replayed(stalls, 4) < 50, "four do not wait for one another"
    assert sass.replayed([code("MUFU")] * 10, 1) == pytest.approx(80, abs=8), "the pipe's rate"
    assert sass.replayed([code("MUFU")] * 10, 4) == pytest.approx(320, abs=8)
    waits = [code("LDS", sets=0), code("FFMA", waits=(0,))]
    assert sass.replayed(waits, 1) > sass.LATENCY["LDS"]
    meet = [*stalls, code("BAR.SYNC")]
    assert sass.replayed(meet, 1) < sass.replayed(meet, 4)
    poll = [code("LDG.E.128.STRONG.GPU", sets=0), code("FFMA", waits=(0,))]
    assert sass.replayed(poll, 1) < 10, "the way of mail is not the replay's"


def test_a_case_s_kernels(capsys):
    assert main(["sass", "latency/rnn/T1024-N1-I64-H64-float32"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[1] for line in lines[3:]] == ["forward", "backward"]
    header, cells = (line.strip("| ").split(" | ") for line in (lines[1], lines[3]))
    found = dict(zip(header, cells, strict=True))
    assert 64 <= int(found["FFMA"]) < int(found["all"]) < 160 and int(found["HMMA"]) == 0
    assert 0.03 < float(found["floor"]) < float(found["replay, us"]) <= float(found["with mail"]) < 0.6
    assert main(["sass", "nothing/like/this"]) == 2
