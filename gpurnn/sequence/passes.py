"""Layers in one direction or both over a sequence: picks the executor, has lengths sorted out, and owns the tapes."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from gpurnn import backend
from gpurnn.cells import Cell
from gpurnn.executors import choose
from gpurnn.executors.contract import Backward, Executor, Job, Weights, full_rows
from gpurnn.executors.random import Masks
from gpurnn.parameters import Parameters
from gpurnn.sequence.lengths import Lengths
from gpurnn.sequence.resets import Restarts, States
from gpurnn.types import Array

Mask = Callable[[Array], Array]


class Layers(Protocol):
    """What is run: see `Recurrent`, whose attributes these are."""

    cell: Cell
    hidden_size: int
    heads: int
    num_layers: int
    directions: int
    dropout: float
    weight_dropout: float
    residual: bool
    clip_in_time: float | None
    precision: str
    executor: str | None
    masks: Masks
    params: Parameters
    grads: Parameters

    def weights(self, values: Mapping[str, Array], layer: int, direction: int) -> Weights: ...
    def fresh(self) -> States: ...


class Level(NamedTuple):
    """What backward needs of a layer: a tape for each direction, dropout behind it, weight_hh's masks."""

    tapes: list[Any]
    mask: Mask | None
    weight_masks: list[Mask]


def run(
    layers: Layers,
    x: Array,
    initial: States,
    lengths: Lengths | None,
    training: bool,
    resets: Array | None = None,
    all_states: bool = False,
) -> tuple[States, States, Callable[..., tuple[Array, States, States | None]] | None]:
    """x (T, N, I) -> (y, ...), final states, and `backward`, None without training; at padding y is 0.

    States are S arrays (L*D, N, H).  y is (T, N, D*H), and with `all_states` the last layer's other states follow alike.
    resets: (T, N) of bool, see `resets`.
    """
    T, N, _ = x.shape
    clip, cell = layers.clip_in_time is not None, layers.cell if training else layers.cell.mean
    engine = choose(
        layers.executor, cell, layers.hidden_size, N, x.dtype, layers.precision, training=training, clip=clip,
        heads=layers.heads,
    )  # fmt: skip
    rows, given = full_rows(T, N) if lengths is None else lengths.rows, initial
    if lengths is not None:
        x = lengths.sorted(x, lengths.padding)
        # The states of empty rows go round the engine, whose products run over all rows and know no NaN in an unused one.
        initial = tuple(lengths.sorted(part, lengths.empty) for part in initial)
    restarts = None if resets is None else Restarts.of(resets, layers.fresh, lengths)
    levels: list[Level] = []
    draws = layers.masks.draws(None if lengths is None else lengths.order) if cell.random else None
    finals: list[States] = []
    through: Array | None = None  # what the layer below gave, before dropout
    rest: States = ()
    for layer in range(layers.num_layers):
        x, outputs, tapes, weight_masks = backend.xp.ascontiguousarray(x), [], [], []
        wanted, others = all_states and layer == layers.num_layers - 1, []
        for direction in range(layers.directions):
            weights, at = layers.weights(layers.params, layer, direction), len(finals)
            if not cell.recurrent:  # the mean may have none where the cell has one
                weights = weights._replace(weight_hh=None, bias_hh=None)
            if training and layers.weight_dropout:
                weight_hh, weight_mask = layers.masks(weights.weight_hh, layers.weight_dropout)
                weights = weights._replace(weight_hh=weight_hh)
                weight_masks.append(weight_mask)
            state, again = tuple(part[at] for part in initial), None
            if restarts is not None:
                state, again = restarts.begun(state, at, direction == 1), restarts.job(at, direction == 1)
            own = None if draws is None else draws._replace(at=at)
            job = Job(cell, x, weights, state, rows, direction == 1, training, layers.precision, again, wanted, own)
            states, tape = engine.forward(job)
            if wanted:
                others.append(states.rest[:, :T] if direction else states.rest[:, 1:])
            outputs.append(states.h[:T] if direction else states.h[1:])
            tapes.append(tape)
            finals.append(states.final)
        x = _beside(outputs)
        through = x = x + through if layers.residual and through is not None else x
        if wanted:
            rest = tuple(map(_beside, zip(*others, strict=True)))
        mask = None
        if training and layers.dropout and layer < layers.num_layers - 1:
            x, mask = _dropped(layers, x, lengths)
        levels.append(Level(tapes, mask, weight_masks))
    final = _stacked(finals)
    if lengths is not None:
        x, rest, final = lengths.unsorted(x), *(tuple(map(lengths.unsorted, parts)) for parts in (rest, final))
        final = tuple(backend.xp.where(lengths.empty, *pair) for pair in zip(given, final, strict=True))
    return (x, *rest), final, functools.partial(_back, layers, engine, levels, lengths, restarts) if training else None


