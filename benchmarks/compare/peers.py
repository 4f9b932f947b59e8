"""Who is compared. A peer is made for a workload, and then trains so many epochs more whenever it is called.

Every peer does the same arithmetic, cross-entropy, clipping to a global norm, Adam, from the same weights on the same
batches in the same order, and returns the mean loss of its last epoch.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.compare.workloads import COUNTS, Workload


Train = Callable[[int], float]


@dataclasses.dataclass(frozen=True)
class Peer:
    """One side.

    Attributes:
        name: on the command line.
        label: in tables.
        made_by: ``module:function`` that makes it for a workload; imported in the peer's own process.
        options: of that function.
        distribution: the package that it needs beyond ``ant_jax``'s own.
        choice: an option whose best value is found out for each workload, one of ``CHOICES``.
    """

    name: str
    label: str
    made_by: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    _: dataclasses.KW_ONLY
    distribution: str | None = None
    choice: str | None = None

    def make(self, workload: Workload, **chosen: Any) -> Train:
        """What trains."""
        module, function = self.made_by.split(":")
        maker = getattr(importlib.import_module(f"benchmarks.compare.{module}"), function)
        return maker(workload, **self.options, **chosen)

    def best(self, workload: Workload) -> dict[str, Any]:
        """The value of its choice with which an epoch takes the least time, compilation left out."""
        if self.choice is None:
            return {}
        times: dict[int, float] = {}
        for value in CHOICES[self.choice](workload):
            train = self.make(workload, **{self.choice: value})
            train(1)
            began = time.perf_counter()
            train(2)
            times[value] = time.perf_counter() - began
        return {self.choice: min(times, key=lambda value: times[value])}


def threads(workload: Workload) -> list[int]:
    """Powers of two, up to the processors that this process may use."""
    del workload
    return [2**i for i in range(len(os.sched_getaffinity(0)).bit_length())]


CHOICES: dict[str, Callable[[Workload], list[int]]] = {
    "threads": threads,
    "steps_per_execution": lambda workload: sorted({1, 10, min(100, workload.steps)}),
}


def torch_peer(name: str, label: str, **options: Any) -> Peer:
    return Peer(name, label, "by_torch:trainer", options, distribution="torch", choice="threads")


def lightning_peer(name: str, label: str, **options: Any) -> Peer:
    return Peer(name, label, "by_lightning:trainer", options, distribution="lightning", choice="threads")


PEERS = {
    peer.name: peer
    for peer in (
        Peer("ant", "ant_jax", "by_trainer:trainer"),
        Peer("ant-standard", "ant_jax, the standard set", "by_trainer:standard"),
        Peer("fused", "by hand, fused", "by_hand:fused"),
        Peer("fused-standard", "by hand, fused, the standard set", "by_hand:fused", {"extras": True}),
        Peer("step", "by hand, a launch a step", "by_hand:per_step"),
        torch_peer("torch", "torch trainer"),
        torch_peer("torch-deferred", "torch trainer, loss read once an epoch", deferred=True),
        torch_peer("torch-compile", "the same, torch.compile", deferred=True, compiled=True),
        torch_peer("torch-usual", "torch trainer, DataLoader and plain Adam", usual=True),
        lightning_peer("lightning", "Lightning, barebones"),
        lightning_peer("lightning-usual", "Lightning, barebones, DataLoader and plain Adam", usual=True),
        Peer("keras", "Keras on JAX", "by_keras:model", distribution="keras", choice="steps_per_execution"),
        *(
            Peer(f"ant-{kind}-{count}", f"ant_jax, {count} {words}", "callbacks:by_ant", {"kind": kind, "count": count})
            for kind, words in (("traced", "in the step"), ("100", "every 100 batches"), ("each", "at every batch"))
            for count in COUNTS
        ),
        *(
            Peer(f"torch-each-{count}", f"torch trainer, {count} at every batch", "callbacks:by_torch",
                 {"count": count}, distribution="torch", choice="threads")
            for count in COUNTS
        ),
        Peer("ant-numpy", "ant_jax, from a loader of numpy arrays", "streaming:from_numpy"),
        Peer("ant-dataloader", "ant_jax, from a torch DataLoader", "streaming:from_dataloader", distribution="torch"),
        Peer("ant-grain", "ant_jax, from Grain", "streaming:from_grain", distribution="grain"),
        Peer("prefetched", "by hand, a launch a step, one batch ahead, the same numpy loader", "streaming:by_hand"),
    )
}  # fmt: skip
