"""`python -m bench compare A B`: what became slower or faster from A to B, told apart from noise and from the machine.

A change is the ratio of medians, B / A, divided by the machine's own drift: peers' code is the same in both files (the
report says so where it is not), so the median of their ratios is what the machine did.  How far their ratios scatter
around it is what a case moves from run to run with unchanged code, and no interval from samples of one run can know
that.  So a change's interval holds, in quadrature: the bootstrap of both medians, the peers' scatter, and the
uncertainty of the drift.  A regression is flagged where the whole interval lies above the limit, the medians differ by
more than either run's own spread, and the fastest samples by half as much at least: two threads that the scheduler
happens to place badly take a quarter longer for most of a run, but not in all of its samples.  The geometric mean over
a group is judged in the same way: a slowdown of everything shows there, even where no case alone stands out of the
noise.

Sources: Efron and Tibshirani 1993 (bootstrap); Hoaglin, Mosteller and Tukey 1983 (scatter from the median deviation).
"""

import argparse
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from bench import results, statistics
from bench.results import Key, Record

Lines = Mapping[Key, Record]

OURS = "gpurnn"
LIMIT = 1.03
# a normal distribution's reach at `statistics.CONFIDENCE`; with the limit, dozens of cases raise no false alarm
Z = 1.96
FEW_PEERS = 6  # fewer peers' lines say too little of the scatter between runs ...
ASSUMED_SCATTER = 0.02  # ... and at least this is taken instead
LEAST_SCATTER = 0.005  # where the runs' own noise seems to explain all of it
TO_SIGMA = 1.4826  # from the median absolute deviation, for a normal distribution


class Drift(NamedTuple):
    """How a group's machine changed, as logarithms, from `lines` of peers; `scatter` is the peers' around `log`."""

    log: float
    error: float
    scatter: float
    lines: int


class Change(NamedTuple):
    """One line's time in B over that in A, `ratio` and interval without the machine's drift."""

    key: Key
    before: float
    after: float
    ratio: float
    low: float
    high: float
    verdict: str  # slower, faster, same, unjudged (throttled, or with too few samples)


class Mean(NamedTuple):
    """The geometric mean over the `cases` of a group, phase and implementation of ours."""

    name: str
    cases: int
    ratio: float
    low: float
    high: float
    verdict: str


class Comparison(NamedTuple):
    changes: list[Change]
    means: list[Mean]
    drifts: dict[str, Drift]
    broken: dict[Key, str]  # timed in A, failed in B, and how
    lost: list[Key]  # timed in A, not in B at all
    new: list[Key]
    remarks: list[str]

    @property
    def regressions(self) -> int:
        verdicts = [change.verdict for change in self.changes] + [mean.verdict for mean in self.means]
        return len(self.broken) + verdicts.count("slower")


