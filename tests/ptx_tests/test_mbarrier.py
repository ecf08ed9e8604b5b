"""mbarriers: counts, phases, bytes on their way, what a wait makes visible; and each rule broken."""

import numpy as np
import pytest

from tests.ptx.errors import (
    BarrierMisuse,
    Deadlock,
    OutOfBounds,
    PeerExited,
    PtxError,
    Race,
    Uninitialised,
    UnknownInstruction,
)
from tests.ptx_tests.snippets import launch

SEEDS = (None, 0, 1, 2)
TILE = ".shared .align 16 .b8 tile[1024]; .shared .align 8 .b64 bar; .shared .align 8 .b64 other;"
MEET = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
FIRST = (
    "mov.u32 %r1, tile; mov.u32 %r2, bar; setp.eq.u32 %p1, %thread, 0; shl.b32 %r3, %thread, 2; add.u32 %r3, %r3, %r1;"
)
INIT = FIRST + "@%p1 mbarrier.init.shared::cta.b64 [%r2], {count}; st.shared.u32 [%r3], 0; bar.sync 0;"
WAIT = "W{k}: mbarrier.try_wait.parity{how}.shared::cta.b64 %p2, [%r2], {parity}; @!%p2 bra W{k};"


def wait(parity=0, how="", k=0) -> str:
    return WAIT.format(parity=parity, how=how, k=k)


def one_block(body: str, count=1, seed=None, threads=64, out=64):
    return launch(INIT.format(count=count) + body, ("u4", out), block=threads, module=TILE, seed=seed)[0]


EXCHANGE = """
    st.shared.u32 [%r3], %thread; {arrive} {wait}
    xor.b32 %r4, %thread, 33; shl.b32 %r4, %r4, 2; add.u32 %r4, %r4, %r1; ld.shared.u32 %r5, [%r4];
    add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r5;"""
ARRIVALS = {
    "every thread": (64, "mbarrier.arrive.shared::cta.b64 _, [%r2];", wait()),
    "every thread twice": (128, "mbarrier.arrive.release.cta.shared::cta.b64 _, [%r2], 2;", wait()),
    "one thread for the block": (1, "bar.sync 0; @%p1 mbarrier.arrive.shared.b64 _, [%r2];", wait()),
    "with the state": (
        64,
        "mbarrier.arrive.shared::cta.b64 %rd5, [%r2];",
        "W: mbarrier.test_wait.shared::cta.b64 %p2, [%r2], %rd5; @!%p2 bra W;",
    ),
    "fences around relaxed ones": (
        64,
        "fence.acq_rel.cta; mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r2];",
        wait(how=".relaxed.cta") + "fence.acq_rel.cta;",
    ),
    "with a time limit": (
        64,
        "mbarrier.arrive.release.cluster.shared::cta.b64 _, [%r2];",
        "W: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r2], 0, 1000; @!%p2 bra W;",
    ),
    "after a phase before": (
        64,
        "mbarrier.arrive.shared::cta.b64 _, [%r2];" + wait(0) + "mbarrier.arrive.shared::cta.b64 _, [%r2];",
        wait(1, k=1),
    ),
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ARRIVALS)
def test_a_wait_sees_what_came_before_the_arrivals(name, seed):
    count, arrive, waits = ARRIVALS[name]
    assert (one_block(EXCHANGE.format(arrive=arrive, wait=waits), count, seed) == np.arange(64) ^ 33).all()


ARRIVE = "mbarrier.arrive.shared::cta.b64 _, [%r2];"
NOT_WAITED = {
    "no wait": (Race, 64, ARRIVE, ""),
    "the other parity": ((Race, Deadlock), 64, ARRIVE, wait(1)),
    "only half the arrivals": (Race, 32, "setp.lt.u32 %p3, %thread, 32; @%p3 " + ARRIVE, wait()),
    "a relaxed arrival": (Race, 64, "mbarrier.arrive.relaxed.cta.shared::cta.b64 _, [%r2];", wait()),
    "a relaxed wait": (Race, 64, ARRIVE, wait(how=".relaxed.cta")),
    "an arrival before the write": (Race, 64, "", wait()),
    "one thread, without the block's barrier": (Race, 1, "@%p1 " + ARRIVE, wait()),
    "one arrival missing": (Deadlock, 65, ARRIVE, wait()),
    "one arrival too many": (BarrierMisuse, 65, "mbarrier.arrive.shared::cta.b64 _, [%r2], 2;", wait()),
    "nothing arrives": (BarrierMisuse, 64, "mbarrier.arrive.shared::cta.b64 _, [%r2], 0;", wait()),
    "no arrivals wanted": (BarrierMisuse, 0, ARRIVE, wait()),
}


