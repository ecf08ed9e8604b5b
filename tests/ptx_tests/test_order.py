"""The order of memory: barriers, fences, releases and acquires; and each of them left out."""

import numpy as np
import pytest

from tests.ptx.errors import Deadlock, PtxError, Race, Uninitialised
from tests.ptx_tests.snippets import launch

SEEDS = (None, 0, 1, 2)
TILE = ".shared .align 16 .b8 tile[256];"

NEIGHBOUR = """
    mov.u32 %r1, tile; shl.b32 %r2, %thread, 2; add.u32 %r3, %r1, %r2; st.shared.u32 [%r3], 0; bar.sync 0;
    st.shared.u32 [%r3], %thread;
    {first}
    xor.b32 %r4, %r2, {distance}; add.u32 %r4, %r1, %r4; ld.shared.u32 %r5, [%r4];
    {second}
    st.shared.u32 [%r3], 7;
    add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r5;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_shared_memory_is_ordered_by_barriers(seed):
    body = NEIGHBOUR.format(first="bar.sync 0;", distance=128, second="bar.sync 0;")
    (out,) = launch(body, ("u4", 64), block=64, module=TILE, seed=seed)
    assert (out == np.arange(64) ^ 32).all()
    for first, second, did in (("", "bar.sync 0;", "wrote|read"), ("bar.sync 0;", "", "read|wrote")):
        with pytest.raises(Race, match=rf"tile.*which block 0, thread \d+ ({did})"):
            launch(
                NEIGHBOUR.format(first=first, distance=128, second=second), ("u4", 64), block=64, module=TILE, seed=seed
            )


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_are_ordered_by_their_warps_barrier(seed):
    within = {"distance": 4, "first": "bar.warp.sync -1;", "second": "bar.warp.sync -1;"}
    (out,) = launch(NEIGHBOUR.format(**within), ("u4", 64), block=64, module=TILE, seed=seed)
    assert (out == np.arange(64) ^ 1).all()
    for missing in ("first", "second"):
        with pytest.raises(Race):
            launch(NEIGHBOUR.format(**within | {missing: ""}), ("u4", 64), block=64, module=TILE, seed=seed)
    with pytest.raises(Race):  # and only the warp's own
        launch(NEIGHBOUR.format(**within | {"distance": 128}), ("u4", 64), block=64, module=TILE, seed=seed)


BROADCAST = """
    mov.u32 %r1, tile; setp.eq.u32 %p1, %thread, 0; @%p1 st.shared.u32 [%r1], 5; bar.sync 0;
    ld.shared.u32 %r2, [%r1]; {between} setp.eq.u32 %p2, %thread, {writer}; @%p2 st.shared.u32 [%r1], 6;"""


@pytest.mark.parametrize("writer", [0, 31, 32, 63])
def test_a_write_after_everybody_read(writer):
    launch(BROADCAST.format(between="bar.sync 0;", writer=writer), ("u4", 1), block=64, module=TILE)
    for between in ("", "bar.warp.sync -1;"):
        with pytest.raises(Race, match=r"writes tile.*read"):
            launch(BROADCAST.format(between=between, writer=writer), ("u4", 1), block=64, module=TILE)


def test_readers_one_after_another():
    """Thread 0, then thread 40 reads, which then writes: that its own read was the last does not excuse it."""
    body = """
    mov.u32 %r1, tile; setp.eq.u32 %p1, %thread, 0; setp.eq.u32 %p2, %thread, 40; @%p1 st.shared.u32 [%r1], 5; bar.sync 0;
    @%p1 ld.shared.u32 %r2, [%r1]; {between} @%p2 ld.shared.u32 %r2, [%r1]; @%p2 st.shared.u32 [%r1], 6;"""
    launch(body.format(between="bar.sync 0;"), ("u4", 1), block=64, module=TILE)
    with pytest.raises(Race, match=r"writes tile.*read"):
        launch(body.format(between=""), ("u4", 1), block=64, module=TILE)


def test_two_threads_write_one_word():
    with pytest.raises(Race, match="array0"):
        launch("st.global.u32 [%ptr0], %thread;", ("u4", 1))
    launch("setp.eq.u32 %p1, %thread, 3; @%p1 st.global.u32 [%ptr0], %thread;", ("u4", 1))


def test_halves_of_a_word_may_belong_to_two_threads():
    body = (
        "mul.wide.u32 %rd1, %thread, 2; add.u64 %rd1, %rd1, %ptr0; cvt.u16.u32 %h1, %thread; st.global.u16 [%rd1], %h1;"
    )
    (out,) = launch(body, ("u2", 32))
    assert (out == np.arange(32)).all()


def test_global_memory_within_a_block():
    body = """add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %thread; {barrier}
    xor.b32 %r1, %thread, 32; mul.wide.u32 %rd2, %r1, 4; add.u64 %rd2, %rd2, %ptr0; ld.global.u32 %r2, [%rd2];"""
    launch(body.format(barrier="bar.sync 0;"), ("u4", 64), block=64)
    with pytest.raises(Race, match="array0"):
        launch(body.format(barrier=""), ("u4", 64), block=64)


def test_named_barriers_join_only_who_comes():
    """Warps 0 and 1 meet at barrier 1; warp 2 never does, and so knows nothing of them."""
    body = """
    mov.u32 %r1, tile; shl.b32 %r2, %thread, 2; add.u32 %r3, %r1, %r2; setp.ge.u32 %p1, %thread, 64;
    @%p1 bra READ; st.shared.u32 [%r3], %thread; bar.sync 1, 64;
    READ: xor.b32 %r4, %r2, 128; add.u32 %r4, %r4, %r1; {guard} ld.shared.u32 %r5, [%r4];"""
    launch(body.format(guard="@!%p1"), ("u4", 1), block=96, module=".shared .align 16 .b8 tile[512];")
    reads = "@%p1 sub.u32 %r4, %r4, 384;"
    with pytest.raises(Race):
        launch(body.format(guard=reads), ("u4", 1), block=96, module=".shared .align 16 .b8 tile[768];")


FLAG = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; setp.ne.u32 %p2, %thread, 0; add.u64 %rd1, %ptr0, %own;
    @%p1 bra CONSUME;
    add.u32 %r2, %thread, 100; st.global.u32 [%rd1], %r2; {arrive}
    @%p2 bra DONE; {release} bra DONE;
    CONSUME: @%p2 bra WAITED;
    SPIN: {poll} setp.ne.u32 %p3, %r3, {target}; @%p3 bra SPIN; {acquired}
    WAITED: {depart}
    xor.b32 %r4, %thread, 1; mul.wide.u32 %rd2, %r4, 4; add.u64 %rd3, %ptr0, %rd2; ld.global.u32 %r5, [%rd3];
    add.u64 %rd4, %ptr2, %own; st.global.u32 [%rd4], %r5;
    DONE:"""
