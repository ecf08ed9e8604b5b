"""Kernels built on this machine, for architectures it does not have: registers, spills, shared memory, instructions.

The lists below are what is published as checked.  A kernel takes seconds to build, so without `-m slow` each kind of product,
precision and exchange is built once, most for the newer chip: what an older one has of its own (fences, less room) shows
in one kernel of each kind.  `-m slow` builds all of them, and the long list.  A GPU is not needed, its tools are.
"""

import functools
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from bench import disassembly as sass
from gpurnn.cells import CELLS, UNITWISE_CELLS, noisy
from gpurnn.cuda.tuning import registers
from gpurnn.kernels import build, packing, persistent, plan, step, tiles, unitwise
from gpurnn.kernels.tiles import Ffma, Mma, Shape
from tests.conftest import USER_CELLS
from tests.kernels.mutants import anew

ARCHITECTURES = ((8, 0), (9, 0))
NEWER = ((10, 0), (12, 0))
SHARED = {(8, 0): 163 * 1024, (9, 0): 227 * 1024, (10, 0): 227 * 1024, (12, 0): 99 * 1024}  # of a block, bytes

MULTIPROCESSORS = {(8, 0): 108, (9, 0): 132, (10, 0): 148, (12, 0): 170}

# cell, H, batch, precision of the products: as a layer of that size is run
RESIDENT = [
    ("rnn_tanh", 1, 64, "float32"), ("rnn_tanh", 256, 64, "float32"), ("lstm", 64, 32, "float32"),
    ("lstm", 128, 256, "float32"), ("gru", 33, 300, "float32"), ("rnn_tanh", 256, 64, "bfloat16"), ("lstm", 128, 64, "bfloat16"),
    ("gru", 128, 64, "float16"),
]  # fmt: skip
PERSISTENT = [
    ("rnn_tanh", 1024, 64, "bfloat16"), ("lstm", 768, 16, "float16"), ("lstm", 1024, 64, "bfloat16"),
    ("gru", 512, 64, "tf32"), ("gru", 1024, 32, "bfloat16"), ("lstm", 512, 32, "float32"),
]  # fmt: skip
NO_ROOM = [("lstm", 128, 256, "float32"), ("lstm", 512, 32, "float32")]  # on the older chip: in one block, in all
SLOW = {
    (9, 0): [RESIDENT[1], RESIDENT[2], RESIDENT[5], PERSISTENT[0], PERSISTENT[1], PERSISTENT[4]],
    (8, 0): [case for case in RESIDENT + PERSISTENT if case not in (RESIDENT[5], PERSISTENT[2])],
}
LONG = [
    (cell, H, N, precision)
    for cell in ("rnn_tanh", "lstm", "gru")
    for H in (1, 7, 32, 64, 100, 128, 256, 512, 650, 768, 1024)
    for N in (8, 64)
    for precision in ("float32", "tf32", "bfloat16")
]


UNITWISE = [("sru", (9, 0)), ("paralstm", (9, 0)), ("sru", (8, 0))]  # the most values of a step, the most parameters


def cases(table):
    """(capability, cell, H, batch, precision) for each chip that has room for it."""
    every = [(chip, case) for chip in ARCHITECTURES for case in table if chip != (8, 0) or case not in NO_ROOM]
    return [pytest.param(chip, *case, marks=[pytest.mark.slow] * (case in SLOW[chip])) for chip, case in every]


def opcodes(cubin, tmp_path):
    """Of the machine code, counted by their first word and whole."""
    found = [instruction.opcode for instruction in sass.listing(cubin, tmp_path)]
    return Counter(word.split(".")[0] for word in found) + Counter(found)


@functools.lru_cache(maxsize=4)
def built(recipe, capability):
    source = recipe.factory(recipe.trace, **dict(recipe.constants))
    text = build.ptx(source, "kernel", capability)
    cubin, usage = build.assemble(text, capability)
    return source, text, cubin, usage