@pytest.mark.parametrize("name", NOT_WAITED)
def test_waits_that_see_nothing(name):
    error, count, arrive, waits = NOT_WAITED[name]
    body = EXCHANGE.format(arrive=arrive, wait=waits)
    body = ARRIVE + body if name == "an arrival before the write" else body
    for seed in SEEDS[:2] if error is Deadlock else SEEDS:
        with pytest.raises(error, match=r"line \d+: `"):
            one_block(body, count, seed)


LIVE = {
    "read as data": (BarrierMisuse, "ld.shared.b64 %rd1, [%r2];"),
    "written as data": (BarrierMisuse, "st.shared.u32 [%r2+4], 1;"),
    "an atomic on it": (BarrierMisuse, "@%p1 atom.shared.add.u32 %r5, [%r2], 1;"),
    "initialised twice": (BarrierMisuse, "@%p1 mbarrier.init.shared::cta.b64 [%r2], 1;"),
    "another word": (Uninitialised, "mbarrier.arrive.shared::cta.b64 _, [%r1];"),
    "half a word off": (PtxError, "mbarrier.arrive.shared::cta.b64 _, [%r2+4];"),
    "beyond the block's memory": (OutOfBounds, "mbarrier.arrive.shared::cta.b64 _, [%r2+4096];"),
    "after its end": (Uninitialised, "bar.sync 0; @%p1 mbarrier.inval.shared::cta.b64 [%r2]; bar.sync 0;" + ARRIVE),
    "ended before others are done": (Race, ARRIVE + "@%p1 mbarrier.inval.shared::cta.b64 [%r2];"),
    "read after its end": (Uninitialised, "@%p1 mbarrier.inval.shared.b64 [%r2]; bar.sync 0; ld.shared.b64 %rd1, [%r2];"),
    "a state of two phases ago": (
        BarrierMisuse,
        "@!%p1 bra E;" + 2 * "mbarrier.arrive.shared::cta.b64 %rd5, [%r2], 64;" + ARRIVE.replace("]", "], 64")
        + "sub.u64 %rd5, %rd5, 1; mbarrier.test_wait.shared::cta.b64 %p2, [%r2], %rd5; E:",
    ),
    "more bytes than it can count": (BarrierMisuse, "@%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 1048576;"),
}  # fmt: skip


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", LIVE)
def test_a_live_mbarrier_is_not_data(name, seed):
    error, body = LIVE[name]
    with pytest.raises(error, match=r"line \d+: `.*`"):
        one_block(body, 64, seed)


def test_its_bytes_are_data_again_after_its_end():
    body = "@%p1 mbarrier.inval.shared::cta.b64 [%r2]; @%p1 st.shared.b64 [%r2], 5; bar.sync 0; ld.shared.b32 %r5, [%r2]; add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r5;"
    assert (one_block(body) == 5).all()
    again = "@%p1 mbarrier.inval.shared::cta.b64 [%r2]; @%p1 mbarrier.init.shared::cta.b64 [%r2], 64; bar.sync 0;"
    one_block(again + EXCHANGE.format(arrive=ARRIVE, wait=wait()), 1)


def test_an_initialisation_is_seen_by_those_that_it_was_ordered_for():
    for body in (INIT.replace("bar.sync 0;", ""), INIT.replace("bar.sync 0", "bar.warp.sync -1")):
        for seed in SEEDS:
            with pytest.raises((Race, Uninitialised), match=r"mbarrier\.(arrive|init)"):
                launch(body.format(count=64) + ARRIVE, ("u4", 1), block=64, module=TILE, seed=seed)


REMOTE_INIT = (
    FIRST
    + """
    @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; {publish}
    mov.u32 %r4, %cluster_ctarank; xor.b32 %r4, %r4, 1; mapa.shared::cluster.u32 %r5, %r2, %r4;
    @%p1 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r5]; {wait} {last}"""
)
MEET_RELAXED = "barrier.cluster.arrive.relaxed; barrier.cluster.wait.acquire;"


def remote_init(seed, publish=MEET, last=MEET):
    body = REMOTE_INIT.format(publish=publish, wait=wait(how=".acquire.cluster"), last=last)
    launch(body, ("u4", 1), grid=4, block=40, module=TILE, seed=seed, cluster=2)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_initialise_and_meet(seed):
    remote_init(seed)
    remote_init(seed, "@%p1 fence.mbarrier_init.release.cluster; " + MEET_RELAXED)
    remote_init(seed, "fence.acq_rel.cluster; " + MEET_RELAXED)
    for publish in ("bar.sync 0;", MEET_RELAXED, "fence.mbarrier_init.release.cluster; bar.sync 0;"):
        with pytest.raises((Race, Uninitialised)):
            remote_init(seed, publish)
    with pytest.raises(Race):  # the fence publishes the initialisations, nothing else
        data = "ld.shared::cluster.u32 %r6, [%r5+{offset}];"
        publish = "st.shared.u32 [%r3], 1; @%p1 fence.mbarrier_init.release.cluster; " + MEET_RELAXED
        publish += "mov.u32 %r4, %cluster_ctarank; xor.b32 %r4, %r4, 1; mapa.shared::cluster.u32 %r5, %r3, %r4;"
        remote_init(seed, publish + data.format(offset=0))
    with pytest.raises(PeerExited):
        launch(
            REMOTE_INIT.format(publish=MEET, wait="", last=""),
            ("u4", 1),
            grid=2,
            block=40,
            module=TILE,
            seed=seed,
            cluster=2,
        )