RIGHT = {
    "arrive": "bar.sync 0;",
    "release": "st.release.gpu.global.u32 [%ptr1], 1;",
    "poll": "ld.acquire.gpu.global.u32 %r3, [%ptr1];",
    "acquired": "",
    "depart": "bar.sync 0;",
    "target": "1",
}
ALSO_RIGHT = [
    {},
    {"release": "red.release.gpu.global.add.u32 [%ptr1], 1;"},
    {"release": "fence.acq_rel.gpu; st.relaxed.gpu.global.u32 [%ptr1], 1;"},
    {"release": "fence.sc.gpu; fence.proxy.async; st.relaxed.gpu.global.u32 [%ptr1], 1;"},
    {"release": "membar.gl; membar.cta; st.relaxed.gpu.global.u32 [%ptr1], 1;"},
    {"release": "membar.gl; st.volatile.global.u32 [%ptr1], 1;"},
    {"release": "membar.gl; atom.global.add.u32 %r9, [%ptr1], 1;"},
    {"poll": "ld.relaxed.gpu.global.u32 %r3, [%ptr1];", "acquired": "fence.acq_rel.gpu;"},
    {"poll": "ld.volatile.global.u32 %r3, [%ptr1];", "acquired": "membar.gl;"},
    {"release": "atom.acq_rel.gpu.global.add.u32 %r9, [%ptr1], 1;"},
    {"poll": "atom.acq_rel.gpu.global.or.b32 %r3, [%ptr1], 0;"},
    {
        "release": "atom.release.gpu.global.exch.b32 %r9, [%ptr1], 1;",
        "poll": "atom.acquire.gpu.global.cas.b32 %r3, [%ptr1], 1, 1;",
    },
]
WRONG = {
    "no barrier before the release": (Race, {"arrive": ""}),
    "no barrier after the wait": (Race, {"depart": ""}),
    "a relaxed release": (Race, {"release": "st.relaxed.gpu.global.u32 [%ptr1], 1;"}),
    "a weak release": (Race, {"release": "st.global.u32 [%ptr1], 1;"}),
    "a fence too early": (
        Race,
        {"arrive": "fence.acq_rel.gpu; bar.sync 0;", "release": "st.relaxed.gpu.global.u32 [%ptr1], 1;"},
    ),
    "a release for the block only": (Race, {"release": "st.release.cta.global.u32 [%ptr1], 1;"}),
    "a relaxed wait": (Race, {"poll": "ld.relaxed.gpu.global.u32 %r3, [%ptr1];"}),
    "a relaxed sum": (Race, {"release": "red.relaxed.gpu.global.add.u32 [%ptr1], 1;"}),
    "a release of what only others did": (
        Race,
        {"arrive": "", "release": "red.release.gpu.global.add.u32 [%ptr1], 1;"},
    ),
    "a wait for the block only": (Race, {"poll": "ld.acquire.cta.global.u32 %r3, [%ptr1];"}),
    "a fence before the wait": (
        Race,
        {"poll": "fence.acq_rel.gpu; ld.relaxed.gpu.global.u32 %r3, [%ptr1];", "target": "1"},
    ),
    "a fence for the block only before the release": (
        Race,
        {"release": "fence.acq_rel.cta; st.relaxed.gpu.global.u32 [%ptr1], 1;"},
    ),
    "a fence for the block only after the wait": (
        Race,
        {"poll": "ld.relaxed.gpu.global.u32 %r3, [%ptr1];", "acquired": "membar.cta;"},
    ),
    "no wait": (Race, {"poll": "mov.u32 %r3, 1;"}),
    "another target": (Deadlock, {"target": "2"}),
}


