"""`gpurnn train`: its options, a run from its first line to its last, and what a person sees meanwhile.

Whatever is slow to import is imported where it is used, so that the command line answers at once.
"""

import argparse
import contextlib
import datetime
import math
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpurnn import files
from gpurnn.app.config import TrainConfig, value_type

INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit codes as a shell gives them
CLOSED_PIPE = 141
SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 300, 0.7


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option per field of TrainConfig.  What is not given stays out, so that it cannot hide a file's value."""
    parser.add_argument("--run", metavar="DIR", help="run folder to make (default: runs/<cell><size>-<time>)")
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with this run; beside it only --steps and --minutes, a new budget for the whole run, "
        "and --data, where the same text is now",
    )
    parser.add_argument("--config", metavar="FILE", help="options from a TOML file, such as a run's config.toml")
    groups: dict[str, Any] = {}
    for option in fields(TrainConfig):
        title = option.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        kind = value_type(option)
        shown = "" if option.default is None else f" (default {option.default})"
        extra: dict[str, Any] = {
            "help": (option.metadata["help"] + shown).replace("%", "%%"),
            "default": argparse.SUPPRESS,
        }
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"], extra["choices"] = kind, option.metadata["choices"]
            extra["metavar"] = None if extra["choices"] else {str: "TEXT", int: "N", float: "X"}[kind]
        group.add_argument(flag(option.name), dest="option_" + option.name, **extra)


def run(options: argparse.Namespace) -> int:
    """A new run, or the rest of one; returns the process's exit code."""
    from gpurnn.app import checkpoint

    for name in ("run", "resume", "config"):
        if getattr(options, name) == "":  # a shell's unset variable
            raise ValueError(f"{flag(name)}: expected a name, got an empty one")
    if options.resume is None:
        config, folder = _new_config(options)
        if config.data == "-":
            config = replace(config, data=str(_from_standard_input(folder)))
        training = _prepared(config)
        checkpoint.create_run(folder, config.to_mapping(), training.checkpoint())
        with checkpoint.locked(folder):
            print(f"run       {folder}", flush=True)
            return _trained(training, folder)
    folder = Path(options.resume)
    if not (folder / checkpoint.CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no run to resume, {checkpoint.CONFIG} is not there")
    with checkpoint.locked(folder):
        files.clean(folder)
        config = _resumed_config(options, folder / checkpoint.CONFIG)
        training = _prepared(config)
        _restore(training, folder)
        print(f"run       {folder}, from step {training.steps_done}", flush=True)
        if training.progress >= 1 and (folder / "gradient_flow.png").exists():
            print(f"nothing left to do: {training.steps_done} steps are done; more with a larger --steps or --minutes")
            return 0
        files.write_atomically(folder / checkpoint.CONFIG, checkpoint.config_bytes(config.to_mapping()))
        return _trained(training, folder)


def _from_standard_input(folder: Path) -> Path:
    """A file beside the run's folder with all of standard input, from which the run can be resumed."""
    path = folder.absolute().with_name(folder.name + ".txt")
    if path.exists():
        raise FileExistsError(f"{path}: the text on standard input would be kept there, but it exists already")
    if sys.stdin is None:
        raise ValueError("--data -: expected a text on standard input, but it is closed")
    files.make_folders(path.parent)
    with files.replacing(path) as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path


def _prepared(config: TrainConfig) -> Any:
    """The training at its beginning; prints what it works on, and with."""
    from gpurnn import backend
    from gpurnn.app.data import load_corpus
    from gpurnn.app.training import Training

    print(f"backend   {backend.name}: {backend.reason}")
    corpus = load_corpus(
        config.data,
        unit=config.unit,  # type: ignore[arg-type]  # TrainConfig allows these two words only
        encoding=config.encoding,
        pattern=config.pattern,
        max_alphabet=config.max_alphabet,
    )
    print(f"text      {corpus.description}\n          sha256 {corpus.sha256}")
    try:
        training = Training(config, corpus)
    except MemoryError as error:
        error.add_note("a smaller --hidden-size, --embedding-size or --batch may fit")
        raise
    depth = f"{config.num_layers} x {config.hidden_size}"
    print(f"model     {config.cell} {depth}, {training.model.params.count:,} parameters, {config.dtype}", flush=True)
    return training


def _trained(training: Any, folder: Path) -> int:
    """Trains until the budget is spent or something stops it; returns the exit code."""
    from gpurnn.app.training import train

    baseline = _baseline(training)
    with _signals() as caught, _progress(training, caught) as report:
        train(training, folder, stop=lambda: bool(caught), report=report)
    figures = _draw(folder, baseline)
    if caught and training.progress < 1:
        again = f"gpurnn train --resume {shlex.quote(str(folder))}"
        print(f"stopped and saved at step {training.steps_done}; go on with: {again}")
        return caught[0]
    _finish(training, folder, baseline, figures)
    return 0


def _new_config(options: argparse.Namespace) -> tuple[TrainConfig, Path]:
    from gpurnn.app import checkpoint

    values = checkpoint.read_config(options.config) if options.config else {}
    if options.config:
        TrainConfig.from_mapping(values, options.config)  # so that a mistake in the file is told as the file's
    config = TrainConfig.from_mapping({**values, **_given(options)}, "options")
    name = f"{config.cell}{config.hidden_size}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(options.run or Path("runs") / name)
    checkpoint.check_free(folder)  # before the text is read, which may take a while
    return _anywhere(config), folder


def _resumed_config(options: argparse.Namespace, path: Path) -> TrainConfig:
    """The run's own options from `path`; a budget that is given takes the place of the old one."""
    from gpurnn.app import checkpoint

    given = _given(options)
    others = [name for name in given if name not in ("steps", "minutes", "data")]
    others += [name for name in ("run", "config") if getattr(options, name) is not None]
    if others:
        raise ValueError(
            "--resume goes on with the run's own options; only --steps, --minutes and --data may be given, "
            f"got {', '.join(map(flag, others))}"
        )
    values = checkpoint.read_config(path)
    TrainConfig.from_mapping(values, str(path))
    if "steps" in given or "minutes" in given:
        values = {name: value for name, value in values.items() if name not in ("steps", "minutes")}
    return _anywhere(TrainConfig.from_mapping({**values, **given}, "options"))


def _given(options: argparse.Namespace) -> dict[str, Any]:
    prefix = "option_"
    given = {name.removeprefix(prefix): value for name, value in vars(options).items() if name.startswith(prefix)}
    if given.get("data") == "":
        raise ValueError("--data: expected a file or folder, got an empty name")
    return given


def _anywhere(config: TrainConfig) -> TrainConfig:
    """With the text's absolute name, so that the run resumes from any folder."""
    return config if config.data in (None, "-") else replace(config, data=str(Path(config.data).absolute()))


def _restore(training: Any, folder: Path) -> None:
    from gpurnn.app import checkpoint

    saved = checkpoint.load(folder / checkpoint.MODEL)
    try:
        differences = training.restore(saved)
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / checkpoint.MODEL}: {error.args[0]}") from None
    if differences:
        print("warning   this is not the environment the run was saved in; results may differ in their last bits:")
        for line in differences:
            print(f"          {line}")


