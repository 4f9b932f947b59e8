"""Keras on its JAX backend, with the ``steps_per_execution`` that is best for the workload."""

from __future__ import annotations

import functools
import os
from typing import Any


os.environ["KERAS_BACKEND"] = "jax"

import keras  # noqa: E402  # it reads the backend when it is imported

from benchmarks.compare.keras_models import keras_model  # noqa: E402
from benchmarks.compare.peers import Train, fastest  # noqa: E402
from benchmarks.compare.workloads import LEARNING_RATE, MAX_GRAD_NORM, Workload  # noqa: E402


def model(workload: Workload, steps_per_execution: int | None = None) -> tuple[Train, str]:
    """A compiled Keras model, and its ``fit``."""
    inputs, targets = workload.data()

    def compiled(steps: int) -> Any:
        made = keras_model(workload.model)
        made.compile(
            optimizer=keras.optimizers.Adam(LEARNING_RATE, epsilon=1e-8, global_clipnorm=MAX_GRAD_NORM),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=steps,
        )
        return made

    def fit(made: Any, epochs: int) -> float:
        history = made.fit(
            inputs, targets, batch_size=workload.batch_size, epochs=epochs, shuffle=False, verbose=0
        ).history
        return history["loss"][-1]

    tried = functools.cache(compiled)
    candidates = sorted({1, 10, min(100, workload.steps)})
    best = steps_per_execution or fastest(candidates, lambda steps: fit(tried(steps), 1))
    made = compiled(best)
    return (lambda epochs: fit(made, epochs)), f"steps_per_execution={best}"
