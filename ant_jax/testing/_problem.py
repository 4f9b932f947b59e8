"""A problem that compiles in a moment."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ant_jax._data.array_loader import ArrayLoader
from ant_jax._hooks.callback import Callback
from ant_jax._state.train_state import TrainState
from ant_jax._trainer.trainer import Trainer


class Problem(NamedTuple):
    """A trainer on a tiny problem, and what to train it on.

    Attributes:
        trainer: with the callbacks that were given.
        state: to begin with.
        train_loader: 5 batches, the last of which is shorter.
        val_loader: 2 batches.
    """

    trainer: Trainer
    state: TrainState
    train_loader: ArrayLoader
    val_loader: ArrayLoader


def problem(*callbacks: Callback, **options: Any) -> Problem:
    """Make a problem that compiles in a moment: four features, three classes, a layer with noise and a running mean.

    Args:
        *callbacks: of the trainer.
        **options: other arguments of the trainer, instead of its optimizer, ``optax.sgd(0.1)``, for example.

    >>> tiny = problem()
    >>> state, history = tiny.trainer.fit(tiny.state, tiny.train_loader, 2, tiny.val_loader)
    >>> sorted(history[-1])
    ['train_loss', 'val_loss']
    """
    rng = np.random.default_rng(0)
    inputs, targets = rng.normal(size=(36, 4)).astype(np.float32), rng.integers(0, 3, 36).astype(np.int32)
    settings = {
        "model": (_init, _apply),
        "optimizer": optax.sgd(0.1),
        "criterion": optax.softmax_cross_entropy_with_integer_labels,
        "progress_bar": False,
    }
    trainer = Trainer(**{**settings, "callbacks": callbacks, **options})
    state = trainer.init((inputs[:8], targets[:8]))
    val_loader = ArrayLoader((inputs[:16], targets[:16]), 8, shuffle=False)
    return Problem(trainer, state, ArrayLoader((inputs, targets), 8), val_loader)


def _init(key: Any, inputs: Any) -> Any:
    kernel = 0.5 * jax.random.normal(key, (inputs.shape[-1], 3))
    return {"dense": {"bias": jnp.zeros(3), "kernel": kernel}}, {"mean": jnp.zeros(inputs.shape[-1])}


def _apply(params: Any, model_state: Any, inputs: Any, key: Any) -> Any:
    if key is not None:
        inputs = inputs + 0.1 * jax.random.normal(key, inputs.shape)
        model_state = {"mean": 0.9 * model_state["mean"] + 0.1 * jnp.mean(inputs, axis=0)}
    centred = inputs - jnp.broadcast_to(model_state["mean"], inputs.shape)
    return centred @ params["dense"]["kernel"] + jnp.broadcast_to(
        params["dense"]["bias"], (len(inputs), 3)
    ), model_state
