"""Bugs planted in what lets several blocks share weight_hh: how a group is spread out, and how its blocks wait.

See `test_kernel_mutants`.  A wait that is missing shows as a race where nothing else orders the two accesses.  Where both
are strong it shows as wrong numbers, and only if warps run in an order in which somebody comes too early: such cases have
a seed.  So have races with one of a word's readers that is not its last, the only one known to the interpreter in global
memory.
"""

import itertools

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
from gpurnn.cells import CELLS
from gpurnn.kernels import build, mail
from gpurnn.kernels.tiles import Ffma, Mma
from tests.interpreted import CAPABILITY, interpreted
from tests.kernels import mutants
from tests.kernels.mutants import Case, Wrong, catch, check, plant, run, stand
from tests.ptx.errors import BarrierMisuse, Deadlock, OutOfBounds, PeerExited, Race, Uninitialised
from tests.ptx.parse import parse

SMALL = {"cell": CELLS["rnn_identity"], "H": 13, "back": False}
# Two groups, the second with one row of two.  A row of the vector is 16 words, and as many of padding; of 8 lanes two
# own a pair.
FFMA = (Ffma(units=1, lanes=8, rows=2, kept=1),) * 2
MMA = (Mma("bfloat16", groups=2, split=1, rows=8, kept=1),) * 2
SPLIT = (Mma("bfloat16", groups=2, split=8, rows=8, kept=1),) * 2  # more warps than pairs to keep
SHORT, WIDE = (5, 4, 2), (4, 4, 3, 3, 3, 3, 2, 2, 1)
CASES = {
    "flagged": Case((16, 15, 14), FFMA, 2, "flagged", **SMALL),
    "flagged long": Case((38, 37, 36), FFMA, 2, "flagged", seed=1, **SMALL),
    "flagged back": Case(SHORT, FFMA, 2, "flagged"),
    "flagged back at random": Case(SHORT, FFMA, 2, "flagged", seed=1),
    "flagged long back": Case((38, 37, 36), FFMA, 2, "flagged", cell=CELLS["gru"], H=13, seed=1),
    "flagged mma": Case(WIDE, MMA, 2, "flagged", **SMALL | {"H": 35}),
    "flagged mma back": Case(WIDE, MMA, 2, "flagged"),
    "flagged split": Case(WIDE, SPLIT, 2, "flagged", **SMALL | {"H": 20}),
    "flagged split at random": Case(WIDE, SPLIT, 2, "flagged", back=False, seed=1),
    "odd shares": Case((5, 4), (Ffma(units=1, lanes=2, rows=2, kept=1),) * 2, 2, "flagged", **SMALL | {"H": 10}),
    "flagged in turns": Case(SHORT, FFMA, 2, "flagged", running=3, **SMALL),
    "flagged at random": Case(SHORT, FFMA, 2, "flagged", back=False, seed=1),
    "flagged in another order": Case(SHORT, FFMA, 2, "flagged", back=False, seed=2),
    "many pieces": Case(
        (3,) * 15 + (2,), (Ffma(units=1, lanes=1, rows=16, kept=1),) * 2, 9, "flagged", **SMALL | {"H": 72}
    ),
    "even pieces": Case(
        (3,) * 15 + (2,), (Ffma(units=1, lanes=1, rows=16, kept=1),) * 2, 16, "flagged", **SMALL | {"H": 128}
    ),
    "heads in turns": Case(SHORT, FFMA, 2, "flagged", running=3, heads=2, **SMALL | {"H": 26}),
    "counted": Case(SHORT, FFMA, 2, "counted", **SMALL),
    "counted at random": Case((12, 11, 10), FFMA, 2, "counted", seed=1, **SMALL),
    "clustered": Case(SHORT, FFMA, 2, "clustered", **SMALL),
    "clustered at random": Case((12, 11, 10), FFMA, 2, "clustered", seed=1, **SMALL),
    "clustered mma": Case(WIDE, MMA, 3, "clustered", **SMALL | {"H": 35}),
}


