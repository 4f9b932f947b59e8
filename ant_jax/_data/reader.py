"""Any iterable of batches, read over the epochs of a run."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from ant_jax._data.batches import BatchError
from ant_jax._data.loaders import cannot_go_on, has_state, refuse_no_iterable


_logger = logging.getLogger("ant_jax")

# What ``get_state`` gave, ``None`` for the beginning of the iterable, and the batches that follow it.
Place = tuple[Any, int]


class Reader:
    """The batches of a loader, and where it is.

    Without a limit every epoch is the loader from its beginning to its end. With one, each epoch goes on where the last
    has ended, and a loader that ends is begun anew.

    Args:
        loader: any iterable; an iterator is its own iterator.
        name: what to call it in errors.
        limit: batches in an epoch, or ``None``.
        place: where it was, as ``place`` returned it, for the first epoch.

    Attributes:
        read: the batches of the epoch that are read, with those that were done before.
        begun_anew: whether the loader ended, and was begun anew, before the batch that was read last.

    Raises:
        TypeError: the loader cannot be iterated over.
    """

    def __init__(self, loader: Any, name: str, limit: int | None = None, place: Place | None = None):
        refuse_no_iterable(loader, name)
        self._loader, self._name, self._limit, self._saved = loader, name, limit, place
        self._iterator: Any = None
        self._has_state = False
        self._since_beginning: int | None = 0  # batches; ``None``, if nobody can tell
        self.read, self.begun_anew = 0, False

    def batches(self, epoch: int, done: int) -> Iterator[Any]:
        """Return the batches of an epoch, without an end if there is a limit, after those that are done.

        Raises:
            BatchError: the loader cannot be put there.
        """
        self.read, self.begun_anew = done, False
        if self._iterator is None or self._limit is None:
            self._begin()
            self._put(epoch, done)
        return self._following()

    def _begin(self) -> None:
        self._iterator, self._since_beginning = iter(self._loader), 0
        self._has_state = has_state(self._iterator)

    def _put(self, epoch: int, done: int) -> None:
        saved, self._saved = self._saved, None
        if self._has_state and saved is not None and saved[0] is not None:
            self._iterator.set_state(copy.deepcopy(saved[0]))  # a copy: it may go on with the very object
            self._skip(saved[1])
            self._since_beginning = None
        elif self._is_own_iterator:
            self._since_beginning = None
            if done and not self._has_state:
                raise BatchError(cannot_go_on(self._loader, self._name))
        else:
            self._skip_from_beginning(saved, epoch, done)

    def _skip_from_beginning(self, saved: Place | None, epoch: int, done: int) -> None:
        skipped = done
        if self._limit is not None and saved is not None and saved[0] is None:
            skipped = saved[1]
        elif self._limit is not None and done:
            skipped += epoch * self._limit
        if skipped and not self._has_state and not isinstance(self._loader, Sequence):
            _logger.warning(
                "%s cannot be put at a position: its first %d batches%s are read and left out. The run goes on exactly "
                "if it gives the same batches, in the same order, every time",
                self._name,
                skipped,
                "" if self._limit is not None else f" of epoch {epoch}",
            )
        self._skip(skipped)

    def _skip(self, batches: int) -> None:
        while batches:
            skipped = sum(1 for _ in itertools.islice(self._iterator, batches))
            self._since_beginning, batches = skipped, batches - skipped
            if not skipped or self._limit is None:
                return
            if batches:
                self._begin()

    def _following(self) -> Iterator[Any]:
        while True:
            try:
                batch = next(self._iterator)
            except StopIteration:
                if not self._may_begin_anew:
                    return
                self._begin()
                self.begun_anew = True
                continue
            if self._since_beginning is not None:
                self._since_beginning += 1
            self.read += 1
            yield batch
            self.begun_anew = False

    @property
    def _may_begin_anew(self) -> bool:
        """Whether an epoch may go over the loader's end: not, when the loader is shorter than an epoch."""
        return self._limit is not None and (self._since_beginning is None or self._since_beginning >= self._limit)

    @property
    def is_read_once(self) -> bool:
        """Whether the loader is an iterator that cannot be put back, so that what is read of it is gone."""
        return self._is_own_iterator and not self._has_state

    @property
    def _is_own_iterator(self) -> bool:
        return self._iterator is self._loader

    def place(self) -> Place | None:
        """Return where the loader is; ``None`` where the batches that are done in the epoch say so, or nothing can."""
        if self._has_state:
            return copy.deepcopy(self._iterator.get_state()), 0  # a copy: it may go on with the very object
        if self._limit is None or self._is_own_iterator or self._since_beginning is None:
            return None
        return None, self._since_beginning

    def put_back(self, used: int, place: Place | None) -> None:
        """Put an iterator that was given itself behind the ``used`` batches of the epoch, if more of them were read.

        One that cannot be put anywhere has lost them, which is said (logger ``ant_jax``).
        """
        unused = self.read - used
        if unused <= 0 or not self._is_own_iterator:
            return
        if not self._has_state:
            _logger.warning(
                "%s has given %d batches that were not used, and cannot be put back: what reads it next goes on after "
                "them. With fit(..., prefetch=0) a batch is read when it is needed, and an iterator with get_state and "
                "set_state is put back",
                self._name,
                unused,
            )
        elif place is not None:
            self._iterator.set_state(place[0])
            self._skip(place[1])
