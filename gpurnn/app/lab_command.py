"""`gpurnn lab`: the tour of the gradient laboratory, on the screen and in a folder."""

import argparse
import time
from pathlib import Path

DEFAULT = "gradient-lab"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", default=DEFAULT, metavar="FOLDER", help=f"where figures and page go (default {DEFAULT})"
    )
    parser.add_argument("--quick", action="store_true", help="shorter lags and fewer updates: seconds, not minutes")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is drawn (default 0)")


def run(options: argparse.Namespace) -> int:
    """Runs the tour; returns the process's exit code."""
    from gpurnn.arguments import whole
    from gpurnn.lab import tour
    from gpurnn.plot import why_not

    if reason := why_not():
        raise ValueError(f"the tour is a page of figures, and {reason}")
    if not options.out:
        raise ValueError("--out: expected a folder, got an empty name")
    began = time.perf_counter()
    try:
        page = tour(Path(options.out), quick=options.quick, seed=whole("--seed", options.seed, 0))
    except KeyboardInterrupt:
        print(f"\nwhat is done is in {options.out}", flush=True)
        raise
    print(f"\nall of it is in {page}  ({time.perf_counter() - began:.0f} s)")
    return 0
