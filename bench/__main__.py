"""`python -m bench`: runs one of COMMANDS."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

COMMANDS = {
    "gpu": "all that a GPU should show, in so many minutes: is it right, does it hang, how fast is it",
    "run": "measure cases and append their lines to a results file",
    "plot": "figures of a results file",
    "report": "the tables and figures that README.md and bench/README.md show",
    "compare": "what became slower or faster between two results files, told apart from noise",
    "profile": "where the time of one case goes",
    "build": "build the kernels of cases, of the smoke test or of the GPU tests ahead, on all CPUs; no GPU needed",
    "smoke": "every executor, precision and exchange on this GPU against NumPy, in a minute",
    "tune": "measure the plan's choices on this GPU and keep the fastest",
    "calibrate": "the measured constants of the CPU side, measured again on this machine",
    "host": "what the host spends on a time step of the executor step, without a GPU",
    "model": "what the kernels' model predicts for a GPU, without one",
    "cells": "the tables of docs/cells.md: what each cell costs, and what each executor runs",
    "sass": "the machine code of a case's kernels: instructions by pipe, and how long a step may take",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status, 2 where what was asked for makes no sense."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of gpurnn and its peers.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        name: commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        for name, text in COMMANDS.items()
    }
    asked = next((name for name in arguments[:1] if name in parsers), None)
    if asked is not None:  # the others' modules, matplotlib among what they need, are not loaded
        try:
            parsers[asked].set_defaults(main=_module(asked).main)
            _module(asked).add_arguments(parsers[asked])
        except (ValueError, RuntimeError, ImportError) as error:  # a variable of gpurnn's, or a package that is missing
            return _refused(asked, error)
    options = parser.parse_args(arguments)
    try:
        return options.main(options) or 0
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return _refused(options.command, error)


def _refused(command: str, error: Exception) -> int:
    print(f"python -m bench {command}: error: {error}", file=sys.stderr)
    return 2


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"bench.{'plots' if command == 'plot' else command}")


if __name__ == "__main__":
    sys.exit(main())