def hand_over(change: dict, seed):
    body = FLAG.format(**RIGHT | change)
    return launch(body, ("u4", 64), np.zeros(1, "u4"), ("u4", 64), grid=2, block=64, seed=seed)[2]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", ALSO_RIGHT, ids=lambda change: " ".join(change.values()) or "release/acquire")
def test_a_block_waits_for_another(change, seed):
    assert (hand_over(change, seed) == (np.arange(64) ^ 1) + 100).all()


@pytest.mark.parametrize("name", WRONG)
def test_a_block_that_does_not_wait_rightly(name):
    error, change = WRONG[name]
    caught = []
    for seed in SEEDS:
        try:
            hand_over(change, seed)
        except PtxError as found:
            caught.append(type(found))
    assert caught and set(caught) <= {error, Uninitialised} and error in caught, caught


def test_strong_accesses_need_no_order_between_them():
    """Data that is its own flag: polled until it is there, by every thread, with nothing else to order it."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; add.u64 %rd1, %ptr0, %own; @%p1 bra SPIN;
    add.u32 %r2, %thread, 100; st.relaxed.gpu.global.u32 [%rd1], %r2; bra DONE;
    SPIN: ld.relaxed.gpu.global.u32 %r3, [%rd1]; setp.eq.u32 %p2, %r3, 0; @%p2 bra SPIN;
    add.u64 %rd4, %ptr1, %own; st.global.u32 [%rd4], %r3;
    DONE:"""
    for seed in SEEDS:
        _, out = launch(body, np.zeros(64, "u4"), ("u4", 64), grid=2, block=64, seed=seed)
        assert (out == np.arange(64) + 100).all()
    with pytest.raises(Race):
        launch(body.replace("st.relaxed.gpu", "st"), np.zeros(64, "u4"), ("u4", 64), grid=2, block=64)


