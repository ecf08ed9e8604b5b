"""`python -m bench run`: measures the cases asked for, most important first, and appends their lines to a file.

A case and phase whose implementations all have a line in the file are skipped, so a run that was stopped, or that ran
out of its budget, goes on where it was.  Each case stands alone: what fails in it is a line with the message.
"""

import argparse
import datetime
import fnmatch
import math
import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from bench import cases, floors, harness, memory, results
from bench.cases import Case
from bench.peers import OURS, Implementation, cuda_device, implementations, why_no_torch_cuda
from bench.results import Record
from bench.telemetry import Telemetry
from gpurnn import environment
from gpurnn.backend import one_line

RESULTS = Path(__file__).parent / "results"
QUICK = harness.Settings(rounds=7, target_s=0.03, warm_s=0.05, limit_s=4.0, retries=1)
QUICK_BUDGET = 35.0  # s
ON_CPU = harness.Settings()
ON_CUDA = harness.Settings(rounds=7, target_s=0.03, warm_s=0.005, limit_s=15.0)
BROKEN = 3  # exit status where the device stopped working; the same command goes on behind the case


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--group", action="append", choices=list(cases.GROUPS), help="only this group; may be given again")
    add("--case", metavar="PATTERN", help="only cases of such names, * and ? as in a shell")
    add("--rank", type=int, metavar="N", help="only cases up to that rank: 0 holds those that matter most, 2 is all")
    add("--only", action="append", metavar="NAME", help="only such implementations, also those left out by default")
    add("--peers-only", action="store_true", help="leave gpurnn out, to record baselines")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: cuda where there is a GPU")
    add("--budget", type=float, metavar="SECONDS", help="start no case after that time (--quick: 35)")
    add("--rounds", type=int, metavar="N", help="samples of each implementation")
    add("--quick", action="store_true", help="a few small cases in under a minute; kept only with --out")
    add("--memory", action="store_true", help="peak memory too (CPU: a fresh process for each line; takes minutes)")
    add("--energy", type=float, default=0.0, metavar="SECONDS", help="GPU: a burst so long for joules per token")
    add("--out", type=Path, metavar="FILE", help="default: bench/results/<device>-<date>.jsonl")


class Plan(NamedTuple):
    """What a run is about to do."""

    device: str
    pairs: list[tuple[Case, str]]
    present: list[Implementation]
    settings: harness.Settings
    path: Path | None
    known: set[results.Key]


def main(options: argparse.Namespace) -> int:
    """Runs; 0 where all is well, 1 where a line failed, 3 where the device broke.  ValueError for senseless options."""
    plan = _plan(options)
    kept = f"results in {plan.path}" if plan.path else "results are not kept (--out FILE keeps them)"
    print(f"{len(plan.pairs)} cases and phases on {_device_name(plan.device)}; {kept}")
    machine = floors.measure(plan.device, sorted({case.dtype for case, _ in plan.pairs}), quick=options.quick)
    products = ", ".join(f"{dtype} {flops / 1e9:.0f} GFLOP/s" for dtype, flops in machine.flops.items())
    print(f"peaks, for the floors: {products}; copy {machine.bandwidth / 1e9:.0f} GB/s")
    stamp = _stamp(plan.device, machine)
    if plan.device == "cpu":
        return _measure(plan, options, machine, stamp, None)
    with Telemetry(_gpu_uuid()) as telemetry:
        if telemetry.reason:
            print(telemetry.reason)
        return _measure(plan, options, machine, stamp, telemetry)


def _measure(
    plan: Plan, options: argparse.Namespace, machine: floors.Machine, stamp: Record, telemetry: Telemetry | None
) -> int:
    start, measured, failures = time.monotonic(), 0, 0
    budget = options.budget or (QUICK_BUDGET if options.quick else math.inf)
    for place, (case, phase) in enumerate(plan.pairs, 1):
        if time.monotonic() - start > budget:
            print(f"the budget of {budget:g} s is spent, {len(plan.pairs) - place + 1} cases and phases are left")
            break
        runners = _runners(plan, case, phase, options.only)
        if not runners:
            continue
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        records = harness.run(case, phase, runners, plan.settings, machine, stamp | {"date": now}, telemetry)
        if options.memory and plan.device == "cpu":
            _add_memory(records, case, phase)
        for record in records:
            if plan.path is not None:
                results.append(plan.path, record)
        measured += 1
        failures += sum(record.get("failure") is not None for record in records)
        print(f"[{place}/{len(plan.pairs)}] {line(records)}", flush=True)
        if plan.device == "cuda" and (why := _broken()):
            print(f"the device stopped working ({why}); the same command goes on behind this case")
            return BROKEN
    failed = f", {failures} lines failed" if failures else ""
    print(f"{measured} measured in {time.monotonic() - start:.0f} s{failed}")
    return 1 if failures else 0


