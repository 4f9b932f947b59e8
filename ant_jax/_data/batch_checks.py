"""Look at the numbers in batches, for those who ask for it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ant_jax._data.batches import BatchError
from ant_jax._data.epoch_batches import Chunk
from ant_jax._trees import PyTree, named_leaves


class BatchChecks:
    """Refuses batches with numbers that cannot be meant, before they reach the device.

    Args:
        name: what errors call the loader.
        epoch: which epoch.
        batch_idx: the first batch's index in it.
        classes: how many classes the targets of a pair ``(inputs, targets)`` choose from; ``None``: they are no labels.
    """

    def __init__(self, name: str, epoch: int, batch_idx: int, classes: int | None):
        self._name, self._epoch, self._batch_idx, self._classes = name, epoch, batch_idx, classes

    def __call__(self, chunk: Chunk, stacked: bool) -> None:
        """Look at the batches of the next chunk.

        Raises:
            BatchError: a floating-point number is not finite, or a label is none of the classes.
        """
        batches = {path: np.asarray(leaf) for path, leaf in named_leaves(chunk.batches).items()}
        if not stacked:
            batches = {path: leaf[None] for path, leaf in batches.items()}
        for row in range(chunk.filled):
            for path, leaf in batches.items():
                fault = _fault(leaf[row], self._classes if path == "1" else None)
                if fault:
                    raise BatchError(
                        f"{self._name}, batch {self._batch_idx + row} of epoch {self._epoch}: {path or 'the batch'} "
                        f"{leaf[row].dtype}{list(leaf[row].shape)} has {fault}"
                    )
        self._batch_idx += chunk.filled


def classes_of(outputs: Any, batch: PyTree) -> int | None:
    """How many classes there are, if the targets are labels: whole numbers, one for each vector of outputs."""
    if not hasattr(outputs, "shape") or not isinstance(batch, tuple | list) or len(batch) != 2:
        return None
    targets = batch[1]
    labels = hasattr(targets, "dtype") and jnp.issubdtype(targets.dtype, jnp.integer)
    return outputs.shape[-1] if labels and outputs.shape[:-1] == targets.shape and outputs.shape else None


def _fault(values: np.ndarray, classes: int | None) -> str:
    if jnp.issubdtype(values.dtype, jnp.inexact):
        bad = ~np.isfinite(values)
        finite = values[~bad]
        others = f"; the others are from {finite.min()} to {finite.max()}" if finite.size else ""
        return f"{bad.sum()} numbers that are not finite{others}" if bad.any() else ""
    if classes is None or not values.size:
        return ""
    outside = (values < 0) | (values >= classes)
    spread = f"they are from {values.min()} to {values.max()}"
    return f"{outside.sum()} labels outside of 0 to {classes - 1}; {spread}" if outside.any() else ""
