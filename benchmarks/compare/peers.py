"""Who is compared. A peer is made for a workload, and then trains so many epochs more whenever it is called.

Every peer does the same arithmetic, cross-entropy, clipping to a global norm, Adam, from the same weights on the same
batches in the same order, and returns the mean loss of its last epoch.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from benchmarks.compare.workloads import COUNTS, Workload


Train = Callable[[int], float]
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Peer:
    """One side.

    Attributes:
        name: on the command line.
        label: in tables.
        made_by: ``module:function`` that makes it for a workload; imported in the peer's own process.
        options: of that function.
        distribution: the package that it needs beyond ``ant_jax``'s own.
        settled: options with which it tries nothing out when it is made, for the time to the first step.
    """

    name: str
    label: str
    made_by: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    distribution: str | None = None
    settled: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, workload: Workload, settled: bool = False) -> tuple[Train, str]:
        """What trains, and what was chosen for it."""
        module, function = self.made_by.split(":")
        options = self.options | (self.settled if settled else {})
        return getattr(importlib.import_module(f"benchmarks.compare.{module}"), function)(workload, **options)


DEFERRED = {"deferred": True}
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ant", "ant_jax", "by_trainer:trainer"),
        Peer("ant-standard", "ant_jax, the standard set", "by_trainer:standard"),
        Peer("fused", "by hand, fused (the limit)", "by_hand:fused"),
        Peer("fused-standard", "by hand, fused, the standard set", "by_hand:fused", {"extras": True}),
        Peer("step", "by hand, a launch a step", "by_hand:per_step"),
        Peer("torch", "torch trainer", "by_torch:trainer", {}, "torch", {"threads": 1}),
        Peer("torch-usual", "torch trainer, DataLoader and plain Adam", "by_torch:trainer", {"usual": True}, "torch"),
        Peer("torch-deferred", "torch trainer, loss read once an epoch", "by_torch:trainer", DEFERRED, "torch"),
        Peer("torch-compile", "the same, torch.compile", "by_torch:trainer", {**DEFERRED, "compiled": True}, "torch",
             {"threads": 1}),
        Peer("lightning", "Lightning", "by_lightning:trainer", {}, "lightning", {"threads": 1}),
        Peer("lightning-usual", "Lightning, DataLoader and plain Adam", "by_lightning:trainer", {"usual": True},
             "lightning"),
        Peer("keras", "Keras on JAX, its best", "by_keras:model", {}, "keras", {"steps_per_execution": 1}),
        *(
            Peer(f"ant-{kind}-{count}", f"ant_jax, {count} {words}", "callbacks:by_ant", {"kind": kind, "count": count})
            for kind, words in (("traced", "in the step"), ("100", "every 100 batches"), ("each", "at every batch"))
            for count in COUNTS
        ),
        *(
            Peer(f"torch-each-{count}", f"torch, {count} at every batch", "callbacks:by_torch", {"count": count},
                 "torch")
            for count in COUNTS
        ),
        Peer("ant-numpy", "ant_jax, from a loader of numpy arrays", "streaming:from_numpy"),
        Peer("ant-dataloader", "ant_jax, from a torch DataLoader", "streaming:from_dataloader", {}, "torch"),
        Peer("ant-grain", "ant_jax, from Grain", "streaming:from_grain", {}, "grain"),
        Peer("prefetched", "by hand, one batch ahead, the same loader of numpy arrays", "streaming:by_hand"),
    )
}  # fmt: skip


def fastest(candidates: Iterable[T], train_with: Callable[[T], Any]) -> T:
    """The candidate with which a short training takes the least time, compilation left out."""
    times: dict[T, float] = {}
    for candidate in candidates:
        train_with(candidate)
        began = time.perf_counter()
        train_with(candidate)
        times[candidate] = time.perf_counter() - began
    return min(times, key=lambda candidate: times[candidate])