def with_instruction(line, name, text, results, operands):
    """The edit that gives a factory, from its first line on, an instruction of its own."""
    made = f"{name} = instruction({name!r}, {text!r}, {results}, {operands})"
    return line, f"from .ptx import instruction\n    {made}\n    {line}"


WITH_RELAXED_ADD = with_instruction(
    "GRAIN, BOX, BLOCKS =", "add_release", "red.relaxed.gpu.global.add.u32 [$0], $1;", "()", "(u64, u32)"
)
WITH_RESTRICTED_FENCE = with_instruction(
    "GRAIN, BOX, BLOCKS =", "acquire", "fence.acquire.sync_restrict::shared::cluster.cluster;", "()", "()"
)

# As in `test_kernel_mutants`.  The second table is for `-m slow`.
# fmt: off
MUTANTS = {
    "flagged: no fence": ("flagged", "mail.flagged", Race, ("fence()", "pass")),
    "flagged: emptied a step too early": ("flagged", "mail.flagged", Race,
        ("range(2 * PERIOD + 1, 3 * PERIOD + 1)", "range(2 * PERIOD, 3 * PERIOD)")),
    "flagged: an empty word is taken": ("flagged long", "mail.collecting", Race,
        ("if full:", "if True:")),
    "flagged: no barrier behind the vector": ("flagged", "mail.flagged", Race, ("cuda.syncthreads()", "pass")),
    "counted: no barrier before the count": ("counted", "mail.counted", Race,
        ("cuda.syncthreads()  # what", "# what")),
    "counted: relaxed count": ("counted", "mail.counted", Race, WITH_RELAXED_ADD),
    "counted: no fence": ("counted", "mail.counted", Race, ("            acquire()\n", "")),
    "counted: a fence for shared memory": ("counted", "mail.counted", Race, WITH_RESTRICTED_FENCE),
    "clustered: nobody says that the vector is free": ("clustered", "clusters.clustered", Race,
        ("mbarrier(vector, 0), u32(BLOCKS + 1)", "mbarrier(vector, 0), u32(1)"),
        ("mbarrier(vector, 1), u32(BLOCKS + 1)", "mbarrier(vector, 1), u32(1)"),
        ("mbarrier_arrive(of_block(mbarrier(vector, step), u32(cuda.threadIdx.x)))", "pass")),
    "clustered: no barrier before arrivals": ("clustered", "clusters.clustered", Race,
        ("cuda.syncthreads()  # nobody", "# nobody")),
    "clustered: nothing released": ("clustered", "clusters.clustered", Race, ("release_shared()", "pass")),
    "clustered: nothing acquired": ("clustered", "clusters.clustered", Race, ("acquire_shared()", "pass")),
    "clustered: wrong parity": ("clustered", "clusters.clustered", Deadlock, ("u32(step >> 1 & 1)", "u32(step & 1)")),
    "group: x of others' pairs loaded ahead": ("flagged split at random", "persistent_forward.", Race,
        ("if length[p] > 0:\n                for g in range(G):\n                    x[p",
         "if True:\n                for g in range(G):\n                    x[p")),
    "group: loads ahead of step T": ("flagged back", "persistent_backward.", OutOfBounds,
        ("if i + 2 < steps:", "if i + 1 < steps:")),
}
MORE_MUTANTS = {
    "flagged: one buffer, always": ("flagged", "exchange.buffers", Race,
        ('"flagged": free_when_done', '"flagged": True')),
    "group: one mail for all": ("flagged", "persistent_forward.", Race,
        ("advance(mail, group * MAIL)", "advance(mail, 0)")),
    "group: x of others' pairs loaded": ("flagged at random", "persistent_forward.", Race,
        ("if length[p] > 0:\n                for g in range(G):\n                    x[p",
         "if True:\n                for g in range(G):\n                    x[p")),
    "group: x of the step before loaded ahead": ("flagged split at random", "persistent_forward.", Wrong,
        ("(t - 1 if reverse else t + 1)", "t")),
    "group: first loads ahead are of the first step": ("flagged back", "persistent_backward.", Wrong,
        ("1 if reverse else steps - 2", "0 if reverse else steps - 1")),
    "group: loads ahead of the next step": ("flagged back", "persistent_backward.", Wrong,
        ("t + 2 if reverse else t - 2", "t + 1 if reverse else t - 1")),
    "flagged: words sent by plain stores": ("flagged", "mail.flagged", Race,
        ("store_relaxed_u(address", "store_global_u(address")),
    "flagged: polled by plain loads": ("flagged", "mail.flagged", Race,
        ("collecting(shape, tile, load_relaxed_4u", "collecting(shape, tile, load_global_4u")),
    "flagged: half of the fences": ("flagged", "mail.flagged", Race,
        ("if step & PERIOD - 1 == 0:\n            fence", "if step & 2 * PERIOD - 1 == 0:\n            fence")),
    "flagged: never emptied": ("flagged long", "mail.flagged", Wrong, ("step >= 3 * PERIOD", "step < 0")),
    "flagged: emptied a period too early": ("flagged", "mail.flagged", Race,
        ("range(2 * PERIOD + 1, 3 * PERIOD + 1)", "range(PERIOD + 1, 2 * PERIOD + 1)")),
    "flagged: the first words are not emptied": ("flagged long", "mail.flagged", Wrong,
        ("step >= 3 * PERIOD", "step > 3 * PERIOD")),
    "flagged: every other period is emptied": ("flagged long", "mail.flagged", Wrong,
        ("step & PERIOD - 1 == 0 and", "step & 2 * PERIOD - 1 == 0 and")),
    "flagged: three of four steps are emptied": ("flagged long", "mail.flagged", Wrong,
        ("range(2 * PERIOD + 1, 3 * PERIOD + 1)", "range(2 * PERIOD + 2, 3 * PERIOD + 1)")),
    "flagged: one full word is enough": ("flagged long", "mail.collecting", Wrong,
        ("largest[0] = found[0]", "largest[0] = words[WORDS - 1]")),
    "flagged: half as many slots are written": ("flagged long", "mail.flagged", Deadlock,
        ("full = u32(NUMBERLESS)", "step = step & BOXES // 2 - 1\n        full = u32(NUMBERLESS)")),
    "flagged: a quarter of the slots": ("flagged", "exchange.", Race,
        ("BOXES = 32", "BOXES = 8")),
    "flagged: waits for the next slot": ("flagged", "mail.flagged", Deadlock,
        ("global_address(mail, 0) + u64((step & BOXES - 1) * BOX)\n        collect",
         "global_address(mail, 0) + u64((step + 1 & BOXES - 1) * BOX)\n        collect")),
    "flagged: collected into the buffer that is read": ("flagged mma", "mail.flagged", Race,
        ("(step + 1 & BUFFERS - 1)", "(step & BUFFERS - 1)")),
    "flagged: one buffer for unsplit tensor cores": ("flagged mma", "products.mma", Race, ("SPLIT > 1)", "True)")),
    "flagged: one buffer for exact products": ("flagged", "products.ffma", Race,
        ("multiply, False)", "multiply, True)")),
    "flagged: second buffer not zeroed": ("flagged", "persistent_forward.", Uninitialised,
        ("store_shared_u(u32(vector + k), u32(0))", "pass")),
    "flagged: one slot of mail for a group": ("flagged", "exchange.mail_words", OutOfBounds,
        ("BOXES * words", "words")),
    "flagged: mail begins as zeros": ("flagged long", "exchange.beginning", Race,
        ('EMPTY if kind == "flagged" else 0', "0")),
    "flagged: a row's words among another's": ("flagged", "mail._in_global", Deadlock,
        ("row * WORDS", "row * (WORDS - 1)")),
    "flagged: half words counted as words": ("flagged mma", "mail._in_global", Deadlock, ("k // GRAIN", "k")),
    "flagged: a part's words elsewhere": ("flagged mma back", "mail.flagged", Deadlock,
        ("k // GRAIN * 4)\n        full", "k * 4)\n        full")),
    "flagged: another part's words are emptied": ("flagged long back", "mail.flagged", Wrong,
        ("k // GRAIN * 4)\n            for", "0)\n            for")),
    "collect: rows without their padding": ("flagged", "mail.collecting", Wrong,
        ("row * u32(ROW)", "row * u32(QUARTER * 16)")),
    "collect: a piece too many is stored": ("flagged", "mail.collecting", Race,
        ("piece < u32(PIECES)", "piece <= u32(PIECES)")),
    "collect: a piece too many is loaded": ("flagged", "mail.collecting", Deadlock,
        ("u32(PIECES - 1)", "u32(PIECES)")),
    "collect: only what is loaded at once": ("many pieces", "mail.collecting", Wrong,
        ("range(0, PIECES, ROUND)", "range(0, 1, ROUND)")),
    "collect: the first piece's place for all": ("even pieces", "mail.collecting", Wrong,
        ("u32(spots[0] + u32(FURTHER[k]))", "spots[0]")),
    "collect: places as they were in the first round": ("even pieces", "mail.collecting", Wrong,
        ("u32(u32(first + k * THREADS) + tid)\n                row", "u32(u32(k * THREADS) + tid)\n                row")),
    "counted: no barrier behind the wait": ("counted", "mail.counted", Race,
        ("cuda.syncthreads()\n        collect", "collect")),
    "counted: no barrier behind the vector": ("counted", "mail.counted", Race,
        ("fault)\n        cuda.syncthreads()\n", "fault)\n")),
    "counted: waits for one block less": ("counted at random", "mail.counted", Race,
        ("(step + 1) * BLOCKS", "(step + 1) * BLOCKS - 1")),
    "counted: waits for one block more": ("counted", "mail.counted", Deadlock,
        ("(step + 1) * BLOCKS", "(step + 1) * BLOCKS + 1")),
    "counted: waits for the step before": ("counted at random", "mail.counted", Race,
        ("(step + 1) * BLOCKS", "step * BLOCKS")),
    "counted: every thread counts": ("counted at random", "mail.counted", Race,
        ("cuda.threadIdx.x == 0:\n            add", "cuda.threadIdx.x >= 0:\n            add")),
    "counted: released before the words are sent": ("counted", "persistent_forward.", Race,
        ("            if i + 1 < steps and owner:",
         "            if i + 1 < steps:\n                release(mail, vector, i)\n            if i + 1 < steps and owner:"),
        ("                release(mail, vector, i)\n                if left", "                if left")),
    "counted: one slot": ("counted", "mail.counted", Race, ("(step & 1) * BOX + k", "k"),
        ("(step & 1) * BOX)", "0)")),
    "counted: sent to the other slot": ("counted", "mail.counted", Race,
        ("(step & 1) * BOX + k", "(step + 1 & 1) * BOX + k")),
    "counted: words where the counter is": ("counted", "mail.counted", Race,
        ("global_address(mail, LINE) + u64(spot)", "global_address(mail, 0) + u64(spot)"),
        ("global_address(mail, LINE) + u64((step", "global_address(mail, 0) + u64((step")),
    "counted: collected from the counter on": ("counted", "mail.counted", Race,
        ("global_address(mail, LINE) + u64((step", "global_address(mail, 0) + u64((step")),
    "counted: no room for the counter": ("counted", "exchange.mail_words", Race, ("LINE + 2 * words", "2 * words")),
    "counted: counter begins as all ones": ("counted", "exchange.beginning", Deadlock,
        ('EMPTY if kind == "flagged" else 0', "EMPTY")),
    "clustered: no clusters": ("clustered", "exchange.launched", OutOfBounds, ("(shape.blocks, False)", "(1, False)")),
    "clustered: too few bytes expected": ("clustered", "clusters.clustered", Deadlock,
        ("u32(BYTES)", "u32(BYTES - 4)")),
    "clustered: too many bytes expected": ("clustered", "clusters.clustered", Deadlock,
        ("u32(BYTES)", "u32(BYTES + 4)")),
    "clustered: nobody arrives": ("clustered", "clusters.clustered", Deadlock,
        ("mbarrier_arrive(of_block(mbarrier(vector, step), u32(cuda.threadIdx.x)))", "pass")),
    "clustered: arrivals not counted": ("clustered", "clusters.clustered", BarrierMisuse,
        ("mbarrier(vector, 0), u32(BLOCKS + 1)", "mbarrier(vector, 0), u32(1)"),
        ("mbarrier(vector, 1), u32(BLOCKS + 1)", "mbarrier(vector, 1), u32(1)")),
    "clustered: all arrive at the first block": ("clustered", "clusters.clustered", BarrierMisuse,
        ("u32(cuda.threadIdx.x)))", "u32(0)))")),
    "clustered: a thread too many arrives": ("clustered", "clusters.clustered", OutOfBounds,
        ("cuda.threadIdx.x < BLOCKS", "cuda.threadIdx.x <= BLOCKS")),
    "clustered: blocks do not wait for mbarriers": ("clustered", "clusters.clustered", Race,
        ("fence_mbarrier_init()\n        cluster_arrive()\n        cluster_wait()", "fence_mbarrier_init()")),
    "clustered: parity inverted": ("clustered", "clusters.clustered", Deadlock,
        ("u32(step >> 1 & 1)", "u32(step >> 1 & 1 ^ 1)")),
    "clustered: one mbarrier": ("clustered", "clusters.clustered", BarrierMisuse,
        ("MBARRIERS + 8 * (step & 1)", "MBARRIERS + 8 * (step & 0)")),
    "clustered: one buffer": ("clustered", "clusters.", Race, ("((step + 1 & 1) * BUFFER + k * SIZE)", "k * SIZE"),
        ("Exchange(2, open, spot, send, nothing_to_tidy, release, left, wait, close)",
         "Exchange(1, open, spot, send, nothing_to_tidy, release, left, wait, close)")),
    "clustered: sent to the buffer that is read": ("clustered", "clusters._local", Race,
        ("(step + 1 & 1)", "(step & 1)")),
    "clustered: sent to the block behind": ("clustered", "clusters.clustered", OutOfBounds,
        ("of_block(here, u32(block))", "of_block(here, u32(block + 1))"),
        ("of_block(counted, u32(block))", "of_block(counted, u32(block + 1))")),
    "clustered: counted by another block": ("clustered", "clusters.clustered", BarrierMisuse,
        ("of_block(here, u32(block))", "of_block(here, u32(block ^ 1))")),
    "clustered: all sent to the first block": ("clustered", "clusters.clustered", Race,
        ("of_block(here, u32(block))", "of_block(here, u32(0))"),
        ("of_block(counted, u32(block))", "of_block(counted, u32(0))")),
    "clustered: the last block gets nothing": ("clustered mma", "clusters.clustered", Deadlock,
        ("range(BLOCKS)", "range(BLOCKS - 1)")),
    "clustered: two threads make the mbarriers": ("clustered", "clusters.clustered", Race,
        ("if cuda.threadIdx.x == 0:\n            mbarrier_init",
         "if cuda.threadIdx.x < 2:\n            mbarrier_init")),
    "clustered: room for one buffer": ("clustered", "exchange.buffers", OutOfBounds,
        ('"clustered": False', '"clustered": True')),
    "clustered: no room for mbarriers": ("clustered", "exchange.shared_bytes", OutOfBounds, ("16 if", "8 if")),
    "clustered: no wait": ("clustered at random", "clusters.clustered", Race,
        ("u32(step >> 1 & 1)) != u32(0)", "u32(step >> 1 & 1)) != u32(2)")),
    "group: blocks' units overlap": ("flagged", "persistent_forward.", Race, ("member * UNITS", "member * (UNITS - 1)")),
    "group: blocks of all groups dealt out in turn": ("clustered", "persistent_forward.", Race,
        ("i64(cuda.blockIdx.x) // BLOCKS, i64(cuda.blockIdx.x) % BLOCKS",
         "i64(cuda.blockIdx.x) % BLOCKS, i64(cuda.blockIdx.x) // BLOCKS")),
    "group: rows of earlier launches again": ("flagged in turns", "persistent_forward.", Wrong,
        ("(begun + group) // HEADS", "group // HEADS")),
    "group: heads begin anew in each launch": ("heads in turns", "persistent_forward.", Wrong,
        ("(begun + group) % HEADS", "group % HEADS")),
    "group: the first block's weights for all": ("flagged", "persistent_forward.", Wrong,
        ("(head * BLOCKS + member) * SHARE", "head * BLOCKS * SHARE")),
    "group: a share for all blocks": ("flagged", "group.group_of", OutOfBounds,
        ("tiles.packed_words(shape, tile) // blocks", "tiles.packed_words(shape, tile)")),
    "group: every block sends to the first one's place": ("flagged", "group.own_pair", Deadlock,
        ("column(base + part)", "column(part)")),
    "group: who has no pair sends too": ("flagged", "persistent_forward.", Race, ("steps and owner:", "steps:")),
    "group: sends behind the last step": ("clustered", "persistent_forward.", PeerExited,
        ("if i + 1 < steps and owner", "if owner")),
    "group: waits behind the last step": ("flagged", "persistent_forward.", Deadlock,
        ("if i + 1 < steps:\n                wait", "if True:\n                wait")),
    "group: sends for the step before": ("flagged", "persistent_forward.", Deadlock, ("0, i, word", "0, i - 1, word")),
    "group: final states written over initial ones": ("flagged at random", "persistent_forward.", Race,
        ("final[s * N * H", "state[s * N * H")),
    "initial: a row beyond the batch": ("flagged", "persistent_forward._initial", OutOfBounds, ("if n < N and", "if")),
    "initial: unit H": ("flagged", "persistent_forward._initial", OutOfBounds, ("unit < HEAD", "unit <= HEAD")),
    "group: the first x of others' pairs loaded": ("flagged in another order", "persistent_forward.", Race,
        (" if length[p] > 0 else f32(0)\n                if AHEAD", "\n                if AHEAD")),
    "group: x of the wrong step": ("flagged", "persistent_forward.", Wrong,
        ("further = (t - 1 if reverse else t + 1)", "further = t")),
    "group: next states loaded with the rest": ("flagged back", "persistent_backward.", Wrong,
        ("if not NEXT <= k % READ < NEXT + S:", "if True:")),
    "group: loads of others' pairs": ("flagged back at random", "persistent_backward.", Race,
        ("if length[p] > 0:  # the slots", "if True:  # the slots")),
    "group: gates without their padding": ("flagged back", "persistent_backward.", Deadlock, ("g * WIDTH, i, word", "g * (WIDTH - 5), i, word")),
    "group: backward, who has no pair sends too": ("flagged back", "persistent_backward.", Wrong,
        ("if owner:", "if steps > 0:")),
    "group: backward, second buffer not zeroed": ("flagged back", "persistent_backward.", Uninitialised,
        ("BUFFERS * BUFFER, 4 * THREADS", "BUFFER, 4 * THREADS")),
    "group: backward, one mail for all": ("flagged back", "persistent_backward.", Wrong,
        ("advance(mail, group * MAIL)", "advance(mail, 0)")),
    "group: backward, the first block's weights for all": ("flagged back", "persistent_backward.", Wrong,
        ("(head * BLOCKS + member) * SHARE", "head * BLOCKS * SHARE")),
    "packing: the first block's units for all": ("flagged", "packing._ffma", Wrong, ("block * OWN + unit", "unit")),
    "packing: a block's words counted once more": ("flagged", "packing._ffma", Wrong,
        ("word // (4 * THREADS_OF * J * CHUNKS)", "word // (4 * THREADS_OF * J * CHUNKS) * 0")),
    "packing, mma: the first block's units for all": ("flagged mma", "packing._mma", Wrong,
        ("block * OWN + (warp", "(warp")),
    "tiles: blocks' shares that are not whole 16 bytes": ("odd shares", "tiles.layout", Wrong,
        ("max(tile.units, 4) if shape.blocks > 1 else tile.units", "tile.units")),
    "split: warps without pairs gather behind the sums": ("flagged split", "products.mma", Race,
        ("min(warp % SPLIT * OWN, PAIRS - OWN)", "warp % SPLIT * OWN")),
    "split: no barrier before sums are gathered": ("flagged split", "products.mma", Race,
        ("            cuda.syncthreads()\n            team", "            team")),
}
# fmt: on


