"""What a tour says: sentences, tables and figures, on the screen as they come and in one page of Markdown."""

import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from gpurnn.files import write_atomically

SUMMARY = "summary.md"
WIDTH = 110


class Page:
    """The tour's page, and what its experiments need to know.

    folder  where the page and its figures go.
    quick   shorter lags and fewer updates: a minute's look in seconds.
    seed    of everything that is drawn.
    """

    def __init__(self, folder: Path, *, quick: bool = False, seed: int = 0):
        self.folder, self.quick, self.seed = folder, quick, seed
        self.began = time.perf_counter()
        self._lines: list[str] = []
        self._sections = 0

    def title(self, text: str) -> None:
        print(text, flush=True)
        self._lines += [f"# {text}", ""]

    def section(self, title: str) -> None:
        self._sections += 1
        numbered = f"{self._sections}. {title}"
        print(f"\n{numbered}\n{'-' * len(numbered)}", flush=True)
        self._lines += [f"## {numbered}", ""]

    def say(self, text: str) -> None:
        print(textwrap.fill(text, WIDTH), flush=True)
        self._lines += [text, ""]

    def quote(self, text: str) -> None:
        """Lines as they stand, such as a verdict."""
        print(textwrap.indent(text, "    "), flush=True)
        self._lines += ["```", text, "```", ""]

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
        padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in (header, *rows)]
        print("\n".join("    " + "   ".join(row).rstrip() for row in padded), flush=True)
        padded.insert(1, ["-" * width for width in widths])
        self._lines += [*(f"| {' | '.join(row)} |" for row in padded), ""]

    def figure(self, name: str, caption: str) -> Path:
        """Where to draw the figure called `name`, which the page shows here."""
        print(f"    figure: {self.folder / name}.png", flush=True)
        self._lines += [f"![{caption}]({name}.png)", "", f"*{caption}*", ""]
        return self.folder / f"{name}.png"

    def progress(self, text: str) -> None:
        """For whoever waits; not a part of the page."""
        print(f"    {text}  [{time.perf_counter() - self.began:.0f} s]", flush=True)

    def save(self) -> None:
        write_atomically(self.folder / SUMMARY, "\n".join(self._lines).encode())
