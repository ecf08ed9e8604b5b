"""The tests.  A package, so that no other one of that name is taken for it; the stand-ins are modules of it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the checkout
