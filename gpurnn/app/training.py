"""A training run of a character model: one object holds all that changes from step to step, and saves and restores it.

The order of a step is: window, forward, loss, backward through time, checks, clipping, update.  Nothing that is not
finite reaches the parameters or a checkpoint.

On CUDA a step waits for nothing and, once it repeats itself, is one graph: the window was copied while the step before
ran, results are looked at when a line of metrics is due, and what went wrong is told then, by its own step.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np

from gpurnn import backend, environment, optim
from gpurnn.app import checkpoint
from gpurnn.app.character_model import bits_per_symbol, build
from gpurnn.app.checkpoint import Checkpoint
from gpurnn.app.config import TrainConfig
from gpurnn.app.data import Alphabet, Corpus, Windows, split
from gpurnn.app.metrics import MetricsLog
from gpurnn.bptt import TruncatedBPTT
from gpurnn.cuda import faults
from gpurnn.cuda.capture import Captured
from gpurnn.cuda.prefetch import Prefetch
from gpurnn.diagnose.flow import Flow
from gpurnn.diagnose.monitor import Alarm, look_at
from gpurnn.diagnose.non_finite import raise_where_it_began
from gpurnn.diagnose.subject import layer_names
from gpurnn.losses import softmax_cross_entropy
from gpurnn.optim import clipping, schedules
from gpurnn.parameters.values import all_finite
from gpurnn.types import Array

VALIDATION_SYMBOLS = 50_000  # looked at on the way; the end result is measured on all of them
SCHEDULE_STEPS = 10_000  # learning-rate schedules run over the budget, whether it is counted in steps or minutes


class Training:
    """A run at one moment.  `step()` goes on by one update; `checkpoint()` and `restore()` are exact inverses."""

    def __init__(self, config: TrainConfig, corpus: Corpus):
        self.config, self.corpus = config, corpus
        train, self.validation = split(corpus.tokens, config.validation)
        if config.validation and len(self.validation) < 2:
            raise ValueError(
                f"the text is too short: {config.validation:g} of its {len(corpus.tokens)} symbols are no validation text"
            )
        self.windows = Windows(train, config.batch, config.k1)
        self.model = build(config, len(corpus.alphabet), np.random.default_rng(config.seed))
        self._masks = {"recurrent": self.model.recurrent.masks}
        if self.model.dropout is not None:
            self._masks["dropout"] = self.model.dropout.masks
        self.optimizer = _optimizer(config, self.model)
        self.schedule = _schedule(config)
        loss = functools.partial(softmax_cross_entropy, reduction="mean")
        self.bptt = TruncatedBPTT(self.model, loss, config.k1, config.k2)
        self.steps_done = 0
        self.seconds = 0.0
        self.best: float | None = None  # the least validation so far
        self.alarm = Alarm()
        self.flow = backend.xp.zeros((config.num_layers, self.model.recurrent.cell.states, config.k1))
        self._source = Prefetch(self.windows) if backend.ops.GRAPHS else self.windows
        self._captured = Captured(self._on_device, when=lambda: self.bptt.steady, quiet=True)
        backend.ops.restart(0)

    @property
    def one_by_one(self) -> str | None:
        """On CUDA, why the kernels of a step are launched one by one; None where they are one graph, or will be."""
        return self._captured.reason if backend.ops.GRAPHS else None

    @property
    def symbols_done(self) -> int:
        return self.steps_done * self.config.batch * self.config.k1

    @property
    def progress(self) -> float:
        """The part of the budget that is spent, 0 to 1: of the steps, the minutes, or whichever is further."""
        parts = []
        if self.config.steps is not None:
            parts.append(self.steps_done / self.config.steps)
        if self.config.minutes is not None:
            parts.append(self.seconds / (60 * self.config.minutes))
        return min(1.0, max(parts))

    def step(self, flow: bool = False) -> tuple[Any, Any]:
        """One update.  Returns the loss in bits per symbol and the norm of the gradient before clipping.

        flow: fill `self.flow` with the norms of dL/dstate_t over this window.
        Raises FloatingPointError where loss or gradient is not finite, the model unchanged, or where the updated
        parameters are not; the run must not go on then.  On CUDA loss and norm are scalars of the device, the norm's good
        until the next step, and `fault` tells what went wrong.
        """
        began = time.perf_counter()
        if flow and backend.ops.GRAPHS:
            self.flow[...] = self._look(self.config.k1)[..., -self.config.k1 :]
        x, targets, first = self._source.at(self.steps_done)
        if first:
            self.bptt.reset()
        self.optimizer.lr = self.config.lr * self.schedule(int(self.progress * SCHEDULE_STEPS))
        loss, norm = self._captured(x, targets) if backend.ops.GRAPHS else self._on_host(x, targets, flow)
        self.steps_done += 1
        self.seconds += time.perf_counter() - began
        return loss / math.log(2), norm

    def _on_host(self, x: Array, targets: Array, flow: bool) -> tuple[float, float]:
        self.model.zero_grad()
        loss = float(self.bptt.step(x, targets, flow=self.flow if flow else None))
        try:
            norm = self._clipped()
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss}")
        except FloatingPointError:
            self._raise_where_it_began(targets)
            raise
        self.optimizer.update()
        if not all_finite(self.model.params.flat):
            raise FloatingPointError("the update left parameters that are not finite")
        return loss, norm

    def _raise_where_it_began(self, targets: Array) -> None:
        """FloatingPointError for what is not finite in the last window's stretch, by tensor, layer and time step."""
        x, begin, model = self.bptt.stretch, self.bptt.begin, cast(Any, self.model)
        with np.errstate(all="ignore"):
            out, _, _ = model(x, begin, training=False)
            dout = backend.xp.zeros_like(out)
            dout[-len(targets) :] = softmax_cross_entropy(out[-len(targets) :], targets)[1]
        raise_where_it_began(model, x, begin, dout=dout)

    def _on_device(self, x: Array, targets: Array) -> tuple[Array, Array]:
        """The same, with nothing in it that the host has to see; where a check fails the update does nothing."""
        self.model.zero_grad()
        loss = self.bptt.step(x, targets)
        norm = self._clipped()
        self.optimizer.update(loss)
        return loss, norm

    def fault(self) -> faults.Fault | None:
        """What went wrong on the device since the last time, or None.  Waits, which counts as time spent on training."""
        began = time.perf_counter()
        fault = faults.take()
        self.seconds += time.perf_counter() - began
        return fault

    def reach(self) -> Flow:
        """Norms of dE/dstate_t over up to k2 steps, E the loss of the next window's last step: how far back it reaches.

        Looks only: the run goes on as if it had not been called.
        """
        norms, layer = backend.to_numpy(self._look(1)), self.model.recurrent
        return Flow(norms, layer_names(layer), layer.cell.state_names, norms.shape[2] - 1)

    def _look(self, last: int) -> Array:
        """Norms (L, S, up to k2) of dL/dstate_t over the next window, L the mean loss of its `last` last steps."""
        x, targets, first = self.windows.at(self.steps_done)
        state, past = (None, None) if first else self.bptt.before(len(x))
        stretch = x if past is None else np.concatenate([backend.to_numpy(past), x])
        model: Any = self.model
        with contextlib.ExitStack() as stack:  # the next step has the same masks
            for masks in self._masks.values():
                stack.enter_context(masks.held())
            out, _, backward = model(stretch, state)
        _, dlast = softmax_cross_entropy(out[-last:], targets[-last:])
        dout = backend.xp.zeros_like(out)
        dout[-last:] = dlast
        flow = backend.xp.zeros((*self.flow.shape[:2], len(stretch)))
        backward(dout, flow=flow)
        self.model.zero_grad()
        return flow

    def _clipped(self) -> Any:
        """The norm before clipping; a float, on CUDA a scalar of the device."""
        config = self.config
        if config.clip_norm and not config.clip_value:
            return clipping.clip_grad_norm(self.model, config.clip_norm)
        norm = clipping.grad_norm(self.model)
        if config.clip_value:
            clipping.clip_grad_value(self.model, config.clip_value)
            if config.clip_norm:
                clipping.clip_grad_norm(self.model, config.clip_norm)
        return norm

    def validate(self, limit: int | None = VALIDATION_SYMBOLS) -> float | None:
        """Bits per symbol on (the first `limit` symbols of) the validation text; None where there is none."""
        return bits_per_symbol(self.model, self.validation, limit) if len(self.validation) else None

    def is_best(self, validation: float | None) -> bool:
        """Whether it is less than every validation before; None is not."""
        if validation is None or not validation < (math.inf if self.best is None else self.best):
            return False
        self.best = validation
        return True

    def checkpoint(self) -> Checkpoint:
        meta = {
            "step": self.steps_done,
            "seconds": self.seconds,
            "dropout": {name: masks.calls for name, masks in self._masks.items()},
            "data": {"window": self.steps_done, "sha256": self.corpus.sha256},
            "alphabet": self.corpus.alphabet.to_json(),
            "best": self.best,
            "environment": environment.describe(),
        }
        return Checkpoint(self.model.state_dict(), self.optimizer.state_dict(), self.bptt.state_dict(), meta)

    def restore(self, saved: Checkpoint) -> list[str]:
        """Takes up `saved`.  Returns what differs from the environment it was written in, a line each.

        Raises ValueError or KeyError where the text is another one or the checkpoint is damaged or does not fit.
        """
        meta, entry = saved.meta, checkpoint.entry
        step, seconds = entry(meta, "step", int), entry(meta, "seconds", float)
        if step < 0 or not 0 <= seconds < math.inf:
            raise ValueError(f"step and seconds: expected numbers from 0, got {step} and {seconds}")
        recorded, sha256 = entry(meta, "environment", dict), entry(entry(meta, "data", dict), "sha256", str)
        if sha256 != self.corpus.sha256:
            raise ValueError(
                f"expected the text that this run began with, sha256 {sha256}; "
                f"got {self.corpus.description}, sha256 {self.corpus.sha256}"
            )
        if Alphabet.from_json(entry(meta, "alphabet", str)) != self.corpus.alphabet:
            raise ValueError("the alphabet differs from the one this run began with")
        calls = entry(meta, "dropout", dict)
        if calls.keys() != self._masks.keys() or not all(type(n) is int and 0 <= n < 1 << 63 for n in calls.values()):
            raise ValueError(
                f"dropout: expected the calls of {', '.join(self._masks)}, numbers from 0, got {calls!r:.60}"
            )
        best = meta.get("best")  # none before a first validation
        if best is not None and not entry(meta, "best", float) >= 0:
            raise ValueError(f"best: expected a number from 0, got {best}")
        self._check_position(saved, step)
        self.model.load_state_dict(saved.tensors)
        self.optimizer.load_state_dict(saved.optimizer)
        self.bptt.load_state_dict(saved.state)
        for name, masks in self._masks.items():
            masks.calls = calls[name]
        self.steps_done, self.seconds, self.best = step, float(seconds), best
        backend.ops.restart(step)
        return environment.differences(recorded)

    def _check_position(self, saved: Checkpoint, step: int) -> None:
        """Raises ValueError where the parts of a checkpoint are not of one moment: what a run carries follows from its step."""
        window = checkpoint.entry(checkpoint.entry(saved.meta, "data", dict), "window", int)
        updates = saved.optimizer.get("step", np.array(-1))
        if window != step or updates.shape != () or int(updates) != step:
            raise ValueError(f"step: expected one number in all parts, got {step}, window {window}, update {updates}")
        windows, (k1, k2) = step and (step - 1) % len(self.windows) + 1, (self.bptt.k1, self.bptt.k2)
        steps = min(k2, windows * k1)
        names = {"begin": windows * k1 > k2, "carried": windows * k1 + k1 > k2 and windows, "stretch": windows}
        expected = {name for name, there in names.items() if there}
        came = {name.rstrip("0123456789") for name in saved.state}
        if came != expected:
            raise ValueError(
                f"state: expected {', '.join(sorted(expected)) or 'none'} at step {step}, "
                f"got {', '.join(sorted(saved.state)) or 'none'}"
            )
        stretch = saved.state.get("stretch")
        if stretch is None:
            return
        if stretch.shape != (steps, self.config.batch) or stretch.dtype.kind not in "iu":
            raise ValueError(
                f"stretch: expected whole numbers (steps, batch) = {(steps, self.config.batch)}, "
                f"got {stretch.dtype} {stretch.shape}"
            )
        if stretch.min() < 0 or stretch.max() >= len(self.corpus.alphabet):
            raise ValueError(f"stretch: expected symbols of the alphabet, got {stretch.min()} to {stretch.max()}")