def compare(before: Iterable[Record], after: Iterable[Record], limit: float = LIMIT) -> Comparison:
    """Compares two runs, records as `results.read` gives them.  Where a line was measured twice the later one counts.

    limit: the smallest ratio of times that is called slower.  Raises ValueError where it is not a ratio from 1.
    """
    if not 1 <= limit < math.inf:
        raise ValueError(f"limit: expected a ratio from 1, got {limit}")
    first, second = ({results.key(record): record for record in records} for records in (before, after))
    a, b = _timed(first), _timed(second)
    common = [key for key in a if key in b]
    raw = {key: statistics.changed(a[key]["samples_s"], b[key]["samples_s"]) for key in common}
    drifts = _drifts(a, raw)
    changes = [_change(key, a[key], b[key], raw[key], drifts[a[key]["group"]], limit) for key in common if _ours(key)]
    failed = {key: str(second[key]["failure"]) for key in a if key in second and second[key].get("failure")}
    return Comparison(
        changes=changes,
        means=_means(a, changes, drifts, limit),
        drifts=drifts,
        broken={key: failure for key, failure in failed.items() if _ours(key)},
        lost=[key for key in a if key not in second or (key in failed and not _ours(key))],
        new=[key for key in b if key not in a],
        remarks=_differences(a, b, common),
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", metavar="A", help="results of the run to compare with (JSON lines)")
    parser.add_argument("after", metavar="B", help="results of the run in question")
    parser.add_argument("--limit", type=float, default=LIMIT, help="the smallest slowdown that counts (%(default)s)")
    parser.add_argument("--all", action="store_true", help="list unchanged cases too")


def main(options: argparse.Namespace) -> int:
    """Prints the comparison; 1 where there is a regression, 2 where nothing can be compared, else 0."""
    comparison = compare(results.read(options.before), results.read(options.after), options.limit)
    print(render(comparison, options.limit, every=options.all))
    if not comparison.drifts and not comparison.broken:
        return 2
    return 1 if comparison.regressions else 0


def render(comparison: Comparison, limit: float, every: bool = False) -> str:
    """The comparison as text."""
    text = [f"note: {remark}" for remark in comparison.remarks]
    text += [_drift_text(group, drift, limit) for group, drift in comparison.drifts.items()]
    for verdict in ("slower", "faster", "unjudged", *(("same",) if every else ())):
        chosen = sorted((c for c in comparison.changes if c.verdict == verdict), key=lambda c: -abs(math.log(c.ratio)))
        if chosen:
            text.append(f"\n{_TITLES[verdict]} ({len(chosen)}), B / A without the machine's drift, and times in us:")
            text += [
                f"  {c.ratio:6.3f} ({c.low:.3f} to {c.high:.3f})  "
                f"{1e6 * c.before:11.1f} -> {1e6 * c.after:11.1f}  {_name(c.key)}"
                for c in chosen
            ]
    if comparison.means:
        text.append("\ngeometric means:")
        text += [
            f"  {m.ratio:6.3f} ({m.low:.3f} to {m.high:.3f})  {m.verdict:<8}  {m.name}, {m.cases} cases"
            for m in comparison.means
        ]
    if comparison.broken:
        text.append(f"\nFAILED in B ({len(comparison.broken)}), timed in A:")
        text += [f"  {_name(key)}: {failure}" for key, failure in comparison.broken.items()]
    for title, keys in (("missing in B", comparison.lost), ("new in B", comparison.new)):
        if keys:
            text += [f"\n{title} ({len(keys)}):", *(f"  {_name(key)}" for key in keys)]
    slower = comparison.regressions
    same = sum(c.verdict == "same" for c in comparison.changes)
    text.append(
        f"\n{len(comparison.changes)} lines compared, {same} unchanged (limit {limit:g}): "
        + (f"{slower} REGRESSION{'S' * (slower != 1)}" if slower else "no regression")
    )
    return "\n".join(text)


_TITLES = {
    "slower": "SLOWER",
    "faster": "faster",
    "unjudged": "changed, but throttled or with too few samples: not judged",
    "same": "unchanged",
}


def _timed(lines: Lines) -> Lines:
    return {key: record for key, record in lines.items() if record.get("failure") is None}


def _ours(key: Key) -> bool:
    return key[3].startswith(OURS)


def _name(key: Key) -> str:
    return " ".join(key)


def _drifts(a: Lines, raw: Mapping[Key, statistics.Change]) -> dict[str, Drift]:
    """By group: another group may run on another device."""
    peers: dict[str, list[statistics.Change]] = {a[key]["group"]: [] for key in raw}
    for key, change in raw.items():
        if not _ours(key):
            peers[a[key]["group"]].append(change)
    everywhere = _drift([change for changes in peers.values() for change in changes], 0.0).scatter
    return {group: _drift(changes, everywhere) for group, changes in peers.items()}


def _drift(peers: Sequence[statistics.Change], everywhere: float) -> Drift:
    """everywhere: the scatter over all groups, for a group that has too few lines of its own."""
    values = np.log([peer.ratio for peer in peers])
    centre = float(np.median(values)) if peers else 0.0
    if len(peers) >= FEW_PEERS:
        seen = TO_SIGMA * float(np.median(np.abs(values - centre)))
        within = float(np.median([math.log(peer.high / peer.low) / (2 * Z) for peer in peers]))  # each run's own noise
        scatter = max(LEAST_SCATTER, math.sqrt(max(0.0, seen**2 - within**2)))
    else:  # what changed a lot did not change evenly
        seen = scatter = max(ASSUMED_SCATTER, everywhere, abs(centre) / 2)
    error = 1.2533 * seen / math.sqrt(max(1, len(peers)))  # of a median
    return Drift(centre, error, scatter, len(peers))


def _change(key: Key, a: Record, b: Record, raw: statistics.Change, drift: Drift, limit: float) -> Change:
    value, between = math.log(raw.ratio) - drift.log, Z * math.hypot(drift.scatter, drift.error)
    low = value - math.hypot(max(0.0, math.log(raw.ratio / raw.low)), between)
    high = value + math.hypot(max(0.0, math.log(raw.high / raw.ratio)), between)
    before, spread_before = _median_and_spread(a["samples_s"])
    after, spread_after = _median_and_spread(b["samples_s"])
    verdict = _verdict(low, high, limit) if abs(value) > max(spread_before, spread_after) else "same"
    fastest = math.log(min(b["samples_s"]) / min(a["samples_s"])) - drift.log
    if verdict != "same" and fastest / value < 0.5:
        verdict = "same"
    if verdict != "same" and (raw.verdict == "unknown" or "throttled" in [*a["flags"], *b["flags"]]):
        verdict = "unjudged"
    return Change(key, before, after, math.exp(value), math.exp(low), math.exp(high), verdict)


def _verdict(low: float, high: float, limit: float) -> str:
    if low > math.log(limit):
        return "slower"
    return "faster" if high < -math.log(limit) else "same"


def _median_and_spread(samples: Sequence[float]) -> tuple[float, float]:
    """Spread: half the distance from the 20th to the 80th percentile, as a part of the median."""
    median, low, high = statistics.summary(samples)
    return median, (high - low) / (2 * median)


def _means(a: Lines, changes: Sequence[Change], drifts: Mapping[str, Drift], limit: float) -> list[Mean]:
    grouped: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)
    for change in changes:
        _, phase, part, implementation = change.key
        grouped[a[change.key]["group"], implementation, phase, part].append(math.log(change.ratio))
    means = []
    for (group, *rest), logs in grouped.items():
        if len(logs) >= FEW_PEERS:
            own = max(float(np.std(logs, ddof=1)), drifts[group].scatter) / math.sqrt(len(logs))
            value, reach = float(np.mean(logs)), Z * math.hypot(own, drifts[group].error)
            low, high = value - reach, value + reach
            ratios = (math.exp(value), math.exp(low), math.exp(high))
            means.append(Mean(" ".join([group, *rest]), len(logs), *ratios, _verdict(low, high, limit)))
    return means


