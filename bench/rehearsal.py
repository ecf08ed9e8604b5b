"""`python -m bench.rehearsal FILE`: the harness without a GPU, on a case that is as small as can be.

Ours runs on the tests' stand-in for CuPy, its kernels in the interpreter of PTX.  What comes of it shows that the
harness works: each line is flagged, and its times are the interpreter's.
"""

import datetime
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

from bench import harness, model, results
from bench.cases import Case
from bench.peers import implementations

CASE = Case("gaps", "rnn", 2, 2, 2, 5)
SETTINGS = harness.Settings(rounds=1, target_s=0.0, warm_s=0.0, retries=0)
FLAG = "stand-in"


def main(path: Path) -> int:
    from tests import fake_cupy
    from tests.interpreted import interpreted

    machine, pool, failures = model.GPUS["h200"].machine, SimpleNamespace(free_all_blocks=lambda: None), 0
    ours = [implementation for implementation in implementations("cuda") if implementation.name == "gpurnn-step"]
    stamp = {"run": FLAG, "commit": results.commit(), "environment": {"machine peaks": machine._asdict()}}
    stamp["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    with interpreted(), patch.object(fake_cupy, "get_default_memory_pool", lambda: pool, create=True):
        for phase in CASE.phases:
            for record in harness.run(CASE, phase, ours, SETTINGS, machine, stamp):
                record["flags"].append(FLAG)
                results.append(path, record)
                failures += record.get("failure") is not None
                outcome = record.get("failure") or f"right, off by {record['error']:.0e} at most"
                print(f"{record['case']} {phase}: {outcome}; {FLAG}, not measured", flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
