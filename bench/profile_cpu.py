"""Where our compiled executor's time goes: its own functions under a clock, put there from outside.

A phase lasts until the last of its threads has done its part.  Beside the phases that are matrix products stand the
same products alone in NumPy, one call each and one call per time step, with the better of one and of all BLAS threads.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np

import gpurnn
from bench.cases import Case
from bench.problem import Problem, make
from gpurnn import backend
from gpurnn.cpu import compiled, crew
from gpurnn.environment import cpu_threads

LAYERS = {"rnn": gpurnn.RNN, "gru": gpurnn.GRU, "lstm": gpurnn.LSTM}
LOOP, WEIGHTS = "packing, time loop, the inputs' product", "gradients of weights and biases"
REST = "the rest: Python, allocation, copies"
ORDER = (LOOP, WEIGHTS, REST)
FEWEST = 5  # runs of each table
Times = dict[str, float]


@contextmanager
def watched(seconds: Times) -> Iterator[None]:
    """Within it the compiled executor's functions add their time to `seconds`, by phase: from the call until all
    threads have done their parts.
    """

    def run(function: Any, *work: Any) -> None:
        start = time.perf_counter()
        crew.run(function, *work)
        phase = WEIGHTS if "reduce" in function.symbol else LOOP
        seconds[phase] += time.perf_counter() - start

    executor: Any = compiled
    executor.crew = SimpleNamespace(run=run)
    try:
        yield
    finally:
        executor.crew = crew


def tables(case: Case, seconds: float = 2.0) -> str:
    """Inference, and the two halves of a training step, as text.  Raises ValueError where there is no layer."""
    if case.group == "train" or case.heads > 1 or case.dtype != "float32":
        raise ValueError(f"case: expected a dense float32 layer to profile on a CPU, got {case.name}")
    if backend.name != "numpy":
        raise ValueError("the compiled executor runs on the CPU: set GPURNN_BACKEND=numpy to profile it")
    problem = make(case)
    layer = LAYERS[case.cell](case.I, case.H, executor="compiled")
    layer.load_state_dict(problem.weights)
    alone = _products(case, seconds / 4)
    text = [f"{cpu_threads()} threads; us per time step, the mean of runs within the middle half"]
    for title, spent in _measured(layer, problem, seconds).items():
        text.append(_table(title, spent, case.T, alone))
    return "\n\n".join(text)


def _measured(layer: Any, problem: Problem, seconds: float) -> dict[str, Times]:
    state = tuple(part[None] for part in problem.state)
    x, dy = problem.x[0], problem.dy[0]

    def call(training: bool) -> Any:
        return layer(x, state if len(state) > 1 else state[0], lengths=problem.lengths, training=training)

    def inference() -> Times:
        return _clocked(lambda: call(False))[1]

    def forward() -> Times:
        return _clocked(lambda: call(True))[1]

    def backward() -> Times:
        step_back = call(True)[2]
        layer.zero_grad()
        return _clocked(lambda: step_back(dy))[1]

    runs = {"inference": inference, "training, forward": forward, "training, backward": backward}
    return {title: _typical(run, seconds) for title, run in runs.items()}


def _clocked(work: Callable[[], Any]) -> tuple[Any, Times]:
    seconds: Times = defaultdict(float)
    with watched(seconds):
        start = time.perf_counter()
        result = work()
        seconds[REST] = time.perf_counter() - start - sum(seconds.values())
    return result, seconds


def _typical(run: Callable[[], Times], seconds: float) -> Times:
    """Means over the middle half of the runs by their total: phases of one set of runs, so that they add up."""
    run()
    found, end = [run() for _ in range(FEWEST)], time.perf_counter() + seconds
    while time.perf_counter() < end:
        found.append(run())
    found.sort(key=lambda spent: sum(spent.values()))
    middle = found[len(found) // 4 : -(len(found) // 4) or None]
    return {name: sum(spent.get(name, 0.0) for spent in middle) / len(middle) for name in ORDER}


def _products(case: Case, seconds: float) -> dict[str, Times]:
    """The products of the two directions alone, in NumPy; with lengths too, over all steps and rows."""
    T, N, I, H, wide = case.T, case.N, case.I, case.H, case.gates * case.H
    rng = np.random.default_rng(0)
    x, h, gates, weight_ih, weight_hh = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((T * N, I), (T * N, H), (T * N, wide), (wide, I), (wide, H))
    )
    out, back = np.empty_like(gates), np.empty_like(h)
    steps = [slice(t * N, (t + 1) * N) for t in range(T)]

    def recur() -> None:
        np.matmul(x, weight_ih.T, out=out)
        for step in steps:
            np.matmul(h[step], weight_hh.T, out=out[step])

    def recur_back() -> None:
        for step in steps:
            np.matmul(gates[step], weight_hh, out=back[step])
        gates @ weight_ih

    def weights() -> None:
        gates.T @ x
        gates.T @ h

    forward = {LOOP: recur}
    backward = {LOOP: recur_back, WEIGHTS: weights}
    best = {half: {name: _best(work, seconds / 3) for name, work in works.items()} for half, works in (
        ("forward", forward), ("backward", backward),
    )}  # fmt: skip
    return {"inference": best["forward"], "training, forward": best["forward"], "training, backward": best["backward"]}


def _best(work: Callable[[], Any], seconds: float) -> float:
    """The better median of one BLAS thread and of all."""
    medians = []
    from threadpoolctl import threadpool_limits

    for limit in (threadpool_limits(1, user_api="blas"), nullcontext()):
        with limit:
            work()
            samples: list[float] = []
            end = time.perf_counter() + seconds / 2
            while len(samples) < FEWEST or time.perf_counter() < end:
                start = time.perf_counter()
                work()
                samples.append(time.perf_counter() - start)
        medians.append(float(np.median(samples)))
    return min(medians)


def _table(title: str, spent: Times, T: int, alone: dict[str, Times]) -> str:
    total, products = sum(spent.values()), alone[title]
    lines = [f"{title:<48} {'us per step':>12} {'share':>7} {'products alone':>15}"]
    for name in ORDER:
        if spent[name] > 0 or name in products:
            product = f"{1e6 * products[name] / T:.3f}" if name in products else ""
            lines.append(f"  {name:<46} {1e6 * spent[name] / T:>12.3f} {spent[name] / total:>7.1%} {product:>15}")
    bound = sum(products.values())
    lines.append(
        f"  {'all':<46} {1e6 * total / T:>12.3f} {1:>7.1%} {1e6 * bound / T:15.3f}  ({total / bound:.2f} times)"
    )
    return "\n".join(lines)
