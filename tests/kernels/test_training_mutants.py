"""Bugs planted in the kernels of a training step, each of which has to show: what says that their tests can fail.

A mutant is an edit of a kernel's source; its module takes the library's place where the library uses it.  The case must then be
refused by the interpreter, or come out wrong.  The source as it is goes the same way and passes.
"""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("numba_cuda", reason="the kernels' tools are not installed: pip install 'gpurnn[test]'")

import gpurnn
import gpurnn.kernels
from gpurnn import backend
from gpurnn.cuda import device, launches
from gpurnn.cuda import moves as moving
from gpurnn.cuda import updates as on_device
from tests.interpreted import interpreted
from tests.kernels.test_training_kernels import LONG, Model, put, rows
from tests.ptx.errors import Misaligned, OutOfBounds, Race, Uninitialised

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="on a GPU the kernels run on the GPU")

FOLDER = Path(gpurnn.kernels.__path__[0])


class Wrong(Exception):
    """A result differs from NumPy's."""


# Cases: each returns named results, on either backend


def few_classes():
    logits, targets = rows(37, 11, "float32")
    targets[[3, 10]] = -1
    logits[3] = np.nan
    logits[5, 7:] = -np.inf
    logits[6] += 200
    none = gpurnn.softmax_cross_entropy(logits, targets, reduction="none", ignore_index=-1)
    finite = gpurnn.softmax_cross_entropy(logits[:5], targets[:5], ignore_index=-1)
    return (*none, *finite, *gpurnn.softmax_cross_entropy(logits, targets, ignore_index=-1))


def many_classes():
    logits, targets = rows(LONG, 3, "float32")
    logits[1, :] = -np.inf
    logits[1, 700:] = np.arange(400)
    targets[:] = (5, 900, -1)
    return gpurnn.softmax_cross_entropy(logits, targets, ignore_index=-1)


def wrong_targets():
    """The place of the first wrong target; NumPy says it at once, a device later."""
    try:
        gpurnn.softmax_cross_entropy(rows(5, 19, "float32")[0], np.array([0] * 9 + [7, -2] + [5] * 8))
        gpurnn.synchronize()
    except ValueError as error:
        return (np.array([int(str(error).rpartition("(")[2].strip(",)"))]),)
    return (np.array([-1]),)


def table():
    layer, rng = gpurnn.Embedding(5, 150, rng=1), np.random.default_rng(0)
    layer.grads["weight"][...] = 1
    y, backward = layer(rng.integers(0, 4, 300))
    backward(rng.standard_normal((300, 150)).astype("float32"))
    return y, layer.grads["weight"]


def untouched():
    """A row of NaN that no token means; nobody may even read it."""
    target = put(np.array([[0, 0], [np.nan, 0]], np.float32))
    backend.ops.add_rows(target, put(np.zeros(3, int)), put(np.ones((3, 2), np.float32)))
    return (target[0],)


def norms_of(dtype, values):
    model = Model(dtype, {"w": (2100,)})
    model.grads["w"][: len(values)] = put(np.array(values, dtype))
    return gpurnn.grad_norm(model), gpurnn.clip_grad_norm(model, 0.5), model.grads["w"]


def norm():
    return norms_of("float32", [])


def norm_of_extremes():
    return (*norms_of("float64", [3e200, 1e200, 1e-200])[:2], norms_of("float64", np.full(2100, 1e-200))[0])


def wrong_gradient():
    model = Model("float32", {"w": (2100,)})
    model.grads["w"][1025] = model.grads["w"][1999] = np.nan
    try:
        gpurnn.grad_norm(model)
        gpurnn.synchronize()
    except FloatingPointError as error:
        return (np.array([int(str(error).partition("at (")[2].partition(",")[0] or 1025)]),)
    return (np.array([-1]),)


def updates(kind, dtype="float32", **options):
    model = Model(dtype)
    optimizer = kind(model, **options)
    for step in range(3):
        optimizer.lr = 0.1 / (1 + step)
        model.fill(model.grads)
        optimizer.step()
    return (*model.params.values(), *(moment.flat for moment in optimizer.moments.values()))


