"""How long it takes from an empty process to the end of the first steps: import, trace, compile; on the CPU.

    python -m benchmarks.compare.first_step [--rounds 5] [--json benchmarks/results/first-step-cpu.json]

Each peer starts in a new process and trains one epoch of four steps of a 64-64-10 MLP; those that compile do so with
empty caches, and those on JAX also with a compilation cache that an earlier process has filled. The seconds until the
packages are imported stand beside the seconds in all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from tqdm import tqdm

from benchmarks._common import machine, write
from benchmarks.compare.peers import PEERS
from benchmarks.compare.processes import installed


WORKLOAD, STEPS = "streaming", 4  # whose data are made of noise, so that nothing else is imported
ON_JAX = ("ant", "step", "fused", "keras")
OTHERS = ("torch", "torch-compile", "lightning")
CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
CHILD = """
import sys, time, importlib
from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import WORKLOADS
peer, workload = PEERS[sys.argv[1]], WORKLOADS[sys.argv[2]]
importlib.import_module("benchmarks.compare." + peer.made_by.split(":")[0])
imported = time.time()
peer.make(workload.of_steps(int(sys.argv[3])))(1)
print("took", imported, time.time())
"""


def started(name: str, cache: str | None) -> tuple[float, float]:
    """Seconds from the start of a process until it has imported, and until it has trained."""
    with tempfile.TemporaryDirectory() as empty:
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TORCHINDUCTOR_CACHE_DIR": empty, **CACHE}
        environment["JAX_COMPILATION_CACHE_DIR"] = cache or empty
        began = time.time()
        child = subprocess.run(
            [sys.executable, "-c", CHILD, name, WORKLOAD, str(STEPS)], env=environment, capture_output=True, text=True
        )
    if child.returncode:
        raise RuntimeError(f"{name} has failed:\n{child.stderr[-3000:]}")
    imported, trained = map(float, child.stdout.rpartition("took")[2].split())
    return imported - began, trained - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="also write the results to this file")
    options = parser.parse_args()
    where = machine("torch", "lightning", "keras")
    names = [name for name in (*ON_JAX, *OTHERS) if installed(PEERS[name])]
    ways = [(name, cached) for name in names for cached in ((False, True) if name in ON_JAX else (False,))]
    times: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as cache:
        for name in set(names) & set(ON_JAX):
            started(name, cache)  # fills it
        for name, cached in tqdm(ways * options.rounds):
            times.setdefault((name, cached), []).append(started(name, cache if cached else None))
    rows: list[dict[str, Any]] = []
    for (name, cached), pairs in times.items():
        imported, trained = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append({"label": PEERS[name].label, "cached": cached, "import_s": round(imported, 2),
                     "first_steps_s": round(trained, 2)})  # fmt: skip
    print(table(rows))
    write(options.json, where | {"rows": rows})


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| peer | JAX's compilation cache | imported after, s | first steps after, s |", "|---|---|---|---|"]
    for row in rows:
        cached = "filled" if row["cached"] else ""
        lines.append(f"| {row['label']} | {cached} | {row['import_s']} | {row['first_steps_s']} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