GRID_BARRIER = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, 0; mad.lo.u32 %r10, %r1, 32, %thread; mul.wide.u32 %rd1, %r10, 4; add.u64 %rd1, %rd1, %ptr0;
    STEP: add.u32 %r2, %r2, 1;
    mul.lo.u32 %r3, %r2, 384; cvt.u64.u32 %rd2, %r3; add.u64 %rd3, %rd1, %rd2; sub.u64 %rd4, %rd3, 384;
    ld.global.u32 %r4, [%rd4]; xor.b32 %r11, %r10, 32; setp.ge.u32 %p4, %r10, 64; @%p4 sub.u32 %r11, %r10, 64;
    mul.wide.u32 %rd5, %r11, 4; add.u64 %rd5, %rd5, %ptr0; add.u64 %rd5, %rd5, %rd2; sub.u64 %rd5, %rd5, 384;
    ld.global.u32 %r5, [%rd5]; add.u32 %r4, %r4, %r5; st.global.u32 [%rd3], %r4;
    bar.sync 0; setp.ne.u32 %p1, %thread, 0; @%p1 bra WAIT;
    red.release.gpu.global.add.u32 [%ptr1], 1; mul.lo.u32 %r6, %r2, 3;
    SPIN: ld.acquire.gpu.global.u32 %r7, [%ptr1]; setp.lt.u32 %p2, %r7, %r6; @%p2 bra SPIN;
    WAIT: bar.sync 0; setp.lt.u32 %p3, %r2, 5; @%p3 bra STEP;"""


@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_of_the_grid_in_a_loop(seed):
    """Every step adds, to each value, that of a thread in another block."""
    history = np.zeros((6, 96), "u4")
    history[0] = np.arange(96)
    out, _ = launch(GRID_BARRIER, history, np.zeros(1, "u4"), grid=3, block=32, seed=seed)
    index = np.arange(96)
    other = np.where(index >= 64, index - 64, index ^ 32)
    for step in range(5):
        history[step + 1] = history[step] + history[step][other]
    assert (out == history).all()


def test_what_a_thread_learnt_it_passes_on():
    """Block 0 to block 1 to block 2: the order is transitive."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; setp.eq.u32 %p2, %r1, 2; @%p1 bra ONE; @%p2 bra TWO;
    st.global.u32 [%ptr0], 9; st.release.gpu.global.u32 [%ptr1], 1; bra DONE;
    ONE: ld.acquire.gpu.global.u32 %r2, [%ptr1]; setp.eq.u32 %p3, %r2, 0; @%p3 bra ONE; {pass_on} bra DONE;
    TWO: ld.acquire.gpu.global.u32 %r2, [%ptr2]; setp.eq.u32 %p3, %r2, 0; @%p3 bra TWO; ld.global.u32 %r3, [%ptr0]; st.global.u32 [%ptr3], %r3;
    DONE:"""
    arrays = (("u4", 1), np.zeros(1, "u4"), np.zeros(1, "u4"), ("u4", 1))
    for seed in SEEDS:
        out = launch(body.format(pass_on="st.release.gpu.global.u32 [%ptr2], 1;"), *arrays, grid=3, block=1, seed=seed)
        assert out[3][0] == 9
    with pytest.raises(Race, match="array0"):
        launch(body.format(pass_on="st.relaxed.gpu.global.u32 [%ptr2], 1;"), *arrays, grid=3, block=1)


def test_a_constant_load_of_what_the_kernel_wrote():
    body = "add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], 1; ld.global{nc}.u32 %r1, [%rd1];"
    launch(body.format(nc=""), ("u4", 32))
    with pytest.raises(Race, match="as constant"):
        launch(body.format(nc=".nc"), ("u4", 32))


VECTORS = {
    "v2.u32": ("u4", 2, "{%r10, %r11}"),
    "v4.b32": ("u4", 4, "{%r10, %r11, %r12, %r13}"),
    "v2.b64": ("u8", 2, "{%rd10, %rd11}"),
    "v2.u64": ("u8", 2, "{%rd10, %rd11}"),
    "v4.u16": ("u2", 4, "{%h10, %h11, %h12, %h13}"),
}
HANDED = """
    mov.u32 %r1, %ctaid.x; setp.ne.u32 %p1, %r1, 0; mul.wide.u32 %rd1, %thread, {size}; add.u64 %rd1, %rd1, %ptr0; @%p1 bra SPIN;
    {values} st.relaxed.{scope}.global.{kind} [%rd1], {registers}; bra DONE;
    SPIN: ld.relaxed.{scope}.global.{kind} {registers}, [%rd1]; {polls}
    add.u64 %rd2, %rd1, %ptr1; sub.u64 %rd2, %rd2, %ptr0; st.global.{kind} [%rd2], {registers};
    DONE:"""


def handed(kind: str, seed, scope="gpu", polled=None) -> np.ndarray:
    """Block 0 hands vectors to block 1, which polls the first `polled` words of each, or all, until none is 0."""
    dtype, count, registers = VECTORS[kind]
    size, names = np.dtype(dtype).itemsize, registers.strip("{}").split(", ")
    bits = 8 * size
    values = "".join(
        f"cvt.u{bits}.u32 {name}, %thread; add.u{bits} {name}, {name}, {k + 1};" for k, name in enumerate(names)
    )
    polls = "".join(f"setp.eq.u{bits} %p2, {name}, 0; @%p2 bra SPIN;" for name in names[:polled])
    body = HANDED.format(size=size * count, values=values, polls=polls, kind=kind, registers=registers, scope=scope)
    blank = np.zeros(64 * count, dtype)
    return launch(body, blank, blank, grid=2, block=64, seed=seed, cluster=2)[1].reshape(64, count)


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_that_are_their_own_flags(kind):
    for seed in SEEDS:
        for scope in ("gpu", "cluster"):
            out = handed(kind, seed, scope)
            assert (out == np.arange(64)[:, None] + 1 + np.arange(out.shape[1])).all()
        with pytest.raises(Race):
            handed(kind, seed, "cta")


def test_the_words_of_a_vector_come_one_by_one():
    """Who looks at the first only, will once find another one missing."""
    assert any((handed("v4.b32", seed, polled=1) == 0).any() for seed in range(6))


def test_each_word_of_a_vector_is_a_flag():
    release, poll = "st.release.gpu.global.v2.u32 [%ptr1], {1, 1};", "ld.acquire.gpu.global.u32 %r3, [%ptr1+4];"
    body = FLAG.format(**RIGHT | {"release": release, "poll": poll})
    for seed in SEEDS:
        out = launch(body, ("u4", 64), np.zeros(2, "u4"), ("u4", 64), grid=2, block=64, seed=seed)[2]
        assert (out == (np.arange(64) ^ 1) + 100).all()


def test_clocks_go_on_and_a_sleep_ends():
    body = """
    mov.u64 %rd1, %globaltimer; mov.u64 %rd2, %clock64; nanosleep.u32 100; mov.u32 %r1, 50; nanosleep.u32 %r1;
    mov.u64 %rd3, %globaltimer; mov.u64 %rd4, %clock64; setp.gt.u64 %p1, %rd3, %rd1; setp.gt.and.u64 %p1, %rd4, %rd2, %p1;
    selp.u32 %r2, 1, 0, %p1; add.u64 %rd5, %ptr0, %own; st.global.u32 [%rd5], %r2;"""
    for seed in SEEDS:
        assert launch(body, ("u4", 64), block=64, seed=seed)[0].all()
