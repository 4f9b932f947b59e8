"""Read the next chunk while the one before it is trained on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any


class Prefetcher:
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
