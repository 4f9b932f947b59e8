"""Loaders: batches from arrays in memory, and any iterable of batches cut into chunks for the engine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._trees import PyTree, describe, differences, named_leaves


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
        ValueError: no arrays, arrays of different lengths, no examples, a bad ``batch_size`` or ``seed``.

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
            found = ", ".join(f"{path or 'arrays'}: {describe(leaf)}" for path, leaf in named_leaves(arrays).items())
            raise ValueError(f"ArrayLoader: arrays must share the length of their first axis, got {found or 'none'}")
        self._examples = len(self._leaves[0])
        if isinstance(batch_size, bool) or not isinstance(batch_size, int | np.integer) or batch_size < 1:
            raise ValueError(f"ArrayLoader: batch_size must be a positive whole number, got {batch_size!r}")
        if self._examples < (batch_size if drop_last else 1):
            raise ValueError(
                f"ArrayLoader: {self._examples} examples make no batch of {batch_size}"
                + (" when drop_last=True" if self._examples else "")
            )
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
            raise ValueError(f"ArrayLoader: seed must be a whole number from 0 on, got {seed!r}")
        self.batch_size, self.shuffle, self.seed, self.drop_last = int(batch_size), shuffle, seed, drop_last
        self._ordered: tuple[int, np.ndarray] | None = None  # the order of the epoch that was last asked for

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(self._examples, self.batch_size)
        return full + bool(rest and not self.drop_last)

    @property
    def ends_short(self) -> bool:
        """Whether the last batch of an epoch has fewer examples than ``batch_size``."""
        return not self.drop_last and self._examples % self.batch_size > 0

    def __iter__(self) -> Iterator[PyTree]:
        return self.batches(epoch=0)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PyTree]:
        """Iterate over the batches of an epoch, from batch ``start`` on."""
        order = self._order(epoch)
        for batch_idx in range(start, len(self)):
            rows = self._rows(order, batch_idx, 1)
            yield jax.tree.unflatten(self._treedef, [leaf[rows] for leaf in self._leaves])

    def stacked(self, epoch: int, start: int, count: int, rows: int) -> PyTree:
        """Return ``count`` whole batches from batch ``start`` on, each leaf ``[rows, batch_size, ...]``.

        Rows from ``count`` on hold nothing.
        """
        wanted = self._rows(self._order(epoch), start, count)
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

    def _rows(self, order: np.ndarray | None, start: int, count: int) -> Any:
        rows = slice(start * self.batch_size, (start + count) * self.batch_size)
        return rows if order is None else order[rows]


class Chunk(NamedTuple):
    """Consecutive batches of one shape, ready for the device.

    Attributes:
        batches: each leaf ``[rows, batch, ...]``; rows from ``filled`` on hold nothing. Not stacked, ``[batch, ...]``,
            when it was asked for single batches.
        filled: batches in it.
        examples: examples in each.
        last: whether the epoch ends with this chunk.
    """

    batches: PyTree
    filled: int
    examples: int
    last: bool


class Feed:
    """The batches of one epoch of any loader, checked and cut into chunks.

    Args:
        loader: an ``ArrayLoader``, or any iterable of batches; leaves that are not arrays yet, such as torch tensors,
            are taken through numpy.
        name: what to call the loader in errors.
        epoch: which epoch.
        start: batches to skip, when a run goes on inside an epoch.
        limit: batches in an epoch, when the loader has no end; ``None``: until the loader ends.

    Attributes:
        first: the first batch.

    Raises:
        TypeError: the loader cannot be iterated over.
        NoBatches: it gave no batch.
    """

    def __init__(self, loader: Any, name: str, epoch: int = 0, start: int = 0, limit: int | None = None):
        self._loader, self._name, self._epoch, self._start, self._limit = loader, name, epoch, start, limit
        if isinstance(loader, ArrayLoader):
            batches = loader.batches(epoch, start)
        elif isinstance(loader, Iterable):
            batches = itertools.islice(loader, start, None)
        else:
            raise TypeError(f"{name} must be an iterable of batches, got {loader!r}")
        self._batches = (_leaves_of(batch, name) for batch in batches)
        try:
            self._first, self._form = next(self._batches)
        except StopIteration:
            raise NoBatches(self._nothing()) from None
        self.first = jax.tree.unflatten(self._form.treedef, self._first)

    @property
    def length(self) -> int | None:
        """Batches in the whole epoch, ``None`` when neither the loader nor the limit tells."""
        return self._limit if self._limit is not None else length_of(self._loader)

    def chunks(self, rows: int | None, seconds: float) -> Iterator[Chunk]:
        """Cut the epoch into chunks.

        Args:
            rows: batches in a chunk at most; ``None`` for single batches that are not stacked.
            seconds: a chunk is closed early when the loader has taken so long for it.
        """
        if rows is not None and isinstance(self._loader, ArrayLoader):
            return self._gathered(self._loader, rows)
        return self._filled(rows, seconds)

    def _gathered(self, loader: ArrayLoader, rows: int) -> Iterator[Chunk]:
        """An ``ArrayLoader``'s chunks, each gathered by one indexing operation."""
        end = min(len(loader), self._limit or len(loader))
        self._refuse_early_end(end)
        whole_end = end - (end == len(loader) and loader.ends_short)
        for start in range(self._start, whole_end, rows):
            count = min(rows, whole_end - start)
            stacked = loader.stacked(self._epoch, start, count, rows)
            yield Chunk(stacked, count, loader.batch_size, last=start + count == end)
        if whole_end < end:
            batch = next(loader.batches(self._epoch, whole_end))
            yield Chunk(jax.tree.map(lambda leaf: leaf[None], batch), 1, batch_size_of(batch), last=True)

    def _filled(self, rows: int | None, seconds: float) -> Iterator[Chunk]:
        """Chunks filled batch by batch; an exception of the loader comes after the batches before it."""
        stack, deadline = None, 0.0
        batch, done, failure = (self._first, self._form), self._start, None
        while batch is not None:
            leaves, form = batch
            if stack is not None and form != self._form:
                yield stack.finished(last=False)
                stack = None
            if stack is None:
                stack, deadline = _Stack(rows, leaves, form), time.monotonic() + seconds
            stack.add(leaves)  # before the loader is asked for more, so that it may reuse its buffers
            done += 1
            try:
                batch = self._following(done)
            except Exception as error:
                batch, failure = None, error
            last = batch is None and failure is None
            if form != self._form:
                self._refuse_other_form(leaves, form, done - 1, last)
            if batch is None or stack.filled == (rows or 1) or time.monotonic() > deadline:
                yield stack.finished(last)
                stack = None
        if failure is not None:
            raise failure

    def _following(self, done: int) -> tuple[list[Any], _Form] | None:
        """Fetch the batch after ``done`` others; ``None`` when the epoch is over."""
        if done == self._limit:
            return None
        try:
            batch = next(self._batches, None)
        except Exception as error:
            error.add_note(f"in {self._name}, after {done} batches of epoch {self._epoch}")
            raise
        if batch is None:
            self._refuse_early_end(done)
        return batch

    def _refuse_other_form(self, leaves: list[Any], form: _Form, batch_idx: int, last: bool) -> None:
        where = f"{self._name}, batch {batch_idx} of epoch {self._epoch}"
        batch = jax.tree.unflatten(form.treedef, leaves)
        rows, expected = batch_size_of(batch), batch_size_of(self.first)
        if rows < expected and not differences(_one_row(self.first), _one_row(batch)):
            if last:
                return
            raise BatchError(
                f"{where} has {rows} examples and the first had {expected}; only the last batch of an epoch may have "
                f"fewer (each shape is a program of its own to compile)"
            )
        lines = "\n  ".join(differences(self.first, batch))
        raise BatchError(f"{where} has another structure, shape or dtype than the first:\n  {lines}")

    def _refuse_early_end(self, batches: int) -> None:
        if self._limit is not None and batches < self._limit:
            raise BatchError(
                f"{self._name} ended after {batches} batches of epoch {self._epoch}, before "
                f"steps_per_epoch={self._limit}"
            )

    def _nothing(self) -> str:
        message = f"{self._name} gave no batches in epoch {self._epoch}"
        if self._start:
            return f"{message} after the {self._start} that are done"
        if iter(self._loader) is self._loader:
            return (
                f"{message}: it is an iterator that has been read to its end, and an iterator can be read only once. "
                f"{_READ_AGAIN}"
            )
        return f"{message}; it is empty"


