"""`python -m bench.gpu_summary FOLDER`: what `python -m bench gpu` found, in some ten lines, printed and in summary.md.

Beside it, summary.jsonl has the same for programs: an object a line, `what` it is about, `text`, and its numbers.
"""

import json
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench import cases, floors, gpu, model, results
from bench.gpu_parts import ABOUT, GROUPS, PEER, RESULTS
from bench.rehearsal import FLAG
from bench.results import Record
from gpurnn.kernels.plan import Chip

NAMED = 3  # of what went wrong, by name
OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
TEST = re.compile(r"tests/\S+\.py::.*?(?= (?:PASSED|FAILED|ERROR|SKIPPED)\b|$)")


class Line(NamedTuple):
    what: str
    text: str
    numbers: dict[str, Any]


class Pair(NamedTuple):
    """A case and phase: our fastest record, and cuDNN's where there is one."""

    ours: Record
    cudnn: Record | None


def main(folder: Path) -> None:
    found = list(lines(folder))
    text = "".join(f"- **{line.what}**: {line.text}\n" for line in found)
    (folder / "summary.md").write_text(text)
    objects = (json.dumps({"what": line.what, "text": line.text, **line.numbers}) + "\n" for line in found)
    (folder / "summary.jsonl").write_text("".join(objects))
    print(text)


def lines(folder: Path) -> Iterator[Line]:
    about = json.loads((folder / ABOUT).read_text())
    device = about["device"] or "no GPU: stand-in, nothing is measured"
    yield Line("machine", f"{device}; commit {about['commit']}, {about['date']}", about)
    yield _parts(folder)
    yield from _smoke(folder / "smoke.jsonl")
    yield from _tests(folder / "tests.log")
    path = folder / RESULTS
    records = [r for r in results.latest(results.read(path)) if FLAG not in r["flags"]] if path.exists() else []
    failed = [record for record in records if record.get("failure")]
    if failed:
        worst = Counter(f"{record['implementation']}: {record['failure'][:100]}" for record in failed)
        text = f"{len(failed)} of {len(records)}; " + "; ".join(name for name, _ in worst.most_common(NAMED))
        yield Line("lines that failed", text, {"failed": len(failed), "lines": len(records)})
    pairs = _pairs(records)
    yield from _groups(pairs)
    yield from _predicted(pairs, about)
    yield from _tuned(folder / "tune.log")


def _parts(folder: Path) -> Line:
    by_state: dict[str, list[str]] = {}
    for state in gpu.read(folder).values():
        why = f" ({state.why})" if state.state in ("failed", "skipped") else ""
        by_state.setdefault(state.state, []).append(state.part + why)
    text = "; ".join(f"{state}: {', '.join(names)}" for state, names in by_state.items())
    return Line("parts", text, {"parts": {name: len(names) for name, names in by_state.items()}})


def _smoke(path: Path) -> Iterator[Line]:
    """The last word on each case."""
    if path.exists():
        last = {outcome["case"]: outcome for outcome in map(json.loads, path.read_text().splitlines())}
        bad = [outcome for outcome in last.values() if outcome["verdict"] not in ("ok", "skip")]
        shown = "; ".join(f"{outcome['case']} {outcome['verdict']}: {outcome['text']}" for outcome in bad[:NAMED])
        text = f"{len(last) - len(bad)} of {len(last)} right" + (f"; {shown}" if bad else "")
        yield Line("smoke", text, {"cases": len(last), "bad": bad})