def train(training: Training, run: Path, *, stop: Callable[[], bool], report: Callable[[dict[str, Any]], None]) -> None:
    """Runs `training` to the end of its budget, or until `stop()`; saves on the way and at the end, and logs metrics.

    report(line) sees every step: its number and, where one is due, its line of metrics.  Where loss, gradient or
    parameters stop being finite, FloatingPointError says at which step.  It and every other error carry a note on the
    checkpoint that stands.
    """
    saved = training.steps_done

    def save() -> None:
        nonlocal saved
        _raise_fault(training)
        log.sync()
        checkpoint.save(run / checkpoint.MODEL, training.checkpoint())
        saved = training.steps_done

    try:
        with MetricsLog.resume(run / checkpoint.METRICS, training.steps_done) as log:
            training.reach()  # compiles the cell's loops, or loads them, before the clock starts
            for line in _steps(training, stop):
                if len(line) > 1:
                    log.write(**line)
                report(line)
                if training.is_best(line.get("validation")):
                    checkpoint.save(run / checkpoint.BEST, training.checkpoint())
                if training.steps_done % training.config.save_every == 0:
                    save()
            if saved < training.steps_done:
                save()
    except Exception as error:
        error.add_note(f"the checkpoint of step {saved} stands")
        raise


def _steps(training: Training, stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
    """Goes on step by step, and says of each its number and what is due to be known."""
    config = training.config
    losses: list[Any] = []
    began, symbols = training.seconds, training.symbols_done
    while training.progress < 1 and not stop():
        due = _is_due(training.steps_done + 1, config.log_every, config.steps)
        try:
            loss, norm = training.step(flow=due)
        except FloatingPointError as error:
            raise _with_step(training.steps_done + 1, error) from None
        losses.append(loss)
        looking = _is_due(training.steps_done, config.validate_every, config.steps) or training.progress >= 1
        if due or looking:
            _raise_fault(training)
        line: dict[str, Any] = {"step": training.steps_done}
        if due:
            line |= {"loss": _mean(losses), "grad_norm": float(norm), "lr": training.optimizer.lr}
            line |= {"chars": training.symbols_done, "seconds": round(training.seconds, 3)}
            elapsed = training.seconds - began
            line["chars_per_second"] = round((training.symbols_done - symbols) / elapsed) if elapsed else None
            line["flow"] = _rounded(backend.to_numpy(training.flow)[:, 0])
            losses, began, symbols = [], training.seconds, training.symbols_done
        if looking:
            flow = training.reach()
            line |= {"validation": training.validate(), "reach": _rounded(flow.norms[:, 0])}
            if (look := look_at([flow], training.steps_done, config.reach)) is not None:
                line |= {"horizon": [round(horizon, 1) for horizon in look.horizons], "news": training.alarm.news(look)}
        yield line


def _raise_fault(training: Training) -> None:
    fault = training.fault()
    if fault is not None:
        raise _with_step(*fault)


def _with_step(step: int, error: Exception) -> Exception:
    if not isinstance(error, FloatingPointError):
        return type(error)(f"step {step}: {error}")
    advice = "a new run with a lower --lr or a smaller --clip-norm may do better"
    return FloatingPointError(f"step {step}: {error}; {advice}")


def _mean(losses: list[Any]) -> float:
    return float(np.mean(backend.to_numpy(backend.xp.stack(losses))))


def _rounded(norms: np.ndarray) -> list[list[float]]:
    return [[float(f"{norm:.4g}") for norm in layer] for layer in norms]


def _is_due(step: int, every: int, last: int | None) -> bool:
    return step == 1 or step % every == 0 or step == last


def _optimizer(config: TrainConfig, model: Any) -> optim.Optimizer:
    lr, decay = config.lr, config.weight_decay
    if config.optimizer == "sgd":
        return optim.SGD(model, lr, momentum=config.momentum, weight_decay=decay)
    if config.optimizer == "rmsprop":
        return optim.RMSprop(model, lr, momentum=config.momentum, weight_decay=decay)
    return {"adam": optim.Adam, "adamw": optim.AdamW}[config.optimizer](model, lr, weight_decay=decay)


def _schedule(config: TrainConfig) -> schedules.Schedule:
    warmup = round(config.warmup * SCHEDULE_STEPS)
    if config.schedule == "constant":
        return schedules.constant()
    falling = {"cosine": schedules.warmup_cosine, "linear": schedules.linear_decay}[config.schedule]
    return falling(SCHEDULE_STEPS, warmup, floor=0.02)
