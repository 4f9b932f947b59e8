"""Batches: a loader of arrays in memory, and what every batch is brought into."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import operator
import sys
import zlib
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ant_jax._trees import PyTree, describe, describe_tree, named_leaves, refuse_unsortable


class BatchError(ValueError):
    """A loader gave a batch that cannot be trained on, or none; the message says which and why."""


class NoBatches(BatchError):
    """A loader gave no batch at all."""


class ArrayLoader:
    """Batches of arrays that are in memory.

    The order of the examples is a function of ``(seed, epoch)`` alone, so a position in the data is two numbers.
    ``Trainer.fit`` asks for the batches of each epoch; plain iteration gives those of epoch 0.

    Args:
        arrays: any pytree of arrays whose first axes have the same length, one entry an example. Usually the pair
            ``(inputs, targets)``. Only what :func:`canonical` must convert is copied.
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
        self._leaves: list[np.ndarray] = [canonical(as_numpy(leaf), "ArrayLoader") for leaf in leaves]
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


def length_of(loader: Any) -> int | None:
    """Batches in an epoch of a loader; ``None`` when it cannot tell, or has no end."""
    length = _told_length(loader)
    return None if length == sys.maxsize else length


def _told_length(loader: Any) -> int | None:
    try:
        return len(loader)
    except Exception:  # whatever it raises, it cannot tell: NotImplementedError, a wrapper's AttributeError
        return None


def has_no_end(loader: Any) -> bool:
    """Whether a loader says that it has no end; one may have none without saying so.

    >>> has_no_end(itertools.cycle([1, 2])), has_no_end([1, 2])
    (True, False)
    """
    if isinstance(loader, itertools.repeat):
        return operator.length_hint(loader, -1) < 0
    # The length is how Grain tells that a data set repeats for ever.
    return isinstance(loader, itertools.cycle | itertools.count) or _told_length(loader) == sys.maxsize


def has_state(iterator: Any) -> bool:
    """Whether an iterator can tell where it is, and be put there, as Grain's can."""
    return all(callable(getattr(iterator, method, None)) for method in ("get_state", "set_state"))


def cannot_go_on(loader: Any, name: str) -> str:
    """Say that a loader cannot be put where a run goes on."""
    return (
        f"{name} is a {type(loader).__name__}, which can be read only once and cannot be put where the run goes on. "
        f"Pass an iterable that starts again for every epoch (a list, an ArrayLoader, a DataLoader), or an iterator "
        f"with get_state and set_state"
    )


def refuse_read_once(loader: Any, name: str) -> None:
    """Raise BatchError if a run that was saved cannot go on with a loader, since that is read only once."""
    if isinstance(loader, Iterator) and not has_state(loader):
        raise BatchError(cannot_go_on(loader, name))


def description_of(loader: Any) -> dict[str, Any]:
    """Describe a loader's data, as JSON, so that another one is noticed when a run goes on.

    An ``ArrayLoader`` by what fixes the order of its batches, by the form of its arrays, and by a checksum of 16
    examples; any other loader by its length, if it knows that.

    >>> description_of([1, 2, 3])
    {'batches': 3}
    """
    if isinstance(loader, ArrayLoader):
        return loader.description
    batches = length_of(loader)
    return {} if batches is None else {"batches": batches}


def refuse_bad_length(loader: Any, name: str, epochs: int, limit: int | None = None) -> None:
    """Raise BatchError if it can be told beforehand that a loader will run out of batches."""
    once = isinstance(loader, Generator) or type(loader).__module__ in ("builtins", "itertools")
    if once and limit is None and epochs > 1 and isinstance(loader, Iterator):
        raise BatchError(
            f"{name} is a {type(loader).__name__}, which can be read only once, and there are {epochs} epochs to go. "
            f"{READ_AGAIN}"
        )
    batches = length_of(loader)
    if limit is not None and batches is not None and batches < limit:
        raise BatchError(f"{name} has {batches} batches, fewer than steps_per_epoch={limit}")


def refuse_endless(loader: Any, name: str, argument: str) -> None:
    """Raise BatchError if a loader says that it has no end, and so an evaluation of all its batches would have none."""
    if has_no_end(loader):
        raise BatchError(f"{name} has no end, and so its evaluation would have none; give {argument}=, its batches")


def refuse_no_iterable(loader: Any, name: str) -> None:
    """Raise TypeError if a loader cannot be iterated over.

    >>> refuse_no_iterable(list, "train_loader")
    Traceback (most recent call last):
    TypeError: train_loader must be an iterable of batches, got <class 'list'>; make an instance of it
    """
    if not isinstance(loader, Iterable):
        hint = "; make an instance of it" if isinstance(loader, type) else "; call it" if callable(loader) else ""
        raise TypeError(f"{name} must be an iterable of batches, got {loader!r:.200}{hint}")


