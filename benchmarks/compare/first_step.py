"""How long it takes from an empty process to the end of the first steps: import, trace, compile.

    python -m benchmarks.compare.first_step [--workload digits] [--peers ant torch ...] [--rounds 3] [--json FILE]

Each peer starts in a new process and trains one epoch of four steps; those on JAX also with a persistent compilation
cache that an earlier process has filled. The seconds until the packages are imported stand beside the seconds in all.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tqdm import tqdm

from benchmarks._common import machine
from benchmarks.compare.peers import PEERS
from benchmarks.compare.processes import installed
from benchmarks.compare.report import versions
from benchmarks.compare.workloads import WORKLOADS


STEPS = 4
ON_JAX = ("ant", "step", "fused", "keras")
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
CHILD = """
import sys, time, importlib
from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import WORKLOADS
peer, workload = PEERS[sys.argv[1]], WORKLOADS[sys.argv[2]]
importlib.import_module("benchmarks.compare." + peer.made_by.split(":")[0])
imported = time.time()
train, _ = peer.make(workload.of_steps(int(sys.argv[3])), settled=True)
train(1)
print("took", imported, time.time())
"""


def started(name: str, workload: str, cache: str | None) -> tuple[float, float]:
    """Seconds from the start of a process until it has imported, and until it has trained."""
    environment = dict(os.environ) | ({"JAX_COMPILATION_CACHE_DIR": cache, **CACHE} if cache else {})
    began = time.time()
    child = subprocess.run(
        [sys.executable, "-c", CHILD, name, workload, str(STEPS)], env=environment, capture_output=True, text=True
    )
    if child.returncode:
        raise RuntimeError(f"{name} has failed:\n{child.stderr[-3000:]}")
    imported, trained = map(float, child.stdout.split("took")[1].split())
    return imported - began, trained - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=WORKLOADS, default="digits")
    parser.add_argument("--peers", nargs="+", choices=PEERS,
                        default=[*ON_JAX[:3], "torch", "torch-compile", "lightning", "keras"])  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    where = machine() | versions()
    names = [name for name in options.peers if installed(PEERS[name])]
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        ways = [(name, cached) for name in names for cached in ((False, True) if name in ON_JAX else (False,))]
        for name, cached in ways:
            if cached:
                started(name, options.workload, cache)  # fills it
        for name, cached in tqdm(ways * options.rounds):
            found = started(name, options.workload, cache if cached else None)
            times.setdefault((name, cached), []).append(found)
    rows: list[dict[str, Any]] = []
    for (name, cached), pairs in times.items():
        imported, trained = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"label": PEERS[name].label, "cached": cached, "import_s": round(imported, 2),
                     "first_steps_s": round(trained, 2)})  # fmt: skip
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(where | {"workload": options.workload, "rows": rows}, indent=2) + "\n")


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| peer | JAX's compilation cache | imported after, s | first steps after, s |", "|---|---|---|---|"]
    for row in rows:
        cached = "filled" if row["cached"] else ""
        lines.append(f"| {row['label']} | {cached} | {row['import_s']} | {row['first_steps_s']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
