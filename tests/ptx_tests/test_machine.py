"""The machine: divergence, calls, memories, and each error by a kernel that deserves it, not by its twin."""

import numpy as np
import pytest

from tests.ptx.errors import (
    Deadlock,
    Divergence,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Trap,
    Uninitialised,
)
from tests.ptx.machine import run
from tests.ptx.memory import Memory
from tests.ptx.parse import parse
from tests.ptx_tests.snippets import HEADER, kernel, launch

SEEDS = (None, 0, 1, 2)
TILE = ".shared .align 16 .b8 tile[256];"

# What is right, what is wrong about it, and the error; %ptr0 has 64 words, %ptr1 is 64 words never written
TWINS = {
    "a word beyond the array": (
        OutOfBounds,
        "array0\\+256",
        "ld.global.u32 %r1, [%ptr0+252];",
        "ld.global.u32 %r1, [%ptr0+256];",
    ),
    "a word before the array": (OutOfBounds, "", "ld.global.u32 %r1, [%ptr0];", "ld.global.u32 %r1, [%ptr0+-4];"),
    "an address cut to 32 bits": (
        OutOfBounds,
        "global address",
        "ld.global.u32 %r1, [%ptr0];",
        "cvt.u32.u64 %r2, %ptr0; cvt.u64.u32 %rd1, %r2; ld.global.u32 %r1, [%rd1];",
    ),
    "beyond shared memory": (
        OutOfBounds,
        "tile\\+256",
        "mov.u32 %r1, tile; st.shared.u32 [%r1+252], %thread;",
        "mov.u32 %r1, tile; st.shared.u32 [%r1+256], %thread;",
    ),
    "beyond local memory": (
        OutOfBounds,
        "depot\\+16",
        "mov.u64 %rd1, depot; st.local.u32 [%rd1+12], %thread;",
        "mov.u64 %rd1, depot; st.local.u32 [%rd1+16], %thread;",
    ),
    "a vector off its alignment": (
        Misaligned,
        "array0\\+8",
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%ptr0+16];",
        "ld.global.v4.u32 {%r1,%r2,%r3,%r4}, [%ptr0+8];",
    ),
    "global memory that nobody wrote": (
        Uninitialised,
        "array1\\+4",
        "st.global.u32 [%ptr1+4], 1; ld.global.u32 %r1, [%ptr1+4];",
        "st.global.u32 [%ptr1], 1; ld.global.u32 %r1, [%ptr1+4];",
    ),
    "half a word that nobody wrote": (
        Uninitialised,
        "array1\\+2",
        "st.global.u32 [%ptr1], 1; ld.global.u32 %r1, [%ptr1];",
        "st.global.u16 [%ptr1], 1; ld.global.u32 %r1, [%ptr1];",
    ),
    "shared memory that nobody wrote": (
        Uninitialised,
        "tile",
        "mov.u32 %r1, tile; st.shared.u32 [%r1], 3; ld.shared.u32 %r2, [%r1];",
        "mov.u32 %r1, tile; ld.shared.u32 %r2, [%r1];",
    ),
    "local memory that nobody wrote": (
        Uninitialised,
        "depot",
        "mov.u64 %rd1, depot; st.local.u32 [%rd1], 3; ld.local.u32 %r2, [%rd1];",
        "mov.u64 %rd1, depot; ld.local.u32 %r2, [%rd1];",
    ),
    "a register written on one way only": (
        Uninitialised,
        "%r5",
        "setp.eq.u32 %p1, %thread, 0; @%p1 mov.u32 %r5, 1; @%p1 add.u32 %r6, %r5, 1;",
        "setp.eq.u32 %p1, %thread, 1; @%p1 mov.u32 %r5, 1; add.u32 %r6, %r5, 1;",
    ),
    "a register that nobody writes": (Uninitialised, "%r5", "mov.u32 %r5, 0; not.b32 %r6, %r5;", "not.b32 %r6, %r5;"),
    "a predicate that nobody writes": (
        Uninitialised,
        "%p1",
        "setp.eq.u32 %p1, %thread, 1; @%p1 mov.u32 %r5, 0;",
        "@%p1 mov.u32 %r5, 0;",
    ),
    "trap": (Trap, "trap", "setp.gt.u32 %p1, %thread, 99; @%p1 trap;", "trap;"),
}


@pytest.mark.parametrize("name", TWINS)
def test_errors_name_what_happened(name):
    error, where, right, wrong = TWINS[name]
    arrays = (np.arange(64, dtype="u4"), ("u4", 64))
    before = ".local .align 16 .b8 depot[16];"
    launch(right, *arrays, block=1, module=TILE, before=before)
    with pytest.raises(error, match=rf"line \d+: `.*`: .*{where}.*block \(0, 0, 0\), thread \(0, 0, 0\)"):
        launch(wrong, *arrays, block=1, module=TILE, before=before)


