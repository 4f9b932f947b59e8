"""``ant_jax``."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

import ant_jax as ant
from benchmarks.compare.jax_models import linen
from benchmarks.compare.peers import Train
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload, weights


class Terminal(io.StringIO):
    """Stands in for a screen, so that the progress bar draws as often as on one."""

    def isatty(self) -> bool:
        return True


def trainer(workload: Workload, callbacks: Sequence[ant.Callback] = (), loader: Any = None) -> Train:
    """A plain ``fit`` with gradient clipping, and any callbacks."""
    made = ant.Trainer(
        linen(workload.model),
        optax.adam(LEARNING_RATE),
        optax.softmax_cross_entropy_with_integer_labels,
        callbacks=[ant.callbacks.clip_by_global_norm(MAX_GRAD_NORM), *callbacks],
        progress_bar=False,
    )
    if loader is None:
        loader = ant.ArrayLoader(workload.data(), workload.batch_size, shuffle=False)
    params = jax.tree.map(jnp.asarray, weights(workload.model))
    state = made.init(workload.batches()[0], params=params)

    def train(epochs: int) -> float:
        nonlocal state
        state, history = made.fit(state, loader, num_epochs=state.epoch + epochs)
        return history[-1]["train_loss"]

    return train


def standard(workload: Workload) -> Train:
    """What most people add: the gradient's norm, an average of the weights, a line every 100 batches, a bar."""
    return trainer(
        workload,
        [
            ant.callbacks.gradient_norm(),
            ant.callbacks.ema(0.999),
            ant.callbacks.log_progress(every=100, printer=io.StringIO().write),
            ant.callbacks.progress_bar(file=Terminal()),
        ],
    )