class _Form(NamedTuple):
    """Structure, shapes and dtypes of a batch."""

    treedef: Any
    leaves: list[tuple[Any, Any]]


def _leaves_of(batch: PyTree, name: str) -> tuple[list[Any], _Form]:
    leaves, treedef = jax.tree.flatten(batch)
    leaves = [_canonical_leaf(leaf, name) for leaf in leaves]
    return leaves, _Form(treedef, [(leaf.shape, leaf.dtype) for leaf in leaves])


class _Stack:
    """Batches of one form, copied into rows as they come, so that a loader may reuse its buffers."""

    def __init__(self, rows: int | None, leaves: list[Any], form: _Form):
        self._rows, self._treedef = rows, form.treedef
        self._examples = batch_size_of(leaves)
        self._kept: list[list[Any]] | None = None
        self._buffers: list[np.ndarray] = []
        if rows is None or any(isinstance(leaf, jax.Array) for leaf in leaves):
            self._kept = []
        else:
            self._buffers = [aligned_empty((rows, *shape), dtype) for shape, dtype in form.leaves]
        self.filled = 0

    def add(self, leaves: list[Any]) -> None:
        if self._kept is not None:
            self._kept.append([leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves])
        for buffer, leaf in zip(self._buffers, leaves, strict=self._kept is None):
            buffer[self.filled] = leaf
        self.filled += 1

    def finished(self, last: bool) -> Chunk:
        if self._kept is None:
            leaves = self._buffers
        elif self._rows is None:
            leaves = self._kept[0]
        else:  # arrays on the device: stacked there, always as many, so that the stacking compiles once
            rows = self._kept + [self._kept[-1]] * (self._rows - self.filled)
            leaves = [jnp.stack(column) for column in zip(*rows, strict=True)]
        return Chunk(jax.tree.unflatten(self._treedef, leaves), self.filled, self._examples, last)


