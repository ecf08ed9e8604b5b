"""Which of the plan's choices is fastest on the GPU at hand: measured once, where somebody asks for it, and kept on disk.

With GPURNN_TUNE=1 the first use of a shape builds and times the plan's best choice of every exchange and the next
cheapest ones, which takes about four seconds each; `python -m bench tune` does so ahead.  Later processes read what was found,
with or without the variable.  The file names choices among those that the plan gives today; what it does not know is
nothing, and so is a file that cannot be read.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np

from gpurnn import backend, variables
from gpurnn.cells import Cell
from gpurnn.cuda import sweeps
from gpurnn.cuda.passes import Pass
from gpurnn.executors.contract import Job, Weights
from gpurnn.executors.random import Draws
from gpurnn.files import code_folder
from gpurnn.kernels import build, entries, persistent, plan
from gpurnn.kernels.launch import DoesNotFit
from gpurnn.kernels.plan import Chip, Choice

FILE = "tuned.json"
CANDIDATES = 6
REPEATS = 5
MOST_STEPS, MOST_VALUES = 256, 1 << 24  # of a measurement: steps, and values in the slots

_too_many: dict[tuple, int] = {}  # blocks of a group, from which on the chip turned out not to run it


class Question(NamedTuple):
    """One direction of time, for one block to a group (`alone`) or several.  H: units of the layer, in `heads`."""

    cell: Cell
    H: int
    N: int
    precision: str
    transposed: bool
    alone: bool
    heads: int = 1


def choice(question: Question, chip: Chip) -> Choice | None:
    """The fastest known, else the cheapest by the model; None where nothing fits."""
    every = choices(question, chip)
    if not every:
        return None
    known = _read().get(_key(question, chip), {}).get("choice")
    found = next((choice for choice in every if _name(choice) == known), None)
    if found is None and variables.given("GPURNN_TUNE") == "1" and not backend.thread.capturing:
        every = [choice for choice, _ in _measured(question, chip)]  # none, where the chip runs nothing of it
    return found or next(iter(every), None)


def choices(question: Question, chip: Chip) -> list[Choice]:
    """All that fits, the cheapest by the model first.  What was ruled out is not among it."""
    cell, H, N, precision, transposed, alone, heads = question
    pair = registers(cell, transposed)
    every = plan.choices(H // heads, cell.gates, transposed, N, precision, pair, chip, alone, heads)
    left = [choice for choice in every if choice.blocks < _too_many.get(_group(question, chip, choice), math.inf)]
    return sorted(left, key=lambda choice: (choice.cost.cycles, choice.blocks))


def rule_out(question: Question, chip: Chip, choice: Choice, error: DoesNotFit) -> None:
    """The chip turned out not to run it: neither it is given in this process again nor a larger group of its kind.

    Raises `error` where it was not given: somebody insists on the choice.
    """
    group = _group(question, chip, choice)
    if choice.blocks >= _too_many.get(group, math.inf):
        raise error
    _too_many[group] = choice.blocks


def _group(question: Question, chip: Chip, choice: Choice) -> tuple:
    """What decides whether a group runs: on a chip, how many blocks are a cluster, or wait for each other through memory.

    One block for itself is refused for what is in it, which the question decides.
    """
    return (chip, question) if choice.exchange == "alone" else (chip, choice.exchange == "clustered")


def candidates(every: list[Choice]) -> list[Choice]:
    """What is worth measuring: the cheapest of every exchange, then the cheapest of all."""
    first = {choice.exchange: choice for choice in reversed(every)}.values()
    rest = [choice for choice in every if choice not in first]
    return [*first, *rest][: max(CANDIDATES, len(first))]


def tune(question: Question, chip: Chip) -> list[tuple[Choice, float]]:
    """Measures the candidates and keeps the fastest: (choice, microseconds a step), the fastest first.

    Waits for the device.  Raises ValueError where nothing fits.
    """
    measured = _measured(question, chip)
    if not measured:
        raise ValueError(f"weight_hh of {question.cell.name} with {question.H} units does not fit this GPU")
    return measured


def _measured(question: Question, chip: Chip) -> list[tuple[Choice, float]]:
    found: dict[Choice, float] = {}
    while left := [choice for choice in candidates(choices(question, chip)) if choice not in found]:
        try:
            found[left[0]] = microseconds(question, left[0])
        except DoesNotFit as error:
            rule_out(question, chip, left[0], error)
    measured = sorted(found.items(), key=lambda pair: pair[1])
    if measured:
        _write(_key(question, chip), {"choice": _name(measured[0][0]), "microseconds": round(measured[0][1], 3)})
    return measured


def microseconds(question: Question, choice: Choice) -> float:
    """Of one step: the fastest of some runs of the kernel alone, on numbers that do not matter."""
    cell, H, N, precision, transposed, _, heads = question
    xp, T = backend.xp, max(1, min(MOST_STEPS, MOST_VALUES // max(1, N * H * cell.trace.slots)))
    weight_ih, weight_hh = (xp.zeros((cell.gates * H, size), np.float32) for size in (1, H // heads))
    weights = Weights(weight_ih, weight_hh, None, None, tuple(xp.zeros(H, np.float32) for _ in cell.params))
    state = tuple(xp.zeros((N, H), np.float32) for _ in range(cell.states))
    x, draws = xp.zeros((T, N, 1), np.float32), Draws(0, xp.zeros(1, np.int64)) if cell.random else None
    sweep = sweeps.begin(Job(cell, x, weights, state, np.full(T, N), False, True, precision, draws=draws))
    tape, carried = sweep.tape, sweep.initial
    tape.slots.fill(0)
    rest_state = tape.rest.strides[0] // 4
    if transposed:
        run = Pass.prepare(choice, persistent.backward, tape, sweep.weight_hh, True, clip=False)
        dy = xp.zeros((T, N, H), np.float32)
        params = sweeps.parameters(tape)
        arrays = (tape.slots, tape.h, tape.rest, dy, carried, *params, tape.lengths, sweeps.draws(tape))
        given: Any = arrays, [0, 0, 0], (), (N, 0, rest_state, N * H, H, np.float32(0))
    else:
        run = Pass.prepare(choice, persistent.forward, tape, sweep.weight_hh, False, training=True)
        final, own = carried.copy(), sweeps.draws(tape)
        arrays = (tape.slots, sweep.bias, tape.h, tape.rest, sweep.params, carried, final, tape.lengths, own)
        given = arrays, [0, 0], (T, 0), (N, 0, rest_state)
    return min(_milliseconds(run, given) for _ in range(REPEATS)) * 1e3 / T


def _milliseconds(run: Any, given: tuple) -> float:
    cuda = backend.xp.cuda
    before, after = cuda.Event(), cuda.Event()
    before.record()
    run(*given)
    after.record()
    after.synchronize()
    return cuda.get_elapsed_time(before, after)


def registers(cell: Cell, transposed: bool) -> int:
    """Of one (unit, batch row) pair, beside the weights."""
    trace, G, S, P = cell.trace, cell.gates, cell.states, len(cell.params)
    kept, start = len(trace.kept), trace.x_start
    if transposed:
        return kept + 2 * S + 1 + G + start + S + 2 * P + 4
    return G + start + S + P + G + max(G, S + kept) + 4


def _name(choice: Choice) -> str:
    return f"{choice.tile}, {choice.blocks}, {choice.exchange}"


def _key(question: Question, chip: Chip) -> str:
    cell, *rest = question
    device_name = backend.xp.cuda.runtime.getDeviceProperties(chip.device)["name"].decode()
    text = f"{device_name}\n{chip[1:]}\n{cell.trace.text}\n{rest}\n{build.environment()}"
    return entries.key(text)


def _read() -> dict[str, Any]:
    place = code_folder()
    try:
        known = json.loads((place / FILE).read_text()) if place else {}
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) and all(isinstance(value, dict) for value in known.values()) else {}


def _write(key: str, found: dict[str, Any]) -> None:
    """Another process that writes at the same time may lose an entry, which is then measured again."""
    place = code_folder()
    if place is None:
        return
    entries.replace(place / FILE, json.dumps(_read() | {key: found}).encode())
