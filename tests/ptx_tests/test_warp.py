"""What warps do together, atomics and asynchronous copies, against NumPy and the ISA's tables."""

import numpy as np
import pytest

from tests.ptx.errors import Divergence, Misaligned, Race, Uninitialised
from tests.ptx_tests.snippets import launch

LANES = np.arange(32)
STORE = "add.u64 %rd9, %ptr1, %own; st.global.b32 [%rd9], %r9;"
LOAD = "add.u64 %rd8, %ptr0, %own; ld.global.b32 %r8, [%rd8];"


def shuffle(mode: str, by: str, clamp: str = "31", count: int = 32):
    """The values and the predicate of a shuffle of 100 + lane."""
    body = f"""{LOAD} mov.u32 %r1, {by}; shfl.sync.{mode}.b32 %r9|%p1, %r8, %r1, {clamp}, -1; {STORE}
    selp.u32 %r2, 1, 0, %p1; add.u64 %rd7, %ptr2, %own; st.global.u32 [%rd7], %r2;"""
    values = np.arange(count, dtype="u4") + 100
    _, out, valid = launch(body, values, ("u4", count), ("u4", count), block=count)
    return out.astype(int) - 100, valid.astype(bool)


def test_shuffles_within_the_warp():
    lanes, valid = shuffle("bfly", "5")
    assert (lanes == (LANES ^ 5)).all() and valid.all()
    lanes, valid = shuffle("down", "7")
    assert (lanes == np.where(LANES < 25, LANES + 7, LANES)).all() and (valid == (LANES < 25)).all()
    lanes, valid = shuffle("up", "3", "0")
    assert (lanes == np.where(LANES >= 3, LANES - 3, LANES)).all() and (valid == (LANES >= 3)).all()
    lanes, valid = shuffle("idx", "9")
    assert (lanes == 9).all() and valid.all()


def test_shuffles_within_segments():
    segments = str(24 << 8 | 31)  # four segments of eight lanes: mask 0b11000
    lanes, valid = shuffle("idx", "35", segments)  # 35 is 3 in a segment's five bits
    assert (lanes == (LANES & 24 | 3)).all() and valid.all()
    lanes, valid = shuffle("down", "6", segments)
    inside = LANES % 8 < 2
    assert (lanes == np.where(inside, LANES + 6, LANES)).all() and (valid == inside).all()


def test_shuffles_of_two_warps_stay_apart():
    lanes, _ = shuffle("bfly", "16", count=64)
    assert (lanes == (np.arange(64) ^ 16)).all()


def test_shuffle_from_a_lane_that_does_not_exist():
    with pytest.raises(Divergence, match="lane 20, which takes no part"):
        shuffle("down", "4", count=20)


def test_votes_and_masks():
    body = f"""{LOAD} setp.gt.u32 %p1, %r8, 4;
    vote.sync.ballot.b32 %r1, %p1, -1; vote.sync.any.pred %p2, %p1, -1; vote.sync.all.pred %p3, %p1, -1;
    activemask.b32 %r2; setp.lt.u32 %p4, %thread, 8; mov.u32 %r9, 0;
    @!%p4 bra DONE;
    activemask.b32 %r3; vote.sync.ballot.b32 %r4, %p1, 255; add.u32 %r9, %r3, %r4;
    DONE: selp.u32 %r5, 1, 0, %p2; selp.u32 %r6, 2, 0, %p3; or.b32 %r5, %r5, %r6;
    add.u64 %rd9, %ptr1, %own; st.global.u32 [%rd9], %r1; st.global.u32 [%rd9+128], %r5; st.global.u32 [%rd9+256], %r9;"""
    _, out = launch(body, np.arange(32, dtype="u4"), ("u4", 96))
    ballot, both, masked = out.reshape(3, 32)
    assert (ballot == 0xFFFFFFE0).all() and (both == 1).all()
    assert (masked == np.where(LANES < 8, 255 + 0xE0, 0)).all()