def _drift_text(group: str, drift: Drift, limit: float) -> str:
    least = limit * math.exp(Z * math.hypot(drift.scatter, drift.error)) - 1
    seen = "seen" if drift.lines >= FEW_PEERS else "assumed"
    visible = f"scatter from run to run {drift.scatter:.1%} ({seen}): a slowdown of one line shows from {least:.0%} on"
    if not drift.lines:
        return f"{group}: no peer is timed in both files, so ratios hold the machine's drift too; {visible}"
    return (
        f"{group}: the machine takes {math.exp(drift.log):.3f} times as long in B as in A, "
        f"by {drift.lines} peers' lines; taken out below; {visible}"
    )


def _differences(a: Lines, b: Lines, common: Sequence[Key]) -> list[str]:
    """Entries of the environment that differ: with another torch the peers' drift is not the machine's alone."""
    if not common:
        return ["the files have no timed line in common"]
    first, second = (lines[common[0]]["environment"] for lines in (a, b))
    both = {**first, **second}
    # What is not text is measured, and never the same twice.
    return [
        f"{name} differs: {first.get(name, 'nothing')} in A, {second.get(name, 'nothing')} in B"
        for name in both
        if first.get(name) != second.get(name) and isinstance(both[name], str) and "memory" not in name
    ]