def refuse_arrays(loader: Any, name: str, pairs: bool) -> None:
    """Raise TypeError if arrays are given where a loader belongs, before their rows are taken for batches.

    Arrays are iterables, too, whose items may be meant as batches. So only what cannot be meant so is refused: several
    arrays of as many examples in different forms, one array where batches are pairs, a mapping, a table.

    Args:
        loader: to look at.
        name: what errors call it.
        pairs: whether batches must be ``(inputs, targets)``.
    """
    if isinstance(loader, Mapping):
        given = ", ".join(map(repr, loader))
        refused = not isinstance(loader, Iterator)
    elif _is_array(loader):
        given = describe(loader) if hasattr(loader, "dtype") else "columns"
        refused = pairs or hasattr(loader, "columns")  # a table's items are the names of its columns
    elif isinstance(loader, tuple | list) and 1 < len(loader) <= MOST_ARRAYS:
        given = ", ".join(map(_form_in_words, loader))
        refused = _lengths_agree(loader) and not _may_be_batches(loader)
    else:
        return
    if refused:
        arrays = "(X, Y)" if pairs or len(loader) == 2 else "arrays"
        raise TypeError(
            f"{name} must be an iterable of batches, got a {type(loader).__name__} of {given}. Arrays in memory become "
            f"one by ArrayLoader({arrays}, batch_size=32); a single batch goes into a list, [batch]"
        )


# Inputs, targets and weights; a longer list is meant as batches.
MOST_ARRAYS = 3


def _is_array(value: Any) -> bool:
    """Whether a value is an array, or what numpy takes for one: a tensor, a table, a column."""
    return hasattr(value, "__array__") and len(getattr(value, "shape", ())) > 0


def _is_list_of_numbers(value: Any) -> bool:
    innermost = value
    while isinstance(innermost, tuple | list) and innermost:
        innermost = innermost[0]
    return innermost is not value and isinstance(innermost, bool | int | float)


def _arrays_in(item: Any) -> list[Any]:
    return [item] if _is_list_of_numbers(item) else jax.tree.leaves(item)


def _form_in_words(item: Any) -> str:
    if _is_list_of_numbers(item):
        return f"a list of {len(item)}"
    return f"({describe_tree(item)})" if isinstance(item, tuple | list | Mapping) else describe(item)


def _lengths_agree(items: Sequence[Any]) -> bool:
    """Whether all arrays in the items have as many examples."""
    arrays = [array for item in items for array in _arrays_in(item)]
    if not arrays or not all(_is_array(array) or isinstance(array, tuple | list) for array in arrays):
        return False
    return len({len(array) for array in arrays}) == 1


def _may_be_batches(items: Sequence[Any]) -> bool:
    """Whether the items are trees of arrays each, or all of one form, as batches are."""
    if all(isinstance(item, tuple | list | Mapping) and not _is_list_of_numbers(item) for item in items):
        return True
    return len({_form_of(item) for item in items}) == 1


def _form_of(item: Any) -> Any:
    arrays = _arrays_in(item)
    dtypes = (getattr(array, "dtype", None) for array in arrays)
    canonical_dtypes = [jax.dtypes.canonicalize_dtype(t) if isinstance(t, np.dtype) else str(t) for t in dtypes]
    return jax.tree.structure(item), tuple(np.shape(array) for array in arrays), tuple(canonical_dtypes)


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


def canonical(batch: PyTree, name: str = "batch") -> PyTree:
    """Turn the leaves of a batch into arrays of the dtypes that JAX computes with.

    Without ``jax_enable_x64`` 64-bit numbers become 32-bit ones.

    Raises:
        BatchError: a leaf is not numeric, or an integer does not fit.

    >>> canonical((np.array([1, 2]), np.array([0.5])))
    (array([1, 2], dtype=int32), array([0.5], dtype=float32))
    """
    leaves, treedef = flattened(batch, name)
    return jax.tree.unflatten(treedef, [canonical_leaf(leaf, name) for leaf in leaves])


def flattened(batch: PyTree, name: str) -> tuple[list[Any], Any]:
    """Return the leaves of a batch and their structure.

    Raises:
        TypeError: it is no pytree; the message names the loader.

    >>> flattened({"x": 1, 0: 2}, "train_loader")
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


def canonical_leaf(leaf: Any, name: str) -> Any:
    """Bring one leaf into the form that ``canonical`` describes."""
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
    ant_jax.data.BatchError: batch 7 has no examples: 0: float64[0,3], 1: float64[0]. Leave it out of the loader
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
