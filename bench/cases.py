"""The table of cases: which shapes are measured, and in what order.

A case is one recurrent layer (group `train`: one whole character model) at one shape and precision.  Its name says all
of it, so that names can be compared across machines and versions.  `rank` 0 holds what a claim would rest on, 2 what
completes a picture; a run with a budget takes the ranks in turn.
"""

import fnmatch
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
STATES = {"rnn": ("h_0",), "gru": ("h_0",), "lstm": ("h_0", "c_0")}
DTYPES = ("float32", "tf32", "float16", "bfloat16")  # tf32: float32 in memory, matrix products in TF32
LONGEST_ON_CPU = 10_000  # by default; the longer ones ask for cuDNN's limit of 65,535 steps
SYMBOLS = 200  # the alphabet of group `train`


@dataclass(frozen=True)
class Case:
    """T steps, N batch rows, I inputs, H hidden units in `heads` blocks: heads > 1 is a block-diagonal weight_hh.

    cell     rnn (tanh), gru (reset after the product), lstm.
    lengths  None: every row has T steps; "uniform": drawn from 0.1 T to T, in no order.
    In group `train` I is the size of the embedding.
    """

    group: str
    cell: str
    T: int
    N: int
    I: int
    H: int
    dtype: str = "float32"
    lengths: str | None = None
    heads: int = 1
    rank: int = field(default=1, compare=False)

    @property
    def name(self) -> str:
        shape = f"T{self.T}-N{self.N}-I{self.I}-H{self.H}-{self.dtype}"
        ragged = f"-{self.lengths}" if self.lengths else ""
        heads = f"-heads{self.heads}" if self.heads > 1 else ""
        return f"{self.group}/{self.cell}/{shape}{ragged}{heads}"

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    @property
    def phases(self) -> tuple[str, ...]:
        return ("training",) if self.group == "train" else ("training", "inference")


def _cpu() -> Iterable[Case]:
    shapes = {
        (128, 16, 64, 128): 0, (100, 32, 128, 256): 0, (50, 64, 512, 512): 0, (64, 1, 32, 32): 0,
        (1000, 8, 64, 64): 1, (35, 20, 650, 650): 1, (5000, 1, 1, 64): 1, (50, 64, 1024, 1024): 1,
    }  # fmt: skip
    for (shape, rank), cell in itertools.product(shapes.items(), ("lstm", "gru", "rnn")):
        yield Case("cpu", cell, *shape, rank=rank)


def _train() -> Iterable[Case]:
    for cell in ("lstm", "gru", "rnn"):
        yield Case("train", cell, 64, 16, 64, 256, rank=0)  # what `gpurnn train` does by default
        yield Case("train", cell, 128, 64, 256, 512, rank=1)


def _latency() -> Iterable[Case]:
    for dtype, N, H, cell in itertools.product(("float32", "float16"), (1, 8, 64), (64, 128, 256), GATES):
        corner = N != 8 and H != 128 and dtype == "float32"
        yield Case("latency", cell, 1024, N, H, H, dtype, rank=0 if corner and cell != "gru" else 1)


def _flashrnn() -> Iterable[Case]:
    for heads in (1, 12, 48, 2, 3, 6, 24):
        yield Case("flashrnn", "lstm", 1024, 16, 768, 768, "bfloat16", heads=heads, rank=0 if heads in (1, 12) else 1)
    for N, heads in itertools.product((2, 4, 8, 32, 64, 128, 256), (1, 12)):
        yield Case("flashrnn", "lstm", 1024, N, 768, 768, "bfloat16", heads=heads, rank=1 if N in (2, 256) else 2)
    for T, heads in itertools.product((256, 512, 2048), (1, 12)):
        yield Case("flashrnn", "lstm", T, 16, 768, 768, "bfloat16", heads=heads, rank=2)


def _persistent() -> Iterable[Case]:
    for cell, H, N in itertools.product(("lstm", "rnn"), (512, 768, 1024), (16, 64, 128)):
        yield Case("persistent", cell, 512, N, H, H, "float16", rank=0 if H == 1024 and N == 64 else 1)
    yield Case("persistent", "lstm", 1024, 16, 768, 768, "float16", rank=0)


def _gaps() -> Iterable[Case]:
    """The shapes of `persistent` and their neighbours, where cuDNN has no persistent kernel."""
    for dtype, cell, H, N in itertools.product(DTYPES, ("lstm", "gru", "rnn"), (512, 768, 1024), (16, 64, 128)):
        if dtype == "float16" and cell != "gru":
            continue
        headline = H == 1024 and N == 64 and dtype in ("bfloat16", "float32")
        yield Case("gaps", cell, 512, N, H, H, dtype, rank=0 if headline else 1 if N == 16 else 2)
    for cell, (H, N) in itertools.product(("lstm", "gru"), ((200, 20), (320, 12), (650, 20), (1000, 12))):
        yield Case("gaps", cell, 512, N, H, H, "float16", rank=1)
        yield Case("gaps", cell, 512, N, H, H, "bfloat16", rank=2)


