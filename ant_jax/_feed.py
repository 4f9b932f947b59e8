"""Any iterable of batches, checked and cut into chunks for the engine."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._trees import PyTree, differences
from ant_jax.data import (
    READ_AGAIN,
    ArrayLoader,
    BatchError,
    NoBatches,
    aligned_empty,
    batch_size_of,
    cannot_go_on,
    canonical_leaf,
    has_state,
    length_of,
)


_logger = logging.getLogger("ant_jax")


class Chunk(NamedTuple):
    """Consecutive batches of one shape, ready for the device.

    Attributes:
        batches: each leaf ``[rows, batch, ...]``; rows from ``filled`` on hold nothing. Not stacked, ``[batch, ...]``,
            when it was asked for single batches.
        filled: batches in it.
        examples: examples in each.
        last: whether the epoch ends with this chunk.
        loader_state: where the loader was before it, if that can tell.
    """

    batches: PyTree
    filled: int
    examples: int
    last: bool
    loader_state: Any = None


class Feed:
    """The batches of one epoch of any loader, checked and cut into chunks.

    Args:
        loader: an ``ArrayLoader``, or any iterable of batches; leaves that are not arrays yet, such as torch tensors,
            are taken through numpy.
        name: what to call the loader in errors.
        epoch: which epoch.
        start: batches of the epoch that are done, when a run goes on inside it.
        position: examples in them.
        limit: batches in an epoch, when the loader has no end; ``None``: until the loader ends.
        loader_state: where a loader with ``get_state`` was before, and how many batches were read since.

    Attributes:
        first: the first batch.

    Raises:
        TypeError: the loader cannot be iterated over.
        NoBatches: it gave no batch.
        BatchError: it cannot be put where the run goes on.
    """

    def __init__(
        self,
        loader: Any,
        name: str,
        epoch: int = 0,
        start: int = 0,
        position: int = 0,
        limit: int | None = None,
        loader_state: tuple[Any, int] | None = None,
    ):
        self._loader, self._name, self._epoch, self._limit = loader, name, epoch, limit
        self._start, self._position = start, position
        if limit is not None and start > limit:
            raise BatchError(f"{name}: {start} batches of epoch {epoch} are done, more than steps_per_epoch={limit}")
        if start == limit:
            raise NoBatches(self._nothing())
        self._iterator: Any = None  # the loader's, if it can tell where it is
        if isinstance(loader, ArrayLoader):
            batches = loader.batches(epoch, position)
        elif isinstance(loader, Iterable):
            batches = self._positioned(loader, loader_state)
        else:
            raise TypeError(f"{name} must be an iterable of batches, got {loader!r}")
        self._batches = (_leaves_of(batch, name) for batch in batches)
        self._loader_state = self._where()
        try:
            self._first, self._form = next(self._batches)
        except StopIteration:
            raise NoBatches(self._nothing()) from None
        self.first = jax.tree.unflatten(self._form.treedef, self._first)

    def _positioned(self, loader: Iterable[Any], loader_state: tuple[Any, int] | None) -> Iterator[Any]:
        """Return the batches from where the run goes on."""
        iterator, skipped = iter(loader), self._start
        if has_state(iterator):
            self._iterator = iterator
            if loader_state is not None:
                iterator.set_state(loader_state[0])  # type: ignore[attr-defined]
                skipped = loader_state[1]
            elif iterator is loader:
                skipped = 0  # it is where the run left it
        elif skipped and iterator is loader:
            raise BatchError(cannot_go_on(loader, self._name))
        elif skipped and not isinstance(loader, Sequence):
            _logger.warning(
                "%s cannot be put at a position: its first %d batches of epoch %d are read and left out. The run goes "
                "on exactly if it gives the same batches, in the same order, every time",
                self._name,
                skipped,
                self._epoch,
            )
        for _ in itertools.islice(iterator, skipped):
            pass
        return iterator

    def _where(self) -> Any:
        # A copy: an iterator may go on with the very object that it gives.
        return None if self._iterator is None else copy.deepcopy(self._iterator.get_state())

    @property
    def length(self) -> int | None:
        """Batches like these in a whole epoch, ``None`` when neither the loader nor the limit tells."""
        return self._limit if self._limit is not None else length_of(self._loader)

    @property
    def epoch_length(self) -> int | None:
        """Batches in this very epoch, whose first ones may have been of another size; ``None`` as for ``length``."""
        if self._limit is not None or not isinstance(self._loader, ArrayLoader):
            return self.length
        whole, rest = self._loader.left(self._position)
        return self._start + whole + bool(rest)

    def chunks(self, rows: int | None, seconds: float) -> Iterator[Chunk]:
        """Cut the epoch into chunks.

        Args:
            rows: batches in a chunk at most; ``None`` for single batches that are not stacked.
            seconds: a chunk is closed early when the loader has taken so long for it.
        """
        if isinstance(self._loader, ArrayLoader):
            return self._gathered(self._loader, rows)
        return self._filled(rows, seconds)

    def _gathered(self, loader: ArrayLoader, rows: int | None) -> Iterator[Chunk]:
        """An ``ArrayLoader``'s chunks, each gathered by one indexing operation, or its single batches."""
        whole, rest = loader.left(self._position)
        available = self._start + whole + bool(rest)
        self._refuse_early_end(available)
        end = min(available, self._limit or available)
        whole_end, position = min(self._start + whole, end), self._position
        if rows is None:
            for done, batch in zip(range(self._start, end), loader.batches(self._epoch, position), strict=False):
                yield Chunk(batch, 1, loader.batch_size if done < whole_end else rest, last=done + 1 == end)
            return
        for start in range(self._start, whole_end, rows):
            count = min(rows, whole_end - start)
            stacked = loader.stacked(self._epoch, position, count, rows)
            position += count * loader.batch_size
            yield Chunk(stacked, count, loader.batch_size, last=start + count == end)
        if whole_end < end:
            batch = next(loader.batches(self._epoch, position))
            yield Chunk(jax.tree.map(lambda leaf: leaf[None], batch), 1, rest, last=True)

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
                stack, deadline = _Stack(rows, leaves, form, self._loader_state), time.monotonic() + seconds
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
            self._loader_state = self._where()
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
                f"{READ_AGAIN}"
            )
        return f"{message}; it is empty"


