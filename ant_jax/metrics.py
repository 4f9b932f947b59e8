"""Metrics: functions ``(outputs, targets) -> one value an example``; the trainer takes the mean over examples."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp


def accuracy(outputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Whether the class with the highest score is the right one.

    Args:
        outputs: scores (logits or probabilities), ``float[..., classes]``.
        targets: the right classes, ``int[...]``.

    Returns:
        1.0 or 0.0 for each example (or token), ``float32[...]``.

    Raises:
        ValueError: the targets are not integers, or not of the outputs' shape without its last axis.

    >>> accuracy(jnp.array([[0.1, 0.9], [0.8, 0.2]]), jnp.array([1, 1])).tolist()
    [1.0, 0.0]
    """
    _check_classes("accuracy", outputs, targets)
    return (jnp.argmax(outputs, axis=-1) == targets).astype(jnp.float32)


def top_k_accuracy(k: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Make the metric: whether the right class is among the ``k`` with the highest scores.

    Args:
        k: at least 1.

    Returns:
        A metric with the arguments and returns of :func:`accuracy`.

    Raises:
        ValueError: ``k`` is below 1.

    >>> top_k_accuracy(2)(jnp.array([[0.3, 0.2, 0.5]]), jnp.array([0])).tolist()
    [1.0]
    """
    if k < 1:
        raise ValueError(f"top_k_accuracy: k must be at least 1, got {k}")

    def metric(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        _check_classes("top_k_accuracy", outputs, targets)
        _, best = jax.lax.top_k(outputs, k)
        return jnp.any(best == jnp.expand_dims(targets, -1), axis=-1).astype(jnp.float32)

    return metric


def _check_classes(name: str, outputs: jax.Array, targets: jax.Array) -> None:
    if targets.shape != outputs.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"{name}: targets must be integer classes of shape {outputs.shape[:-1]} for outputs of shape "
            f"{outputs.shape}, got {targets.dtype}{list(targets.shape)}"
        )