def _lengths() -> Iterable[Case]:
    """Each uneven batch stands beside the padded one."""
    for dtype, cell, lengths in itertools.product(("float32", "bfloat16"), ("lstm", "gru"), ("uniform", None)):
        yield Case("lengths", cell, 1000, 32, 256, 256, dtype, lengths, rank=0 if cell == "lstm" else 1)
    for lengths in ("uniform", None):
        yield Case("lengths", "lstm", 70_000, 4, 64, 64, "float32", lengths, rank=1)
        yield Case("lengths", "lstm", 1000, 64, 1024, 1024, "bfloat16", lengths, rank=2)


def _deepbench() -> Iterable[Case]:
    """Baidu's DeepBench, training set: recurrent sizes of real speech and language models of 2016-2017; I = H."""
    for H, N in itertools.product((1760, 2048, 2560), (16, 32, 64, 128)):
        yield Case("deepbench", "rnn", 50, N, H, H, "float16", rank=1 if N == 32 else 2)
    for H, N in itertools.product((512, 1024, 2048), (16, 32, 64, 128)):
        yield Case("deepbench", "lstm", 25, N, H, H, "float16", rank=1 if N == 32 else 2)
    for H, T in ((1024, 1500), (2816, 187), (1536, 375), (2048, 375), (2560, 375), (2816, 750), (1536, 1500)):
        yield Case("deepbench", "gru", T, 32, H, H, "float16", rank=1 if H in (1024, 2816) and T != 750 else 2)


GROUPS = {
    "cpu": tuple(_cpu()),
    "train": tuple(_train()),
    "latency": tuple(_latency()),
    "flashrnn": tuple(_flashrnn()),
    "persistent": tuple(_persistent()),
    "gaps": tuple(_gaps()),
    "lengths": tuple(_lengths()),
    "deepbench": tuple(_deepbench()),
}
ON_CPU = ("cpu", "train", "latency", "lengths")  # measured where nothing else is asked for
ON_CUDA = ("persistent", "gaps", "flashrnn", "latency", "lengths", "train", "deepbench")

QUICK = (
    Case("cpu", "lstm", 64, 1, 32, 32, rank=0),
    Case("cpu", "gru", 64, 1, 32, 32, rank=0),
    Case("cpu", "rnn", 128, 16, 64, 128, rank=0),
    Case("cpu", "lstm", 128, 16, 64, 128, rank=0),
    replace(GROUPS["train"][0], rank=0),
)


def select(
    groups: Sequence[str] | None, pattern: str | None, device: str, quick: bool = False, rank: int | None = None
) -> list[Case]:
    """The cases asked for, the most important first: rank by rank, the groups of a rank in turn.

    groups: names, or None for all that suit the device.  pattern: of whole names, as in a shell.  rank: the last one.
    Raises ValueError for a group that does not exist, and where nothing is left.
    """
    for group in groups or ():
        if group not in GROUPS:
            raise ValueError(f"group: expected one of {', '.join(GROUPS)}, got {group!r}")
    if quick:
        chosen = [case for case in QUICK if not groups or case.group in groups]
    else:
        chosen = [case for group in groups or (ON_CUDA if device == "cuda" else ON_CPU) for case in GROUPS[group]]
        if device == "cpu" and not pattern:
            chosen = [case for case in chosen if case.dtype == "float32" and case.T <= LONGEST_ON_CPU]
    found = [case for case in chosen if fnmatch.fnmatchcase(case.name, pattern or "*")]
    found = [case for case in found if rank is None or case.rank <= rank]
    if not found:
        ranked = "" if rank is None else f" up to rank {rank}"
        raise ValueError(
            f"no case{ranked} of {', '.join(groups or ['the default groups'])} matches {pattern or '*'!r} here"
        )
    return _in_turn(found)


def find(name: str) -> Case:
    """The case of that name.  Raises ValueError where there is none, with what comes near."""
    every = {case.name: case for group in GROUPS.values() for case in group}
    if name not in every:
        near = [other for other in every if fnmatch.fnmatchcase(other, f"*{name}*")][:5]
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"case: expected a name such as {next(iter(every))}, got {name!r}{hint}")
    return every[name]


def _in_turn(chosen: Iterable[Case]) -> list[Case]:
    """By rank; within a rank the first of every group, then the second of every group, and so on."""
    places: dict[tuple[int, str], int] = {}
    keyed = []
    for case in chosen:
        place = places[case.rank, case.group] = places.get((case.rank, case.group), -1) + 1
        keyed.append(((case.rank, place), case))
    return [case for _, case in sorted(keyed, key=lambda pair: pair[0])]