def _baseline(training: Any) -> float | None:
    """Prints and returns what an order-3 character model of the same split reaches: the figure to beat."""
    from gpurnn.app.ngram import witten_bell

    if len(training.validation) < 2:
        return None
    began = time.perf_counter()
    train, alphabet = training.windows.tokens, training.corpus.alphabet
    try:
        bits = witten_bell(train, training.validation, len(alphabet))
    except ValueError as error:  # an alphabet too large to count in
        print(f"baseline  none: {error}")
        return None
    print(
        f"baseline  order-3 Witten-Bell model: {bits:.3f} bits/char in validation ({time.perf_counter() - began:.1f} s)"
    )
    return bits


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """The list receives the exit code of a SIGINT or SIGTERM, so that a step is finished and saved.

    A second signal kills the process where it stands, which a run survives at any moment.  Outside the main thread
    signals are the program's own affair, and the list stays empty.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    told = _stderr_descriptor()

    def note(number: int, frame: Any) -> None:
        caught.append(INTERRUPTED[signal.Signals(number)])
        for each in INTERRUPTED:
            signal.signal(each, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # not print, which the signal may have interrupted
            if told is not None:
                os.write(told, b"\nfinishing the step and saving; a second time ends at once\n")

    before = {number: signal.signal(number, note) for number in INTERRUPTED}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stderr_descriptor() -> int | None:
    """None where the process has no stderr: descriptor 2 may then be any file, such as metrics.jsonl."""
    try:
        return None if sys.stderr is None else sys.stderr.fileno()
    except (OSError, ValueError):  # a stream without a descriptor, or closed
        return None


@contextlib.contextmanager
def _progress(training: Any, caught: list[int]) -> Iterator[Any]:
    """A live line on a terminal; elsewhere, and without tqdm, a line at each validation.

    A reader of those lines who leaves stops the run.
    """
    bar = _bar(training)
    validation, gradient = ("val", "grad") if bar is not None else ("validation", "gradient")  # to fit into 80 columns
    of_all = f"/{training.config.steps}" if training.config.steps else ""
    known: dict[str, Any] = {}

    def report(line: dict[str, Any]) -> None:
        known.update({name: value for name, value in line.items() if value is not None})
        parts = [f"{_short(known['loss'])} bits/char"] if "loss" in known else []
        parts += [f"{validation} {_short(known['validation'])}"] if "validation" in known else []
        parts += [f"{known['chars_per_second']:,} chars/s"] if "chars_per_second" in known else []
        parts += [f"{gradient} {known['grad_norm']:.2g}"] if "grad_norm" in known else []
        try:
            for sentence in line.get("news", []):
                (print if bar is None else bar.write)(f"warning   {sentence}")  # on its own line, above a live bar
            if bar is not None:
                bar.set_postfix_str(", ".join([f"step {line['step']}{of_all}", *parts]), refresh=False)
                bar.update(training.progress - bar.n)
            elif "validation" in line:
                print(f"step {line['step']:6d}  {training.seconds:6.1f} s  " + ", ".join(parts), flush=True)
        except OSError:
            caught.append(CLOSED_PIPE)

    with contextlib.nullcontext() if bar is None else bar:
        yield report


def _bar(training: Any) -> Any:
    """The live line: the budget, whether in steps or minutes, and what the figures leave of the terminal's width."""
    if sys.stderr is None or not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return None
    layout = "{bar} {remaining}{postfix}"
    bar = tqdm(total=1.0, initial=training.progress, bar_format=layout, dynamic_ncols=True)
    bar.set_postfix_str("compiling or loading the cell")
    return bar


