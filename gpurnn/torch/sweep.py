"""The engine as one differentiable function of PyTorch's: a stack of layers over a sequence, forward and backward.

What backward needs is kept as saved tensors and nowhere else, so that activation checkpointing, hooks on saved tensors,
version counters and the refusal of a second backward work as they do for PyTorch's own functions.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpurnn.environment import at_most_threads
from gpurnn.executors.contract import Backward, Job
from gpurnn.executors.layout import Tape
from gpurnn.torch import composite
from gpurnn.torch.stack import Stack, array

# Whether the backward pass under way was told to keep its graph (retain_graph); where PyTorch does not say, it may have been.
_kept_by_backward = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
# Whether a gradient stands for many at once: `is_grads_batched`, `torch.autograd.functional.jacobian(..., vectorize=True)`.
_is_batched = torch._C._functorch.is_legacy_batchedtensor
EMPTY: Any = Tape(None, None, None, None)  # type: ignore[arg-type]


def run(
    stack: Stack, rows: np.ndarray, noises: Sequence[Tensor], x: Tensor, tensors: Sequence[Tensor], training: bool
) -> tuple[Tensor, list[Tensor], list[Any], list[Tensor]]:
    """y (T, N, D*H), S final states (L*D, N, H); with training the tapes, and what the layers but the first read.

    x        (T, N, I), zero behind each row's end.
    tensors  the S initial states (L*D, N, H), then the weights, as `Stack.weights` wants them.
    rows     (T,): at step t the batch rows 0..rows[t]-1 live; never increasing.
    noises   what outputs of layers but the last are multiplied by; see `stack.noises`.
    """
    engine, S, D, T = stack.engine(), stack.cell.states, stack.directions, len(rows)
    arrays, level = [array(part) for part in tensors], array(x)
    final = [np.empty_like(part) for part in arrays[:S]]
    tapes, read = [], []
    for layer in range(stack.layers):
        outputs = []
        if layer > 0:
            read.append(torch.from_numpy(level))
        for direction in range(D):
            at = layer * D + direction
            state, weights = tuple(part[at] for part in arrays[:S]), stack.weights(arrays[S:], at)
            states, tape = engine.forward(Job(stack.cell, level, weights, state, rows, direction == 1, training))
            outputs.append(states.h[:T] if direction else states.h[1:])
            tapes.append(tape)
            for whole, part in zip(final, states.final, strict=True):
                whole[at] = part
        level = outputs[0] if D == 1 else np.concatenate(outputs, 2)
        if layer < len(noises):
            level = level * noises[layer].numpy()
    return torch.from_numpy(level), [torch.from_numpy(part) for part in final], tapes, read


class Sweep(torch.autograd.Function):
    """y, *final = Sweep.apply(stack, rows, noises, x, *state, *weights); see `run`."""

    @staticmethod
    def forward(ctx: Any, stack: Stack, rows: np.ndarray, noises: Sequence[Tensor], x: Tensor, *tensors: Tensor) -> Any:
        y, final, tapes, read = run(stack, rows, noises, x, tensors, True)
        ctx.static = stack, rows, len(noises), [emptied(tape) for tape in tapes]
        ctx.set_materialize_grads(False)
        # y beside the memory that it shows: its version tells of a change in place
        ctx.save_for_backward(x, *tensors, *noises, *read, *buffers_of(tapes), y)
        return (y, *final)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *dfinal: Tensor | None) -> Any:
        stack, rows, noisy, tapes = ctx.static
        wanted = ctx.needs_input_grad[3:]
        saved, given = ctx.saved_tensors, len(wanted)
        (x, *tensors), noises, kept = saved[:given], saved[given : given + noisy], saved[given + noisy : -1]
        again = torch.is_grad_enabled()  # somebody wants the gradient of this gradient
        if again or any(part is not None and _is_batched(part) for part in (dy, *dfinal)):
            gradients = _differentiable(stack, rows, noises, (x, *tensors), wanted, (dy, *dfinal), again)
        else:
            read, buffers = (x, *kept[: stack.layers - 1]), kept[stack.layers - 1 :]
            keep = _kept_by_backward()
            with at_most_threads(torch.get_num_threads()):
                gradients = go_back(stack, rows, noises, read, tensors, filled(tapes, buffers), dy, dfinal, keep)
        return None, None, None, *gradients


def go_back(
    stack: Stack,
    rows: np.ndarray,
    noises: Sequence[Tensor],
    read: Sequence[Tensor],
    tensors: Sequence[Tensor],
    tapes: Sequence[Any],
    dy: Tensor | None,
    dfinal: Sequence[Tensor | None],
    keep: bool,
) -> list[Tensor]:
    """The gradients of x, of the initial states and of the weights.

    read: x, and what `run` gave; tensors: what it was given; tapes: what it gave, without their jobs.
    keep: the tapes must survive, for another backward.
    """
    engine, S, D = stack.engine(), stack.cell.states, stack.directions
    levels, arrays = [array(part) for part in read], [array(part) for part in tensors[S:]]
    (T, N, _), H, dtype = levels[0].shape, tensors[0].shape[2], levels[0].dtype
    gradients = [np.zeros(part.shape, dtype) for part in arrays]
    dstate = [np.empty(tuple(part.shape), dtype) for part in tensors[:S]]
    ends = None
    if any(part is not None for part in dfinal):
        ends = [
            _nothing(whole.shape, dtype) if part is None else array(part)
            for whole, part in zip(dstate, dfinal, strict=True)
        ]
    down = _nothing((T, N, D * H), dtype) if dy is None else dy.detach().resolve_neg().numpy()
    options = Backward(keep=keep)
    for layer in reversed(range(stack.layers)):
        below = []
        for direction in range(D):
            at = layer * D + direction
            job = Job(stack.cell, levels[layer], stack.weights(arrays, at), (), rows, direction == 1, True)
            last = None if ends is None else tuple(part[at] for part in ends)
            dx, initial = engine.backward(
                tapes[at]._replace(job=job),
                down[..., direction * H : (direction + 1) * H],
                last,
                stack.weights(gradients, at),
                options,
            )
            below.append(dx)
            for whole, part in zip(dstate, initial, strict=True):
                whole[at] = part
        down = below[0] if D == 1 else below[0] + below[1]
        if 0 < layer <= len(noises):
            down = down * noises[layer - 1].numpy()
    return [torch.from_numpy(part) for part in (down, *dstate, *gradients)]


def _nothing(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.broadcast_to(np.zeros((), dtype), shape)


def buffers_of(tapes: Sequence[Any]) -> list[Tensor]:
    """What tapes hold beside their jobs, three tensors each.  That of the NumPy executor, the oracle, has a list of steps."""
    return [
        torch.from_numpy(part) for tape in tapes if isinstance(tape, Tape) for part in (tape.slots, tape.h, tape.rest)
    ]


def emptied(tape: Any) -> Any:
    """What outlives the backward pass holds none of its memory."""
    return EMPTY if isinstance(tape, Tape) else tape._replace(job=None)


def filled(tapes: Sequence[Any], buffers: Sequence[Tensor]) -> list[Any]:
    """The way back, the jobs apart."""
    if not buffers:
        return list(tapes)
    arrays = [array(part) for part in buffers]
    return [
        tape._replace(slots=slots, h=h, rest=rest)
        for tape, slots, h, rest in zip(tapes, *(arrays[k::3] for k in range(3)), strict=True)
    ]


def _differentiable(
    stack: Stack,
    rows: np.ndarray,
    noises: Sequence[Tensor],
    given: Sequence[Tensor],
    wanted: Sequence[bool],
    upstream: Sequence[Tensor | None],
    again: bool,
) -> list[Tensor | None]:
    """The gradients of what is wanted of `given` as PyTorch finds them; again: to be differentiated once more."""
    S, (x, *tensors) = stack.cell.states, given
    with torch.enable_grad():
        y, final = composite.run(stack, rows, noises, x, tensors[:S], tensors[S:])
    pairs = [(out, of) for out, of in zip((y, *final), upstream, strict=True) if of is not None]
    inputs = [part for part, one in zip(given, wanted, strict=True) if one]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs], inputs, [of for _, of in pairs], create_graph=again, allow_unused=True
        )
    )
    return [next(found) if one else None for one in wanted]