class _Form(NamedTuple):
    """Structure, shapes and dtypes of a batch."""

    treedef: Any
    leaves: list[tuple[Any, Any]]


def _leaves_of(batch: PyTree, name: str) -> tuple[list[Any], _Form]:
    leaves, treedef = jax.tree.flatten(batch)
    leaves = [canonical_leaf(leaf, name) for leaf in leaves]
    return leaves, _Form(treedef, [(leaf.shape, leaf.dtype) for leaf in leaves])


class _Stack:
    """Batches of one form, copied into rows as they come, so that a loader may reuse its buffers."""

    def __init__(self, rows: int | None, leaves: list[Any], form: _Form, loader_state: Any):
        self._rows, self._treedef, self._loader_state = rows, form.treedef, loader_state
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
        return Chunk(jax.tree.unflatten(self._treedef, leaves), self.filled, self._examples, last, self._loader_state)


class Ahead:
    """An iterator that can be told to fetch its next item early, so that fetching overlaps with other work.

    An exception in fetching early is raised when the item is asked for.

    Args:
        iterator: what to fetch from.
        prepare: what to make of every item.
        timed: makes the context in which to fetch.
    """

    def __init__(
        self,
        iterator: Iterator[Any],
        prepare: Callable[[Any], Any],
        timed: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self._iterator, self._prepare, self._timed = iterator, prepare, timed
        self._fetched: list[Any] = []
        self._failure: Exception | None = None

    def fetch(self) -> None:
        """Fetch the next item now, unless it is here already."""
        if self._fetched or self._failure is not None:
            return
        try:
            with self._timed():
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