def groups():
    """A part that is frozen for an update, one with settings of its own."""
    model = Model("float32")
    optimizer = gpurnn.AdamW(model, lr=0.1, weight_decay=0.5, groups={"bias": {"lr": 0.02, "weight_decay": 0.0}})
    for step in range(3):
        model.params.freeze("wide")
        if step != 1:
            model.params.unfreeze()
        model.fill(model.grads)
        optimizer.step()
    return (*model.params.values(), *(moment.flat for moment in optimizer.moments.values()))


def wrong_tokens():
    tokens = np.zeros(400, int)
    tokens[[301, 360]] = 5, -1
    try:
        gpurnn.Embedding(5, 3, rng=1)(tokens)
        gpurnn.synchronize()
    except ValueError as error:  # NumPy names the extremes, a device the first
        return (np.array([int(str(error).rpartition("(")[2].strip(",)")) if "(" in str(error) else 301]),)
    return (np.array([-1]),)


def column_sums():
    values = np.random.default_rng(0).standard_normal((1100, 4 * 3)).astype("float32")
    a, b = np.ones(6, np.float32), np.ones(9, np.float32)
    if backend.name == "cuda":
        a, b = put(a), put(b)
        device.add_columns(put(values), 3, a, b, first=(1, 0), second=(2, 0, 1), start=1)
        return a, b
    sums = values.sum(0, dtype=float).reshape(4, 3)
    return a + sums[[1, 0]].reshape(-1), b + sums[[2, 3, 1]].reshape(-1)


def small_moves():
    if backend.name == "numpy":
        return np.arange(300.0), np.arange(300.0) + 1, np.full(5, 7), np.full(3, 3.0)
    old, new = put(np.arange(300.0)), put(np.arange(300.0) + 1)
    before, numbers, total = put(np.zeros(300)), put(np.zeros(5, np.int64)), put(np.zeros(3))
    moves = moving.Moves()
    moves.copy(before, old)
    moves.copy(old, new)
    moves.fill(numbers, 7)
    moves.add(total, put(np.ones(3)), put(np.full(3, 2.0)))
    moves.run()
    return before, old, numbers, total


def dropped():
    layer, x = gpurnn.Dropout(0.4, rng=1), np.ones(1030, np.float32)
    first, second = layer(put(x) if backend.name == "cuda" else x)[0], layer(put(x) if backend.name == "cuda" else x)[0]
    return first, second, np.array([layer.masks.calls])


def sixteen_bits():
    """Some values and some more than a block has, where 16 bytes begin and where they do not."""
    values = np.random.default_rng(0).standard_normal(2100).astype("float32")
    values[:2] = 65520, np.nan
    parts = [slice(0, 13), slice(1, 2100)]
    if backend.name == "numpy":
        with np.errstate(over="ignore"):
            return [values[part].astype(np.float16) for part in parts]
    return [device.rounded(put(values)[part], "float16") for part in parts]


