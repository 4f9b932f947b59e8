"""The torch trainer of ``benchmarks/torch_trainer.py``."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from benchmarks.compare.peers import Train, fastest
from benchmarks.compare.torch_models import Batches, cross_entropy, dataloader, module
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload
from benchmarks.torch_trainer import Callback, Trainer


def trainer(
    workload: Workload,
    deferred: bool = False,
    compiled: bool = False,
    callbacks: Sequence[Callback] = (),
    threads: int | None = None,
    usual: bool = False,
) -> tuple[Train, str]:
    """With batches that lie in memory, the fused Adam, and as many threads as are best for the workload.

    ``usual``: with a DataLoader and a plain Adam, as most people write it.
    """
    batches = dataloader(workload) if usual else Batches(workload)

    def made() -> Trainer:
        model = module(workload.model)
        optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=not usual)
        return Trainer(
            torch.compile(model) if compiled else model,  # type: ignore[arg-type]
            optimizer,
            cross_entropy,
            callbacks=callbacks,
            max_grad_norm=MAX_GRAD_NORM,
            read_every_batch=not deferred,
        )

    trying = made()

    def try_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        trying.fit(batches, 1)

    threads = threads or fastest(sorted({1, os.cpu_count() or 1}), try_threads)
    torch.set_num_threads(threads)
    chosen = made()

    def train(epochs: int) -> float:
        return chosen.fit(batches, epochs)[-1]["train_loss"]

    return train, f"{threads} threads"
