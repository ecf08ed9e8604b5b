"""The tour: every experiment in turn, on one page."""

from pathlib import Path

from gpurnn.lab import beginnings, cliff, lags, letters, memory, truncation, weight
from gpurnn.lab.page import SUMMARY, Page

EXPERIMENTS = (weight, letters, lags, cliff, memory, truncation, beginnings)


def tour(folder: Path, *, quick: bool = False, seed: int = 0) -> Path:
    """Runs the experiments and writes figures (PNG and SVG) and a page into `folder`; returns the page's path.

    The page is written behind every experiment, so that an interrupted tour leaves what is done.
    Raises FileExistsError where the folder holds something else than an earlier tour.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / SUMMARY).exists():
        raise FileExistsError(f"{folder}: expected a new folder or an earlier tour's, got one with other files in it")
    folder.mkdir(parents=True, exist_ok=True)
    page = Page(folder, quick=quick, seed=seed)
    page.title("A tour of vanishing and exploding gradients")
    for module in EXPERIMENTS:
        module.experiment(page)
        page.save()
    return folder / SUMMARY
