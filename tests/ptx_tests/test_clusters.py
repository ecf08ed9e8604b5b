"""Clusters: who is in one, their barrier, each other's shared memory; and each rule broken."""

import numpy as np
import pytest

from tests.ptx.errors import (
    BarrierMisuse,
    Deadlock,
    Divergence,
    Misaligned,
    OutOfBounds,
    PeerExited,
    PtxError,
    Race,
    Uninitialised,
)
from tests.ptx_tests.snippets import launch

SEEDS = (None, 0, 1, 2)
TILE = ".shared .align 16 .b8 tile[512];"
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"

NUMBERS = """
    mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ctaid.y; mov.u32 %r3, %nctaid.x; mad.lo.u32 %r1, %r2, %r3, %r1;
    mul.wide.u32 %rd1, %r1, 24; add.u64 %rd1, %rd1, %ptr0;
    mov.u32 %r4, %cluster_ctarank; st.global.u32 [%rd1], %r4; mov.u32 %r4, %cluster_nctarank; st.global.u32 [%rd1+4], %r4;
    mov.u32 %r4, %clusterid.x; st.global.u32 [%rd1+8], %r4; mov.u32 %r4, %nclusterid.x; st.global.u32 [%rd1+12], %r4;
    mov.u32 %r4, %cluster_ctaid.x; st.global.u32 [%rd1+16], %r4; mov.u32 %r4, %clusterid.y; st.global.u32 [%rd1+20], %r4;"""


