"""The command line: gpurnn train, sample, info."""

import argparse
import codecs
import contextlib
import datetime
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from gpurnn._version import __version__
from gpurnn.config import TrainConfig, value_type

INTERRUPTED = {signal.SIGINT: 130, signal.SIGTERM: 143}  # exit codes as a shell gives them
CLOSED_PIPE = 141
SAMPLE_LENGTH, SAMPLE_TEMPERATURE = 300, 0.7


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit code.  A mistake of the user's is one line, not a traceback."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return options.command(options)
    except BrokenPipeError:  # whoever read our output has left; so has what Python would still flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return CLOSED_PIPE
    except (ValueError, TypeError, KeyError, OSError, FloatingPointError, MemoryError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        notes = getattr(error, "__notes__", [])
        print("; ".join([f"gpurnn: error: {message or type(error).__name__}", *notes]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpurnn: interrupted", file=sys.stderr)
        return INTERRUPTED[signal.SIGINT]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpurnn", description="Recurrent networks by backpropagation through time.")
    parser.add_argument("--version", action="version", version=f"gpurnn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a character model",
        description="Trains a character model by truncated BPTT and leaves a run folder: model.safetensors, "
        "config.toml, metrics.jsonl, loss.png, gradient_flow.png.  Ctrl-C finishes the step and saves.",
    )
    train.add_argument(
        "--run", dest="folder", metavar="DIR", help="run folder to make (default: runs/<cell><size>-<time>)"
    )
    train.add_argument("--resume", metavar="DIR", help="go on with this run; only --steps and --minutes may change")
    train.add_argument("--config", metavar="FILE", help="options from a TOML file, such as a run's config.toml")
    _add_train_options(train)
    train.set_defaults(command=_train)

    sample = commands.add_parser(
        "sample", help="let a trained model write", description="Writes text with a run's model."
    )
    sample.add_argument("folder", metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default="\n", help="text to go on from (default: a new line)")
    sample.add_argument("--length", type=int, default=500, help="characters to write (default 500)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest, 1 the model's own (0.8)")
    sample.add_argument("--seed", type=int, default=None, help="for the same text again")
    sample.set_defaults(command=_sample)

    info = commands.add_parser("info", help="what this machine and installation offer")
    info.set_defaults(command=_info)
    return parser


def _add_train_options(parser: argparse.ArgumentParser) -> None:
    """One option per field of TrainConfig.  What is not given stays out, so that it cannot hide a file's value."""
    groups: dict[str, Any] = {}
    for option in fields(TrainConfig):
        title = option.metadata["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        kind = value_type(option)
        shown = "" if option.default is None else f" (default {option.default})"
        extra: dict[str, Any] = {"help": option.metadata["help"] + shown, "default": argparse.SUPPRESS}
        if kind is bool:
            extra["action"] = argparse.BooleanOptionalAction
        else:
            extra["type"], extra["choices"] = kind, option.metadata["choices"]
            extra["metavar"] = None if extra["choices"] else {str: "TEXT", int: "N", float: "X"}[kind]
        group.add_argument("--" + option.name.replace("_", "-"), dest="option_" + option.name, **extra)


def _given(options: argparse.Namespace) -> dict[str, Any]:
    prefix = "option_"
    return {name.removeprefix(prefix): value for name, value in vars(options).items() if name.startswith(prefix)}


def _info(options: argparse.Namespace) -> int:
    from gpurnn import environment

    print(environment.report())
    return 0


def _sample(options: argparse.Namespace) -> int:
    import numpy as np

    from gpurnn import character_model

    model, alphabet, _ = character_model.load(options.folder)
    rng = np.random.default_rng(options.seed)
    tokens = character_model.sample(model, alphabet, options.prompt, options.length, options.temperature, rng)
    _write(options.prompt.lstrip("\n"))
    _write_tokens(alphabet, tokens)
    _write("\n")
    return 0


def _write(text: str) -> None:
    """To standard output, whatever its encoding can show."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()


def _write_tokens(alphabet: Any, tokens: Iterator[int]) -> None:
    """As they come; bytes wait until they are whole characters."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        _write(alphabet.decode([token]) if alphabet.unit == "chars" else decoder.decode(bytes([token])))
    _write(decoder.decode(b"", final=True))


def _train(options: argparse.Namespace) -> int:
    from gpurnn import backend, checkpoint
    from gpurnn.data import load_corpus
    from gpurnn.training import Training

    config, folder = _resumed_config(options) if options.resume else _new_config(options)
    print(f"backend   {backend.name}: {backend.reason}")
    corpus = load_corpus(
        config.data,
        unit=config.unit,  # type: ignore[arg-type]  # TrainConfig allows these two words only
        encoding=config.encoding,
        pattern=config.pattern,
        max_alphabet=config.max_alphabet,
    )
    print(f"text      {corpus.description}\n          sha256 {corpus.sha256}")
    training = Training(config, corpus)
    depth = f"{config.num_layers} x {config.hidden_size}"
    print(f"model     {config.cell} {depth}, {training.model.params.count:,} parameters, {config.dtype}", flush=True)
    if not options.resume:
        checkpoint.create_run(folder, config.to_mapping(), training.checkpoint())
    with checkpoint.locked(folder):
        if options.resume:
            checkpoint.clean(folder)
            _restore(training, folder)
            checkpoint.write_atomically(folder / checkpoint.CONFIG, checkpoint.config_bytes(config.to_mapping()))
        print(f"run       {folder}" + (f", from step {training.steps_done}" if options.resume else ""), flush=True)
        if training.progress >= 1:
            print(f"nothing left to do: {training.steps_done} steps are done; more with --steps or --minutes")
            return 0
        return _run(training, folder)


def _run(training: Any, folder: Path) -> int:
    from gpurnn.training import train

    baseline = _baseline(training)
    with _signals() as caught, _progress(training) as report:
        train(training, folder, stop=lambda: bool(caught), report=report)
    _draw(folder, training, baseline)
    if caught and training.progress < 1:
        print(f"stopped and saved at step {training.steps_done}; go on with: gpurnn train --resume {folder}")
        return INTERRUPTED[caught[0]]
    _finish(training, folder, baseline)
    return 0


def _new_config(options: argparse.Namespace) -> tuple[TrainConfig, Path]:
    from gpurnn import checkpoint

    values = checkpoint.read_config(options.config) if options.config else {}
    if options.config:
        TrainConfig.from_mapping(values, options.config)  # so that a mistake in the file is told as the file's
    config = TrainConfig.from_mapping({**values, **_given(options)}, "options")
    if config.data == "":
        raise ValueError("--data: expected a file or folder, got an empty name")
    if config.data is not None:  # a run may be resumed from another folder
        config = replace(config, data=str(Path(config.data).absolute()))
    name = f"{config.cell}{config.hidden_size}-{datetime.datetime.now():%Y%m%d-%H%M%S}"
    return config, Path(options.folder or Path("runs") / name)


def _resumed_config(options: argparse.Namespace) -> tuple[TrainConfig, Path]:
    from gpurnn import checkpoint

    folder, given = Path(options.resume), _given(options)
    others = sorted(name for name in given if name not in ("steps", "minutes"))
    others += [name for name in ("config", "folder") if getattr(options, name)]
    if others:
        raise ValueError(
            f"--resume goes on with the run's own options; only --steps and --minutes may change, got {others}"
        )
    if not (folder / checkpoint.CONFIG).is_file():
        raise FileNotFoundError(f"{folder}: no run to resume, {checkpoint.CONFIG} is not there")
    values = checkpoint.read_config(folder / checkpoint.CONFIG)
    return TrainConfig.from_mapping({**values, **given}, str(folder / checkpoint.CONFIG)), folder


def _restore(training: Any, folder: Path) -> None:
    from gpurnn import checkpoint

    try:
        differences = training.restore(checkpoint.load(folder / checkpoint.MODEL))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{folder / checkpoint.MODEL}: {error.args[0]}") from None
    if differences:
        print("warning   this is not the environment the run was saved in; results may differ in their last bits:")
        for line in differences:
            print(f"          {line}")


def _baseline(training: Any) -> float | None:
    """Prints and returns what an order-3 character model of the same split reaches: the figure to beat."""
    from gpurnn.ngram import witten_bell

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
def _signals() -> Iterator[list[signal.Signals]]:
    """The list receives SIGINT and SIGTERM, so that a step is finished and saved; a second one ends the process."""
    caught: list[signal.Signals] = []

    def note(number: int, frame: Any) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(signal.Signals(number))

    before = {number: signal.signal(number, note) for number in INTERRUPTED}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _progress(training: Any) -> Iterator[Any]:
    """A live line on a terminal; elsewhere a line at each validation."""
    from tqdm import tqdm

    live = sys.stderr.isatty()
    known: dict[str, Any] = {}
    bar = tqdm(
        total=training.config.steps, initial=training.steps_done, unit="step", disable=not live, dynamic_ncols=True
    )

    def report(line: dict[str, Any]) -> None:
        known.update({name: value for name, value in line.items() if value is not None})
        parts = [f"{known['loss']:.3f} bits/char"] if "loss" in known else []
        parts += [f"validation {known['validation']:.3f}"] if "validation" in known else []
        parts += [f"{known['chars_per_second']:,} chars/s"] if "chars_per_second" in known else []
        parts += [f"gradient {known['grad_norm']:.2g}"] if "grad_norm" in known else []
        bar.set_postfix_str(", ".join(parts), refresh=False)
        bar.update(line["step"] - bar.n)
        if not live and "validation" in line:
            print(f"step {line['step']:6d}  {training.seconds:6.1f} s  " + ", ".join(parts), flush=True)

    with bar:
        yield report


def _draw(folder: Path, training: Any, baseline: float | None) -> None:
    """loss.png and gradient_flow.png, from metrics.jsonl."""
    from gpurnn import checkpoint, plot
    from gpurnn.metrics import read_metrics

    metrics = read_metrics(folder / checkpoint.METRICS)
    plot.loss_curve(metrics, folder / "loss.png", baseline=baseline)
    recorded = [line for line in metrics if "flow" in line and "reach" in line]
    if not recorded:
        return
    picked = recorded if len(recorded) < 3 else [recorded[0], recorded[len(recorded) // 2], recorded[-1]]
    layers = range(len(picked[0]["flow"]))
    names = [f"step {line['step']}" + (f", layer {k}" if len(layers) > 1 else "") for line in picked for k in layers]
    flows, reaches = ([line[what][k] for line in picked for k in layers] for what in ("flow", "reach"))
    longest = max(map(len, reaches))
    padded = [[math.nan] * (longest - len(curve)) + curve for curve in reaches]  # a run's first windows have less past
    plot.gradient_flow(flows, folder / "gradient_flow.png", last=padded, labels=names)


def _finish(training: Any, folder: Path, baseline: float | None) -> None:
    """The result on the whole validation text, a sample, and where everything is."""
    import numpy as np

    from gpurnn import character_model, checkpoint
    from gpurnn.metrics import MetricsLog

    speed = training.symbols_done / training.seconds
    print(
        f"trained   {training.steps_done} steps, {training.symbols_done:,} chars in {training.seconds:.1f} s ({speed:,.0f} chars/s)"
    )
    bits = training.validate(limit=None)
    if bits is not None:
        with MetricsLog(folder / checkpoint.METRICS) as log:
            log.write(training.steps_done, validation_all=bits, witten_bell=baseline)
        against = f", order-3 Witten-Bell {baseline:.3f}" if baseline is not None else ""
        print(f"result    {bits:.3f} bits/char on all {len(training.validation):,} validation chars{against}")
    print(
        f"figures   {folder / 'loss.png'}, {folder / 'gradient_flow.png'}\nsample    (more: gpurnn sample {folder})\n"
    )
    alphabet, rng = training.corpus.alphabet, np.random.default_rng(training.config.seed)
    prompt = "\n" if alphabet.unit == "bytes" or "\n" in alphabet.symbols else alphabet.symbols[0]
    _write_tokens(
        alphabet,
        character_model.sample(training.model, alphabet, prompt, SAMPLE_LENGTH, SAMPLE_TEMPERATURE, rng),
    )
    _write("\n")


if __name__ == "__main__":
    sys.exit(main())
