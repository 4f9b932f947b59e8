"""What the project has set itself, and whether it was met."""

from __future__ import annotations

import statistics
from typing import Any


BY_HAND = ("fused", "step")
TORCH = ("torch", "torch-deferred", "torch-compile")
# By workload: the ratio of the times of two peers, the second the fastest of several, and the bound that it is to keep.
TARGETS: dict[str, list[tuple[str, tuple[str, ...], str, float]]] = {
    "digits": [
        ("torch", ("ant",), "at least", 25.0),
        ("lightning", ("ant",), "at least", 40.0),
        ("keras", ("ant",), "at least", 2.5),
        ("ant", ("fused",), "at most", 1.05),
        ("ant-standard", ("fused-standard",), "at most", 1.10),
    ],
    "tiny": [("torch", ("ant",), "at least", 60.0)],
    "cnn": [("ant", BY_HAND, "at most", 1.03), ("ant", TORCH, "at most", 1.0)],
    "transformer": [("ant", BY_HAND, "at most", 1.03), ("ant", TORCH, "at most", 1.0)],
    "callbacks": [("ant-each-1", ("step",), "at most", 1.30)],
    "streaming": [("ant-numpy", ("prefetched",), "at most", 1.15)],
}


def middle(row: dict[str, Any]) -> float:
    return statistics.median(row["us_a_step"])


def quartiles(values: list[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, high


def ratios(one: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Of the times of each round, in which the two took turns."""
    return [a / b for a, b in zip(one["us_a_step"], other["us_a_step"], strict=True)]


def verdicts(workload: str, peers: dict[str, Any]) -> list[dict[str, Any]]:
    """Each target of a workload that can be judged.

    It is met, or missed, by the median of the ratios; and that is resolved if both quartiles say the same.
    """
    found = []
    for one, others, word, bound in TARGETS.get(workload, []):
        if one in peers and set(others) <= peers.keys():
            other = min(others, key=lambda name: middle(peers[name]))
            values = ratios(peers[one], peers[other])
            kept = [
                value >= bound if word == "at least" else value <= bound
                for value in (statistics.median(values), *quartiles(values))
            ]
            verdict = ("met" if kept[0] else "**missed**") + ("" if len(set(kept)) == 1 else ", within the spread")
            found.append(
                {
                    "of": f"{peers[one]['label']} / {peers[other]['label']}",
                    "ratio": statistics.median(values),
                    "quartiles": quartiles(values),
                    "target": f"{word} {bound:g}",
                    "verdict": verdict,
                }
            )
    return found