def test_threads_diverge_and_meet_again():
    """Each thread loops as often as its number says; the shuffle behind the loop waits for the whole warp."""
    body = """
    mov.u32 %r1, 0; mov.u32 %r2, 0;
    LOOP: setp.ge.u32 %p1, %r1, %thread; @%p1 bra DONE; add.u32 %r2, %r2, %r1; add.u32 %r1, %r1, 1; bra LOOP;
    DONE: shfl.sync.bfly.b32 %r3, %r2, 31, 31, -1; add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r3;"""
    for seed in SEEDS:
        (out,) = launch(body, ("u4", 32), seed=seed)
        last = 31 - np.arange(32)
        assert (out == last * (last - 1) // 2).all()


def test_warps_wait_where_the_code_lies_behind_them():
    """The lanes of the upper branch, further down in the text, come to the shuffle first."""
    body = """
    setp.lt.u32 %p1, %thread, 16; @%p1 bra LOW; mov.u32 %r1, 7; bra MEET;
    MEET: shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1; bra END;
    LOW: mov.u32 %r1, 9; bra MEET;
    END: add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r2;"""
    (out,) = launch(body, ("u4", 32))
    assert (out == np.where(np.arange(32) < 16, 7, 9)).all()


@pytest.mark.parametrize(
    "error, body",
    [
        (Divergence, "setp.lt.u32 %p1, %thread, 32; @%p1 bra L; bar.sync 0; bra E; L: bar.sync 0; E:"),
        (Divergence, "setp.lt.u32 %p1, %thread, 16; @%p1 bra L; bar.sync 0; bra E; L: bar.sync 0; E:"),
        (Deadlock, "setp.lt.u32 %p1, %thread, 32; @%p1 bra L; bar.sync 1; bra E; L: bar.sync 0; E:"),
        (Divergence, "and.b32 %r1, %thread, 31; setp.lt.u32 %p1, %r1, 16; @%p1 bar.sync 1, 32; bar.sync 0;"),
        (Deadlock, "bar.sync 0, 96;"),
        (Deadlock, "L: ld.relaxed.gpu.global.u32 %r1, [%ptr0]; setp.ne.u32 %p1, %r1, 5; @%p1 bra L;"),
    ],
)
def test_barriers_that_do_not_meet(error, body):
    launch("setp.lt.u32 %p1, %thread, 32; @%p1 exit; bar.sync 0;", np.zeros(1, "u4"), block=64)
    with pytest.raises(error, match=r"line \d+"):
        launch(body, np.zeros(1, "u4"), block=64)


def test_an_endless_loop(monkeypatch):
    monkeypatch.setattr("tests.ptx.machine.ENDLESS_TURNS", 500)
    with pytest.raises(Deadlock, match="endless"):
        launch("L: add.u32 %thread, %thread, 1; bra L;", ("u4", 1))


def test_a_spin_lock_does_not_starve_who_holds_it():
    body = """
    setp.ne.u32 %p1, %thread, 0; @%p1 bra DONE;
    LOCK: atom.acquire.gpu.global.cas.b32 %r1, [%ptr0], 0, 1; setp.ne.u32 %p2, %r1, 0; @%p2 bra LOCK;
    ld.global.u32 %r2, [%ptr1]; add.u32 %r2, %r2, 1; st.global.u32 [%ptr1], %r2; st.release.gpu.global.u32 [%ptr0], 0;
    DONE:"""
    for seed in SEEDS:
        lock, count = launch(body, np.zeros(1, "u4"), np.zeros(1, "u4"), grid=5, seed=seed)
        assert (lock[0], count[0]) == (0, 5)
    with pytest.raises(Race, match="array1"):
        launch(body.replace("st.release", "st.relaxed"), np.zeros(1, "u4"), np.zeros(1, "u4"), grid=5)


FUNCTION = """
.func (.param .b64 result) twice(.param .b32 value, .param .b64 base)
{
    .reg .b32 %r<4>; .reg .b64 %rd<4>; .reg .pred %p<2>;
    ld.param.u32 %r1, [value]; ld.param.u64 %rd1, [base]; setp.gt.u32 %p1, %r1, 40; @%p1 bra BIG;
    mul.wide.u32 %rd2, %r1, 2; add.u64 %rd2, %rd2, %rd1; st.param.b64 [result], %rd2; ret;
BIG: st.param.b64 [result], %rd1; ret;
}
"""


def test_calls_by_some_of_the_threads_and_from_two_places():
    call = "{{ .param .b32 a; .param .b64 b; .param .b64 c; st.param.b32 [a], %thread; st.param.b64 [b], {base}; call.uni (c), twice, (a, b); ld.param.b64 %rd1, [c]; }}"
    body = f"""
    mov.u64 %rd1, 5; setp.lt.u32 %p1, %thread, 20; @%p1 bra FIRST; setp.lt.u32 %p1, %thread, 60; @%p1 bra SECOND; bra END;
    FIRST: {call.format(base=1000)} bra END; SECOND: {call.format(base=2000)}
    END: shl.b64 %own, %own, 1; add.u64 %rd2, %ptr0, %own; st.global.u64 [%rd2], %rd1;"""
    (out,) = launch(body, ("u8", 64), block=64, module=FUNCTION)
    t = np.arange(64)
    assert (out == np.select([t < 20, t <= 40, t < 60], [1000 + 2 * t, 2000 + 2 * t, 2000], 5)).all()


def test_inline_scopes_and_module_constants():
    table = ".const .align 4 .u32 table[4] = {10, 20, 30};\n.global .align 8 .f64 scale = 0d4000000000000000;"
    body = """
    { .reg .pred p; .reg .b32 x; setp.eq.u32 p, %thread, 1; selp.u32 x, 8, 4, p; { .reg .b32 x; mov.u32 x, 99; } mov.u32 %r1, x; }
    ld.const.u32 %r2, [table+8]; mov.u64 %rd1, table; cvta.const.u64 %rd2, %rd1; ld.global.u32 %r3, [table+12]; ld.u32 %r4, [%rd2];
    ld.global.f64 %fd1, [scale]; cvt.rzi.u32.f64 %r5, %fd1; add.u32 %r1, %r1, %r2; add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, %r4;
    add.u32 %r1, %r1, %r5; add.u64 %rd3, %ptr0, %own; st.global.u32 [%rd3], %r1;"""
    (out,) = launch(body, ("u4", 2), block=2, module=table)
    assert out.tolist() == [4 + 30 + 0 + 10 + 2, 8 + 30 + 0 + 10 + 2]


def test_generic_addresses_lead_to_every_memory():
    """A third of the threads each goes to global, shared and local memory by one load."""
    body = """
    mov.u64 %rd1, tile; cvta.shared.u64 %rd2, %rd1; mov.u64 %rd3, depot; cvta.local.u64 %rd4, %rd3; st.local.u32 [%rd3], 3;
    setp.eq.u32 %p1, %thread, 0; @%p1 st.shared.u32 [tile], 2; bar.sync 0; rem.u32 %r1, %thread, 3;
    setp.eq.u32 %p2, %r1, 0; setp.eq.u32 %p3, %r1, 1; selp.b64 %rd5, %rd2, %rd4, %p3; selp.b64 %rd5, %ptr0, %rd5, %p2;
    ld.u32 %r2, [%rd5]; add.u64 %rd6, %ptr1, %own; st.u32 [%rd6], %r2; cvta.to.shared.u64 %rd7, %rd2; ld.shared.u32 %r3, [%rd7];"""
    _, out = launch(body, np.array([1], "u4"), ("u4", 32), module=TILE, before=".local .align 4 .b8 depot[4];")
    assert (out == np.arange(32) % 3 + 1).all()


def test_dynamic_shared_memory_begins_behind_the_static():
    module = ".shared .align 4 .b8 tile[20];\n.extern .shared .align 16 .b8 dynamic[];"
    body = "mov.u32 %r1, tile; mov.u32 %r2, dynamic; sub.u32 %r3, %r2, %r1; st.global.u32 [%ptr0], %r3; st.shared.u32 [%r2+{at}], 1;"
    (out,) = launch(body.format(at=60), ("u4", 1), block=1, module=module, dynamic_shared=64)
    assert out[0] == 32
    with pytest.raises(OutOfBounds, match=r"dynamic shared memory\+64"):
        launch(body.format(at=64), ("u4", 1), block=1, module=module, dynamic_shared=64)


def test_report_and_module():
    text = kernel("bar.sync 0;", 1, TILE)
    module = parse(text)
    assert (module.entry, module.params, module.static_shared) == ("k", [("u64", "p0")], 256)
    report = run(module, (2, 3), 40, [0], Memory())
    assert report.barriers == 6
    assert report.executed == 240 * 5  # ld.param, mov, mul, bar, ret


def test_arguments_are_checked():
    text = f"{HEADER}.visible .entry k(.param .u32 n, .param .f32 x) .maxntid 64, 1, 1 {{ ret; }}"
    module = parse(text)
    run(module, 1, 64, [-1, 2], Memory())
    for args, block, why in (
        ([1], 1, "2 arguments"),
        ([1 << 32, 0.5], 1, "argument 0"),
        ([0.5, 0], 1, "argument 0"),
        ([1, 1], 65, "64 threads"),
    ):
        with pytest.raises(PtxError, match=why):
            run(module, 1, block, args, Memory())
    with pytest.raises(PtxError, match="positive"):
        run(module, (1, 0), 1, [1, 1], Memory())


def test_memory_gives_back_what_was_put():
    memory = Memory()
    arrays = [np.arange(5, dtype="f8"), np.zeros((3, 100_000), "u2"), np.array(7, "i4"), np.zeros(0, "f4")]
    addresses = [memory.put(a) for a in arrays]
    assert all(address % 256 == 0 for address in addresses) and len(set(addresses)) == 4
    for address, array in zip(addresses, arrays, strict=True):
        got = memory.get(address, array)
        assert got.dtype == array.dtype and got.shape == array.shape and (got == array).all()
    with pytest.raises(OutOfBounds, match="array 0"):
        memory.get(addresses[0], np.zeros(6))
