"""Lightning, with everything switched off that a benchmark can do without."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import lightning
import torch

from benchmarks.compare.peers import Train, fastest
from benchmarks.compare.torch_models import Batches, cross_entropy, dataloader, module
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload


class Module(lightning.LightningModule):
    def __init__(self, workload: Workload, usual: bool):
        super().__init__()
        self.model = module(workload.model)
        self.total: Any = 0.0
        self.optimizer = torch.optim.Adam(self.parameters(), LEARNING_RATE, fused=not usual)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        inputs, targets = batch
        loss = cross_entropy(self.model(inputs), targets)
        self.total += loss.detach()  # not self.log, which costs more
        return loss

    def on_train_epoch_start(self) -> None:
        self.total = 0.0

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer  # the same for every ``fit``


def trainer(workload: Workload, threads: int | None = None, usual: bool = False) -> tuple[Train, str]:
    """One ``fit`` of Lightning's for every call; ``usual`` as for the torch trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    batches = dataloader(workload) if usual else Batches(workload)

    def fit(made: Module, epochs: int) -> float:
        lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            gradient_clip_val=MAX_GRAD_NORM,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ).fit(made, batches)
        return float(made.total) / len(batches)

    trying = Module(workload, usual)

    def try_threads(threads: int) -> None:
        torch.set_num_threads(threads)
        fit(trying, 1)

    threads = threads or fastest(sorted({1, os.cpu_count() or 1}), try_threads)
    torch.set_num_threads(threads)
    made = Module(workload, usual)
    return (lambda epochs: fit(made, epochs)), f"{threads} threads"