def test_warp_reductions():
    data = np.array([*range(31), -5], "i4")
    for name, kind, expected in (("add", "s32", 460), ("min", "s32", -5), ("max", "u32", 2**32 - 5), ("or", "b32", -1)):
        _, out = launch(f"{LOAD} redux.sync.{name}.{kind} %r9, %r8, -1; {STORE}", data, ("i4", 32))
        assert (out.view("u4") == expected % (1 << 32)).all(), name


def fragments(kind: str, depth: int):
    """(registers, elements in each) of A and of B and, for lane t and element i, its row and column, as the ISA's tables say."""
    g, q = LANES // 4, LANES % 4
    if kind == "tf32":
        a = [(g + 8 * (i % 2), q + 4 * (i // 2)) for i in range(4 if depth == 8 else 2)]
        return (1, a), (1, [(q + 4 * i, g) for i in range(2 if depth == 8 else 1)])
    if depth == 8:
        return (2, [(g + 8 * (i // 2), 2 * q + i % 2) for i in range(4)]), (2, [(2 * q + i, g) for i in range(2)])
    a = [(np.where(i % 4 < 2, g, g + 8), 2 * q + i % 2 + 8 * (i // 4)) for i in range(8)]
    return (2, a), (2, [(2 * q + i % 2 + 8 * (i // 2), g) for i in range(4)])


def bits_of(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f16":
        return values.astype("f2").view("u2")
    bits = values.astype("f4").view("u4")
    return bits if kind == "tf32" else (bits >> 16).astype("u2")


@pytest.mark.parametrize("kind, depth", [("bf16", 16), ("bf16", 8), ("f16", 16), ("f16", 8), ("tf32", 8), ("tf32", 4)])
def test_matrix_products(kind, depth):
    rng = np.random.default_rng(0)
    a, b = rng.integers(-8, 9, (16, depth)) / 4, rng.integers(-8, 9, (depth, 8)) / 4  # exact in every format
    c = rng.standard_normal((16, 8)).astype("f4")
    words = []
    for matrix, (per_word, places) in zip((a, b), fragments(kind, depth), strict=True):
        elements = np.stack([bits_of(matrix[row, column], kind) for row, column in places], axis=1)
        words.append(np.ascontiguousarray(elements).view("u4").reshape(32, len(places) // per_word))
    g, q = LANES // 4, LANES % 4
    rows = [g + 8 * (i // 2) for i in range(4)]
    columns = [2 * q + i % 2 for i in range(4)]
    words.append(np.stack([c[row, column].view("u4") for row, column in zip(rows, columns, strict=True)], axis=1))
    counts = [w.shape[1] for w in words]
    names = [f"%r{10 + k}" for k in range(sum(counts[:2]))] + [f"%f{k}" for k in range(4)]
    data = np.concatenate(words, axis=1)
    loads = f"mul.lo.u32 %r1, %thread, {4 * data.shape[1]}; cvt.u64.u32 %rd1, %r1; add.u64 %rd1, %rd1, %ptr0;"
    loads += "".join(f"ld.global.b32 {name}, [%rd1+{4 * k}];" for k, name in enumerate(names))
    listed = ["{" + ", ".join(names[sum(counts[:k]) : sum(counts[: k + 1])]) + "}" for k in range(3)]
    product = f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {listed[2]}, {', '.join(listed)};"
    store = "mul.wide.u32 %rd2, %thread, 16; add.u64 %rd2, %rd2, %ptr1; st.global.v4.f32 [%rd2], {%f0, %f1, %f2, %f3};"
    _, out = launch(loads + product + store, data, ("f4", 128))
    got = np.empty((16, 8), "f4")
    for i in range(4):
        got[rows[i], columns[i]] = out.reshape(32, 4)[:, i]
    assert (got == (a @ b + c).astype("f4")).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, transposed):
    """Rows lie 48 bytes apart, in reverse order, and lane t gets row t / 4 (or column, transposed), 2 (t % 4) and the next."""
    rows = 8 * count
    matrix = np.arange(rows * 8, dtype="u2").reshape(rows, 8)
    spread = np.zeros((rows, 24), "u2")
    spread[:, :8] = matrix
    registers = ", ".join(f"%r{20 + k}" for k in range(count))
    stores = "".join(f"st.global.u32 [%rd9+{128 * k}], %r{20 + k};" for k in range(count))
    body = f"""
    mov.u32 %r1, tile; mov.u32 %r2, %thread;
    COPY: setp.ge.u32 %p1, %r2, {rows * 12}; @%p1 bra COPIED;
    mul.wide.u32 %rd1, %r2, 4; add.u64 %rd1, %rd1, %ptr0; ld.global.u32 %r3, [%rd1]; shl.b32 %r4, %r2, 2; add.u32 %r4, %r4, %r1;
    st.shared.u32 [%r4], %r3; add.u32 %r2, %r2, 32; bra COPY;
    COPIED: bar.sync 0;
    and.b32 %r5, %thread, {rows - 1}; sub.u32 %r5, {rows - 1}, %r5; mad.lo.u32 %r5, %r5, 48, %r1;
    ldmatrix.sync.aligned.m8n8.x{count}{".trans" if transposed else ""}.shared.b16 {{{registers}}}, [%r5];
    add.u64 %rd9, %ptr1, %own; {stores}"""
    _, out = launch(body, spread.view("u4"), ("u4", 32 * count), module=f".shared .align 16 .b8 tile[{rows * 48}];")
    halves = out.view("u2").reshape(count, 32, 2)
    for k in range(count):
        tile = matrix[::-1][8 * k : 8 * k + 8]
        tile = tile.T if transposed else tile
        for h in range(2):
            assert (halves[k, :, h] == tile[LANES // 4, 2 * (LANES % 4) + h]).all()


def test_ldmatrix_rows_are_aligned():
    body = "mov.u32 %r1, tile; ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r1+8];"
    with pytest.raises(Misaligned, match="tile"):
        launch(body, ("u4", 1), module=".shared .align 16 .b8 tile[256];")


ATOMICS = {
    "add.u32": (7, [1] * 31, 38),
    "add.f32": (0.5, [0.25] * 31, 8.25),
    "min.s32": (3, list(range(31, 0, -1)), 1),
    "max.u32": (3, [4] * 31, 4),
    "and.b32": (0xFF, [0xF7] * 31, 0xF7),
    "or.b32": (1, [6] * 31, 7),
    "xor.b32": (5, [1] * 31, 4),
    "exch.b32": (5, list(range(31)), 30),
    "inc.u32": (2, [2] * 31, 0),
    "dec.u32": (0, [3] * 31, 1),
}


@pytest.mark.parametrize("name", ATOMICS)
def test_atomics_take_turns(name):
    start, values, end = ATOMICS[name]
    dtype = "f4" if "f32" in name else "i4" if "s32" in name else "u4"
    body = f"{LOAD} setp.eq.u32 %p1, %thread, 0; @%p1 bra DONE; atom.global.{name} %r9, [%ptr1], %r8; DONE:"
    if "f32" in name:
        body = body.replace("%r8", "%f8").replace("%r9", "%f9").replace("b32 %f8", "f32 %f8")
    memory = np.array([start], dtype)
    _, out = launch(body, np.array([0, *values], dtype), memory)
    assert out[0] == end


def test_atomics_return_what_they_found():
    body = f"atom.global.add.u32 %r9, [%ptr0], 3; {STORE}"
    count, found = launch(body, np.array([10], "u4"), ("u4", 32))
    assert count[0] == 10 + 96 and sorted(found) == list(range(10, 106, 3))
    swap = f"atom.global.cas.b32 %r9, [%ptr0], 10, %thread; {STORE}"
    value, found = launch(swap, np.array([10], "u4"), ("u4", 32))
    assert value[0] == 0 and found[0] == 10 and (found[1:] == 0).all()


def test_red_adds_across_blocks():
    (total,) = launch("red.global.add.u64 [%ptr0], 5;", np.array([1], "u8"), grid=3, block=40)
    assert total[0] == 1 + 5 * 120


COPY = """
    mov.u32 %r1, tile; shl.b32 %r2, %thread, 4; add.u32 %r1, %r1, %r2; mul.wide.u32 %rd1, %thread, 16; add.u64 %rd2, %ptr0, %rd1;
    {start} cp.async.commit_group; {wait} {barrier}
    xor.b32 %r3, %r2, 16; mov.u32 %r4, tile; add.u32 %r4, %r4, %r3;
    ld.shared.v4.u32 {{%r5, %r6, %r7, %r8}}, [%r4]; add.u64 %rd3, %ptr1, %rd1; st.global.v4.u32 [%rd3], {{%r5, %r6, %r7, %r8}};"""
TILE = ".shared .align 16 .b8 tile[512];"
START = "cp.async.cg.shared.global [%r1], [%rd2], 16;"


def copied(start=START, wait="cp.async.wait_group 0;", barrier="bar.sync 0;"):
    data = np.arange(128, dtype="u4")
    return launch(COPY.format(start=start, wait=wait, barrier=barrier), data, ("u4", 128), module=TILE)[1].reshape(
        32, 4
    )


def test_asynchronous_copies_arrive_after_a_wait_and_a_barrier():
    expected = np.arange(128, dtype="u4").reshape(32, 4)[LANES ^ 1]
    assert (copied() == expected).all()
    assert (copied(wait="cp.async.wait_all;") == expected).all()
    half = copied("cp.async.ca.shared.global [%r1], [%rd2], 16, 8;")
    assert (half[:, :2] == expected[:, :2]).all() and (half[:, 2:] == 0).all()


@pytest.mark.parametrize(
    "wait, barrier, error",
    [
        ("", "bar.sync 0;", Uninitialised),
        ("cp.async.wait_group 1;", "bar.sync 0;", Uninitialised),
        ("cp.async.wait_group 0;", "", Race),
    ],
)
def test_asynchronous_copies_without_either(wait, barrier, error):
    with pytest.raises(error, match="tile"):
        copied(wait=wait, barrier=barrier)


@pytest.mark.parametrize(
    "body",
    [
        "setp.lt.u32 %p1, %thread, 16; @%p1 shfl.sync.bfly.b32 %r1, %thread, 1, 31, -1; bar.sync 0;",
        "setp.lt.u32 %p1, %thread, 31; @%p1 bra L; exit; L: mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%f0,%f1,%f2,%f3}, {%thread,%thread,%thread,%thread}, {%thread,%thread}, {0f00000000,0f00000000,0f00000000,0f00000000};",
        "shfl.sync.bfly.b32 %r1, %thread, 1, 31, 0xffff;",
        "setp.lt.u32 %p1, %thread, 7; vote.sync.any.pred %p2, %p1, -1; @%p1 bar.warp.sync -1; bar.sync 0;",
    ],
)
def test_partial_warps(body):
    """Lanes that have exited need not come, so these have a barrier to wait at, or take part in an mma."""
    with pytest.raises(Divergence, match=r"block \(0, 0, 0\), thread"):
        launch(body, ("u4", 1))


def test_half_warps_with_masks_of_their_own():
    """Both halves come to a shuffle of theirs, at different places, and the mask says that this is meant."""
    body = f"""{LOAD} setp.lt.u32 %p1, %thread, 16; @%p1 bra LOW;
    shfl.sync.bfly.b32 %r9, %r8, 1, 31, 0xffff0000; bra JOIN;
    LOW: shfl.sync.bfly.b32 %r9, %r8, 2, 31, 0x0000ffff;
    JOIN: {STORE}"""
    _, out = launch(body, np.arange(32, dtype="u4"), ("u4", 32))
    assert (out == np.where(LANES < 16, LANES ^ 2, LANES ^ 1)).all()
