"""What callbacks have open while a run goes on."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple


class Resources:
    """What one call of ``fit`` or ``evaluate`` has open: files, connections, clocks, counters, by key.

    Hooks reach it as ``trainer.resources``. Every call has its own, so runs of one trainer at the same time, in threads
    or in each other's hooks, share nothing. ``fit`` and ``evaluate`` close what is left when they end.

    >>> resources = Resources()
    >>> resources.open("log", ["a file"], close=lambda file: print("closed", file))
    ['a file']
    >>> resources.get("log")
    ['a file']
    >>> with resources:
    ...     pass
    closed ['a file']
    """

    def __init__(self) -> None:
        self._opened: dict[Hashable, _Opened] = {}

    def get(self, key: Hashable) -> Any:
        """Return what is open under a key, or ``None``."""
        opened = self._opened.get(key)
        return None if opened is None else opened.resource

    def open(self, key: Hashable, resource: Any, close: Callable[[Any], Any] | None = None) -> Any:
        """Keep a resource until the run ends, in place of the one that the key has had, which is not closed.

        Args:
            key: a callback's own, such as its name.
            resource: any object.
            close: ``close(resource)`` closes it; ``None``: there is nothing to close.

        Returns:
            The resource.
        """
        self._opened[key] = _Opened(resource, close, contextvars.copy_context())
        return resource

    def take(self, key: Hashable) -> Any:
        """Return what is open under a key, for the caller to close, or ``None``."""
        opened = self._opened.pop(key, None)
        return None if opened is None else opened.resource

    def close(self, key: Hashable) -> None:
        """Close what is open under a key, if anything is."""
        opened = self._opened.pop(key, None)
        if opened is not None and opened.close is not None:
            opened.close(opened.resource)

    def of_type(self, kind: type[Any]) -> list[Any]:
        """Return the open resources of a class, in the order in which they were opened."""
        return [opened.resource for opened in self._opened.values() if isinstance(opened.resource, kind)]

    def __enter__(self) -> Resources:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        """Close all, the last one first; a failure does not hide ``error``, which gets it as a note."""
        failure: Exception | None = None
        while self._opened:
            key = next(reversed(self._opened))
            try:
                # In the context of the opening hook, because that is where `tolerate` handles failures.
                self._opened[key].context.run(self.close, key)
            except Exception as second:
                failure = failure or second
        if failure is not None and error is None:
            raise failure
        if failure is not None and error is not None:
            error.add_note(f"closing what callbacks had open failed too: {failure!r}")


class _Opened(NamedTuple):
    resource: Any
    close: Callable[[Any], Any] | None
    context: contextvars.Context
