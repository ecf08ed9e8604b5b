"""Bugs planted in the CUDA kernels, each of which has to show: that says that the other tests of the kernels can fail.

A mutant is an edit of a kernel's source.  Its kernel takes the place of the library's in the executor that launches it,
and a small training step goes through the PTX interpreter, which must refuse it or come out with wrong numbers.  The
source as it is goes the same way and passes, so it is the edit that was caught.  Here: the step kernel, and the
persistent kernel's time loop, product and packing, one block to a group; `test_exchange_mutants` has groups of several.
"""

import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

from gpurnn.cells import PARALSTM_CELL, SRU_CELL
from gpurnn.kernels.tiles import Ffma, Mma
from tests.kernels.mutants import Case, Wrong, catch, check, plant, stand
from tests.ptx.errors import Misaligned, OutOfBounds, Race, Uninitialised

FEW, MANY = (4, 3, 3, 1, 1), (4, 4, 4, 3, 3, 2, 2, 2, 2, 1)  # several blocks' rows, and the last block is not full
LONG = (7, 7, 6, 5, 3, 1, 0)  # longer than what a thread loads ahead, as long, and shorter
# Several warps, sums over lanes with and without halves to keep, weights in registers and in shared memory, and,
# forward, two tiles of tensor cores' products.
FFMA = Ffma(units=2, lanes=8, rows=2, kept=1), Ffma(units=1, lanes=4, rows=2, kept=3)
MMA = (Mma("bfloat16", groups=2, split=1, rows=8, kept=1),) * 2
SPLIT = (Mma("bfloat16", groups=2, split=2, rows=16, kept=0), Mma("bfloat16", groups=2, split=2, rows=16, kept=1))
TF32 = (Mma("tf32", groups=2, split=2, rows=8, kept=1),) * 2
CASES = {
    "ffma": Case(FEW, FFMA),
    "ffma reverse": Case(FEW, FFMA, reverse=True),
    "ffma padded": Case(FEW, (FFMA[0], Ffma(units=2, lanes=4, rows=2, kept=3))),
    "pieces": Case(FEW, FFMA, training=False),
    "pieces reverse": Case(FEW, FFMA, training=False, reverse=True),
    "ffma forward": Case(FEW, FFMA, back=False),
    "mma": Case(MANY, MMA),
    "mma reverse": Case(MANY, MMA, reverse=True),
    "mma forward": Case(MANY, MMA, back=False),
    "split": Case(MANY, SPLIT),
    "split forward": Case(MANY, SPLIT, back=False),
    "tf32 forward": Case(MANY, TF32, back=False),
    "step": Case(MANY),
    "step reverse": Case(MANY, reverse=True),
    "unitwise": Case(LONG, cell=SRU_CELL),
    "unitwise reverse": Case(LONG, cell=SRU_CELL, reverse=True),
    "unitwise pieces": Case(LONG, cell=SRU_CELL, training=False),
    "unitwise next": Case(LONG, cell=PARALSTM_CELL),  # its backward looks at the states behind a step
}

