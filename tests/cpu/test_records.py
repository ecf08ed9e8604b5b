"""Records: what compiled functions read is what they are given, by name, and no word more or less."""

import ast
import inspect

import numpy as np
import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cpu import clear, compiled, crew, loops, reduction
from gpurnn.cpu.records import HEAD

pytestmark = pytest.mark.skipif(backend.name == "cuda", reason="the compiled executor runs on the CPU backend only")

RECORDS = {
    "forward": (loops, "forward", loops.FORWARD),
    "backward": (loops, "backward", loops.BACKWARD),
    "reduce": (reduction, "reduce", reduction.REDUCTION),
    "clear": (clear, "clear", clear.LINES),
}


def unpacked(module, function):
    """The names that a function gives to what `read` and `read_share` return."""
    found = {}
    for inner in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(inner, ast.FunctionDef) and inner.name == function and inner.args.args[-1].arg == "part":
            for node in ast.walk(inner):
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                    called = getattr(node.value.func, "id", "")
                    if called in ("read", "read_share"):
                        found[called] = tuple(name.id.lstrip("_") for name in node.targets[0].elts)
    return found


@pytest.mark.parametrize("name", RECORDS)
def test_the_names_are_those_of_the_function(name):
    module, function, record = RECORDS[name]
    assert unpacked(module, function) == {"read": (*HEAD, *record.numbers), "read_share": record.share}


@pytest.mark.parametrize("executor", ["forward", "backward", "reduction"])
@pytest.mark.parametrize("where", ["numbers", "share"])
@pytest.mark.parametrize("change", [-1, 1])
def test_a_word_too_many_or_too_few_is_refused(monkeypatch, executor, where, change):
    """It would be read as somebody else's memory."""
    record = {"forward": loops.FORWARD, "backward": loops.BACKWARD, "reduction": reduction.REDUCTION}[executor]
    run = crew.run

    def changed(given):
        return (*given, 0) if change > 0 else tuple(given)[:-1]

    def wrong(function, numbers, shares):
        if function.record is record:
            numbers = changed(numbers) if where == "numbers" else numbers
            shares = [changed(share) for share in shares] if where == "share" else shares
        run(function, numbers, shares)

    monkeypatch.setattr(compiled.crew, "run", wrong)
    layer = gpurnn.LSTM(2, 3, executor="compiled", rng=0)
    with pytest.raises(TypeError, match=r"expected \d+ numbers.*; got \d+"):
        y, _, backward = layer(np.ones((2, 1, 2), np.float32))
        backward(y)
