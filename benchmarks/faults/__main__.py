"""Run the fault table, or parts of it.

    python -m benchmarks.faults [--only kill,resume] [--scale 1.0] [--seed 0] [--json FILE]

prints a line for every row: trials that came out as they should, of those that were done, and of those asked for. Parts
that need mounts need root.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib
import json
import logging
import os
import pathlib
import platform
import tempfile
from importlib.metadata import version
from typing import Any

import jax

from benchmarks.faults.trials import Bench, Row


GROUPS = (
    "control resume damage kill signals disk mismatch callbacks nonfinite hooks exits soak".split()
)  # in the order of importance
PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")
RESULTS = pathlib.Path(__file__).parents[1] / "results" / "faults.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of rows, separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="what part of the trials to do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", default=str(RESULTS), help="the file of results; groups not run stay as they were")
    options = parser.parse_args()
    chosen = options.only.split(",")
    if set(chosen) - set(GROUPS):
        parser.error(f"the groups are {', '.join(GROUPS)}")
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("ant_jax").setLevel(logging.ERROR)
    root = pathlib.Path(tempfile.mkdtemp(prefix="faults-"))
    print(f"directories of trials that fail are kept in {root}")
    bench = Bench(options.scale, options.seed, root)
    for group in chosen:
        rows: list[Row] = []
        for row in importlib.import_module(f"benchmarks.faults.{group}").rows(bench):
            print(row, flush=True)
            rows.append(row)
            write(pathlib.Path(options.json), group, rows, options)
    with contextlib.suppress(OSError):  # what failed is kept
        root.rmdir()


def write(path: pathlib.Path, group: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Put the rows of a group into the file of results, in place of those of an earlier run."""
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results[group] = {
        "date": datetime.date.today().isoformat(),
        "seed": options.seed,
        "scale": options.scale,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({name: results[name] for name in GROUPS if name in results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
