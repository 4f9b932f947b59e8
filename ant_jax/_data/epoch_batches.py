"""Any iterable of batches, checked and cut into chunks for the engine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._data.array_loader import ArrayLoader
from ant_jax._data.batches import (
    READ_AGAIN,
    BatchError,
    NoBatches,
    aligned_empty,
    batch_size_of,
    flatten_batch,
    refuse_empty,
    to_leaf,
)
from ant_jax._data.loaders import length_of, refuse_bad_length, refuse_endless
from ant_jax._data.reader import Place, Reader
from ant_jax._trees import PyTree, differences


class Loaders(NamedTuple):
    """What a run reads, and how much of it; see ``Trainer.fit``.

    Attributes:
        train: any iterable of batches.
        val: the same, or ``None``.
        steps_per_epoch: batches of an epoch, or ``None`` when the loader ends.
        validation_steps: batches of an evaluation at most, or ``None``.
        prefetch: batches to read beyond the one that is trained on, at most; ``None``: as many as a launch may want,
            and of an iterator that cannot be put back no more than host callbacks let pass without a look.
    """

    train: Any
    val: Any = None
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    prefetch: int | None = None

    def refuse_bad_lengths(self, epochs: int) -> None:
        """Raise BatchError if it can be told beforehand that a loader has no end, or one too early."""
        refuse_bad_length(self.train, "train_loader", epochs, self.steps_per_epoch)
        if self.validation_steps is None:
            refuse_endless(self.val, "val_loader", "validation_steps")
            refuse_bad_length(self.val, "val_loader", epochs)


class Chunk(NamedTuple):
    """Consecutive batches of one shape, ready for the device.

    Attributes:
        batches: each leaf ``[rows, batch, ...]``; rows from ``filled`` on hold nothing. Not stacked, ``[batch, ...]``,
            when it was asked for single batches.
        filled: batches in it.
        examples: examples in each.
        last: whether the epoch ends with this chunk; ``None``: not known yet.
        places: where the loader was before each batch, and after the last; ``None`` when batches are counted.
    """

    batches: PyTree
    filled: int
    examples: int
    last: bool | None
    places: Sequence[Place | None] | None = None


def _never(done: int) -> bool:
    return False


class EpochBatches:
    """The batches of one epoch of any loader, checked and cut into chunks.

    Args:
        loader: an ``ArrayLoader``, or any iterable of batches; leaves that are not arrays yet, such as torch tensors,
            are taken through numpy.
        name: what to call the loader in errors.
        epoch: which epoch.
        start: batches of the epoch that are done, when a run goes on inside it.
        position: examples in them.
        limit: batches in an epoch, when the loader has no end; ``None``: until the loader ends.
        may_end: whether the loader may end before the limit.
        reader: of the loader, if that is read over many epochs, and no ``ArrayLoader``.

    Attributes:
        first: the first batch.
        place: where the loader was before it, if that can tell.

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
        may_end: bool = False,
        reader: Reader | None = None,
    ):
        self._loader, self._name, self._epoch, self._limit, self._may_end = loader, name, epoch, limit, may_end
        self._start, self._position = start, position
        if limit is not None and start > limit:
            raise BatchError(f"{name}: {start} batches of epoch {epoch} are done, more than steps_per_epoch={limit}")
        if start == limit:
            raise NoBatches(self._nothing())
        self._reader: Reader | None = None
        if isinstance(loader, ArrayLoader):
            batches = loader.batches(epoch, position)
        else:
            self._reader = Reader(loader, name, limit) if reader is None else reader
            batches = self._reader.batches(epoch, start)
        self._first: list[Any]
        self._form: _Form
        self.first: PyTree
        self._batches = (_leaves_of(batch, name) for batch in batches)
        self.place = self._place = self._where()
        try:
            self._take_as_first(*next(self._batches))
        except StopIteration:
            raise NoBatches(self._nothing()) from None
        except Exception as error:
            error.add_note(f"in the first batch of {name} in epoch {epoch}")
            raise
        refuse_empty(self.first, self._which(start))

    def _where(self) -> Place | None:
        return None if self._reader is None else self._reader.place()

    @property
    def read(self) -> int:
        """Batches of the epoch that are read, as far as it matters: those of an ``ArrayLoader`` are not lost."""
        return 0 if self._reader is None else self._reader.read

    @property
    def is_read_once(self) -> bool:
        """Whether what is read of the loader is gone, because it is an iterator that cannot be put back."""
        return self._reader is not None and self._reader.is_read_once

    @contextlib.contextmanager
    def putting_back(self, used: Callable[[], tuple[int, Place | None]]) -> Iterator[None]:
        """Put an iterator back behind the last batch that was used, however the body ends.

        Args:
            used: returns how many batches of the epoch were used, and where the loader was then.
        """
        try:
            yield
        except BaseException as error:
            try:
                self._put_back(used)
            except Exception as failure:
                error.add_note(f"{self._name} could not be put back where the run has ended: {failure!r}")
            raise
        self._put_back(used)

    def _put_back(self, used: Callable[[], tuple[int, Place | None]]) -> None:
        if self._reader is not None:
            self._reader.put_back(*used())

    @property
    def length(self) -> int | None:
        """Batches like these in a whole epoch, ``None`` when neither the loader nor the limit tells."""
        if self._limit is not None and not self._may_end:
            return self._limit
        lengths = [length for length in (self._limit, length_of(self._loader)) if length is not None]
        return min(lengths, default=None)

    @property
    def epoch_length(self) -> int | None:
        """Batches in this very epoch, whose first ones may have been of another size; ``None`` as for ``length``."""
        if self._limit is not None or not isinstance(self._loader, ArrayLoader):
            return self.length
        whole, rest = self._loader.left(self._position)
        return self._start + whole + bool(rest)

    def chunks(
        self, rows: int | None, seconds: float, *, peek: bool = True, pauses: Callable[[int], bool] = _never
    ) -> Iterator[Chunk]:
        """Cut the epoch into chunks.

        Args:
            rows: batches in a chunk at most; ``None`` for single batches that are not stacked.
            seconds: a chunk is closed early when the loader has taken so long for it.
            peek: whether to read the batch after a chunk before the chunk is given, which tells whether that is the
                last; otherwise only ``limit`` tells.
            pauses: returns whether to close a chunk when so many batches of the epoch are read. An ``ArrayLoader``'s
                chunks are closed where they are full.
        """
        if isinstance(self._loader, ArrayLoader):
            return self._gathered(self._loader, rows)
        return self._filled(rows, seconds, peek, pauses)

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

    def _filled(self, rows: int | None, seconds: float, peek: bool, pauses: Callable[[int], bool]) -> Iterator[Chunk]:
        """Chunks filled batch by batch; an exception of the loader comes after the batches before it."""
        stack, deadline = None, 0.0
        batch, done, failure = (self._first, self._form), self._start, None
        while batch is not None:
            leaves, form = batch
            if stack is not None and form is not stack.form:
                yield stack.finished(self._place, last=False)
                stack = None
            if stack is None:
                stack, deadline = _Stack(rows, leaves, form), time.monotonic() + seconds
            stack.add(leaves, self._place)  # before the loader is asked for more, so that it may reuse its buffers
            done += 1
            full = stack.filled == (rows or 1) or pauses(done)
            if full and not peek and done != self._limit:
                if form is not self._form:
                    self._refuse_other_form(leaves, form, done - 1, last=True)  # which is not known yet
                yield stack.finished(self._where(), last=None if self._limit is None else False)
                stack = None
            try:
                batch = self._following(done)
            except Exception as error:
                batch, failure = None, error
            last = batch is None and failure is None
            if batch is not None and done == self._start + 1 and self._begun_anew:
                self._take_as_first(*batch)  # the one before may have been a shorter one, which ended the loader
            if form is not self._form:
                self._refuse_other_form(leaves, form, done - 1, last or self._begun_anew)
            if stack is not None and (batch is None or full or time.monotonic() > deadline):
                yield stack.finished(self._place, last)
                stack = None
        if failure is not None:
            raise failure

    def _following(self, done: int) -> tuple[list[Any], _Form] | None:
        """Fetch the batch after ``done`` others; ``None`` when the epoch is over."""
        try:
            self._place = self._where()
            batch = None if done == self._limit else next(self._batches, None)
        except Exception as error:
            error.add_note(f"in {self._name}, after {done} batches of epoch {self._epoch}")
            raise
        if batch is None:
            self._refuse_early_end(done)
        elif batch[1] == self._form:
            return batch[0], self._form  # the very object
        return batch

    def _take_as_first(self, leaves: list[Any], form: _Form) -> None:
        self._first, self._form, self.first = leaves, form, jax.tree.unflatten(form.treedef, leaves)

    @property
    def _begun_anew(self) -> bool:
        return self._reader is not None and self._reader.begun_anew

    def _which(self, batch_idx: int) -> str:
        return f"{self._name}, batch {batch_idx} of epoch {self._epoch}"

    def _refuse_other_form(self, leaves: list[Any], form: _Form, batch_idx: int, last: bool) -> None:
        """Raise BatchError unless a batch of another form than the first is a shorter one that ends the loader."""
        where = self._which(batch_idx)
        batch = jax.tree.unflatten(form.treedef, leaves)
        refuse_empty(batch, where)
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
        if self._limit is not None and batches < self._limit and not self._may_end:
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
    leaves, treedef = flatten_batch(batch, name)
    leaves = [to_leaf(leaf, name) for leaf in leaves]
    return leaves, _Form(treedef, [(leaf.shape, leaf.dtype) for leaf in leaves])


