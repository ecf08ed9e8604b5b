"""Who stands where: the records of a results file arranged as tables and figures want them, and nothing measured anew.

A cell of a table is one case and phase.  Ours is the implementation that peers' ratios name, which is what users get
without asking; the torch beside it is the fastest that was measured there, so that a choice of ours cannot flatter us.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from bench import cases, results, statistics
from bench.results import Record

OURS, TORCH = "gpurnn", "torch"
CELL_NAMES = ("rnn", "gru", "lstm")
PHASES = ("training", "inference")
PREFERRED = ("gpurnn-persistent", "gpurnn-resident", "gpurnn-step", "gpurnn-compiled", "gpurnn-numpy")


class Row(NamedTuple):
    """What a table's row holds apart from the cell."""

    part: str
    dtype: str
    lengths: str
    heads: int
    T: int
    N: int
    I: int
    H: int

    @property
    def shape(self) -> str:
        return f"{self.T}, {self.N}, {self.I}, {self.H}"

    def label(self, rows: Iterable["Row"]) -> str:
        """The shape, and what else the rows differ in."""
        rows = list(rows)
        extra = [
            f"{name} {value}" if name == "heads" else str(value)
            for name, value in zip(self._fields[:4], self[:4], strict=True)
            if len({getattr(row, name) for row in rows}) > 1
        ]
        return " ".join([self.shape, *extra])


class Standing(NamedTuple):
    """One case and phase: ours, the fastest torch, all that were timed; torch's time / ours: (median, low, high)."""

    row: Row
    cell: str
    phase: str
    ours: Record | None
    torch: Record | None
    timed: dict[str, Record]
    ratio: tuple[float, float, float] | None

    @property
    def flags(self) -> list[str]:
        """Of ours and torch: noisy, throttled, and what else the harness says of a line."""
        return sorted({flag for record in (self.ours, self.torch) if record for flag in record["flags"]})

    @property
    def floor(self) -> float | None:
        """us per time step that nothing can beat, by the stated model."""
        return next((line["floor_us_per_step"] for line in self.timed.values() if line.get("floor_us_per_step")), None)

    @property
    def memory(self) -> float | None:
        """torch's peak / ours."""
        peaks = [record.get("peak_bytes") if record else None for record in (self.torch, self.ours)]
        return peaks[0] / peaks[1] if peaks[0] and peaks[1] else None


class Section(NamedTuple):
    """A group on one machine."""

    group: str
    machine: str
    records: list[Record]
    standings: list[Standing]
    name: str  # of its figures: the group's, and the machine's too where there are several


def machine(record: Record) -> str:
    """The device that a record was measured on."""
    environment = record["environment"]
    if environment.get("bench device") == "cuda":
        return environment.get("bench gpu", "an unknown GPU")
    return environment.get("cpu", "an unknown CPU")


def sections(records: Iterable[Record]) -> dict[str, list[Section]]:
    """Group -> one section for each machine that measured it, none where nobody did; in the order of the table."""
    found: dict[str, dict[str, list[Record]]] = {group: {} for group in cases.GROUPS}
    for record in records:
        found.setdefault(record["group"], {}).setdefault(machine(record), []).append(record)
    return {
        group: [_section(group, *item, len(machines)) for item in machines.items()] for group, machines in found.items()
    }


def standings(records: Sequence[Record]) -> list[Standing]:
    """One for each case, part and phase, rows in order of shape."""
    places: dict[tuple[Row, str, str], dict[str, Record]] = {}
    for record in records:
        row = Row(record["part"], record["dtype"], record.get("lengths") or "full", record["heads"], *_shape(record))
        timed = places.setdefault((row, record["cell"], record["phase"]), {})
        if record.get("failure") is None:
            timed[record["implementation"]] = record
    order = sorted(places, key=lambda place: (_size(place[0]), CELL_NAMES.index(place[1]), PHASES.index(place[2])))
    return [_standing(*place, places[place]) for place in order]


def geometric_mean(values: Iterable[float]) -> float | None:
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def peer_ratio(peer: Record, ours: Record) -> tuple[float, float, float] | None:
    """The peer's time / ours, as recorded, or from the pairs of samples; None where neither is there."""
    given = peer.get("ratio")
    if given and given["to"] == ours["implementation"]:
        return given["median"], given["low"], given["high"]
    if len(peer["samples_s"]) == len(ours["samples_s"]):
        return statistics.ratio(ours["samples_s"], peer["samples_s"])
    return None


def _section(group: str, name: str, records: list[Record], machines: int) -> Section:
    latest = results.latest(records)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Section(group, name, latest, standings(latest), group if machines == 1 else f"{group}-{slug}")


def _standing(row: Row, cell: str, phase: str, timed: dict[str, Record]) -> Standing:
    named = [record["ratio"]["to"] for record in timed.values() if record.get("ratio")]
    ours = next((timed[name] for name in (*named, *PREFERRED) if name in timed), None)
    torches = [record for name, record in timed.items() if name.startswith(TORCH)]
    torch = min(torches, key=lambda record: record["median_s"], default=None)
    ratio = peer_ratio(torch, ours) if torch and ours else None
    return Standing(row, cell, phase, ours, torch, timed, ratio)


def _shape(record: Record) -> tuple[int, int, int, int]:
    return record["T"], record["N"], record["I"], record["H"]


def _size(row: Row) -> tuple:
    """Rows of a kind stand together, the small layers first."""
    return row[:4], row.H, row.N, row.T, row.I
