"""Two tasks whose memory is set by one number, and how a model is trained on them.

Both ask at the end of a sequence about its beginning: whatever the gradient cannot carry over the lag is not learnt.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from gpurnn import backend, losses, optim
from gpurnn.arguments import whole
from gpurnn.bptt import full_bptt
from gpurnn.layers import Linear
from gpurnn.losses import Loss
from gpurnn.model import SequenceModel
from gpurnn.optim import clipping
from gpurnn.recurrent import Recurrent
from gpurnn.sequence import checked_lengths
from gpurnn.types import Array

Draw = Callable[[np.random.Generator, int], tuple[Array, Array]]

ALWAYS_ONE = (
    1 / 6
)  # squared error of answering 1, the mean, in the adding problem: twice the variance of a uniform number


def adding_problem(rng: np.random.Generator, T: int, N: int, dtype: Any = "float32") -> tuple[Array, Array]:
    """The adding problem of Hochreiter & Schmidhuber 1997: add the two numbers of T that are marked.

    Returns x (T, N, 2), a uniform number in [0, 1) and a mark, 1 at one step of the first half and at one of the
    second, else 0; and the sums, targets (1, N, 1) of the last step.  Always answering 1 errs by 1/6 in the mean square.
    """
    whole("T", T, 2)
    x = np.zeros((T, N, 2), dtype)
    x[..., 0] = rng.random((T, N))
    rows = np.arange(N)
    first, second = rng.integers(0, T // 2, N), rng.integers(T // 2, T, N)
    x[first, rows, 1] = x[second, rows, 1] = 1
    return x, (x[first, rows, 0] + x[second, rows, 0])[None, :, None]


def copy_task(
    rng: np.random.Generator, lag: int, N: int, symbols: int = 3, alphabet: int = 4, dtype: Any = "float32"
) -> tuple[Array, Array]:
    """The copy task of the same paper: some symbols, `lag` blanks, and then the symbols again, from memory.

    Returns x (2 symbols + lag, N, alphabet + 2), one-hot: the symbols, blanks, and `symbols` times the sign to answer;
    and the symbols, targets (symbols, N) of the last steps.  Each is log2(alphabet) bits.
    """
    whole("lag", lag, 0)
    drawn = rng.integers(0, alphabet, (symbols, N))
    tokens = np.full((2 * symbols + lag, N), alphabet)
    tokens[:symbols], tokens[symbols + lag :] = drawn, alphabet + 1
    return np.eye(alphabet + 2, dtype=dtype)[tokens], drawn.astype(np.int32)


def echo(rng: np.random.Generator, T: int, N: int, lag: int, dtype: Any = "float32") -> tuple[Array, Array]:
    """x (T, N, 1) of ±1, and targets (T, N, 1): what was heard `lag` steps before (before x began, too)."""
    heard = rng.choice([-1.0, 1.0], (T + whole("lag", lag, 0), N, 1)).astype(dtype)
    return heard[lag:], heard[:T]


def at_the_end(loss: Loss) -> Loss:
    """`loss` of the last steps alone, as many as there are targets; with lengths, of those of them that are valid."""

    def of_the_last(out: Array, targets: Array, lengths: Any = None) -> tuple[Any, Array]:
        begin = len(out) - len(targets)
        if lengths is not None:
            lengths = np.maximum(checked_lengths(lengths, *out.shape[:2]) - begin, 0)
        value, dlast = losses.evaluate(loss, out[begin:], targets, lengths)
        dout = backend.xp.zeros_like(out)
        dout[begin:] = dlast
        return value, dout

    return of_the_last


squared_error = at_the_end(losses.mean_squared_error)
cross_entropy = at_the_end(losses.softmax_cross_entropy)


def with_head(recurrent: Recurrent, outputs: int, rng: np.random.Generator) -> SequenceModel:
    """`recurrent` and a linear head behind it."""
    head = Linear(recurrent.directions * recurrent.hidden_size, outputs, dtype=recurrent.dtype, rng=rng)
    return SequenceModel(None, recurrent, head)


def fit(
    model: Any,
    draw: Draw,
    loss: Loss,
    rng: np.random.Generator,
    *,
    updates: int,
    enough: float,
    lr: float = 0.01,
    max_norm: float = 0.1,
    batch: int = 32,
    every: int = 50,
    look: Callable[[int], None] | None = None,
) -> tuple[int, float]:
    """Trains on fresh batches by full BPTT, Adam and clipping by norm, until a test batch's loss is below `enough`.

    draw(rng, N) -> x, targets.  look(update) is called before the first update and at every look at the test batch.
    Returns how many updates it took, at most `updates`, and the last loss of the test batch.
    """
    test = draw(np.random.default_rng(0), 500)
    optimizer = optim.Adam(model, lr=lr)
    found = float("inf")
    for update in range(updates + 1):
        if update % every == 0 or update == updates:
            found = float(loss(model(test[0], training=False)[0], test[1])[0])
            if look:
                look(update)
            if found < enough:
                return update, found
        if update < updates:
            model.zero_grad()
            full_bptt(model, *draw(rng, batch), loss)
            clipping.clip_grad_norm(model, max_norm)
            optimizer.step()
    return updates, found