# Block 0 stores to block 1, {each} bytes a thread, and block 1 waits for {bytes}
SEND = (
    INIT.replace("bar.sync 0;", MEET)
    + """
    mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p3, %r4, 0; mapa.shared::cluster.u32 %r5, %r2, {rank}; mapa.shared::cluster.u32 %r6, %r1, {to};
    @%p3 bra SEND;
    @%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r2], {bytes}; {wait}
    mul.lo.u32 %r7, %thread, {each}; xor.b32 %r7, %r7, 36; add.u32 %r7, %r7, %r1; ld.shared.u32 %r8, [%r7];
    add.u64 %rd1, %ptr0, %own; st.global.u32 [%rd1], %r8; bra END;
    SEND: mul.lo.u32 %r7, %thread, {each}; add.u32 %r7, %r7, %r6; add.u32 %r8, %thread, 100; cvt.u64.u32 %rd5, %r8; mov.b32 %f1, %r8;
    st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.{kind} [%r7], {value}, [%r5]; {then}
    END: {last}"""
)
SENT = {
    "count": 1,
    "rank": 1,
    "to": 1,
    "each": 4,
    "bytes": 256,
    "wait": wait(how=".acquire.cluster"),
    "then": "",
    "last": "",
}
SENT |= {"kind": "b32", "value": "%r8"}
KINDS = [
    {},
    {"kind": "f32", "value": "%f1"},
    {"kind": "u64", "value": "%rd5", "each": 8, "bytes": 512},
    {"kind": "v2.b64", "value": "{%rd5, %rd5}", "each": 16, "bytes": 1024},
    {"kind": "v4.b32", "value": "{%r8, %r8, %r8, %r8}", "each": 16, "bytes": 1024},
    {"wait": wait(how=".relaxed.cluster") + "fence.acq_rel.cluster;"},
    {"wait": wait(how=".relaxed.cluster") + "fence.acquire.cluster;"},
    {"wait": wait(how=".relaxed.cluster") + "fence.acquire.sync_restrict::shared::cluster.cluster;"},
    {"bytes": "64; @%p1 mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 192", "count": 1, "slow": True},
    {"count": 2, "bytes": "300; @%p1 mbarrier.complete_tx.relaxed.cta.shared::cta.b64 [%r2], 44; @%p1 " + ARRIVE},
]


def send(seed, change):
    body = SEND.format(**SENT | change)
    return launch(body, ("u4", 64), grid=2, block=64, module=TILE, seed=seed, cluster=2)[0]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("change", KINDS, ids=lambda change: change.get("kind") or " ".join(change))
def test_asynchronous_stores(change, seed):
    if change.get("slow"):  # the bytes are expected in two parts, between which the phase may end
        change = change | {"bytes": "256"}
    each = change.get("each", 4)
    source = (np.arange(64) * each ^ 36) // each
    upper = (np.arange(64) * each ^ 36) % 8 == 4
    expected = np.where(upper & ("64" in change.get("kind", "")), 0, source + 100)
    assert (send(seed, change) == expected).all()