class _Stack:
    """Batches of one form, copied into rows as they come, so that a loader may reuse its buffers."""

    def __init__(self, rows: int | None, leaves: list[Any], form: _Form):
        self._rows, self.form = rows, form
        self._places: list[Place | None] = []
        self._examples = batch_size_of(leaves)
        self._kept: list[list[Any]] | None = None
        self._buffers: list[np.ndarray] = []
        if rows is None or any(isinstance(leaf, jax.Array) for leaf in leaves):
            self._kept = []
        else:
            self._buffers = [aligned_empty((rows, *shape), dtype) for shape, dtype in form.leaves]
        self.filled = 0

    def add(self, leaves: list[Any], place: Place | None) -> None:
        self._places.append(place)
        if self._kept is not None:
            self._kept.append([leaf if isinstance(leaf, jax.Array) else np.array(leaf) for leaf in leaves])
        for buffer, leaf in zip(self._buffers, leaves, strict=self._kept is None):
            buffer[self.filled] = leaf
        self.filled += 1

    def finished(self, place: Place | None, last: bool | None) -> Chunk:
        if self._kept is None:
            leaves = self._buffers
        elif self._rows is None:
            leaves = self._kept[0]
        else:  # arrays on the device: stacked there, always as many, so that the stacking compiles once
            rows = self._kept + [self._kept[-1]] * (self._rows - self.filled)
            leaves = [jnp.stack(column) for column in zip(*rows, strict=True)]
        places = None if place is None else [*self._places, place]
        return Chunk(jax.tree.unflatten(self.form.treedef, leaves), self.filled, self._examples, last, places)


def _one_row(batch: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), batch)
