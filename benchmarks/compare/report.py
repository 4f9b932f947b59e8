"""Tables and a plot of what was measured."""

from __future__ import annotations

import pathlib
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.compare.peers import PEERS
from benchmarks.compare.workloads import TRAINERS, WORKLOADS


PACKAGES = ("torch", "lightning", "keras")
# What the project has set itself: the ratio of two peers' times, on a workload, and whether it is to be at least that
# or at most.
TARGETS = {
    "digits": [
        ("torch", "ant", "at least", 25.0),
        ("torch-usual", "ant", "at least", 25.0),
        ("lightning", "ant", "at least", 40.0),
        ("lightning-usual", "ant", "at least", 40.0),
        ("keras", "ant", "at least", 2.5),
        ("ant", "fused", "at most", 1.05),
        ("ant-standard", "fused-standard", "at most", 1.10),
    ],
    "tiny": [("torch", "ant", "at least", 60.0), ("torch-usual", "ant", "at least", 60.0)],
    "cnn": [("ant", "better by hand", "at most", 1.03), ("ant", "torch", "at most", 1.0)],
    "transformer": [("ant", "better by hand", "at most", 1.03), ("ant", "torch", "at most", 1.0)],
    "callbacks": [("ant-100-1", "ant", "at most", 1.01)],
    "streaming": [("ant-numpy", "prefetched", "at most", 1.15)],
}


def versions() -> dict[str, str]:
    """The versions of the peers that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def verdicts(workload: str, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target of a workload that can be judged: the ratio found, and whether it is met."""
    times = {name: row["us_a_step"] for name, row in peers.items()}
    if {"fused", "step"} <= set(times):
        times["better by hand"] = min(times["fused"], times["step"])
    found = []
    for one, other, word, target in TARGETS.get(workload, []):
        if one in times and other in times:
            ratio = times[one] / times[other]
            met = ratio >= target if word == "at least" else ratio <= target
            of = f"{one} / {other}"
            found.append({"ratio_of": of, "found": round(ratio, 3), "target": f"{word} {target:g}", "met": met})
    return found


def markdown(workloads: dict[str, Any]) -> str:
    """A table for every workload, and one of the targets."""
    lines: list[str] = []
    targets: list[str] = []
    for name, result in workloads.items():
        peers = result["peers"]
        ours = peers.get("ant", {}).get("us_a_step")
        lines += [
            f"**{name}**: {WORKLOADS[name].shows}",
            "",
            "| peer | us a step | quartiles | times `ant_jax` | peak MB | loss apart | chosen |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in peers.values():
            ratio = f"{row['us_a_step'] / ours:.2f}" if ours else ""
            low, high = row["quartiles"]
            lines.append(
                f"| {row['label']} | {row['us_a_step']:.4g} | {low:.4g}, {high:.4g} | {ratio} | {row['peak_mb']} "
                f"| {row['loss_apart']:.0e} | {row['chosen']} |"
            )
        lines.append("")
        targets += [
            f"| {name} | {row['ratio_of']} | {row['found']:.3g} | {row['target']} | "
            f"{'met' if row['met'] else '**missed**'} |"
            for row in verdicts(name, peers)
        ]
    if targets:
        lines += ["| workload | ratio of medians | found | target | |", "|---|---|---|---|---|", *targets]
    return "\n".join(lines)


def plot(workloads: dict[str, Any], path: pathlib.Path) -> None:
    """Bars on a logarithmic scale: the time of a step of every trainer on every workload that all have."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = {name: result for name, result in workloads.items() if WORKLOADS[name].peers == TRAINERS}
    columns = max(1, min(3, len(drawn)))
    rows = max(1, -(-len(drawn) // columns))
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.2 * columns, 3.2 * rows), sharey=True, squeeze=False)
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (workload, result) in zip(axes.flat, drawn.items(), strict=False):
        for place, name in enumerate(TRAINERS):
            if name in result["peers"]:
                row = result["peers"][name]
                axis.barh(place, row["us_a_step"], color="tab:red" if name.startswith("ant") else "tab:gray")
                axis.plot(row["quartiles"], [place, place], color="black", linewidth=1)
        axis.set(title=workload, xscale="log", xlabel="us a step")
        axis.set_yticks(range(len(TRAINERS)), [PEERS[name].label for name in TRAINERS])
    axes[0, 0].invert_yaxis()  # shared by all
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
