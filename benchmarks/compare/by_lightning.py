"""Lightning, barebones, which is its own word for what to measure its loop with."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import lightning
import torch

from benchmarks.compare.peers import Train
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


def trainer(workload: Workload, threads: int = 1, usual: bool = False) -> Train:
    """One ``fit`` of Lightning's, with nothing around the loop, for every call; ``usual`` as for the torch trainer."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    torch.set_num_threads(threads)
    batches = dataloader(workload) if usual else Batches(workload)
    made = Module(workload, usual)

    def train(epochs: int) -> float:
        lightning.Trainer(accelerator="cpu", barebones=True, max_epochs=epochs, gradient_clip_val=MAX_GRAD_NORM).fit(
            made, batches
        )
        return float(made.total) / len(batches)

    return train