def _short(bits: float) -> str:
    return f"{bits:.3f}" if bits < 1000 else f"{bits:.3g}"


def _draw(folder: Path, baseline: float | None) -> str:
    """Draws loss.png and gradient_flow.png; returns where they are, or why there are none, which costs no result."""
    from gpurnn import plot
    from gpurnn.backend import one_line

    again = f"gpurnn train --resume {shlex.quote(str(folder))} draws them"
    if reason := plot.why_not():
        return f"none: {reason}; with it, {again}"
    try:
        return _figures(folder, baseline)
    except Exception as error:
        return f"none: drawing failed: {one_line(error)}; with that mended, {again}"


def _figures(folder: Path, baseline: float | None) -> str:
    """Draws from metrics.jsonl; returns where the figures are."""
    from gpurnn import plot
    from gpurnn.app import checkpoint
    from gpurnn.app.metrics import read_metrics

    metrics = read_metrics(folder / checkpoint.METRICS)
    plot.loss_curve(metrics, folder / "loss.png", baseline=baseline)
    recorded = [line for line in metrics if "flow" in line and "reach" in line]
    if not recorded:
        return str(folder / "loss.png")
    picked = recorded if len(recorded) < 3 else [recorded[0], recorded[len(recorded) // 2], recorded[-1]]
    layers = range(len(picked[0]["flow"]))
    names = [f"step {line['step']}" + (f", layer {k}" if len(layers) > 1 else "") for line in picked for k in layers]
    flows, reaches = ([line[what][k] for line in picked for k in layers] for what in ("flow", "reach"))
    longest = max(map(len, reaches))
    padded = [[math.nan] * (longest - len(curve)) + curve for curve in reaches]  # a run's first windows have less past
    plot.gradient_flow(flows, folder / "gradient_flow.png", last=padded, labels=names)
    return f"{folder / 'loss.png'}, {folder / 'gradient_flow.png'}"


def _finish(training: Any, folder: Path, baseline: float | None, figures: str) -> None:
    """The result on the whole validation text, a sample, and where everything is."""
    import numpy as np

    from gpurnn.app import character_model, checkpoint
    from gpurnn.app.metrics import MetricsLog

    speed = training.symbols_done / training.seconds
    print(
        f"trained   {training.steps_done} steps, {training.symbols_done:,} chars in {training.seconds:.1f} s ({speed:,.0f} chars/s)"
    )
    if training.one_by_one:
        print(f"graph     none, the kernels of a step were launched one by one: {training.one_by_one}")
    bits = training.validate(limit=None)
    if bits is not None:
        with MetricsLog(folder / checkpoint.METRICS) as log:
            log.write(training.steps_done, validation_all=bits, witten_bell=baseline)
        against = f", order-3 Witten-Bell {baseline:.3f}" if baseline is not None else ""
        print(f"result    {_short(bits)} bits/char on all {len(training.validation):,} validation chars{against}")
        guess = math.log2(len(training.corpus.alphabet))
        if bits > 2 * guess:
            print(f"warning   guessing takes {guess:.3f}: this has diverged; a lower --lr or --clip-norm may do better")
    print(f"figures   {figures}\nsample    (more: gpurnn sample {folder})\n")
    alphabet, rng = training.corpus.alphabet, np.random.default_rng(training.config.seed)
    prompt = character_model.first_prompt(alphabet)
    tokens = character_model.sample(training.model, alphabet, prompt, SAMPLE_LENGTH, SAMPLE_TEMPERATURE, rng)
    character_model.write(alphabet, prompt, tokens)


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")
