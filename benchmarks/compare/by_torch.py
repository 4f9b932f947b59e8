"""The torch trainer of ``benchmarks/torch_trainer.py``."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.compare.peers import Train
from benchmarks.compare.torch_models import Batches, cross_entropy, dataloader, module
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload
from benchmarks.torch_trainer import Callback, Trainer


def trainer(
    workload: Workload,
    deferred: bool = False,
    compiled: bool = False,
    callbacks: Sequence[Callback] = (),
    threads: int = 1,
    usual: bool = False,
) -> Train:
    """With batches that lie in memory and the fused Adam, the fastest of torch's three.

    ``usual``: with a DataLoader and a plain Adam, as most people write it.
    """
    batches = dataloader(workload) if usual else Batches(workload)

    torch.set_num_threads(threads)
    model = module(workload.model)
    made = Trainer(
        torch.compile(model) if compiled else model,  # type: ignore[arg-type]
        torch.optim.Adam(model.parameters(), LEARNING_RATE, fused=not usual),
        cross_entropy,
        callbacks=callbacks,
        max_grad_norm=MAX_GRAD_NORM,
        read_every_batch=not deferred,
    )
    return lambda epochs: made.fit(batches, epochs)[-1]["train_loss"]
