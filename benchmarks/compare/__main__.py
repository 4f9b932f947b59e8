"""Compare trainers: each in a process of its own, taking turns, doing the same arithmetic.

    python -m benchmarks.compare [--workloads tiny digits ...] [--peers ant torch ...] [--rounds 5] [--size 1.0]
                                 [--json FILE]

prints a table of the microseconds that a step takes, and writes it as JSON, Markdown and a plot beside ``--json``.
Peers that are not installed are left out, with a line. ``pip install -e ".[bench]"`` installs all.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from tqdm import tqdm

from benchmarks._common import machine
from benchmarks.compare.peers import PEERS
from benchmarks.compare.processes import installed, measured
from benchmarks.compare.report import markdown, plot, versions
from benchmarks.compare.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), help="of those that a workload has")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each peer")
    parser.add_argument("--size", type=float, default=1.0, help="scales the steps of an epoch")
    parser.add_argument("--json", type=pathlib.Path, help="the file of results; what is not run stays as it was")
    options = parser.parse_args()
    where = machine() | versions()
    there = [name for name in options.peers if installed(PEERS[name])]
    for name in set(options.peers) - set(there):
        print(f"{name} is left out: {PEERS[name].distribution} is not installed")
    chosen = {name: [peer for peer in WORKLOADS[name].peers if peer in there] for name in options.workloads}
    with tqdm(total=sum(map(len, chosen.values())) * (options.rounds + 2)) as bar:

        def tell(what: str) -> None:
            bar.set_description_str(what)
            bar.update()

        for name, peers in chosen.items():
            workload = WORKLOADS[name]
            workload = workload.of_steps(max(4, round(options.size * workload.steps)))
            found = {"steps": workload.steps, "peers": measured(workload, peers, options.rounds, tell)}
            bar.write(markdown({name: found}))
            if options.json:
                write(options.json, where, name, found)


def write(path: pathlib.Path, where: dict[str, Any], name: str, found: dict[str, Any]) -> None:
    """Put what was found for a workload in its place in the file of results, and draw all anew."""
    workloads = json.loads(path.read_text())["workloads"] if path.exists() else {}
    workloads[name] = found | {"measured": where}
    workloads = {name: workloads[name] for name in WORKLOADS if name in workloads}
    path.write_text(json.dumps({"workloads": workloads}, indent=2) + "\n")
    path.with_suffix(".md").write_text(markdown(workloads) + "\n")
    plot(workloads, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
