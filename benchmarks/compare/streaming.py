"""The same batches out of loaders, as data come that do not lie in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.compare import by_trainer
from benchmarks.compare.by_hand import per_step
from benchmarks.compare.peers import Train
from benchmarks.compare.workloads import Arrays, Workload


class Stream:
    """Makes batches one after the other by picking rows, as a loader of one's own does."""

    def __init__(self, workload: Workload):
        self._arrays, self._size = workload.data(), workload.batch_size

    def __len__(self) -> int:
        return len(self._arrays[0]) // self._size

    def __iter__(self) -> Iterator[Arrays]:
        inputs, targets = self._arrays
        for i in range(len(self)):
            rows = np.arange(i * self._size, (i + 1) * self._size)
            yield inputs[rows], targets[rows]


class Prefetcher:
    """Batches of a loader on the device, the next one on its way there while the one before is used."""

    def __init__(self, loader: Iterable[Arrays]):
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        waiting: Any = None
        for batch in self._loader:
            following = jax.device_put(batch)
            if waiting is not None:
                yield waiting
            waiting = following
        yield waiting


def from_numpy(workload: Workload) -> Train:
    return by_trainer.trainer(workload, loader=Stream(workload))


def from_dataloader(workload: Workload) -> Train:
    from benchmarks.compare.torch_models import dataloader

    return by_trainer.trainer(workload, loader=dataloader(workload))


def from_grain(workload: Workload) -> Train:
    import grain

    examples = grain.MapDataset.source(workload.examples())
    return by_trainer.trainer(workload, loader=examples.batch(workload.batch_size).to_iter_dataset())


def by_hand(workload: Workload) -> Train:
    """A launch a step, with the next batch on its way to the device while the step runs."""
    return per_step(workload, Prefetcher(Stream(workload)))