def _back(
    layers: Layers,
    engine: Executor,
    levels: list[Level],
    lengths: Lengths | None,
    restarts: Restarts | None,
    dy: States,
    dfinal: States | None,
    keep: bool,
    flow: Array | None,
) -> tuple[Array, States, States | None]:
    """Adds to the layers' gradients; returns dx and the gradients of the initial states; and, where there are resets, of
    what they set rows back to, S arrays (L*D, N, H) in float64.  dfinal: None for zeros.

    dy: dL/dy alone, or followed by those of the last layer's other states.  At padding dx is 0 and dy is not read.
    """
    H, D, xp = layers.hidden_size, layers.directions, backend.xp
    if lengths is not None:
        dy, dfinal = tuple(map(lengths.sorted, dy)), None if dfinal is None else tuple(map(lengths.sorted, dfinal))
    above, *drest = dy
    dfresh: Array = None
    if restarts is not None:
        dfresh = xp.zeros((len(levels) * D, layers.cell.states, above.shape[1], H), xp.float64)
    dinitial: list[States] = [()] * (len(levels) * D)
    dx: Array | None = None
    for layer in reversed(range(len(levels))):
        tapes, mask, weight_masks = levels[layer]
        if dx is not None:
            down = dx if mask is None else mask(dx)
            above, drest = down + above if layers.residual else down, []
        dx = None
        for direction, tape in enumerate(tapes):
            at = layer * D + direction
            squares = None if flow is None else xp.zeros(flow.shape[1:])
            own = slice(direction * H, (direction + 1) * H)
            grads = layers.weights(layers.grads, layer, direction)
            whole: Array = grads.weight_hh
            if weight_masks:
                grads = grads._replace(weight_hh=xp.zeros(whole.shape, whole.dtype))
            part, dinitial[at] = engine.backward(
                tape,
                above[..., own],
                None if dfinal is None else tuple(state[at] for state in dfinal),
                grads,
                Backward(
                    layers.clip_in_time,
                    squares,
                    keep,
                    None if dfresh is None else dfresh[at],
                    tuple(rest[..., own] for rest in drest) or None,
                ),
            )
            if weight_masks:
                whole += weight_masks[direction](grads.weight_hh)
            if restarts is not None:
                dinitial[at] = restarts.returned(dinitial[at], dfresh[at], direction == 1)
            dx = part if dx is None else dx + part
            if flow is not None:
                flow[at] = xp.sqrt(squares)
    if not keep:
        levels.clear()
    dstates = _stacked(dinitial)
    if lengths is not None:
        dx, dstates = lengths.unsorted(dx), tuple(map(lengths.unsorted, dstates))
    return dx, dstates, None if dfresh is None else tuple(dfresh.swapaxes(0, 1))


def _dropped(layers: Layers, x: Array, lengths: Lengths | None) -> tuple[Array, Mask]:
    """Dropout of x, and of its gradient.  A mask is one of places in the caller's order."""
    if lengths is None:
        return layers.masks(x, layers.dropout)
    x, mask = layers.masks(lengths.unsorted(x), layers.dropout)
    return lengths.sorted(x), lambda gradient: lengths.sorted(mask(lengths.unsorted(gradient)))


def _beside(parts: Sequence[Array]) -> Array:
    """(T, N, H) of each direction -> (T, N, D*H)."""
    return parts[0] if len(parts) == 1 else backend.xp.concatenate(parts, axis=2)


def _stacked(parts: list[States]) -> States:
    """Of each state one array for all layers and directions, (L*D, N, H); executors give them away in memory of their own."""
    alone = len(parts) == 1
    return tuple(own[0][None] if alone else backend.stacked(own) for own in zip(*parts, strict=True))
