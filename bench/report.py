"""`python -m bench report RESULTS...`: the tables and figures in README.md and bench/README.md, never typed.

A document holds pairs of lines, `<!-- bench:NAME begin -->` and `<!-- bench:NAME end -->`, NAME a group of cases; what
stands between them is replaced, what stands outside is not touched.  README.md gets a short form.
"""

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import plots, results, tables
from bench.standings import Section, sections
from gpurnn.files import write_atomically

ROOT = Path(__file__).parent.parent
RESULTS = Path("bench", "results")
FIGURES = Path("bench", "figures")
FULL, SHORT = Path("bench", "README.md"), Path("README.md")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "results", nargs="*", type=Path, metavar="RESULTS", help="JSON lines; default: bench/results/*.jsonl"
    )
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="where README.md and bench/ are; default: this checkout"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is out of date")


def main(options: argparse.Namespace) -> int:
    """Writes figures and documents, or with --check says which are out of date: then 1, else 0."""
    root = options.root
    paths = options.results or sorted((root / RESULTS).glob("*.jsonl"))
    if not paths:
        raise ValueError(f"results: expected files of JSON lines, found none in {root / RESULTS}")
    groups = sections(record for path in paths for record in results.read(path))
    every = [section for members in groups.values() for section in members]
    texts = {root / name: document(root, name, groups) for name in (SHORT, FULL)}
    if options.check:
        stale = [path for path, text in texts.items() if path.read_text(encoding="utf-8") != text]
        stale += [
            path for section in every for path in plots.paths(section, root / FIGURES) if not plots.is_of(path, section)
        ]
        print("\n".join(f"out of date: {path}" for path in stale) or "documents and figures are up to date")
        return 1 if stale else 0
    (root / FIGURES).mkdir(parents=True, exist_ok=True)
    drawn = [path for section in every for path in plots.draw(section, root / FIGURES)]
    for path, text in texts.items():
        write_atomically(path, text.encode())
    print("\n".join(str(path) for path in (*drawn, *texts)))
    return 0


def document(root: Path, name: Path, groups: dict[str, list[Section]]) -> str:
    """The text that a document should have.  Raises ValueError where its markers cannot be made sense of."""
    short = name == SHORT

    def block(group: str) -> str:
        if not groups[group]:
            return f"Nothing measured yet: `python -m bench run --group {group}` on a machine of that kind."
        parts = []
        for section in groups[group]:
            figures = [path.as_posix() for path in plots.paths(section, FIGURES if short else Path(FIGURES.name))]
            parts.append((tables.short if short else tables.full)(section, figures))
        return "\n\n".join(parts)

    needed = [] if short else [group for group, members in groups.items() if members]
    return fill((root / name).read_text(encoding="utf-8"), block, list(groups), needed, str(root / name))


def fill(text: str, block: Callable[[str], str], known: Sequence[str], needed: Sequence[str], name: str) -> str:
    """`text` with `block(NAME)` between the markers of each NAME that it has.

    Raises ValueError where there is no marker at all or none for one of `needed`, a NAME is not `known`, and where
    markers are not in pairs.
    """
    marks = re.findall(r"^<!-- bench:(\S+) (begin|end) -->$", text, re.MULTILINE)
    for opening, closing in zip(marks[::2], [*marks[1::2], ("nothing", "end")], strict=False):
        if opening[1] != "begin" or closing != (opening[0], "end"):
            raise ValueError(f"{name}: expected a begin and an end of the same name, got {opening} and {closing}")
    names = [mark for mark, _ in marks[::2]]
    for mark, count in Counter(names).items():
        if mark not in known or count > 1:
            wrong = f"{count} times bench:{mark}" if count > 1 else f"bench:{mark}"
            raise ValueError(f"{name}: expected markers among {', '.join(known)}, each once, got {wrong}")
    missing = [group for group in needed if group not in names] or ([] if names else list(known[:1]))
    if missing:
        lines = " and ".join(f"<!-- bench:{missing[0]} {edge} -->" for edge in ("begin", "end"))
        raise ValueError(f"{name}: no markers for {', '.join(missing)}: put the lines {lines} where the table belongs")
    for mark in names:
        begin, end = f"<!-- bench:{mark} begin -->\n", f"<!-- bench:{mark} end -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}{block(mark)}\n{end}{rest.split(end)[1]}"
    return text