# What is wrong: case, where, what shows, (old, new) of each edit.  The second table is for `-m slow`.
# fmt: off
MUTANTS = {
    "forward: no barrier before the first product": ("ffma forward", "persistent_forward.", Race,
        ("open(vector, fault)\n        cuda.syncthreads()\n", "open(vector, fault)\n")),
    "forward: padding not zeroed": ("ffma forward", "persistent_forward.", Uninitialised,
        ("store_shared_u(u32(vector + k), u32(0))", "pass")),
    "forward: rows run on behind their end": ("ffma forward", "persistent_forward.", Wrong,
        ("if step < length[p]:\n                for s", "if length[p] > 0:\n                for s")),
    "backward: next states of the step itself": ("ffma", "persistent_backward.", Wrong,
        ("ready[p * READ + NEXT + s] = ready[p * READ + STATE + s]", "pass")),
    "alone: no barrier in a step": ("ffma", "clusters.alone", Race, ("cuda.syncthreads()", "pass")),
    "mma: weights of the wrong lane": ("mma forward", "packing._mma", Wrong,
        ("CHUNK // 4 * (lane % 4)", "CHUNK // 8 * (lane % 4)"), ("CHUNK // 8 * second", "CHUNK // 2 * second")),
    "split: no barrier before sums are gathered": ("split forward", "products.mma", Race,
        ("            cuda.syncthreads()\n            team", "            team")),
    "step backward: a row too many clipped": ("step", "step.backward", Wrong, ("n < seen", "n <= seen")),
    "unitwise forward: a step loaded too late": ("unitwise", "unitwise.forward", Wrong,
        ("slots[slot + AHEAD * slot_step", "slots[slot + (AHEAD - 1) * slot_step")),
    "unitwise backward: what is loaded ahead is not moved up": ("unitwise", "unitwise.backward", Wrong,
        ("coming[s] = coming[s + EACH]", "pass")),
}
MORE_MUTANTS = {
    "backward: ended rows go on changing": ("ffma reverse", "persistent_backward.", Wrong,
        ("if step < length[p]:\n                for s", "if length[p] > 0:\n                for s")),
    "ffma: keeps the wrong half": ("ffma forward", "products._reduction", Wrong,
        ("(high if upper else low) +", "(low if upper else high) +")),
    "forward: a step too late in reverse": ("ffma reverse", "persistent_forward.", Wrong,
        ("t = steps - 1 - i", "t = steps - i")),
    "forward: x of the wrong step": ("ffma forward", "persistent_forward.", Wrong,
        ("following = advance(now, slots_on)", "following = advance(now, 0)")),
    "forward: bias of the wrong slot": ("ffma forward", "persistent_forward.", Wrong,
        ("p * GIVEN + G + k]", "p * GIVEN + k]")),
    "forward: a piece forgets where it starts": ("pieces", "persistent_forward.", Wrong,
        ("lengths[n] - start", "lengths[n]")),
    "forward: x of step T": ("ffma forward", "persistent_forward.", OutOfBounds,
        ("if AHEAD and i + 1 < steps:", "if AHEAD and i < steps:")),
    "forward: first x of step T in reverse": ("ffma reverse", "persistent_forward.", OutOfBounds,
        ("(steps - 1 if reverse and", "(steps if reverse and")),
    "forward: last row not run": ("ffma forward", "group.own_pair", Wrong,
        ("unit < H and n < N", "unit < H and n < N - 1")),
    "forward: a row beyond the batch runs": ("ffma forward", "group.own_pair", Race,
        ("unit < H and n < N", "unit < H and n <= N")),
    "forward: a row beyond the batch loaded": ("ffma forward", "group.own_pair", OutOfBounds,
        ("min(n, N - 1)", "min(n, N)")),
    "forward: unit H runs": ("ffma forward", "group.own_pair", Race, ("unit < H and n < N", "unit <= H and n < N")),
    "forward: unit H loaded": ("ffma forward", "group.own_pair", OutOfBounds, ("min(unit, H - 1)", "min(unit, H)")),
    "forward: all rows stop with the shortest": ("ffma forward", "persistent_forward.", Wrong,
        ("min(T, lengths[first] - start)\n", "min(T, lengths[min(first + ROWS, N) - 1] - start)\n")),
    "forward: unused pairs write final states": ("ffma forward", "persistent_forward.", Race,
        ("if length[p] > 0:\n                for s", "if length[p] >= 0:\n                for s")),
    "forward: final states written over initial ones": ("ffma forward", "persistent_forward.", Wrong,
        ("final[s * N * H", "state[s * N * H")),
    "forward: x of the wrong gate": ("ffma forward", "persistent_forward.", Wrong,
        ("now[slot_at[p] + (START + g) * H]", "now[slot_at[p] + g * H]")),
    "forward: x of the wrong gate later": ("ffma forward", "persistent_forward.", Wrong,
        ("= following[slot_at[p] + (START + g) * H]", "= following[slot_at[p] + g * H]")),
    "forward: a bias slot too far": ("ffma forward", "persistent_forward.", OutOfBounds,
        ("bias[k * H + u]", "bias[(k + 1) * H + u]")),
    "forward: states written a step early": ("ffma forward", "persistent_forward.", Wrong,
        ("(t + 1 - reverse)", "(t + reverse)")),
    "forward: other states over each other": ("ffma", "persistent_forward.", Wrong,
        ("rest_after[s * rest_state", "rest_after[s * N * H")),
    "forward: written behind a row's end": ("ffma", "persistent_forward.", Wrong,
        ("if step < length[p]:\n                h_after", "if length[p] > 0:\n                h_after")),
    "forward: groups begin at the same row": ("ffma forward", "persistent_forward.", Race,
        ("row + group * ROWS", "row + group")),
    "initial: half of the vector not written": ("ffma forward", "persistent_forward._initial", Uninitialised,
        ("ROWS * WORDS, THREADS", "ROWS * WORDS // 2, THREADS")),
    "initial: units of another row": ("ffma forward", "persistent_forward._initial", Wrong,
        ("state[n * H + unit]", "state[first * H + unit]")),
    "initial: units not in their columns": ("mma forward", "persistent_forward._initial", Wrong,
        ("unit = unit_at(place + half)", "unit = place + half")),
    "backward: the last state taken for the one after it": ("ffma", "persistent_backward.", Wrong,
        ("(0 if reverse else steps) * N * H", "(0 if reverse else steps - 1) * N * H")),
    "backward: no barrier after zeroing": ("ffma", "persistent_backward.", Race,
        ("open(vector, fault)\n        cuda.syncthreads()\n", "open(vector, fault)\n")),
    "backward: padding not zeroed": ("ffma", "persistent_backward.", Uninitialised,
        ("store_shared_u(u32(vector + k), u32(0))", "pass")),
    "backward: second buffer not zeroed": ("ffma", "persistent_backward.", Uninitialised,
        ("BUFFERS * BUFFER, 4 * THREADS", "BUFFER, 4 * THREADS")),
    "backward: loads of the wrong step": ("ffma reverse", "persistent_backward.", OutOfBounds,
        ("on = i64(1 if reverse else -1)", "on = i64(-1)")),
    "backward: dy that does not walk": ("ffma", "persistent_backward.", Wrong, ("advance(dy, on * dy_step)", "dy")),
    "backward: other states that do not walk": ("ffma", "persistent_backward.", Wrong,
        ("advance(rest, on * N * H),", "rest,")),
    "forward: states over those of the step before": ("ffma", "persistent_forward.", (Wrong, Uninitialised),
        ("advance(h_after, states_on)", "h_after")),
    "forward: other states over those of the step before": ("ffma reverse", "persistent_forward.", (Wrong, Uninitialised),
        ("advance(rest_after, states_on)", "rest_after")),
    "backward: first loads of step T": ("ffma", "persistent_backward.", OutOfBounds,
        ("i64(0 if reverse else steps - 1))", "i64(0 if reverse else steps))")),
    "backward: rows begin behind their end": ("ffma", "persistent_backward.", Wrong,
        ("if step < length[p]:\n                    for k", "if length[p] > 0:\n                    for k")),
    "backward: ended rows get the product's share": ("ffma reverse", "persistent_backward.", Wrong,
        ("if step < length[p]:\n                values", "if length[p] > 0:\n                values")),
    "backward: dy's row stride ignored": ("ffma", "persistent_backward.", Wrong, ("n * dy_row + u", "n * H + u")),
    "backward: dy's step stride ignored": ("ffma", "persistent_backward.", OutOfBounds, ("t * dy_step", "t * N * H")),
    "backward: clipped before the step, not behind it": ("ffma", "persistent_backward.", Wrong,
        ("if clip:", "if not clip:"),
        ("            go_back(step", "            for k in range(OWN_STATE):\n                values[k] = _clipped(values[k], limit)\n            go_back(step")),
    "backward: not clipped": ("ffma", "persistent_backward.", Wrong, ("if clip:", "if not clip:")),
    "backward: only positive values clipped": ("mma", "persistent_backward.", Wrong,
        ("return -limit if value < -limit else value", "return value")),
    "backward: dparams of one step": ("ffma", "persistent_backward.", Wrong,
        ("gradients[p * P + k] +=", "gradients[p * P + k] =")),
    "backward: gates in the wrong order": ("ffma", "persistent_backward.", Wrong,
        ("written[p * WRITTEN + g]", "written[p * WRITTEN + G - 1 - g]")),
    "backward: the product's share lost": ("ffma", "persistent_backward.", Wrong, ("values[p * S] += sums[p]", "pass")),
    "backward: before and after swapped": ("ffma", "persistent_backward.", Wrong,
        ("before = (t + reverse) * N * H", "before = (t + 1 - reverse) * N * H")),
    "backward: other states of the first step": ("ffma", "persistent_backward.", Wrong,
        ("advance(rest, last)", "advance(rest, 0)")),
    "backward: gates sent on top of each other": ("ffma", "persistent_backward.", Wrong, ("g * WIDTH, i, word", "0, i, word")),
    "backward: gates without their padding": ("ffma padded", "persistent_backward.", Race,
        ("g * WIDTH, i, word", "g * (WIDTH - 1), i, word")),
    "backward: the vector of the step before": ("ffma", "persistent_backward.", Race,
        ("vector + (i + 1 & BUFFERS - 1)", "vector + (i & BUFFERS - 1)")),
    "alone: one buffer": ("ffma forward", "clusters.", Race, ("((step + 1 & 1) * BUFFER + k * SIZE)", "k * SIZE"),
        ("Exchange(2, open, spot, send, nothing_to_tidy, n", "Exchange(1, open, spot, send, nothing_to_tidy, n")),
    "alone: sent to the buffer that is read": ("ffma forward", "clusters._local", Race,
        ("(step + 1 & 1)", "(step & 1)")),
    "alone: rows without their padding": ("ffma forward", "clusters._local", Race,
        ("row * STRIDE + k", "row * (STRIDE // 2) + k")),
    "ffma: weights of the row behind": ("ffma forward", "packing._element", OutOfBounds, ("unit >= H", "unit > H")),
    "ffma: chunks in shared memory begin one late": ("ffma forward", "products.ffma", OutOfBounds,
        ("((c - KEPT) * J", "((c - KEPT + 1) * J")),
    "ffma: chunks copied from one early": ("ffma forward", "products.ffma", Wrong,
        ("packed[KEPT * J", "packed[(KEPT - 1) * J")),
    "ffma: adds the wrong lane": ("ffma forward", "products._reduction", Wrong,
        ("shuffle(partial[k], u32(mask))", "shuffle(partial[k], u32(2 * mask))")),
    "ffma: pairs placed elsewhere": ("ffma forward", "products.ffma", Race, ("(PAIRS >> (bit + 1))", "(PAIRS >> bit)")),
    "ffma: several lanes own a pair": ("ffma forward", "products.ffma", Race, ("lane < DOUBLE and unit", "unit")),
    "ffma: a wrong lane's halves": ("ffma forward", "products._reduction", Wrong,
        ("low if upper else high, u32(mask)", "low if upper else high, u32(mask ^ 3)")),
    "ffma: weights of the wrong lane": ("ffma forward", "packing._ffma", Wrong,
        ("4 * (tid % LANES + LANES * c)", "4 * (tid % LANES * 2 + c)")),
    "ffma: packs a thread too many": ("ffma", "packing._ffma", OutOfBounds, ("word < WORDS", "word <= WORDS")),
    "packing: the vector's other parts": ("ffma padded", "packing._element", Wrong, ("k // WIDTH", "k // H")),
    "packing: a part behind the last": ("ffma", "packing._element", OutOfBounds, ("part >= PARTS", "part > PARTS")),
    "packing: the vector's unit H": ("ffma", "packing._element", OutOfBounds, ("other >= H", "other > H")),
    "packing: units not in their columns": ("mma forward", "packing._element", Wrong,
        ("unit_at(k % WIDTH)", "k % WIDTH")),
    "mma: halves of a chunk swapped": ("mma forward", "products.mma", Wrong,
        ("[2 * second : 2 * second + 2]", "[2 - 2 * second : 4 - 2 * second]")),
    "mma: the lane's k at half its place": ("mma forward", "products.mma", Misaligned,
        ("lane % 4 * 16", "lane % 4 * 8")),
    "mma: batch rows permuted": ("mma forward", "products.mma", Wrong,
        ("2 * (lane % 4) + own // 2 % 2", "lane % 4 + 4 * (own // 2 % 2)")),
    "mma: chunks copied from one early": ("mma forward", "products.mma", Wrong,
        ("at * CHUNKS + KEPT)", "at * CHUNKS + KEPT - 1)")),
    "mma: a tile's registers from another chunk": ("mma forward", "products.mma", Wrong,
        ("at * CHUNKS * 2 + k", "at * KEPT * 2 + k")),
    "mma: results of rows and units swapped": ("mma forward", "products.mma", Wrong,
        ("[half % 2 * 2 + row]", "[row * 2 + half % 2]")),
    "mma: one chain of sums forgotten": ("mma", "products.mma", Wrong,
        ("b.fadd(*found) if CHAINS == 2 else found[0]", "found[0]")),
    "mma: halves of a word swapped": ("mma forward", "products.mma", Wrong,
        ("pack_bf16(values[2 * k + 1], values[2 * k])", "pack_bf16(values[2 * k], values[2 * k + 1])")),
    "mma: pairs of weights swapped": ("mma forward", "packing._mma", Wrong,
        ("pack_bf16(element(weight, unit, half % OUT, k + 1), low)",
         "pack_bf16(low, element(weight, unit, half % OUT, k + 1))")),
    "mma: fragment words swapped": ("mma forward", "packing._mma", Wrong,
        ("half = 2 * at + part % 2", "half = 2 * at + part // 2"), ("* (part // 2)", "* (part % 2)")),
    "mma: units not in their columns": ("mma forward", "tiles.paired", Wrong, ("unit % 8 * 2", "(unit + 2) % 8 * 2")),
    "tf32: words not rounded": ("tf32 forward", "products.mma", Wrong,
        ("return round_tf32(values[k])", "return round_tf32(values[0])")),
    "tf32: halves of a chunk as in bfloat16": ("tf32 forward", "packing._mma", Wrong,
        ("CHUNK // 16 * (part // 2)", "2 * (part // 2)")),
    "split: gathers half of what was left": ("split forward", "products.mma", Wrong,
        ("s * 128 * VALUES", "s * 64 * VALUES")),
    "split: gathers the first warp's sums twice": ("split forward", "products.mma", Wrong,
        ("s * 128 * VALUES", "0 * VALUES")),
    "split: every warp keeps the first pairs": ("split forward", "products.mma", Wrong,
        ("(team * PAIRS + own)", "(team * PAIRS)")),
    "split: gathers the first team's": ("split forward", "products.mma", Wrong,
        ("warp // SPLIT * SPLIT, min", "0, min")),
    "split: warps leave sums on top of each other": ("split forward", "products.mma", Race,
        ("warp * (32 * VALUES) + AT", "0 * VALUES + AT")),
    "split: every warp has the same piece of the vector": ("split forward", "products.mma", Wrong,
        ("warp % SPLIT * (CHUNKS * 64)", "warp % SPLIT * 0")),
    "split: weights where the sums are": ("split forward", "products.mma", Wrong,
        ("weights[PARTIAL // 4 + (tid", "weights[(tid"), ("(dynamic, PARTIAL // 4 + warp", "(dynamic, warp")),
    "split: too little room for sums": ("split forward", "tiles.partial_bytes", Race, ("* 4\n", "* 2\n")),
    "split: too little room for weights": ("split forward", "tiles.spilled_bytes", Race, ("* 4\n", "* 2\n")),
    "split: weights of every piece of the vector the same": ("split forward", "packing._mma", Wrong,
        ("(warp % SPLIT * CHUNKS + c)", "c")),
    "split: rows beyond 8 multiplied by the first": ("split forward", "products.mma", Wrong,
        ("8 * ROW * r + tiles", "0 * r + tiles")),
    "split: rows beyond 8 elsewhere": ("split forward", "products.mma", Race,
        ("own // 4 % EIGHTS * 8", "own // 4 % EIGHTS * 4")),
    "step forward: blocks on top of each other": ("step", "step.forward", Race,
        ("types.int64(cuda.blockIdx.x) * THREADS + cuda.threadIdx.x", "types.int64(cuda.threadIdx.x)")),
    "step forward: a thread too many": ("step", "step.forward", Race, ("k >= rows * H", "k > rows * H")),
    "step forward: before and after swapped": ("step", "step.forward", Wrong, ("before, after =", "after, before =")),
    "step forward: a bias slot too far": ("step", "step.forward", OutOfBounds,
        ("bias[s * H + u]", "bias[(s + 1) * H + u]")),
    "step forward: other states of the step behind": ("step", "step.forward", Wrong,
        ("before * rest_step + k", "after * rest_step + k")),
    "step backward: a thread too many": ("step", "step.backward", OutOfBounds, ("k >= rows * H", "k > rows * H")),
    "step backward: before and after swapped": ("step reverse", "step.backward", Wrong,
        ("before, after =", "after, before =")),
    "step backward: dL/d(final state) clipped": ("step", "step.backward", Wrong, ("if clip and n < seen", "if clip")),
    "step backward: dy's row stride ignored": ("step", "step.backward", Wrong, ("n * dy_row", "n * H")),
    "step backward: dy not added": ("step", "step.backward", Wrong, ("given[DNEXT] += dy", "given[DNEXT] = dy")),
    "unitwise forward: loads behind a row's end": ("unitwise", "unitwise.forward", OutOfBounds,
        ("if step + AHEAD < count:", "if step + AHEAD < count + 9:")),
    "unitwise forward: rows run on behind their end": ("unitwise", "unitwise.forward", Wrong,
        ("min(steps, lengths[n] - begin)", "steps")),
    "unitwise forward: a piece forgets what was before": ("unitwise pieces", "unitwise.forward", Wrong,
        ("lengths[n] - begin", "lengths[n]")),
    "unitwise forward: other states stay": ("unitwise", "unitwise.forward", Wrong,
        ("own[GIVEN + s] = result[s]", "own[GIVEN] = result[0]")),
    "unitwise forward: in reverse from the last step": ("unitwise reverse", "unitwise.forward", Wrong,
        ("reverse * (count - 1)", "reverse * (steps - 1)")),
    "unitwise backward: from the first step": ("unitwise", "unitwise.backward", (Wrong, OutOfBounds),
        ("(1 - reverse) * (count - 1)", "(1 - reverse) * 0")),
    "unitwise backward: next states of the step itself": ("unitwise next", "unitwise.backward", Wrong,
        ("given[NEXT + s] = given[STATE + s]", "pass")),
    "unitwise backward: dL/d(final state) not read": ("unitwise", "unitwise.backward", Wrong,
        ("passed[s] = dstate[s * N * H + k]", "passed[s] = real(0)")),
    "unitwise backward: not clipped": ("unitwise", "unitwise.backward", Wrong,
        ("clipped(result[G + s], limit) if clip else result[G + s]", "result[G + s]")),
    "unitwise backward: dparams of one step": ("unitwise reverse", "unitwise.backward", Wrong,
        ("sums[p] += types", "sums[p] = types")),
    "unitwise backward: dy's row stride ignored": ("unitwise", "unitwise.backward", Wrong, ("n * dy_row", "n * H")),
    "step backward: dparams of one step": ("step reverse", "step.backward", Wrong,
        ("+= types.float64(result", "= types.float64(result")),
}
# fmt: on

QUICK = {mutant[0] for mutant in MUTANTS.values()}


@pytest.mark.parametrize("seed", (None, 0, pytest.param(1, marks=pytest.mark.slow)))
@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_the_kernels_as_they_are(case, seed):
    check(CASES[case], seed)


UNCHANGED = {
    "persistent_backward.": "ffma",
    "products.ffma": "ffma forward",
    "packing._mma": "mma forward",
    "clusters.alone": "ffma forward",
    "tiles.paired": "mma forward",
    "step.forward": "step",
    "unitwise.forward": "unitwise",
}


@pytest.mark.slow
@pytest.mark.parametrize("where", UNCHANGED)
def test_a_copy_without_an_edit(monkeypatch, where):
    plant(monkeypatch, CASES[UNCHANGED[where]], where, ())
    check(CASES[UNCHANGED[where]])


def test_every_row_stands_where_it_says():
    stand(MUTANTS | MORE_MUTANTS)


@pytest.mark.parametrize("name", [*MUTANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MUTANTS)])
def test_planted_bugs_are_caught(monkeypatch, name):
    catch(monkeypatch, CASES, (MUTANTS | MORE_MUTANTS)[name])
