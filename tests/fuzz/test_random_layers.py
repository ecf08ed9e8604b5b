"""Layers whose options meet at random: the compiled executor against NumPy, whatever the threads; backward against differences."""

import pytest

import gpurnn
from gpurnn import backend
from gpurnn.cpu import costs
from tests.fuzz.cases import each_case, seeds
from tests.fuzz.random_layers import numbers, random_case, told, worst

OTHER = "compiled" if backend.name == "numpy" else "step"
WIDE = 1e-9  # in float64
NARROW = 2e-3  # in float32; where NumPy's own is worse, twenty times that


@pytest.fixture
def threads(monkeypatch):
    """Any layer is large enough for several threads."""
    for name in ("LOOP_FLOPS", "SUM_FLOPS", "UNITS_FLOPS"):
        monkeypatch.setattr(costs, name, 1)
    yield lambda count: monkeypatch.setenv("GPURNN_NUM_THREADS", str(count))


@pytest.mark.parametrize("seeds", seeds(4, one_in=5))
def test_executors_agree(seeds, tmp_path, threads):
    def case(seed: int) -> str | None:
        drawn = random_case(seed)
        right = drawn.results(drawn.layer())
        for count in (1, 2, 3) if backend.name == "numpy" else (1,):
            threads(count)
            error, name = worst(drawn.results(drawn.layer(executor=OTHER)), right)
            if error > WIDE:
                return f"{count} threads differ by {error:.2g} in {name}; {told(drawn)}"
        plain, _ = worst(drawn.results(drawn.layer("float32")), right)
        error, name = worst(drawn.results(drawn.layer("float32", OTHER)), right)
        if error > max(NARROW, 20 * plain):
            return f"float32 differs by {error:.2g} in {name}, NumPy's by {plain:.2g}; {told(drawn)}"
        return without_training(drawn)

    each_case(case, seeds, tmp_path)


def without_training(drawn) -> str | None:
    """Nothing is random, nothing is kept, and what does not depend on training is as it is with it."""
    outputs = []
    for executor in ("numpy", OTHER):
        y, state, back = drawn.call(drawn.layer(executor=executor), training=False)
        outputs.append(numbers({"y": y, "state": state}))
        if back is not None:
            return f"a backward without training; {told(drawn)}"
    error, name = worst(outputs[1], outputs[0])
    if error > WIDE:
        return f"without training they differ by {error:.2g} in {name}; {told(drawn)}"
    if not any(drawn.options[name] for name in ("dropout", "weight_dropout", "zoneout", "recurrent_dropout", "noise")):
        y, state, _ = drawn.call(drawn.layer(executor=OTHER))
        error, name = worst(numbers({"y": y, "state": state}), outputs[0])
        if error > WIDE:
            return f"training changes {name} by {error:.2g}; {told(drawn)}"
    return None


@pytest.mark.parametrize("seeds", seeds(2, one_in=50))
def test_gradients_are_those_of_differences(seeds, tmp_path):
    def case(seed: int) -> str | None:
        drawn = random_case(seed, most=4, smooth=True)
        layer = drawn.layer()
        T, N = drawn.sizes[:2]
        given = {name: drawn.given[name] for name in ("lengths", "resets")}
        if layer.batch_first and given["resets"] is not None:
            given["resets"] = given["resets"].swapaxes(0, 1)
        errors = gpurnn.check_gradients(layer, T=T, N=N, all_states=drawn.all_states, tolerance=1e9, **given)
        wrong = {name: error for name, error in errors.items() if not error <= 1e-4}  # of tiny gradients, too
        return f"{wrong}; {told(drawn)}" if wrong else None

    each_case(case, seeds, tmp_path)