QUICK = {mutant[0] for mutant in MUTANTS.values()}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_kernels_as_they_are(case):
    check(CASES[case], seed=0)
    with interpreted():
        gpurnn.synchronize()  # nobody gave up


@pytest.mark.parametrize("case", ["clustered", pytest.param("counted", marks=pytest.mark.slow)])
def test_the_words_of_older_tools(case, monkeypatch):
    """What stands for fences that came later orders as much."""

    changed = set()

    def program(recipe):
        source = recipe.factory(recipe.trace, **dict(recipe.constants))
        text = build.ptx(source, "kernel", CAPABILITY)
        if build.older(text) != text:
            changed.add(source.function.__name__)
        return source, parse(build.older(text))

    monkeypatch.setattr("tests.interpreted.program", program)
    check(CASES[case], seed=1)
    assert changed == {"persistent_forward"}


def test_every_row_stands_where_it_says():
    stand(MUTANTS | MORE_MUTANTS)


@pytest.mark.parametrize("name", [*MUTANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MUTANTS)])
def test_planted_bugs_are_caught(monkeypatch, name):
    catch(monkeypatch, CASES, (MUTANTS | MORE_MUTANTS)[name])


def test_where_distances_of_pieces_are_the_same_in_every_round():
    def places(first, row):
        return [[piece // row * (row + 1) + piece % row for piece in range(k, k + 8)] for k in first]

    for pieces, row, rounds in itertools.product(
        (16, 24, 32, 48, 64, 96), (1, 2, 3, 4, 8, 12, 16, 24, 32, 48), (1, 2, 3)
    ):
        at_once = 8 * -(-pieces // 8 // rounds)
        alike = pieces % at_once == 0 and all(
            [b - a for a, b in zip(*places((first, first + k), row), strict=True)] == [places((k,), row)[0][0]] * 8
            for first in range(0, pieces, at_once)
            for k in range(0, at_once, 8)
        )
        assert not mail._fixed(pieces, 8, at_once, row) or alike, (pieces, row, at_once)
    assert mail._fixed(64, 8, 16, 4) and mail._fixed(64, 8, 16, 16) and not mail._fixed(48, 8, 24, 16)


NUMBERLESS = Case((6, 5, 2), FFMA, 2, "flagged", reverse=True, **SMALL)


@pytest.fixture
def all_ones(monkeypatch):
    """The last row's initial state is NaN, with the bits of an empty word."""
    given = mutants.problem(NUMBERLESS)
    given.state[0][2] = np.uint32(0xFFFFFFFF).view("f4")
    monkeypatch.setattr(mutants, "problem", lambda case: given)


def test_a_nan_of_all_ones_is_not_an_empty_word(all_ones):
    """A row that has not begun yet sends its initial state."""
    y = run(NUMBERLESS)["y"][0]
    assert np.isfinite(y[:, :2]).all() and np.isnan(y[:2, 2]).all()


@pytest.mark.slow
def test_a_nan_of_all_ones_that_is_sent_as_it_is(monkeypatch, all_ones):
    plant(monkeypatch, NUMBERLESS, "mail.flagged", [("GRAIN == 1 and word == u32(EMPTY)", "False")])
    with pytest.raises(Deadlock):
        run(NUMBERLESS)
