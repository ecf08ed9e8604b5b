"""The command line: gpurnn train, sample, flow, lab, info."""

import argparse
import difflib
import io
import os
import signal
import sys
import warnings
from dataclasses import fields
from typing import NoReturn

from gpurnn._version import __version__
from gpurnn.app import flow_command, lab_command, train_command
from gpurnn.app.config import TrainConfig


def main(arguments: list[str] | None = None) -> int:
    """Runs one command; returns the process's exit code.  A mistake of the user's is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # so that any text and any file name can be shown
    options = _parsed(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # NumPy's: what is not finite is told by name
            code = options.command(options)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read our output has left; so has what Python would still flush at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return train_command.CLOSED_PIPE
    except (ValueError, TypeError, KeyError, OSError, ArithmeticError, MemoryError) as error:
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        notes = [*getattr(error, "__notes__", []), *_no_current_folder()]
        print("; ".join([f"gpurnn: error: {message or type(error).__name__}", *notes]), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("gpurnn"):
            raise
        print(f"gpurnn: error: this needs {error.name}, which is not installed: pip install it", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gpurnn: interrupted", file=sys.stderr)
        return train_command.INTERRUPTED[signal.SIGINT]


def _no_current_folder() -> list[str]:
    """Why a relative name leads nowhere, in a folder that is gone."""
    try:
        os.getcwd()
    except OSError:
        return ["the current folder does not exist any more"]
    return []


# What other programs call an option: ours, or why there is none.
_CHOSEN = (
    "the device is chosen at import, as `gpurnn info` says; GPURNN_BACKEND=cuda makes it an error where there is none"
)
MEANT = {
    "--learning-rate": "--lr",
    "--learning_rate": "--lr",
    "--batch-size": "--batch",
    "--bptt": "--k1",
    "--seq-len": "--k1",
    "--seq-length": "--k1",
    "--layers": "--num-layers",
    "--hidden": "--hidden-size",
    "--units": "--hidden-size",
    "--clip": "--clip-norm",
    "--grad-clip": "--clip-norm",
    "--model": "--cell",
    "--input": "--data",
    "--out": "--run",
    "--output": "--run",
    "--out-dir": "--run",
    "--output-dir": "--run",
    "--temp": "--temperature",
    "--epochs": "a budget is --steps or --minutes; a step reads --batch times --k1 characters",
    "--gpu": _CHOSEN,
    "--cuda": _CHOSEN,
    "--device": _CHOSEN,
    "--bidirectional": "a character model predicts the next character, which a backward direction would have read",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, as for every other mistake; argparse's own would be under the whole usage."""
        self.exit(2, f"gpurnn: error: {message} (see {self.prog} --help)\n")


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    """An unknown argument ends the process with what may have been meant."""
    parser = _parser()
    options, unknown = parser.parse_known_args(arguments)
    if unknown and unknown[0].startswith("-"):
        meant = MEANT.get(unknown[0].split("=")[0], "")
        if meant in options.known:
            parser.error(f"unknown option {unknown[0]}; did you mean {meant}?")
        if " " in meant and options.command in (train_command.run, _sample):
            parser.error(f"unknown option {unknown[0]}: {meant}")
        words = [name.removeprefix("--") for name in options.known]
        near = difflib.get_close_matches(unknown[0].split("=")[0].lstrip("-"), words, 1, cutoff=0.7)
        parser.error(f"unknown option {unknown[0]}" + (f"; did you mean --{near[0]}?" if near else ""))
    if unknown:
        meant = f"; did you mean --data {unknown[0]}?" if options.command is train_command.run else ""
        parser.error(f"unknown argument {unknown[0]}{meant}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gpurnn", description="Recurrent networks by backpropagation through time.")
    parser.add_argument("--version", action="version", version=f"gpurnn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a character model",
        description="Trains a character model by truncated BPTT and leaves a run folder: model.safetensors, "
        "best.safetensors, config.toml, metrics.jsonl, loss.png, gradient_flow.png.  Ctrl-C finishes the step and saves.",
    )
    train_command.add_arguments(train)
    names = ["run", "resume", "config", *(option.name for option in fields(TrainConfig))]
    train.set_defaults(command=train_command.run, known=[train_command.flag(name) for name in names])

    sample = commands.add_parser(
        "sample", help="let a trained model write", description="Writes text with a run's model."
    )
    sample.add_argument("folder", metavar="RUN", help="run folder")
    sample.add_argument("--prompt", default=None, help="text to go on from (default: a new line)")
    sample.add_argument("--length", type=int, default=500, help="characters to write (default 500)")
    sample.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest, 1 the model's own (0.8)")
    sample.add_argument(
        "--top-k", type=int, default=None, metavar="K", help="draw from the K likeliest characters alone"
    )
    sample.add_argument(
        "--top-p", type=float, default=None, metavar="P", help="draw from the likeliest that have P of the probability"
    )
    sample.add_argument("--seed", type=int, default=None, help="for the same text again")
    sample.add_argument("--best", action="store_true", help="the model whose validation was best, not the last")
    sample.set_defaults(
        command=_sample, known=["--prompt", "--length", "--temperature", "--top-k", "--top-p", "--seed", "--best"]
    )

    flow = commands.add_parser(
        "flow",
        help="look at a model's gradients",
        description="The gradient laboratory on a run, trained or in training: verdicts and tables on the screen, "
        "flow.json and figures (flow_*.png, .svg) in the run folder.",
    )
    flow_command.add_arguments(flow)
    flow.set_defaults(command=flow_command.run, known=["--steps", "--batch", "--data"])

    lab = commands.add_parser(
        "lab",
        help="a tour of vanishing and exploding gradients",
        description="Runs the classic experiments on vanishing and exploding gradients and writes a page with figures, "
        "summary.md, into a folder.  Ctrl-C leaves what is done.",
    )
    lab_command.add_arguments(lab)
    lab.set_defaults(command=lab_command.run, known=["--out", "--quick", "--seed"])

    info = commands.add_parser("info", help="what this machine and installation offer")
    info.set_defaults(command=_info, known=[])
    return parser


def _info(options: argparse.Namespace) -> int:
    from gpurnn import environment

    print(environment.report())
    return 0


def _sample(options: argparse.Namespace) -> int:
    import numpy as np

    from gpurnn.app import character_model

    model, alphabet, _ = character_model.load_run(options.folder, best=options.best)
    rng = np.random.default_rng(options.seed)
    prompt = character_model.first_prompt(alphabet) if options.prompt is None else options.prompt
    tokens = character_model.sample(
        model, alphabet, prompt, options.length, options.temperature, rng, top_k=options.top_k, top_p=options.top_p
    )
    character_model.write(alphabet, prompt, tokens)
    return 0


if __name__ == "__main__":
    sys.exit(main())