def check(recipe, capability, tmp_path):
    """Spills nothing; on the newer chips, whose 99 KB leave less room for weights, at most eight registers."""
    source, text, cubin, usage = built(recipe, capability)
    codes = opcodes(cubin, tmp_path)
    assert usage["spilled"] <= (32 if capability in NEWER else 0)
    assert not {"CALL.ABS", "CALL.ABS.NOINC", *(() if usage["spilled"] else ("LDL", "STL"))} & set(codes)
    warps = -(-source.threads // 128)  # on the busiest of four schedulers
    assert 0 < usage["registers"] <= min(255, 65536 // 4 // (32 * warps))
    assert usage["static_shared"] + source.shared <= SHARED[capability]
    assert ".extern .func" not in text
    doubles = {"DADD", "DMUL", "DFMA", "DSETP"} & set(codes)
    assert not doubles if ".f64" not in text else doubles
    return codes, text


@pytest.mark.parametrize(
    ("cell", "dtype", "capability"),
    [("rnn_tanh", "float32", (9, 0)), ("lstm", "float32", (9, 0)), ("gru", "float32", (9, 0))]
    + [("lstm", "float64", (9, 0)), ("lstm", "float32", (8, 0))]
    + [pytest.param(cell, "float64", (9, 0), marks=pytest.mark.slow) for cell in ("rnn_tanh", "gru")]
    + [pytest.param(cell, "float32", (8, 0), marks=pytest.mark.slow) for cell in ("rnn_tanh", "gru")]
    + [pytest.param(cell, "float64", (8, 0), marks=pytest.mark.slow) for cell in ("rnn_tanh", "lstm", "gru")],
    ids=str,
)
def test_step(cell, dtype, capability, tmp_path):
    for recipe in (
        build.recipe(step.forward, CELLS[cell].trace, dtype=dtype),
        build.recipe(step.backward, CELLS[cell].trace, dtype=dtype, clip=True),
    ):
        codes, text = check(recipe, capability, tmp_path)
        assert (".f64" in text) == (dtype == "float64")
        assert codes["LDG"] and codes["STG"]


@pytest.mark.parametrize(
    ("cell", "capability"),
    [
        pytest.param(cell, chip, marks=[pytest.mark.slow] * ((cell.name, chip) not in UNITWISE))
        for chip in ((9, 0), (8, 0))
        for cell in UNITWISE_CELLS
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_unitwise(cell, capability, tmp_path):
    for factory, constants, loads in (
        (unitwise.forward, {}, cell.gates),
        (unitwise.backward, {"clip": True}, len(cell.trace.kept) + cell.states + 1),
    ):
        codes, _ = check(build.recipe(factory, cell.trace, dtype="float32", **constants), capability, tmp_path)
        assert codes["LDG"] >= unitwise.AHEAD * loads  # before the first step: what is ahead lies in registers


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in ("hoarder", "every_function"))) for name in USER_CELLS],
)
def test_step_of_a_user_s_cell(name, tmp_path):
    for recipe in (
        build.recipe(step.forward, USER_CELLS[name].trace, dtype="float32"),
        build.recipe(step.backward, USER_CELLS[name].trace, dtype="float32", clip=False),
    ):
        check(recipe, (9, 0), tmp_path)


def test_random_numbers_in_kernels(tmp_path):
    lstm = noisy(CELLS["lstm"], zoneout=0.1, recurrent_dropout=0.3, noise=0.1)
    mingru = noisy(CELLS["mingru"], zoneout=0.1, noise=0.1)
    for kernels, cell in ((step, lstm), (unitwise, mingru)):
        for factory, constants in ((kernels.forward, {}), (kernels.backward, {"clip": True})):
            codes, text = check(build.recipe(factory, cell.trace, dtype="float32", **constants), (9, 0), tmp_path)
            assert codes["IMAD.WIDE.U32"] + codes["IMAD.HI.U32"] >= 10 and "mul.f64" not in text


def chip_of(capability):
    return plan.Chip(0, capability, MULTIPROCESSORS[capability], SHARED[capability])