def line(records: Sequence[Record]) -> str:
    """Progress: case and phase; ours; the best peer, its time over ours; percent of the floor; what failed."""
    timed = [record for record in records if record.get("failure") is None]
    peers = [record for record in timed if not record["implementation"].startswith(OURS)]
    parts = [f"{records[0]['case']} {records[0]['phase']}"]
    ours = next((record for record in timed if record["implementation"].startswith(OURS)), None)
    if ours is not None:
        parts.append(_time(ours))
        peers = [record for record in peers if record["part"] == ours["part"]]
    if peers:
        best = min(peers, key=lambda record: record["median_s"])
        parts.append(_time(best))
        if "ratio" in best:
            parts.append("{median:.2f}x [{low:.2f}, {high:.2f}]".format(**best["ratio"]))
    if shown := ours or (best if peers else None):
        parts.append(f"{shown['percent_of_floor']:.0f}% of the floor")
    flags = sorted({flag for record in timed for flag in record["flags"]})
    parts += [", ".join(flags)] if flags else []
    parts += [f"{r['implementation']} FAILED: {r['failure']}" for r in records if r.get("failure") is not None]
    return " | ".join(parts)


def _time(record: Record) -> str:
    return f"{record['implementation']} {1e3 * record['median_s']:.4g} ms"


def _plan(options: argparse.Namespace) -> Plan:
    """Raises ValueError for options that make no sense, or where nothing can run."""
    device = options.device
    if device == "auto":
        device = "cuda" if cuda_device() else "cpu"
    if device == "cuda" and (reason := why_no_torch_cuda()):
        raise ValueError(f"the GPU's peaks and kernels are measured with PyTorch, but {reason}")
    settings = QUICK if options.quick else ON_CUDA if device == "cuda" else ON_CPU
    if options.rounds is not None:
        if options.rounds < 1:
            raise ValueError(f"--rounds: expected a number from 1, got {options.rounds}")
        settings = replace(settings, rounds=options.rounds)
    chosen = cases.select(options.group, options.case, device, options.quick, options.rank)
    path = options.out or (None if options.quick else _default_path(device))
    known = {results.key(record) for record in results.read(path)} if path is not None and path.exists() else set()
    return Plan(
        device,
        [(case, phase) for case in chosen for phase in case.phases],
        _present(options, device),
        replace(settings, energy_s=options.energy),
        path,
        known,
    )


def _present(options: argparse.Namespace, device: str) -> list[Implementation]:
    """The implementations asked for that can be had; the others are named, once, with the reason."""
    present = []
    for implementation in implementations(device):
        asked = any(fnmatch.fnmatchcase(implementation.name, name) for name in options.only or ())
        if not (asked if options.only else implementation.default) or (implementation.ours and options.peers_only):
            continue
        if reason := implementation.missing():
            print(f"missing: {implementation.name}: {reason}")
        else:
            present.append(implementation)
    if not present:
        names = ", ".join(implementation.name for implementation in implementations(device))
        raise ValueError(f"none of the implementations asked for can be had on {device}; the table has {names}")
    return present


def _runners(plan: Plan, case: Case, phase: str, only: Sequence[str] | None) -> list[Implementation]:
    """Those that take part in a case and phase; none where each of them has its lines already."""
    part = "model" if case.group == "train" else "layer"
    runners = [
        implementation
        for implementation in plan.present
        if (only or not implementation.headline or case.rank == 0) and not implementation.refuses(case, phase, part)
    ]
    if all((case.name, phase, part, implementation.name) in plan.known for implementation in runners):
        return []
    return runners  # all of them again: ratios are of samples that were taken in turn


def _add_memory(records: Sequence[Record], case: Case, phase: str) -> None:
    for record in records:
        if record.get("failure") is None and record["part"] != "recurrence":
            try:
                record["peak_bytes"] = memory.peak_bytes(case, phase, record["implementation"])
            except RuntimeError as error:
                print(f"no peak memory of {record['implementation']}: {error}")


def _stamp(device: str, machine: floors.Machine) -> Record:
    """What all lines of a run share."""
    described: Record = dict(environment.describe())
    for package in ("torch", "jax", "flashrnn", "triton"):
        try:
            described[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            described[package] = environment.NOT_INSTALLED
    if device == "cuda":
        described |= _cuda_settings()
    described["bench device"] = device
    described["machine peaks"] = machine._asdict()
    return {"run": uuid.uuid4().hex[:12], "commit": results.commit(), "environment": described}


def _cuda_settings() -> Record:
    """Read, never set; TF32 follows the case's dtype and cudnn.benchmark is off, see peers/torch_nn.py."""
    import torch

    versions = {"torch's cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return versions | {"bench gpu": torch.cuda.get_device_name(), "tf32": "by dtype", "cudnn.benchmark": "off"}


def _default_path(device: str) -> Path:
    today = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
    slug = re.sub(r"[^a-z0-9]+", "-", _device_name(device).lower()).strip("-")
    return RESULTS / f"{slug}-{today}.jsonl"


def _device_name(device: str) -> str:
    return (cuda_device() or "cuda") if device == "cuda" else environment.describe()["cpu"]


def _gpu_uuid() -> str | None:
    import torch

    return str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)


def _broken() -> str | None:
    """After an illegal access every later call on a device fails in the same way: why, or None where it works."""
    import torch

    try:
        torch.ones(2, device="cuda").sum().item()
    except RuntimeError as error:
        return one_line(error)
    return None