def length_of(loader: Any) -> int | None:
    """Batches in an epoch of a loader; ``None`` when it cannot tell."""
    try:
        return len(loader)
    except TypeError:
        return None


def refuse_bad_length(loader: Any, name: str, epochs: int, limit: int | None = None) -> None:
    """Raise BatchError if it can be told beforehand that a loader will run out of batches."""
    once = isinstance(loader, Generator) or type(loader).__module__ in ("builtins", "itertools")
    if once and limit is None and epochs > 1 and isinstance(loader, Iterator):
        raise BatchError(
            f"{name} is a {type(loader).__name__}, which can be read only once, and there are {epochs} epochs to go. "
            f"{_READ_AGAIN}"
        )
    batches = length_of(loader)
    if limit is not None and batches is not None and batches < limit:
        raise BatchError(f"{name} has {batches} batches, fewer than steps_per_epoch={limit}")


_READ_AGAIN = (
    "Pass an iterable that starts again for every epoch (a list, an ArrayLoader, a DataLoader), or an endless iterator "
    "with steps_per_epoch"
)


def as_numpy(leaf: Any) -> np.ndarray:
    """Take a leaf of a batch through numpy: numbers, lists of numbers, torch tensors on the CPU."""
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise BatchError(f"a batch holds a {type(leaf).__name__} that numpy cannot read: {error}") from error
    if array.dtype == object or array.dtype.kind in "USMm":
        raise BatchError(
            f"a batch is a pytree of numeric arrays; it holds a {type(leaf).__name__} (dtype {array.dtype})"
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
    return jax.tree.map(lambda leaf: _canonical_leaf(leaf, name), batch)


_COMPUTED_WITH = frozenset(np.dtype(name) for name in ("float32", "int32", "uint8", "bool"))


def _canonical_leaf(leaf: Any, name: str) -> Any:
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


class Ahead:
    """An iterator that can be told to fetch its next item early, so that fetching overlaps with other work.

    An exception in fetching early is raised when the item is asked for.
    """

    def __init__(self, iterator: Iterator[Any], prepare: Callable[[Any], Any]):
        self._iterator, self._prepare = iterator, prepare
        self._fetched: list[Any] = []
        self._failure: Exception | None = None

    def fetch(self) -> None:
        """Fetch the next item now, unless it is here already."""
        if self._fetched or self._failure is not None:
            return
        try:
            for item in self._iterator:
                self._fetched.append(self._prepare(item))
                return
        except Exception as error:
            self._failure = error

    def __iter__(self) -> Iterator[Any]:
        while True:
            self.fetch()
            if self._failure is not None:
                raise self._failure
            if not self._fetched:
                return
            yield self._fetched.pop()


def _one_row(batch: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