CASES = {
    "few classes": few_classes, "many classes": many_classes, "wrong targets": wrong_targets, "table": table,
    "untouched": untouched, "norm": norm, "norm of extremes": norm_of_extremes, "wrong gradient": wrong_gradient,
    "sgd": lambda: updates(gpurnn.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "rmsprop": lambda: updates(gpurnn.RMSprop, momentum=0.5, centered=True, weight_decay=0.1),
    "adam": lambda: updates(gpurnn.Adam, weight_decay=0.1, betas=(0.8, 0.7)),
    "adamw": lambda: updates(gpurnn.AdamW, weight_decay=0.5),
    "groups": groups, "dropped": dropped, "wrong tokens": wrong_tokens, "columns": column_sums, "moves": small_moves,
    "sixteen bits": sixteen_bits,
}  # fmt: skip


def check(case):
    """Raises what the interpreter finds, or Wrong."""
    with np.errstate(all="ignore"):
        expected = [np.asarray(value, float) for value in CASES[case]()]
    with interpreted("numpy"):
        found = [np.asarray(backend.to_numpy(value), float) for value in CASES[case]()]
        if gpurnn.cuda.faults.take() is not None:
            raise Wrong("a fault where none is")
    for k, (got, want) in enumerate(zip(found, expected, strict=True)):
        largest = np.abs(want[np.isfinite(want)]).max(initial=0) or 1.0
        if not np.allclose(got, want, rtol=1e-5, atol=2e-6 * largest, equal_nan=True):
            raise Wrong(f"result {k}")


USERS = {  # of a module: whoever imports it
    "faults": ("embedding", "losses", "norms", "optim"),
    "last": ("losses", "norms", "optim"),
}
PLACES = {
    "optim": (on_device, "optim"), "columns": (device, "columns"), "moves": (moving, "moves"),
    "rounding": (device, "rounding"),
}  # fmt: skip


def plant(patch, name, edits):
    """kernels/`name`.py with the edits, as a module of its own, in the library's place and in that of its users."""
    text = (FOLDER / f"{name}.py").read_text()
    for old, new in edits:
        assert text.count(old) == 1, f"{name} has {text.count(old)} times {old!r}"
        text = text.replace(old, new)
    patch.setitem(sys.modules, f"gpurnn.kernels.{name}", loaded(name, text))
    for user in (name, *USERS.get(name, ())):
        module = (
            sys.modules[f"gpurnn.kernels.{name}"] if user == name else loaded(user, (FOLDER / f"{user}.py").read_text())
        )
        if user not in ("faults", "last"):  # which the library never launches themselves
            patch.setattr(*PLACES.get(user, (launches, user)), module)


def loaded(name, text):
    spec = importlib.util.spec_from_loader(f"gpurnn.kernels.{name}", None, origin=str(FOLDER / f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    exec(compile(text, FOLDER / f"{name}.py", "exec"), vars(module))
    return module


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_as_they_are(case):
    check(case)


@pytest.mark.parametrize("case", ["norm", "norm of extremes", "wrong gradient"])
def test_norms_of_more_than_all_blocks_take_at_once(case, monkeypatch):
    plant(monkeypatch, "norms", [("BLOCKS = 512 ", "BLOCKS = 2 ")])
    check(case)


# What is wrong: case, module, what shows, (old, new) of each edit.  Every barrier and fence is in the first table, and some
# of each other kind; the second is for `-m slow`.
# fmt: off
MUTANTS = {
    "rows: the last class is left out": ("few classes", "losses", Wrong, ("load(logits, start + c) if c < C else", "load(logits, start + c) if c < C - 1 else")),
    "rows: a row too many": ("few classes", "losses", OutOfBounds, ("// WARP\n        if row >= R:", "// WARP\n        if row > R:")),
    "rows: no shift": ("few classes", "losses", Wrong, ("top = _warp_max(top)\n        for k", "top = real(0)\n        for k")),
    "rows: not divided by the count": ("few classes", "losses", Wrong, ("one = ratio(real(scale), real(count[0])) if counted else real(scale)\n        factor = ratio(one, total) if inside else", "one = real(scale)\n        factor = ratio(one, total) if inside else")),
    "wide: no barrier": ("many classes", "losses", Race, ("        cuda.syncthreads()\n        top = _warp_max(tops", "        top = _warp_max(tops")),
    "wide: not rescaled between warps": ("many classes", "losses", Wrong, ("totals[tid % LANES] * math.exp(tops[tid % LANES] - top)", "totals[tid % LANES]")),
    "gather: a token too many": ("table", "embedding", OutOfBounds, ("if k >= count:", "if k > count:")),
    "add_rows: no barrier": ("table", "embedding", Race, ("            hits[warp] = found\n        cuda.syncthreads()\n", "            hits[warp] = found\n")),
    "add_rows: assigns": ("table", "embedding", Wrong, ("target[row * dim + first + d] += real(total)", "target[row * dim + first + d] = real(total)")),
    "sums: no barrier": ("norm", "norms", Race, ("    shared[tid] = value\n    cuda.syncthreads()\n", "    shared[tid] = value\n")),
    "sums: no barrier in the tree": ("norm", "norms", Race, ("            shared[tid] += shared[tid + half]\n        cuda.syncthreads()\n", "            shared[tid] += shared[tid + half]\n")),
    "sums: any wrong one": ("wrong gradient", "norms", Race, ("least(global_address(record, FIRST), u64(first))", "record[FIRST] = first")),
    "finish: one block's sum is left out": ("norm", "norms", Wrong, ("for block in range(tid, blocks, THREADS)", "for block in range(tid, blocks - 1, THREADS)")),
    "scale: always": ("norm", "norms", Wrong, ("max_norm / norm if finite(norm) and norm > max_norm else f64(1)", "2 * max_norm / norm")),
    "update: a vector too many": ("sgd", "optim", OutOfBounds, ("if k >= size or", "if k > size or")),
    "update: moments are not kept": ("adam", "optim", Wrong, ("        if count > 1:\n            store(m1, k, x1)\n", "")),
    "sgd: plain momentum for Nesterov's": ("sgd", "optim", Wrong, ("moments[0] * a + grad if nesterov else", "moments[0] if nesterov else")),
    "rmsprop: not centered": ("rmsprop", "optim", Wrong, ("spread - moments[1] * moments[1]", "spread")),
    "adam: decayed as AdamW": ("adam", "optim", Wrong, ("            grad += now[3] * param\n        grad =", "            param *= now[2]\n        grad =")),
    "begin_update: no correction": ("adam", "optim", Wrong, ("rate * root / (1 - power1)", "rate * root")),
    "update: all lines are of the first group": ("groups", "optim", Wrong, ("marks[k >> LINE]", "marks[0]")),
    "update: a line's mark is the next one's": ("groups", "optim", (Wrong, OutOfBounds), ("marks[k >> LINE]", "marks[(k >> LINE) + 1]")),
    "begin_update: missed updates count": ("groups", "optim", Wrong, ("- i64(groups[3 * group + 2])", "- 0")),
    "end_update: steps are not counted": ("adam", "optim", Wrong, ("        steps[0] += 1\n", "        pass\n")),
    "settle: forgets to clear": ("wrong targets", "faults", Wrong, ("        record[FIRST] = NOWHERE\n", "        record[FIRST] = NOWHERE - 1\n        record[POSITION] += 1\n")),
    "rows: no barrier in the sum": ("few classes", "losses", Race, ("                    sums[tid] += sums[tid + half]\n                cuda.syncthreads()\n", "                    sums[tid] += sums[tid + half]\n")),
    "gather: the last wrong token": ("wrong tokens", "embedding", Wrong, ("firsts[tid] = min(firsts[tid], firsts[tid + half])", "firsts[tid] = max(firsts[tid], firsts[tid + half])")),
    "last: nobody is": ("norm", "last", Wrong, ("flag[0] = before == i64(cuda.gridDim.x) - 1", "flag[0] = before == i64(cuda.gridDim.x)")),
    "last: the first is": ("norm", "last", (Race, Wrong, Uninitialised), ("flag[0] = before == i64(cuda.gridDim.x) - 1", "flag[0] = before == 0")),
    "last: nothing is published": ("norm", "last", Race, ("atom.acq_rel.gpu", "atom.relaxed.gpu")),
    "last: no barrier before": ("few classes", "last", Race, ("    cuda.syncthreads()\n    if cuda.threadIdx.x == 0:\n        before", "    if cuda.threadIdx.x == 0:\n        before")),
    "columns: no barrier": ("columns", "columns", Race, ("        shared[tid] = total\n        cuda.syncthreads()\n", "        shared[tid] = total\n")),
    "columns: assigned": ("columns", "columns", Wrong, ("a[first_gate(slot) * H + unit] += real", "a[first_gate(slot) * H + unit] = real")),
    "columns: a row too many": ("columns", "columns", OutOfBounds, ("if row + i * LANES < rows:", "if row + i * LANES <= rows:")),
    "moves: one after the other's end": ("moves", "moves", Wrong, ("job(s0, t0, n0, p0, k)\n            job(s1, t1, n1, p1, k)", "job(s1, t1, n1, p1, k)\n            job(s0, t0, n0, p0, k)")),
    "moves: a word too many": ("moves", "moves", OutOfBounds, ("        if k < count:\n            if", "        if k <= count:\n            if")),
    "rounded: halves of a word swapped": ("sixteen bits", "rounding", Wrong, ("pack(d, c)", "pack(c, d)")),
    "rounded: beyond the end": ("sixteen bits", "rounding", OutOfBounds, ("if wide != 0 and first + EACH <= count:", "if wide != 0:")),
    "rounded: 16 bytes anywhere": ("sixteen bits", "rounding", Misaligned, ("if wide != 0 and", "if")),
    "drop: the key's halves swapped": ("dropped", "dropout", Wrong, ("u32(low), u32(high)", "u32(high), u32(low)")),
    "drop: beyond the end": ("dropped", "dropout", (OutOfBounds, Wrong), ("if aligned and first + EACH <= count", "if aligned")),
}
MORE_MUTANTS = {
    "rows: a class too many": ("few classes", "losses", (OutOfBounds, Wrong, Race), ("load(logits, start + c) if c < C else", "load(logits, start + c) if c <= C else")),
    "rows: each lane its own maximum": ("few classes", "losses", Wrong, ("top = _warp_max(top)\n        for k", "for k")),
    "rows: half of a warp is summed": ("few classes", "losses", Wrong, ("    for mask in (16, 8, 4, 2, 1):\n        value +=", "    for mask in (8, 4, 2, 1):\n        value +=")),
    "rows: an ignored row is read": ("few classes", "losses", Wrong, ("if ignoring and target == ignore:\n            for c in range(lane", "if ignoring and target == ignore + 1:\n            for c in range(lane")),
    "rows: an ignored gradient is not written": ("few classes", "losses", Wrong, ("for c in range(lane, C, WARP):\n                store(dlogits, start + c, real(0))", "for c in range(lane, C - 1, WARP):\n                store(dlogits, start + c, real(0))")),
    "rows: the target is not subtracted": ("few classes", "losses", Wrong, ("x[k] * factor - (one if c == target else real(0))", "x[k] * factor")),
    "rows: the wrong target passes": ("wrong targets", "losses", (OutOfBounds, Wrong), ("inside = 0 <= target < C\n        one = ratio(real(scale), real(count[0])) if counted else real(scale)\n        factor = ratio(one, total) if inside else", "inside = 0 <= target <= C\n        one = ratio(real(scale), real(count[0])) if counted else real(scale)\n        factor = ratio(one, total) if inside else")),
    "wide: not rescaled as the maximum grows": ("many classes", "losses", Wrong, ("total = total * math.exp(top - x) + real(1)", "total += real(1)")),
    "wide: not rescaled between lanes": ("many classes", "losses", Wrong, ("_warp_sum(total * math.exp(top - highest))", "_warp_sum(total)")),
    "wide: -inf as the lowest": ("many classes", "losses", Wrong, ("lowest = real(np.finfo(np.float64 if dtype == \"float64\" else np.float32).min)", "lowest = real(-math.inf)")),
    "wide: every warp counts twice": ("many classes", "losses", Wrong, ("/ real(WARP // LANES)", "/ real(1)")),
    "gather: the row behind": ("table", "embedding", Wrong, ("weight[token * dim + d] if inside", "weight[(token + 1) * dim + d] if inside")),
    "add_rows: the last token once more": ("table", "embedding", OutOfBounds, ("base + lane < count and i64(tokens", "i64(tokens")),
    "add_rows: tokens of the first 256": ("table", "embedding", Wrong, ("range(warp * WARP, count, THREADS)", "range(warp * WARP, min(count, 256), THREADS)")),
    "add_rows: the second span over the first": ("table", "embedding", Wrong, ("d = first + lane + WARP * i\n", "d = lane + WARP * i\n")),
    "add_rows: a warp's sums are left out": ("table", "embedding", Wrong, ("for w in range(WARPS):", "for w in range(WARPS - 1):")),
    "sums: blocks on top of each other": ("norm", "norms", Wrong, ("begin, stride = (i64(cuda.blockIdx.x) * THREADS + tid) * EACH", "begin, stride = tid * EACH")),
    "finish: large values are not scaled back": ("norm of extremes", "norms", Wrong, ("* (norm * DOWN)) * UP", "* (norm * DOWN))")),
    "finish: tiny values are lost": ("norm of extremes", "norms", Wrong, ("if plain > 0 else small", "if plain >= 0 else small")),
    "update: a vector's values over each other": ("sgd", "optim", Wrong, ("value = rule(param[i], grad[i]", "value = rule(param[i], grad[0]")),
    "adam: 1 - b of a rounded b": ("adamw", "optim", Wrong, ("rest_b * (grad * grad)", "(types.float32(1) - b) * (grad * grad)")),
    "begin_update: a step too early": ("adam", "optim", Wrong, ("t = steps[0] + 1", "t = steps[0]")),
    "rows: a loss is left out of the sum": ("few classes", "losses", Wrong, ("for row in range(tid, R, threads):", "for row in range(tid + 1, R, threads):")),
    "gather: tokens of the first 256": ("wrong tokens", "embedding", Wrong, ("for k in range(tid, count, THREADS):", "for k in range(tid, 256, THREADS):")),
    "last: counts on": ("norm", "last", Wrong, ("            done[0] = 0\n", "            pass\n")),
    "columns: gates as they come": ("columns", "columns", Wrong, ("b[second_gate(slot - start) * H + unit]", "b[(slot - start) * H + unit]")),
    "columns: the last rows are left out": ("columns", "columns", Wrong, ("if row + i * LANES < rows:", "if row + i * LANES < rows - 1:")),
    "columns: a chunk over the next": ("columns", "columns", Wrong, ("row += CHUNK * LANES", "row += LANES")),
    "moves: the pattern's low half": ("moves", "moves", Wrong, ("u64(8 * size * (k % each))", "u64(0)")),
    "moves: a sum of one": ("moves", "moves", Wrong, ("out[k] = a[k] + b[k]", "out[k] = a[k]")),
    "rounded: one too few at the end": ("sixteen bits", "rounding", Wrong, ("min(first + EACH, count)", "min(first + EACH, count - 1)")),
    "drop: every call the same": ("dropped", "dropout", Wrong, ("calls[0] += 1", "calls[0] += 0")),
    "drop: one too few at the end": ("dropped", "dropout", Wrong, ("min(EACH, count - first)", "min(EACH, count - first - 1)")),
    "rows: a row's targets are the next one's": ("few classes", "losses", (OutOfBounds, Wrong), ("start, target = row * C, i64(targets[row])\n        if ignoring and target == ignore:\n            for c in range(lane", "start, target = row * C, i64(targets[row + 1])\n        if ignoring and target == ignore:\n            for c in range(lane")),
    "rows: E without the shift": ("few classes", "losses", Wrong, ("losses[row] = f64(top) - f64(load(logits, start + target)) + math.log(f64(total))\n            else", "losses[row] = math.log(f64(total)) - f64(load(logits, start + target))\n            else")),
    "wide: the target's gradient of every thread": ("many classes", "losses", Wrong, ("store(dlogits, start + c, x - (one if c == target else real(0)))", "store(dlogits, start + c, x - (one if c % THREADS == target % THREADS else real(0)))")),
    "add_rows: hits of the first warp alone": ("table", "embedding", Wrong, ("found |= hits[w]", "found = hits[0] * hits[7] * 0")),
    "rmsprop: momentum over the mean": ("rmsprop", "optim", Wrong, ("moments[LAST] = moments[LAST] * b + step", "moments[LAST] = moments[LAST - 1] * b + step")),
    "update: what is frozen moves": ("groups", "optim", (Wrong, OutOfBounds), ("            if group < 0:\n                return\n", "")),
    "begin_update: every group's lr is the first's": ("groups", "optim", Wrong, ("lr[0] * groups[3 * group]", "lr[0] * groups[0]")),
    "adam: betas swapped": ("adam", "optim", Wrong, ("rest_b * (grad * grad)", "rest_a * (grad * grad)")),
    "adamw: no decay": ("adamw", "optim", Wrong, ("param *= now[2]", "pass")),
    "begin_update: the second power of the first": ("adam", "optim", Wrong, ("power2 *= square2", "power2 *= square1")),
    "begin_update: lr of the update before": ("sgd", "optim", Wrong, ("real(rate * root", "real(0.1 * root")),
}
# fmt: on


@pytest.mark.parametrize("name", [*MUTANTS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_MUTANTS)])
def test_planted_bugs_are_caught(monkeypatch, name):
    case, module, error, *edits = (MUTANTS | MORE_MUTANTS)[name]
    plant(monkeypatch, module, edits)
    with pytest.raises(error):
        check(case)