MISSENT = {
    "no wait": (Race, {"wait": "", "last": MEET}),
    "the wrong parity": (Race, {"wait": wait(1, ".acquire.cluster"), "last": MEET}),
    "a wait that reaches its own block only": (Race, {"wait": wait(how=".acquire.cta")}),
    "a relaxed wait": (Race, {"wait": wait(how=".relaxed.cluster")}),
    "an element more than comes": (Deadlock, {"bytes": 260}),
    "an element less": ((Race, Deadlock), {"bytes": 252, "last": MEET}),
    "to another block than the mbarrier": (BarrierMisuse, {"to": 0, "last": MEET}),
    "at another block's mbarrier": (BarrierMisuse, {"rank": 0, "last": MEET}),
    "the bytes of another kind": ((Race, Deadlock), {"each": 8, "kind": "b64", "value": "%rd5", "last": MEET}),
    "all to one word": (Race, {"each": 0, "last": MEET}),
    "beyond the memory": (OutOfBounds, {"each": 64, "last": MEET}),
    "written again while it is on its way": (Race, {"then": "st.shared::cluster.u32 [%r7], 1;", "last": MEET}),
    "sent again": (Race, {"then": "st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%r7], %r8, [%r5];", "last": MEET}),
    "read back": (Race, {"then": "ld.shared::cluster.u32 %r9, [%r7];", "last": MEET}),
    "nobody waits, and the block exits": (PeerExited, {"bytes": "0", "wait": "bra END;"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MISSENT)
def test_asynchronous_stores_gone_wrong(name):
    error, change = MISSENT[name]
    for seed in SEEDS[:2] if error is Deadlock else SEEDS:
        with pytest.raises(error, match=r"line \d+: `"):
            send(seed, change)


# Block 0 reads (or writes) a word of its own, says so to block 1's mbarrier, and block 1 writes (or reads) the word.
HAND_OVER = (
    INIT.replace("bar.sync 0;", MEET)
    + """
    mov.u32 %r4, %cluster_ctarank; setp.eq.u32 %p3, %r4, 0; mapa.shared::cluster.u32 %r5, %r2, 1; mapa.shared::cluster.u32 %r6, %r3, 0;
    add.u64 %rd1, %ptr0, %own; @%p3 bra FIRST;
    {wait} {acquire} {second} bra END;
    FIRST: {first} {release} mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%r5];
    END: {last}"""
)
RELEASES = {
    "restricted": "fence.release.sync_restrict::shared::cta.cluster;",
    "alone": "fence.release.cluster;",
    "whole": "fence.acq_rel.cluster;",
    "wrong": "fence.acquire.cluster;",
    "none": "",
}
ACQUIRES = {
    "restricted": "fence.acquire.sync_restrict::shared::cluster.cluster;",
    "alone": "fence.acquire.cluster;",
    "whole": "fence.acq_rel.cluster;",
    "wrong": "fence.release.cluster;",
    "none": "",
}
WORDS = {
    "shared, read first": ("ld.shared.u32 %r8, [%r3];", "st.shared::cluster.u32 [%r6], 7;"),
    "shared, written first": ("st.shared.u32 [%r3], 7;", "ld.shared::cluster.u32 %r8, [%r6];"),
    "global, read first": ("ld.global.u32 %r8, [%rd1];", "st.global.u32 [%rd1], 7;"),
    "global, written first": ("st.global.u32 [%rd1], 7;", "ld.global.u32 %r8, [%rd1];"),
}


PAIRS = [("restricted", other) for other in ACQUIRES] + [("alone", "restricted"), ("wrong", "alone"), ("none", "whole")]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize(("release", "acquire"), [*PAIRS, ("alone", "alone")])
def test_what_fences_around_an_mbarrier_order(release, acquire, words):
    """Those that are restricted to shared memory order that, and nothing else."""
    first, second = WORDS[words]
    parts = {"first": first, "second": second, "release": RELEASES[release], "acquire": ACQUIRES[acquire]}
    body = HAND_OVER.format(count=64, wait=wait(how=".relaxed.cluster"), last=MEET, **parts)
    wholly = "restricted" not in (release, acquire) or words.startswith("shared")
    fine = wholly and not {"wrong", "none"} & {release, acquire}
    for seed in SEEDS[:2]:
        if fine:
            launch(body, np.zeros(64, "u4"), grid=2, block=64, module=TILE, seed=seed, cluster=2)
        else:
            with pytest.raises(Race):
                launch(body, np.zeros(64, "u4"), grid=2, block=64, module=TILE, seed=seed, cluster=2)


def test_forms_that_do_not_exist():
    for body in (
        "mbarrier.arrive.release.cluster.shared::cluster.b64 %rd1, [%r2];",
        "mbarrier.try_wait.parity.shared::cluster.b64 %p2, [%r2], 0;",
        "mbarrier.init.shared::cluster.b64 [%r2], 1;",
        "st.async.shared.mbarrier::complete_tx::bytes.b32 [%r1], %r1, [%r2];",
        "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b64 [%r1], {%rd1, %rd1, %rd1, %rd1}, [%r2];",
        "mbarrier.arrive_drop.shared.b64 %rd1, [%r2];",
        "ld.global.v4.u64 {%rd1, %rd2, %rd3, %rd4}, [%ptr0];",
        "fence.acquire.sync_restrict::shared::cta.cluster;",
        "fence.release.sync_restrict::shared::cta.gpu;",
        "fence.acq_rel.sync_restrict::shared::cluster.cluster;",
    ):
        with pytest.raises(UnknownInstruction, match="line"):
            launch(FIRST + body, ("u4", 64), module=TILE)
