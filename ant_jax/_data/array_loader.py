"""A loader of arrays in memory."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from ant_jax._data.batches import aligned_empty, as_numpy, to_batch
from ant_jax._trees import PyTree, describe, named_leaves


class ArrayLoader:
    """Batches of arrays that are in memory.

    The order of the examples is a function of ``(seed, epoch)`` alone, so a position in the data is two numbers.
    ``Trainer.fit`` asks for the batches of each epoch; plain iteration gives those of epoch 0.

    Args:
        arrays: any pytree of arrays whose first axes have the same length, one entry an example. Usually the pair
            ``(inputs, targets)``. Only what :func:`to_batch` must convert is copied.
        batch_size: examples in a batch.
        shuffle: whether every epoch has its own random order.
        seed: of the shuffling.
        drop_last: whether to leave out the last batch of an epoch when it has fewer examples than ``batch_size``.

    Raises:
        ValueError: no arrays, arrays of different lengths, no examples, a bad ``batch_size``, ``seed`` or flag.

    >>> loader = ArrayLoader((np.arange(5), np.arange(5) ** 2), batch_size=2, shuffle=False)
    >>> [inputs.tolist() for inputs, targets in loader]
    [[0, 1], [2, 3], [4]]
    >>> len(loader)
    3
    """

    def __init__(
        self, arrays: PyTree, batch_size: int, *, shuffle: bool = True, seed: int = 0, drop_last: bool = False
    ):
        leaves, self._treedef = jax.tree.flatten(arrays)
        self._leaves: list[np.ndarray] = [to_batch(as_numpy(leaf), "ArrayLoader") for leaf in leaves]
        lengths = {path: np.shape(leaf)[:1] for path, leaf in named_leaves(arrays).items()}
        if not lengths or () in lengths.values() or len(set(lengths.values())) > 1:
            named = [f"{path or 'arrays'}: {describe(leaf)}" for path, leaf in named_leaves(arrays).items()]
            more = f", and {len(named) - 8} more" if len(named) > 8 else ""
            hint = "; make arrays of lists with np.asarray" if set(lengths.values()) == {()} else ""
            raise ValueError(
                f"ArrayLoader: arrays must share the length of their first axis, got "
                f"{', '.join(named[:8]) or 'none'}{more}{hint}"
            )
        self._examples = len(self._leaves[0])
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"ArrayLoader: seed must be a whole number from 0 on, got {seed!r:.200}")
        for flag, value in {"shuffle": shuffle, "drop_last": drop_last}.items():
            if not isinstance(value, bool | np.bool_):
                raise ValueError(f"ArrayLoader: {flag} must be True or False, got {value!r:.200}")
        self.shuffle, self.seed, self.drop_last = shuffle, seed, drop_last
        self._set_batch_size(batch_size)
        self._ordered: tuple[int, np.ndarray] | None = None  # the order of the epoch that was last asked for

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = self.left(0)
        return whole + bool(rest)

    @functools.cached_property  # every epoch asks for it
    def description(self) -> dict[str, Any]:
        """What fixes the batches, as JSON; see :func:`description_of`."""
        some = np.linspace(0, self._examples - 1, num=16).astype(int)
        return {
            "examples": self._examples,
            "batch_size": self.batch_size,
            "shuffle": bool(self.shuffle),
            "seed": int(self.seed),
            "drop_last": bool(self.drop_last),
            "arrays": [describe(leaf) for leaf in self._leaves],
            "crc32": functools.reduce(lambda crc, leaf: zlib.crc32(leaf[some].tobytes(), crc), self._leaves, 0),
        }

    def with_batch_size(self, batch_size: int) -> ArrayLoader:
        """Return a loader of the same arrays, in the same order, with another batch size.

        >>> loader = ArrayLoader(np.arange(5), batch_size=2, shuffle=False)
        >>> [batch.tolist() for batch in loader.with_batch_size(3)]
        [[0, 1, 2], [3, 4]]
        """
        other = copy.copy(self)
        vars(other).pop("description", None)
        other._set_batch_size(batch_size)
        return other

    def _set_batch_size(self, batch_size: int) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            hint = (
                "; several arrays go into one tuple, ArrayLoader((X, Y), batch_size=32)" if np.ndim(batch_size) else ""
            )
            raise ValueError(f"ArrayLoader: batch_size must be a positive whole number, got {batch_size!r:.200}{hint}")
        if self._examples < (batch_size if self.drop_last else 1):
            raise ValueError(
                f"ArrayLoader: {self._examples} examples make no batch of {batch_size}"
                + (" when drop_last=True" if self._examples else "")
            )
        self.batch_size = int(batch_size)

    def left(self, position: int) -> tuple[int, int]:
        """What is left of an epoch from example ``position`` on: the whole batches, and the examples of a shorter last.

        >>> ArrayLoader(np.arange(7), batch_size=2).left(2)
        (2, 1)
        """
        whole, rest = divmod(self._examples - position, self.batch_size)
        return whole, 0 if self.drop_last else rest

    def __iter__(self) -> Iterator[PyTree]:
        return self.batches(epoch=0)

    def batches(self, epoch: int, position: int = 0) -> Iterator[PyTree]:
        """Iterate over the batches of an epoch, from example ``position`` of its order on."""
        order = self._order(epoch)
        whole, rest = self.left(position)
        for start in range(position, position + whole * self.batch_size + rest, self.batch_size):
            rows = _rows(order, start, self.batch_size)
            # No views: a batch may still be read by the device when the arrays' owner changes them.
            leaves = [leaf[rows].copy() if isinstance(rows, slice) else leaf[rows] for leaf in self._leaves]
            yield jax.tree.unflatten(self._treedef, leaves)

    def stacked(self, epoch: int, position: int, count: int, rows: int) -> PyTree:
        """Return ``count`` whole batches from example ``position`` on, each leaf ``[rows, batch_size, ...]``.

        Rows from ``count`` on hold nothing.
        """
        wanted = _rows(self._order(epoch), position, count * self.batch_size)
        stacked = [aligned_empty((rows, self.batch_size, *leaf.shape[1:]), leaf.dtype) for leaf in self._leaves]
        for to, leaf in zip(stacked, self._leaves, strict=True):
            flat = to[:count].reshape(-1, *leaf.shape[1:])
            if isinstance(wanted, slice):
                flat[:] = leaf[wanted]
            else:
                np.take(leaf, wanted, axis=0, out=flat, mode="clip")  # the mode in which numpy writes without a buffer
        return jax.tree.unflatten(self._treedef, stacked)

    def _order(self, epoch: int) -> np.ndarray | None:
        if not self.shuffle:
            return None
        if self._ordered is None or self._ordered[0] != epoch:
            self._ordered = (epoch, np.random.default_rng((self.seed, epoch)).permutation(self._examples))
        return self._ordered[1]


def _rows(order: np.ndarray | None, position: int, examples: int) -> Any:
    rows = slice(position, position + examples)
    return rows if order is None else order[rows]