def planned(name, H, N, precision, alone, kind, capability, heads=1):
    """(shape, choice) forward and backward, as the executor would choose them; None where a direction does not fit."""
    cell, chip, found = CELLS[name], chip_of(capability), []
    for transposed in (False, True):
        pair = registers(cell, transposed)
        choices = plan.choices(H // heads, cell.gates, transposed, N, precision, pair, chip, alone, heads)
        choice = min((c for c in choices if kind in (None, c.exchange)), key=lambda c: c.cost.cycles, default=None)
        found.append(choice and (Shape(H // heads, cell.gates, transposed, choice.blocks), choice))
    return found


def on_chip_recipes(name, H, N, precision, alone, kind, capability, heads=1, **more):
    """(recipe, tile, shape) forward and backward; less where a direction does not fit.  more: constants of both."""
    cell, chip, recipes = CELLS[name], chip_of(capability), []
    ways = ((persistent.forward, {"training": True}), (persistent.backward, {"clip": True}))
    both = planned(name, H, N, precision, alone, kind, capability, heads)
    for found, (factory, constants) in zip(both, ways, strict=True):
        constants |= {"heads": heads} if heads > 1 else {}
        if found is not None:
            shape, choice = found
            recipes.append((*shipped(factory, cell, choice, shape, constants | more, chip), shape))
    return recipes


def shipped(factory, cell, choice, shape, constants, chip):
    """The executor's choice: the first tile that spills nothing."""
    options = {
        "H": shape.H * constants.get("heads", 1),
        "blocks": choice.blocks,
        "exchange": choice.exchange,
        **constants,
    }
    options["newer"] = chip.capability >= (9, 0)
    for tries, tile in enumerate(plan.relaxed(shape, choice.tile, choice.exchange, chip)):
        recipe = build.recipe(factory, cell.trace, tile=tile, **options)
        if not built(recipe, chip.capability)[3]["spilled"]:
            assert tries <= 8, "the plan is far from what the cell needs"
            return recipe, tile
    assert chip.capability in NEWER, f"every tile spills: {choice.tile}"
    return recipe, tile


@pytest.mark.parametrize(
    "factory",
    [step.forward, step.backward, unitwise.forward, unitwise.backward],
    ids=lambda f: f"{f.__module__}.{f.__name__}",
)
def test_with_resets(factory, tmp_path):
    back, apart = factory.__name__ == "backward", factory.__module__.endswith("unitwise")
    constants = {"resets": True} | ({"clip": True} if back else {}) | ({"above": True} if back and not apart else {})
    trace = CELLS["sru" if apart else "lstm"].trace
    plain = build.recipe(factory, trace, dtype="float32", **({"clip": True} if back else {}))
    _, text = check(build.recipe(factory, trace, dtype="float32", **constants), (9, 0), tmp_path)
    assert "ld.global.u8" in text and "u8" not in check(plain, (9, 0), tmp_path)[1], (
        "flags are read where there are any"
    )


@pytest.mark.parametrize(
    ("case", "alone"),
    [
        (("lstm", 64, 32, "float32"), True),
        (("gru", 1024, 32, "bfloat16"), False),
        pytest.param(("lstm", 1024, 64, "bfloat16"), False, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_on_chip_with_resets(case, alone, tmp_path):
    recipes = on_chip_recipes(*case, alone, None, (9, 0), resets=True)
    assert len(recipes) == 2
    for recipe, _, _ in recipes:
        _, text = check(recipe, (9, 0), tmp_path)
        assert "ld.global.u8" in text


def check_on_chip(name, H, N, precision, alone, capability, tmp_path, kind=None, heads=1):
    recipes = on_chip_recipes(name, H, N, precision, alone, kind, capability, heads)
    for recipe, tile, shape in recipes:
        codes, text = check(recipe, capability, tmp_path)
        if isinstance(tile, Ffma):
            assert codes["FFMA"] >= _products(shape, tile)
        else:
            assert codes["HMMA"] >= _products(shape, tile)
        assert ".f64" not in text
        assert any(code.startswith("LDG.E.128") for code in codes) or tile.kept == 0
        assert any(code.startswith("LDS.128") for code in codes)
        assert codes["BAR"] >= (1 if alone else 2)
        kind, code = dict(recipe.constants)["exchange"], sass.listing(built(recipe, capability)[2], tmp_path)
        check_exchange(kind, text)
        check_fences(kind, sass.step_loop(code), capability, shape.transposed)
        if capability == (9, 0) and kind != "counted" and tiles.ahead(shape, tile, kind):  # whose acquire waits for all
            check_loads_ahead(sass.step_loop(code), shape.transposed)
        if capability >= (9, 0):
            assert warps_wait_as_one(code) >= (kind in ("flagged", "clustered"))
    return len(recipes)


def check_fences(kind, loop, capability, transposed):
    """A step has the fences that its exchange cannot do without, and none of them waits for what has time.

    A fence of the device waits for all that its thread has stored, and an acquire drops all of L1.  Forward, what is loaded
    ahead of the product has come by then.
    """
    codes = [instruction.opcode for instruction in loop]
    fences = sum(code.startswith("MEMBAR") and code.endswith(("GPU", "SYS")) for code in codes)
    dropped = sum(code.startswith("CCTL.IVALL") for code in codes)
    old = capability < (9, 0) and kind == "counted"  # its acquire is a whole fence there
    assert (fences, dropped) == {"flagged": (1, 1), "counted": (1 + old, 1)}.get(kind, (0, 0))
    if fences:  # behind what is sent, before what is stored and loaded for later
        fence = next(k for k, code in enumerate(codes) if code.startswith("MEMBAR") and code.endswith("GPU"))
        sent = max((k for k, i in enumerate(codes[:fence]) if i.startswith("STG")), default=-1)
        product = 0 if transposed else next(k for k, code in enumerate(codes) if code.startswith(("HMMA", "FFMA")))
        loads = [k for k, i in enumerate(codes) if i.startswith("LDG") and "STRONG" not in i and k >= product]
        stores = [k for k, code in enumerate(codes) if code.startswith("STG") and "STRONG" not in code and k > sent]
        assert 0 <= sent < fence < min(loads, default=len(codes)) and fence < min(stores)


def check_loads_ahead(loop, transposed):
    """What a step loads ahead is on its way while it multiplies, and forward until it looks for mail.

    Back, the assembler waits at the branch before the sends: nobody knows why, and the product lies between.
    """
    assert any(i.fetches for i in loop)
    for end in ("multiplies",) if transposed else ("multiplies", "polls"):
        early = sass.waits_for_fetches(loop, lambda i, end=end: getattr(i, end))
        assert early is None, f"{early.opcode} {early.operands} waits for what is loaded ahead, before it {end}"


POLLS = ("LDG.E.128.STRONG.GPU", "SYNCS.PHASECHK")  # a load of mail, a look at an mbarrier


def warps_wait_as_one(code):
    """How many loops poll for mail; each asks the warp by a vote before any of its threads may leave.

    On an H200, threads that left one by one went on apart, the block's barrier let them through, and a group hung.
    """
    bodies = [code[i.target : k + 1] for k, i in enumerate(code) if i.target is not None and i.target <= k]
    of_mail = [[i.opcode for i in body] for body in bodies if len(body) < 200]  # not the loop over time
    polls = [codes for codes in of_mail if any(i.startswith(POLLS) for i in codes)]
    for codes in polls:
        asked = next(k for k, i in enumerate(codes) if i.startswith(POLLS))
        leaves = next(k for k, i in enumerate(codes) if k > asked and i.startswith(("BRA", "BREAK", "EXIT", "BSYNC")))
        assert any(i.startswith("VOTE") for i in codes[asked:leaves])
    return len(polls)


def check_exchange(kind, text):
    """Blocks meet by what was meant, and by nothing else."""
    found = {
        word for word in ("st.async", "mbarrier", "st.relaxed.gpu", "ld.relaxed.gpu", "red.release.gpu") if word in text
    }
    given_up = {"st.relaxed.gpu"}
    assert (
        found
        == {
            "alone": set(),
            "flagged": {"st.relaxed.gpu", "ld.relaxed.gpu"},
            "counted": {"ld.relaxed.gpu", "red.release.gpu"} | given_up,
            "clustered": {"st.async", "mbarrier", "ld.relaxed.gpu"} | given_up,
        }[kind]
    )


def _products(shape, tile):
    """Multiplications of a step that a thread, or products of matrices that a warp, cannot do without."""
    lay = tiles.layout(shape, tile)
    if isinstance(tile, Ffma):
        return tile.rows * tile.units * shape.outputs * 4 * lay.chunks
    return tile.groups * shape.outputs // 2 * tile.rows // 8 * 2 * lay.chunks


@pytest.mark.parametrize(("capability", "cell", "H", "N", "precision"), cases(RESIDENT))
def test_resident(capability, cell, H, N, precision, tmp_path):
    assert check_on_chip(cell, H, N, precision, True, capability, tmp_path) == 2


@pytest.mark.parametrize(("capability", "cell", "H", "N", "precision"), cases(PERSISTENT))
def test_persistent(capability, cell, H, N, precision, tmp_path):
    assert check_on_chip(cell, H, N, precision, False, capability, tmp_path) == 2


@pytest.mark.parametrize(
    ("cell", "H", "heads", "precision", "alone"),
    [
        ("lstm", 768, 12, "bfloat16", True),
        ("slstm", 768, 4, "bfloat16", False),
        pytest.param("gru", 1024, 4, "float32", False, marks=pytest.mark.slow),
        pytest.param("slstm", 256, 4, "float32", True, marks=pytest.mark.slow),
    ],
)
def test_heads(cell, H, heads, precision, alone, tmp_path):
    assert check_on_chip(cell, H, 16, precision, alone, (9, 0), tmp_path, heads=heads) == 2


@pytest.mark.parametrize(("case", "alone"), [(NO_ROOM[0], True), (NO_ROOM[1], False)], ids=str)
def test_no_room_on_the_older_chip(case, alone):
    assert planned(*case, alone, None, (8, 0)) == [None, None]
    assert None not in planned(*case, alone, None, (9, 0))


@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ("counted", "bfloat16"),
        ("clustered", "float32"),
        pytest.param("clustered", "tf32", marks=pytest.mark.slow),
        pytest.param("flagged", "float32", marks=pytest.mark.slow),  # as `test_persistent` has it
    ],
)
def test_every_exchange(kind, precision, tmp_path):
    assert check_on_chip("lstm", 200, 16, precision, False, (9, 0), tmp_path, kind) == 2


@pytest.mark.parametrize("kind", ["alone", "flagged", "counted", "clustered"])
def test_blocks_that_wait_for_each_other_are_launched_together(kind, tmp_path):
    blocks = 1 if kind == "alone" else 3
    options = {"H": 9, "tile": Ffma(1, 4, 1, 0), "blocks": blocks, "exchange": kind, "training": False}
    recipe = build.recipe(persistent.forward, CELLS["rnn_tanh"].trace, **options)
    for kernel in (build.build(recipe, (9, 0), tmp_path) for _ in range(2)):  # built, and from the disk
        assert kernel.cluster == (3 if kind == "clustered" else 1)
        assert kernel.cooperative == (kind in ("flagged", "counted"))


@pytest.mark.parametrize("kind", ["counted", "clustered"])
def test_the_words_of_older_tools_assemble(kind, tmp_path):
    """They wait for stores to global memory and drop L1, which is why they are only for older tools."""
    options = {"H": 9, "tile": Ffma(1, 4, 1, 0), "blocks": 3, "exchange": kind, "training": False}
    text = built(build.recipe(persistent.forward, CELLS["rnn_tanh"].trace, **options), (9, 0))[1]
    codes = opcodes(build.assemble(build.older(text), (9, 0))[0], tmp_path)
    now = opcodes(build.assemble(text, (9, 0))[0], tmp_path)
    assert sum(codes[code] for code in codes if code.startswith("MEMBAR")) > now["MEMBAR"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES + NEWER, ids=str)
@pytest.mark.parametrize(("cell", "H", "N", "precision"), LONG)
def test_long_list(cell, H, N, precision, capability, tmp_path):
    fits = check_on_chip(cell, H, N, precision, True, capability, tmp_path)
    fits += check_on_chip(cell, H, N, precision, False, capability, tmp_path)
    if not fits:
        pytest.skip(f"{cell} with {H} units does not fit")


def test_pack_kernels(tmp_path):
    for precision in ("float32", "tf32", "bfloat16", "float16"):
        for shape, choice in planned("lstm", 100, 16, precision, False, None, (9, 0)):
            for heads in ({}, {"heads": 3}):
                check(build.recipe(packing.pack, shape=shape, tile=choice.tile, **heads), (9, 0), tmp_path)


def test_lint_notices_spills_and_an_empty_disassembly(tmp_path):
    """The checks above can fail: a tile that asks for more registers than a thread has, and no code at all."""
    cell, shape = CELLS["lstm"], Shape(128, 4, False)
    tile = Ffma(2, 2, 4, tiles.layout(shape, Ffma(2, 2, 4, 0)).chunks)
    options = {"H": 128, "blocks": 1, "exchange": "alone", "training": True}
    recipe = build.recipe(persistent.forward, cell.trace, tile=tile, **options)
    with pytest.raises(AssertionError):
        check(recipe, (9, 0), tmp_path)
    empty = build.Source(lambda p: None, (_pointer(),), 32)
    with pytest.raises(AssertionError, match="empty disassembly"):
        opcodes(build.assemble(build.ptx(empty, "empty", (9, 0)), (9, 0))[0], tmp_path)


def _pointer():
    from gpurnn.kernels.numba_cuda import types

    return types.CPointer(types.float32)


@pytest.mark.parametrize("asks", ["LDG.E.128.STRONG.GPU", "SYNCS.PHASECHK.TRANS64.TRYWAIT"])
def test_lint_notices_threads_that_leave_a_poll_one_by_one(asks):
    def poll(*between):
        return [sass.Instruction(code, "", 0 if code == "BRA" else None) for code in (asks, *between)]

    assert warps_wait_as_one(poll("VOTE.ANY", "BRA")) == 1 and warps_wait_as_one([]) == 0
    for apart in (("BRA",), ("BREAK", "VOTE.ANY", "BRA")):
        with pytest.raises(AssertionError):
            warps_wait_as_one(poll(*apart))


VOTES = {  # of a warp that waits as one: without them its threads leave one by one
    "flagged": ("mail", ("full = cuda.all_sync(WARP, full)", "pass")),
    "clustered": (
        "clusters",
        (
            "cuda.all_sync(WARP, mbarrier_passed(mbarrier(vector, step), u32(step >> 1 & 1)) != u32(0))",
            "mbarrier_passed(mbarrier(vector, step), u32(step >> 1 & 1)) != u32(0)",
        ),
    ),
}


@pytest.mark.parametrize("kind", [pytest.param("flagged", marks=pytest.mark.slow), "clustered"])
def test_lint_notices_a_wait_without_its_vote(kind, tmp_path):
    module, edit = VOTES[kind]
    factory = anew(module, "", [edit])["persistent_forward"].forward
    options = {"H": 9, "tile": Ffma(1, 4, 1, 0), "blocks": 3, "exchange": kind, "training": False}
    cubin = built(build.recipe(factory, CELLS["rnn_tanh"].trace, **options), (9, 0))[2]
    with pytest.raises(AssertionError):
        warps_wait_as_one(sass.listing(cubin, tmp_path))


def test_lint_notices_who_waits_for_what_is_loaded_ahead():
    """Of another load's scoreboard, too; a fence waits for all, and behind the poll it is time to wait."""

    def code(opcode, sets=sass.NONE, waits=()):
        return sass.Instruction(opcode, "", None, sets=sets, waits=waits)

    load, product, poll = code("LDG.E", 5), code("HMMA"), code("LDG.E.128.STRONG.GPU", 5)
    check_loads_ahead([load, product, code("MEMBAR.ALL.GPU", waits=(5,)), poll, code("FADD", waits=(5,))], False)
    check_loads_ahead([product, poll, load, code("FADD", waits=(4,))], False)
    for loop in ([load, code("HMMA", waits=(5,)), poll], [load, product, code("FADD", waits=(0, 5)), poll]):
        with pytest.raises(AssertionError, match="waits for what is loaded ahead"):
            check_loads_ahead(loop, False)
    check_loads_ahead([load, product, code("BRA", waits=(5,)), poll], True)
    with pytest.raises(AssertionError, match="before it multiplies"):
        check_loads_ahead([poll, load, code("FADD", waits=(5,)), product], True)


def test_plan_never_asks_for_more_than_there_is():
    chip = chip_of((9, 0))
    assert plan.best(plan.choices(512, 4, False, 64, "float32", 20, chip, True)) is None
    for G, H, N in ((1, 250, 64), (3, 77, 5), (4, 128, 1000), (4, 700, 33)):
        for transposed in (False, True):
            for precision in ("float32", "tf32", "bfloat16"):
                for alone in (True, False):
                    for choice in plan.choices(H, G, transposed, N, precision, 20, chip, alone):
                        check_choice(choice, Shape(H, G, transposed, choice.blocks), chip)


def check_choice(choice, shape, chip):
    lay = tiles.layout(shape, choice.tile)
    assert lay.units * shape.blocks >= shape.H > lay.units * (shape.blocks - 1), "no block without a unit"
    assert lay.threads <= plan.MOST_THREADS and lay.threads % 32 == 0
    assert 0 <= choice.tile.kept <= lay.chunks
    assert 2 * 1 <= choice.cost.cycles < np.inf
    assert shape.blocks <= (8 if choice.exchange == "clustered" else chip.multiprocessors)
    kept = [tile.kept for tile in plan.relaxed(shape, choice.tile, choice.exchange, chip)]
    assert kept[0] == choice.tile.kept and kept == sorted(kept, reverse=True)
    for tile in plan.relaxed(shape, choice.tile, choice.exchange, chip):
        assert plan.shared_bytes(shape, tile, choice.exchange) <= chip.shared - plan.RESERVED
    if isinstance(choice.tile, Mma):
        assert lay.stride * lay.size // 64 % 2 == 1, "8 rows' 16 bytes would meet banks twice"
