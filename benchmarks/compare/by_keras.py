"""Keras on its JAX backend."""

from __future__ import annotations

import os
from typing import Any


os.environ["KERAS_BACKEND"] = "jax"

import keras  # noqa: E402  # it reads the backend when it is imported

from benchmarks.compare.keras_models import keras_model  # noqa: E402
from benchmarks.compare.peers import Train  # noqa: E402
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload  # noqa: E402


def model(workload: Workload, steps_per_execution: int = 1) -> Train:
    """A compiled Keras model, and its ``fit``."""
    inputs, targets = workload.data()
    made: Any = keras_model(workload.model)
    made.compile(
        optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8, global_clipnorm=MAX_GRAD_NORM),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        steps_per_execution=steps_per_execution,
    )

    def train(epochs: int) -> float:
        history = made.fit(
            inputs, targets, batch_size=workload.batch_size, epochs=epochs, shuffle=False, verbose=0
        ).history
        return history["loss"][-1]

    return train
