"""Compare trainers: each in a process of its own, taking turns, doing the same arithmetic, on the CPU.

    python -m benchmarks.compare [--workloads tiny digits ...] [--peers ant torch ...] [--rounds 7] [--size 1.0]
                                 [--json benchmarks/results/compare-cpu.json]

prints the microseconds that a step takes, and the ratios that are to be kept, by the median of the rounds; with
``--json`` it also writes them to that file, and as Markdown and a plot beside it. Peers that are not installed, or
fail, are left out, with a line. ``pip install -e ".[bench]"`` installs all; torch.compile needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
from typing import Any

from tqdm import tqdm

from benchmarks._common import machine
from benchmarks.compare.peers import PEERS
from benchmarks.compare.processes import installed, measured
from benchmarks.compare.report import markdown, plot
from benchmarks.compare.workloads import WORKLOADS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--peers", nargs="+", choices=PEERS, help="of those that a workload has; by default all")
    parser.add_argument("--rounds", type=int, default=7, help="timed runs of each peer")
    parser.add_argument("--size", type=float, default=1.0, help="scales the steps of an epoch")
    parser.add_argument("--json", type=pathlib.Path, help="the file of results; workloads not run stay as they were")
    options = parser.parse_args()
    if options.json and options.peers:
        parser.error("a workload in a file of results has all its peers: give --json or --peers")
    if options.json and not (options.json.parent.is_dir() and importlib.util.find_spec("matplotlib")):
        parser.error(f"{options.json.parent} must be a directory, and matplotlib installed, to write results there")
    where = machine("torch", "lightning", "keras", "grain", "numpy")
    there = [name for name in options.peers or PEERS if installed(PEERS[name])]
    for name in set(options.peers or PEERS) - set(there):
        print(f"{name} is left out: {PEERS[name].distribution} is not installed")
    chosen = {name: [peer for peer in WORKLOADS[name].peers if peer in there] for name in options.workloads}
    chosen = {name: peers for name, peers in chosen.items() if peers}
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