def _tests(path: Path) -> Iterator[Line]:
    """From the log, which is there for tests that were killed as well."""
    if not path.exists():
        return
    outcomes: dict[str, str] = {}
    for line in path.read_text(errors="replace").splitlines():
        outcome, test = OUTCOME.search(line), TEST.search(line)
        if (
            outcome and test and "[" in line
        ):  # the place in the run, "[ 12%]" or "[gw3] [ 12%]"; not the summary's lines
            outcomes[re.sub(r"\s*\[ *\d+%\]$", "", test.group())] = outcome.group(1)
    counted = Counter(outcomes.values())
    bad = [test for test, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    text = ", ".join(f"{count} {name.lower()}" for name, count in counted.items()) or "none ran"
    yield Line("tests", text + (f"; {'; '.join(bad[:NAMED])}" if bad else ""), {"tests": dict(counted), "bad": bad})


def _pairs(records: Sequence[Record]) -> list[Pair]:
    timed: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.get("failure") is None and record["part"] != "recurrence":
            timed.setdefault((record["case"], record["phase"]), []).append(record)
    pairs = []
    for here in timed.values():
        ours = [record for record in here if record["implementation"].startswith("gpurnn-")]
        cudnn = next((record for record in here if record["implementation"] == PEER), None)
        if ours:
            pairs.append(Pair(min(ours, key=lambda record: record["median_s"]), cudnn))
    return pairs


def _groups(pairs: Sequence[Pair]) -> Iterator[Line]:
    """cuDNN's time over ours: above 1 ours is faster."""
    for group in GROUPS:
        told, numbers = [], {}
        for phase in results.PHASES:
            here = [pair for pair in pairs if pair.ours["group"] == group and pair.ours["phase"] == phase]
            if not here:
                continue
            floor = statistics.median(pair.ours["percent_of_floor"] for pair in here)
            ratios = {p.ours["case"]: p.cudnn["median_s"] / p.ours["median_s"] for p in here if p.cudnn}
            beside = ""
            if ratios:
                mean = math.exp(statistics.fmean(map(math.log, ratios.values())))
                least = min(ratios, key=lambda case: ratios[case])
                beside = f"{_down(mean)} x over {len(ratios)} (least {_down(ratios[least])}: {least}), "
                numbers[f"{phase} ratio"] = mean
            told.append(f"{phase} {beside}{floor:.0f}% of the floor")
            numbers |= {f"{phase} percent of floor": floor, f"{phase} cases": len(here)}
        if told:
            yield Line(f"{group}, cuDNN's time / ours", "; ".join(told), numbers)


def _down(ratio: float) -> str:
    """Rounded down, so that no loss becomes a win."""
    return f"{math.floor(100 * ratio) / 100:.2f}"


def _predicted(pairs: Sequence[Pair], about: dict[str, Any]) -> Iterator[Line]:
    """Measured over predicted, for what the plan would pick."""
    if about["chip"] is None:
        return
    number, capability, *sizes = about["chip"]
    chip, ratios = Chip(number, tuple(capability), *sizes), {}
    for ours, _ in pairs:
        if ours["part"] == "layer":
            gpu_here = model.Gpu(chip, floors.Machine(**ours["environment"]["machine peaks"]))
            case = cases.find(ours["case"])
            ratios[f"{ours['case']} {ours['phase']}"] = ours["us_per_step"] / model.predicted(
                case, ours["phase"], gpu_here
            )
    if ratios:
        middle, most = statistics.median(ratios.values()), max(ratios, key=lambda name: ratios[name])
        text = f"median {middle:.2f} over {len(ratios)}, {min(ratios.values()):.2f} to {ratios[most]:.2f} ({most})"
        yield Line("measured / predicted time", text, {"median": middle, "ratios": ratios})


def _tuned(path: Path) -> Iterator[Line]:
    """How often the plan's own choice was the fastest, and what the fastest gains."""
    questions: dict[tuple[str, str, bool], list[tuple[float, float]]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        fields = [field.strip() for field in line.strip("| ").split(" | ")]
        if len(fields) == 5 and fields[1] in ("forward", "backward"):
            key = fields[0], fields[1], fields[2].endswith("alone")
            questions.setdefault(key, []).append((float(fields[3]), float(fields[4])))
    if questions:
        gains = [min(every)[1] / min(measured for _, measured in every) for every in questions.values()]
        mean = math.exp(statistics.fmean(map(math.log, gains)))
        first = sum(gain == 1 for gain in gains)
        text = (
            f"the plan's choice was the fastest in {first} of {len(gains)}; the fastest takes 1/{mean:.2f} of its time"
        )
        yield Line("tuning", text, {"questions": len(gains), "plan was fastest": first, "gain": mean})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