@pytest.mark.parametrize("cluster", [1, 2, 3, 6])
def test_every_block_knows_its_place(cluster):
    (out,) = launch(NUMBERS, ("u4", 6 * 12), grid=(6, 2), block=1, cluster=cluster)
    x, y = np.arange(12) % 6, np.arange(12) // 6
    columns = [x % cluster, 0 * x + cluster, x // cluster, 0 * x + 6 // cluster, x % cluster, y]
    assert (out.reshape(12, 6) == np.stack(columns, axis=1)).all()


def test_a_grid_of_whole_clusters():
    for grid, cluster in ((6, 4), ((2, 4), 4), (2, 0)):
        with pytest.raises(PtxError, match="whole clusters"):
            launch("", ("u4", 1), grid=grid, cluster=cluster)


# Every block writes its tile, and reads that of the next in its cluster
ROTATE = """
    mov.u32 %r1, tile; shl.b32 %r2, %thread, 2; add.u32 %r1, %r1, %r2; mov.u32 %r3, %cluster_ctarank; mov.u32 %r9, %ctaid.x;
    mad.lo.u32 %r4, %r9, 100, %thread; st.shared.u32 [%r1], %r4;
    {first}
    add.u32 %r5, %r3, {distance}; mov.u32 %r6, %cluster_nctarank; rem.u32 %r5, %r5, %r6;
    mapa.shared::cluster.u32 %r7, %r1, %r5; ld.shared::cluster.u32 %r8, [%r7];
    {last}
    mad.lo.u32 %r9, %r9, {threads}, %thread; mul.wide.u32 %rd1, %r9, 4; add.u64 %rd1, %rd1, %ptr0; st.global.u32 [%rd1], %r8;
    st.shared.u32 [%r1], 0;"""


def rotate(seed=None, threads=64, **change):
    body = ROTATE.format(**{"first": MEET, "last": MEET, "distance": 1, "threads": threads} | change)
    return launch(body, ("u4", 6 * threads), grid=6, block=threads, module=TILE, seed=seed, cluster=3)[0]


@pytest.mark.parametrize("threads", [64, 40, 1])
@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_read_each_others_shared_memory(seed, threads):
    out = rotate(seed, threads).reshape(6, threads)
    assert (out == np.array([1, 2, 0, 4, 5, 3])[:, None] * 100 + np.arange(threads)).all()


def test_an_own_address_is_an_address_of_the_cluster():
    body = """
    mov.u32 %r1, tile; mov.u32 %r2, %cluster_ctarank; mapa.shared::cluster.u32 %r3, %r1, %r2;
    st.shared.u32 [%r1], 5; ld.shared::cluster.u32 %r4, [%r1]; st.shared::cluster.u32 [%r3+4], %r4; ld.shared.u32 %r5, [%r1+4];
    mul.wide.u32 %rd1, %r2, 4; add.u64 %rd1, %rd1, %ptr0; st.global.u32 [%rd1], %r5;"""
    (out,) = launch(body, ("u4", 2), grid=2, block=1, module=TILE, cluster=2)
    assert out.tolist() == [5, 5]


HALVES = {
    "relaxed with a fence": "fence.acq_rel.cluster; barrier.cluster.arrive.relaxed; barrier.cluster.wait;",
    "the defaults": "barrier.cluster.arrive; barrier.cluster.wait;",
    "after a barrier of the block": "bar.sync 0; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;",
}


@pytest.mark.parametrize("name", HALVES)
def test_other_ways_to_meet(name):
    for seed in SEEDS:
        rotate(seed, first=HALVES[name])


NOT_MET = {
    "not at all": (Race, {"first": ""}),
    "in the block only": (Race, {"first": "bar.sync 0;"}),
    "without a release": (Race, {"first": "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;"}),
    "a fence that reaches the block only": (
        Race,
        {"first": "fence.acq_rel.cta; barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;"},
    ),
    "arriving before the write": (
        Race,
        {"first": "barrier.cluster.wait;", "before": "barrier.cluster.arrive.release;"},
    ),
    "before it is written again": (Race, {"last": ""}),
    "before it is written again, one block": (Race, {"last": "bar.sync 0;"}),
}


@pytest.mark.parametrize("name", NOT_MET)
def test_blocks_that_do_not_meet(name):
    """Whichever block comes first: what was never written is not read, or not what is being written."""
    error, change = NOT_MET[name]
    change = dict(change)
    body = ROTATE.format(**{"first": MEET, "last": MEET, "distance": 1, "threads": 64} | change)
    body = change.get("before", "") + body
    caught = set()
    for seed in SEEDS:
        with pytest.raises((error, Uninitialised, PeerExited)) as found:
            launch(body, ("u4", 6 * 64), grid=6, block=64, module=TILE, seed=seed, cluster=3)
        caught.add(found.type)
    assert error in caught


def test_the_barrier_says_who_may_not_come_again():
    for body, why in (
        ("barrier.cluster.wait;", "waits without having arrived"),
        (MEET + "barrier.cluster.wait;", "waits without having arrived"),
        ("barrier.cluster.arrive; barrier.cluster.arrive;", "arrives again"),
    ):
        with pytest.raises(BarrierMisuse, match=why):
            launch(body, ("u4", 1), grid=2, cluster=2)
    with pytest.raises(Divergence):
        launch(
            "setp.lt.u32 %p1, %thread, 9; @%p1 barrier.cluster.arrive.aligned; bar.sync 0;",
            ("u4", 1),
            grid=2,
            cluster=2,
        )
    with pytest.raises(Deadlock):
        body = "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 0; barrier.cluster.arrive; @%p1 bra E; bar.sync 0; bar.sync 1, 64; E: barrier.cluster.wait; bar.sync 2; barrier.cluster.arrive; barrier.cluster.wait;"
        launch(body, ("u4", 1), grid=2, cluster=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_have_exited_are_not_waited_for(seed):
    body = (
        "mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, 1; @%p1 exit; setp.lt.u32 %p2, %thread, 40; @%p2 exit;" + 3 * MEET
    )
    *_, report = launch(body, ("u4", 1), grid=4, block=64, cluster=2, seed=seed, report=True)
    assert report.barriers == 6


@pytest.mark.parametrize("seed", SEEDS)
def test_work_between_the_two_halves(seed):
    """What is written in between is not part of what the barrier orders."""
    body = (
        """
    mov.u32 %r1, tile; shl.b32 %r2, %thread, 2; add.u32 %r1, %r1, %r2; st.shared.u32 [%r1], 1; barrier.cluster.arrive;
    st.shared.u32 [%r1+128], 2; barrier.cluster.wait; mov.u32 %r3, %cluster_ctarank; xor.b32 %r3, %r3, 1;
    mapa.shared::cluster.u32 %r4, %r1, %r3; ld.shared::cluster.u32 %r5, [%r4+{offset}];"""
        + MEET
    )
    launch(body.format(offset=0), ("u4", 1), grid=2, module=TILE, cluster=2, seed=seed)
    with pytest.raises(Race, match=r"reads tile\+\d+.*wrote"):
        launch(body.format(offset=128), ("u4", 1), grid=2, module=TILE, cluster=2, seed=seed)


REMOTE = "mov.u32 %r1, tile; mapa.shared::cluster.u32 %r2, %r1, 1;"
WRONG = {
    "a rank beyond the cluster": (OutOfBounds, "mapa.shared::cluster.u32 %r3, %r1, 2;"),
    "a mapped address mapped again": (OutOfBounds, "mapa.shared::cluster.u32 %r3, %r2, 1;"),
    "an address beyond the cluster": (OutOfBounds, "st.shared::cluster.u32 [%r2+16777216], 1;"),
    "beyond the other's memory": (OutOfBounds, "@%p1 st.shared::cluster.u32 [%r2+512], 1;"),
    "a mapped address as an own one": (OutOfBounds, "@%p1 st.shared.u32 [%r2], 1;"),
    "off its alignment": (Misaligned, "@%p1 st.shared::cluster.v2.u32 [%r2+4], {%r1, %r1};"),
    "never written": (Uninitialised, "@%p1 ld.shared::cluster.u32 %r3, [%r2];"),
    "both blocks write": (Race, "st.shared::cluster.u32 [%r2], 1;"),
}
EXITS = {
    "a store": "st.shared::cluster.u32 [%r2], 1;",
    "a load": "ld.shared::cluster.u32 %r3, [%r2+16];",
    "an atomic": "red.shared::cluster.add.u32 [%r2+16], 1;",
    "a load before what orders nothing": "ld.shared::cluster.u32 %r3, [%r2+16]; bar.sync 0;",
}


def by_block_0(body: str, seed, meet: str) -> None:
    """A thread of block 0 executes it, where %p1 says that it is that; at %r2 + 16 block 1 has a word."""
    first = "mov.u32 %r9, %ctaid.x; setp.eq.u32 %p1, %r9, 0; mov.u32 %r1, tile; st.shared.u32 [%r1+16], 0;"
    launch(first + MEET + REMOTE + body + meet, ("u4", 1), grid=2, block=1, module=TILE, cluster=2, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", WRONG)
def test_remote_accesses_gone_wrong(name, seed):
    error, body = WRONG[name]
    with pytest.raises(error, match=r"line \d+: `.*`.*block \(\d, 0, 0\)"):
        by_block_0(body, seed, MEET)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", EXITS)
def test_who_is_accessed_must_not_exit(name, seed):
    by_block_0("@%p1 " + EXITS[name], seed, MEET)
    for missing in ("", "barrier.cluster.arrive; @%p1 barrier.cluster.wait;"):
        with pytest.raises(PeerExited, match="exit"):
            by_block_0("@%p1 " + EXITS[name], seed, missing)


@pytest.mark.parametrize("seed", SEEDS)
def test_remote_atomics_and_vectors(seed):
    """All threads of four blocks count in block 0's memory, and block 3 fetches 16 bytes of it."""
    body = f"""
    mov.u32 %r1, tile; setp.eq.u32 %p1, %thread, 0; @%p1 st.shared.v4.u32 [%r1], {{%thread, %thread, %thread, %thread}};
    {MEET} mapa.shared::cluster.u32 %r2, %r1, 0; and.b32 %r3, %thread, 3; shl.b32 %r3, %r3, 2; add.u32 %r3, %r3, %r2;
    red.relaxed.cluster.shared::cluster.add.u32 [%r3], 1; atom.relaxed.cluster.shared::cluster.add.u32 %r4, [%r3], 1;
    {MEET} mov.u32 %r5, %ctaid.x; setp.eq.and.u32 %p1, %r5, 3, %p1; @%p1 ld.shared::cluster.v4.u32 {{%r6,%r7,%r8,%r9}}, [%r2];
    {MEET} @%p1 st.global.v4.u32 [%ptr0], {{%r6,%r7,%r8,%r9}};"""
    (out,) = launch(body, ("u4", 4), grid=4, block=64, module=TILE, cluster=4, seed=seed)
    assert (out == 4 * 16 * 2).all()
    with pytest.raises(Race, match="tile"):  # a scope that does not reach the others
        launch(
            body.replace("red.relaxed.cluster", "red.relaxed.cta"),
            ("u4", 4),
            grid=4,
            block=64,
            module=TILE,
            cluster=4,
            seed=seed,
        )


HAND_OVER = """
    mov.u32 %r1, tile; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p1, %r2, 0; setp.ne.u32 %p2, %thread, 0;
    @!%p2 st.shared.u32 [%r1+256], 0; {meet} @%p1 bra SEND;
    RECEIVE: @%p2 bra GOT; SPIN: ld.acquire.{to}.shared.u32 %r3, [%r1+256]; setp.eq.u32 %p3, %r3, 0; @%p3 bra SPIN;
    GOT: {depart} shl.b32 %r4, %thread, 2; xor.b32 %r4, %r4, 4; add.u32 %r4, %r4, %r1; ld.shared.u32 %r5, [%r4];
    add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r5; bra END;
    SEND: mapa.shared::cluster.u32 %r6, %r1, 1; shl.b32 %r4, %thread, 2; add.u32 %r4, %r4, %r6; st.shared::cluster.u32 [%r4], %thread;
    {arrive} @!%p2 st.{order}.{of}.shared::cluster.u32 [%r6+256], 1;
    END: {meet}"""
RIGHT = {
    "meet": MEET,
    "to": "cluster",
    "of": "cluster",
    "order": "release",
    "arrive": "bar.sync 0;",
    "depart": "bar.sync 0;",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", [{}, {"of": "gpu"}, {"to": "gpu"}, {"of": "sys", "to": "gpu"}], ids=str)
def test_flags_in_the_others_memory(seed, change):
    """One thread's release, and one thread's acquire, cover their blocks through the blocks' barriers."""
    (out,) = launch(HAND_OVER.format(**RIGHT | change), ("u4", 64), grid=2, block=64, module=TILE, cluster=2, seed=seed)
    assert (out == np.arange(64) ^ 1).all()


@pytest.mark.parametrize(
    "change",
    [
        {"of": "cta"},
        {"to": "cta"},
        {"arrive": ""},
        {"depart": ""},
        {"order": "relaxed"},
        {"order": "volatile", "of": ""},
    ],
    ids=str,
)
def test_flags_that_order_nothing(change):
    text = HAND_OVER.format(**RIGHT | change).replace("volatile.", "volatile")
    for seed in SEEDS:
        with pytest.raises((Race, Uninitialised)):
            launch(text, ("u4", 64), grid=2, block=64, module=TILE, cluster=2, seed=seed)


def test_clusters_do_not_reach_each_other():
    """A release in the scope of the cluster publishes nothing to the next cluster."""
    body = """
    mov.u32 %r1, %ctaid.x; setp.eq.u32 %p1, %r1, {reader}; setp.eq.u32 %p2, %r1, 0; @%p2 bra WRITE; @%p1 bra READ; bra END;
    WRITE: st.global.u32 [%ptr0], 7; st.release.{scope}.global.u32 [%ptr1], 1; bra END;
    READ: ld.acquire.{scope}.global.u32 %r2, [%ptr1]; setp.eq.u32 %p3, %r2, 0; @%p3 bra READ; ld.global.u32 %r3, [%ptr0];
    END:"""
    arrays = (("u4", 1), np.zeros(1, "u4"))
    for seed in SEEDS:
        launch(body.format(reader=1, scope="cluster"), *arrays, grid=4, block=1, cluster=2, seed=seed)
        launch(body.format(reader=2, scope="gpu"), *arrays, grid=4, block=1, cluster=2, seed=seed)
        with pytest.raises(Race):
            launch(body.format(reader=2, scope="cluster"), *arrays, grid=4, block=1, cluster=2, seed=seed)


def test_every_remote_reader_is_remembered():
    """Blocks 1 to 3 read a word of block 0, which writes it again and must know of all of them."""
    body = """
    mov.u32 %r1, tile; mov.u32 %r2, %cluster_ctarank; setp.eq.u32 %p1, %r2, 0; st.shared.u32 [%r1], 1; st.shared.u32 [%r1+4], 0; {meet}
    mapa.shared::cluster.u32 %r3, %r1, 0; @%p1 bra WAIT; ld.shared::cluster.u32 %r4, [%r3]; {silent}
    red.release.cluster.shared::cluster.add.u32 [%r3+4], 1; bra END;
    WAIT: ld.acquire.cluster.shared.u32 %r5, [%r1+4]; setp.lt.u32 %p2, %r5, {count}; @%p2 bra WAIT; st.shared.u32 [%r1], 2;
    END: {meet}"""
    for seed in SEEDS:
        launch(
            body.format(meet=MEET, silent="", count=3), ("u4", 1), grid=4, block=1, module=TILE, cluster=4, seed=seed
        )
        silent = "setp.eq.u32 %p3, %r2, 3; @%p3 bra END;"
        with pytest.raises(Race, match="read"):
            launch(
                body.format(meet=MEET, silent=silent, count=2),
                ("u4", 1),
                grid=4,
                block=1,
                module=TILE,
                cluster=4,
                seed=seed,
            )
