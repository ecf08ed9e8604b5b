"""The tables of a group of cases as Markdown: `full` for bench/README.md, `short` for README.md.

Every ratio is a peer's time (or memory) over ours, so above 1 ours is better; all ratios are rounded down, so that no
loss and no tie can turn into a win on paper.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

from bench.standings import CELL_NAMES, OURS, PHASES, Section, Standing, geometric_mean, peer_ratio

BEYOND = 105  # percent of the floor; a little more than it is the noise of both measurements
ABSENT = ("none", "unknown", "not installed")
VERSIONS = ("gpurnn", "python", "numpy", "numba", "cupy", "torch", "cudnn", "jax", "driver", "blas")
PEERS = {"torch": "torch", "jax": "jax-scan", "flashrnn": "flashrnn"}  # packages, and the implementations they bring


def shown(ratio: float) -> str:
    """A ratio with three figures, rounded down."""
    decimals = 2 if ratio < 10 else 1 if ratio < 100 else 0
    return f"{math.floor(ratio * 10**decimals + 1e-9) / 10**decimals:.{decimals}f}"


def full(section: Section, figures: Sequence[str]) -> str:
    """Everything about a group on one machine.  figures: paths, seen from the document."""
    parts = [f"**{section.machine}**", _provenance(section)]
    for phase in PHASES:
        chosen = [s for s in section.standings if s.phase == phase]
        if any(s.ratio for s in chosen):
            parts += [
                f"*{phase.capitalize()}, torch's best time / ours* (95% interval)",
                _ratios(chosen),
                _verdict(chosen),
            ]
        if any(s.timed for s in chosen):
            parts += [f"*{phase.capitalize()}, us per time step* (percentage of the floor reached)", _times(chosen)]
    memory = [s for s in section.standings if s.phase == "training"]
    if any(s.memory for s in memory):
        parts += ["*Training, torch's peak memory / ours*", _table(memory, _memory, lambda s: s.memory)]
    parts += [_peers(section), *(f"![{_title(path)}]({path})" for path in figures)]
    return "\n\n".join(part for part in parts if part)


def short(section: Section, figures: Sequence[str]) -> str:
    """The ratios of a group on one machine, with their geometric means, losses in words, and the first figure."""
    parts = []
    for phase in PHASES:
        chosen = [s for s in section.standings if s.phase == phase]
        if any(s.ratio for s in chosen):
            parts += [
                f"*{phase.capitalize()}, torch's best time / ours* (95% interval)",
                _ratios(chosen),
                _verdict(chosen),
            ]
    means = [
        f"{cell.upper()} {shown(mean)}"
        for cell in CELL_NAMES
        if (mean := geometric_mean(s.memory for s in section.standings if s.cell == cell and s.memory)) is not None
    ]
    if means:
        parts.append(f"torch's peak memory / ours, geometric means: {', '.join(means)}.")
    parts += [f"![{_title(path)}]({path})" for path in figures[:1]]
    parts.append(f"{section.machine}. {_provenance(section)}")
    return "\n\n".join(parts)


def _table(
    chosen: Sequence[Standing], text: Callable[[Standing], str], mean: Callable[[Standing], float | None]
) -> str:
    """Rows are shapes, columns cells; the last row holds geometric means of `mean`, where there are any."""
    rows = list(dict.fromkeys(s.row for s in chosen))
    columns = [cell for cell in CELL_NAMES if any(s.cell == cell for s in chosen)]
    places = {(s.row, s.cell): text(s) for s in chosen}
    lines = ["| T, N, I, H | " + " | ".join(map(str.upper, columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        lines.append(_line(row.label(rows), [places.get((row, cell), "") for cell in columns]))
    means = [geometric_mean(value for s in chosen if s.cell == cell and (value := mean(s))) for cell in columns]
    if any(means):
        lines.append(_line("geometric mean", [shown(value) if value else "" for value in means]))
    return "\n".join(lines)


def _line(label: str, entries: Iterable[str]) -> str:
    return f"| {label} | " + " | ".join(entries) + " |"


def _ratios(chosen: Sequence[Standing]) -> str:
    def text(s: Standing) -> str:
        if not s.ratio:
            return "ours not measured" if not s.ours else "torch not measured"
        median, low, high = map(shown, s.ratio)
        return " ".join([f"{median} ({low}–{high})", *s.flags])

    return _table(chosen, text, lambda s: s.ratio and s.ratio[0])


def _times(chosen: Sequence[Standing]) -> str:
    def text(s: Standing) -> str:
        record = s.ours or s.torch
        if not record:
            return "not measured"
        floor = record.get("percent_of_floor")
        whose = "" if s.ours else f"{record['implementation']} "
        return whose + _figures(record["us_per_step"]) + (f" ({floor:.0f}%)" if floor else "")

    return _table(chosen, text, lambda s: None)


def _memory(s: Standing) -> str:
    return "not measured" if s.memory is None else shown(s.memory)


def _figures(us: float) -> str:
    """Three figures, as people read them."""
    return f"{us:,.{0 if us >= 100 else 1 if us >= 10 else 2}f}"


def _verdict(chosen: Sequence[Standing]) -> str:
    """In words: where the whole interval is on one side of 1, and where it is not."""
    known = [(s, s.ratio) for s in chosen if s.ratio]
    faster = sum(low > 1 for _, (_, low, _) in known)
    slower = [f"{s.cell.upper()} {s.row.shape} ({shown(ratio[0])})" for s, ratio in known if ratio[2] < 1]
    open_ = len(known) - faster - len(slower)
    losses = f"slower in {len(slower)}: {'; '.join(slower)}" if slower else "slower in none"
    first = f"Of {len(known)} case{'s' * (len(known) != 1)} ours is faster in {faster}, "
    return f"{first}undecided in {open_} (the interval holds 1), {losses}."


def _peers(section: Section) -> str:
    """Geometric means for every other implementation, and what could not be timed, by name."""
    lines = []
    names = sorted({record["implementation"] for record in section.records})
    for name in names:
        means = []
        for phase in PHASES:
            pairs = [
                (s.timed[name], s.ours) for s in section.standings if s.phase == phase and name in s.timed and s.ours
            ]
            found = [r[0] for peer, ours in pairs if peer is not ours and (r := peer_ratio(peer, ours))]
            if found:
                means.append(f"{shown(geometric_mean(found) or 1)} over {len(found)}")
            else:
                means.append("")
        if any(means):
            lines.append(_line(name, means))
    table = ["| time / ours, geometric mean, over cases | " + " | ".join(PHASES) + " |", "|---|---|---|", *lines]
    failures = Counter((r["implementation"], str(r["failure"])) for r in section.records if r.get("failure"))
    notes = [f"{name} not timed in {count} lines: {why}." for (name, why), count in sorted(failures.items())]
    environment = section.records[-1]["environment"]
    for package, name in PEERS.items():
        useful = package != "flashrnn" or environment.get("bench device") == "cuda"
        if useful and environment.get(package, ABSENT[0]) in ABSENT:
            notes.append(f"Missing: {name} ({package} is not installed).")
    if not any(name.startswith(OURS) for name in names):
        notes.append("Ours is not among the lines: these are the peers' baselines.")
    if beyond := sum((record.get("percent_of_floor") or 0) > BEYOND for record in section.records):
        notes.append(f"{beyond} lines are beyond their floor: its peaks were measured while other processes ran.")
    flagged = Counter(flag for record in section.records for flag in record["flags"])
    notes += [f"{count} of {len(section.records)} lines are {flag}." for flag, count in sorted(flagged.items())]
    return "\n\n".join(["\n".join(table)] * bool(lines) + [" ".join(notes)] * bool(notes))


def _provenance(section: Section) -> str:
    """Date, commit, versions and the commands that give these figures."""
    dates = sorted({record["date"][:10] for record in section.records})
    commits = sorted({record["commit"] for record in section.records})
    environment = section.records[-1]["environment"]
    versions = [f"{name} {environment[name]}" for name in VERSIONS if environment.get(name) not in (None, *ABSENT)]
    threads, peaks = environment.get("threads"), environment.get("machine peaks")
    reached = ""
    if peaks:
        flops = ", ".join(f"{value / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, value in peaks["flops"].items())
        reached = f" The floor's peaks, measured: {flops}, a copy at {peaks['bandwidth'] / 1e9:,.0f} GB/s."
    return (
        f"Measured {' to '.join(dict.fromkeys([dates[0], dates[-1]]))} at commit {', '.join(commits)}"
        + (f", {threads} threads" if threads else "")
        + f"; {', '.join(versions)}. `python -m bench run --group {section.group}`, "
        + f"then `python -m bench report`.{reached}"
    )


def _title(path: str) -> str:
    return path.rsplit("/", 1)[-1].removesuffix(".png").replace("-", " ")
