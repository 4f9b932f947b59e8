"""Tables and plots of what was measured."""

from __future__ import annotations

import pathlib
import statistics
from typing import Any

from benchmarks.compare.peers import PEERS
from benchmarks.compare.targets import middle, quartiles, ratios, verdicts
from benchmarks.compare.workloads import TRAINERS, WORKLOADS


def markdown(workloads: dict[str, Any]) -> str:
    """The targets of all workloads, and a table for every one."""
    lines: list[str] = []
    rows = [(name, row) for name, result in workloads.items() for row in verdicts(name, result["peers"])]
    if rows:
        lines += ["| workload | ratio | found | quartiles | target | |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {name} | {row['of']} | {row['ratio']:.3g} | {_pair(row['quartiles'], '.3g')} | {row['target']} "
            f"| {row['verdict']} |"
            for name, row in rows
        ]
        lines.append("")
    for name, result in workloads.items():
        lines += table(name, result)
    return "\n".join(lines)


def table(name: str, result: dict[str, Any]) -> list[str]:
    """The lines of a workload's table."""
    peers, ours = result["peers"], result["peers"].get("ant")
    rounds = max((len(row["us_a_step"]) for row in peers.values()), default=0)
    lines = [
        f"**{name}**: {WORKLOADS[name].shows}; epochs of {result['steps']} steps, {rounds} runs of each",
        "",
        "| peer | us a step | quartiles | times `ant_jax` | peak MB | loss apart | chosen |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in peers.values():
        ratio = f"{statistics.median(ratios(row, ours)):.3g}" if ours else ""
        chosen = ", ".join(f"{option}={value}" for option, value in row["chosen"].items())
        lines.append(
            f"| {row['label']} | {middle(row):.4g} | {_pair(quartiles(row['us_a_step']), '.4g')} | {ratio} "
            f"| {row['peak_mb']} | {row['loss_apart']:.0e} | {chosen} |"
        )
    where = ", ".join(f"{key} {value}" for key, value in result.get("measured", {}).items())
    return [*lines, "", *([where, ""] if where else [])]


def _pair(values: tuple[float, float], form: str) -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def plot(workloads: dict[str, Any], path: pathlib.Path) -> None:
    """Bars on a logarithmic scale: the time of a step of every trainer on every workload that all have."""
    from matplotlib.figure import Figure

    drawn = {name: result for name, result in workloads.items() if WORKLOADS[name].peers == TRAINERS}
    columns = max(1, min(3, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows))
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (workload, result) in zip(axes.flat, drawn.items(), strict=False):
        for place, name in enumerate(TRAINERS):
            if name in result["peers"]:
                row = result["peers"][name]
                axis.barh(place, middle(row), color="tab:red" if name.startswith("ant") else "tab:gray")
                axis.plot(quartiles(row["us_a_step"]), [place, place], color="black", linewidth=1)
        axis.set(title=workload, xscale="log", xlabel="us a step")
        axis.set_yticks(range(len(TRAINERS)), [PEERS[name].label for name in TRAINERS])
    axes[0, 0].invert_yaxis()  # shared by all
    figure.tight_layout()
    figure.savefig(path, dpi=100)
