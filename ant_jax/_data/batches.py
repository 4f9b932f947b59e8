"""Batches: a loader of arrays in memory, and what every batch is brought into."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from ant_jax._trees import PyTree, describe, named_leaves, refuse_unsortable


class BatchError(ValueError):
    """A loader gave a batch that cannot be trained on, or none; the message says which and why."""


class NoBatches(BatchError):
    """A loader gave no batch at all."""


# Inputs, targets and weights; a longer list is meant as batches.
MOST_ARRAYS = 3


READ_AGAIN = (
    "Pass an iterable that starts again for every epoch (a list, an ArrayLoader, a DataLoader), or an endless iterator "
    "with steps_per_epoch (for evaluation: validation_steps)"
)


def as_numpy(leaf: Any) -> np.ndarray:
    """Take a leaf of a batch through numpy: numbers, lists of numbers, torch tensors on the CPU."""
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise BatchError(f"a batch holds a {type(leaf).__name__} that numpy cannot read: {error}") from error
    if array.dtype == object or array.dtype.kind in "USMm":
        hint = (
            "; of a loader take one batch, next(iter(loader))" if isinstance(leaf, Iterable) and not array.ndim else ""
        )
        raise BatchError(
            f"a batch is a pytree of numeric arrays; it holds a {type(leaf).__name__} (dtype {array.dtype})"
            f"{'' if isinstance(leaf, str | bytes) else hint}"
        )
    return array


def to_batch(batch: PyTree, name: str = "batch") -> PyTree:
    """Turn the leaves of a batch into arrays of the dtypes that JAX computes with.

    Without ``jax_enable_x64`` 64-bit numbers become 32-bit ones.

    Raises:
        BatchError: a leaf is not numeric, or an integer does not fit.

    >>> to_batch((np.array([1, 2]), np.array([0.5])))
    (array([1, 2], dtype=int32), array([0.5], dtype=float32))
    """
    leaves, treedef = flatten_batch(batch, name)
    return jax.tree.unflatten(treedef, [to_leaf(leaf, name) for leaf in leaves])


def flatten_batch(batch: PyTree, name: str) -> tuple[list[Any], Any]:
    """Return the leaves of a batch and their structure.

    Raises:
        TypeError: it is no pytree; the message names the loader.

    >>> flatten_batch({"x": 1, 0: 2}, "train_loader")
    Traceback (most recent call last):
    ...
    TypeError: train_loader: a batch is no pytree: the keys of a dict in it cannot be sorted, as when some are str and \
some int
    """
    try:
        return jax.tree.flatten(batch)
    except (TypeError, ValueError):
        refuse_unsortable(f"{name}: a batch", batch)
        raise


_COMPUTED_WITH = frozenset(np.dtype(name) for name in ("float32", "int32", "uint8", "bool"))


def to_leaf(leaf: Any, name: str) -> Any:
    """Bring one leaf into the form that ``to_batch`` describes."""
    if type(leaf) is np.ndarray and leaf.dtype in _COMPUTED_WITH or isinstance(leaf, jax.Array):
        return leaf
    array = as_numpy(leaf)
    dtype = jax.dtypes.canonicalize_dtype(array.dtype)
    if dtype == array.dtype:
        return array
    narrow = array.astype(dtype)
    if array.dtype.kind in "iu" and not np.array_equal(narrow, array):
        bad = array[narrow != array].ravel()[0]
        raise BatchError(f"{name}: {bad} in an {array.dtype} leaf does not fit {dtype}; enable jax_enable_x64")
    return narrow


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array of undefined content that begins at a multiple of 64 bytes.

    XLA on a CPU computes with such an array where it lies; any other one it copies first.

    >>> aligned_empty((3, 5), np.float32).ctypes.data % 64
    0
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


def refuse_empty(batch: PyTree, where: str) -> None:
    """Raise BatchError if a batch has arrays, and all have no examples: their mean would not be a number.

    >>> refuse_empty((np.zeros((0, 3)), np.zeros(0)), "batch 7")
    Traceback (most recent call last):
    ant_jax._data.batches.BatchError: batch 7 has no examples: 0: float64[0,3], 1: float64[0]. Leave it out of \
the loader
    """
    leaves = {path: leaf for path, leaf in named_leaves(batch).items() if np.ndim(leaf)}
    if leaves and all(np.shape(leaf)[0] == 0 for leaf in leaves.values()):
        found = ", ".join(f"{path or 'batch'}: {describe(leaf)}" for path, leaf in leaves.items())
        raise BatchError(f"{where} has no examples: {found}. Leave it out of the loader")


def batch_size_of(batch: PyTree) -> int:
    """Examples in a batch: the length of the first axis that all leaves share; 1 when they share none, as in a graph.

    >>> batch_size_of((np.zeros((32, 64)), np.zeros(32)))
    32
    """
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    return sizes.pop()[0] if len(sizes) == 1 and () not in sizes else 1


def inputs_of(batch: PyTree) -> Any:
    """The model's inputs: the first of a pair, or the whole batch when it is not a pair.

    >>> inputs_of(("inputs", "targets"))
    'inputs'
    """
    return batch[0] if isinstance(batch, tuple | list) and len(batch) == 2 else batch
