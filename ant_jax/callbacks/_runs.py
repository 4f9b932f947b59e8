"""What callbacks have open while runs go on: each run its own."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar


_logger = logging.getLogger("ant_jax")

Opened = TypeVar("Opened")


class PerRun(Generic[Opened]):
    """What one callback has open, for each run by itself: a resource of the host, no part of the run's state.

    Runs of one trainer may go on at the same time, in threads or in each other's hooks. A run is told by the trainer
    that its hooks are given, which ``fit`` makes for each. What a run has left open, because its last hooks were left
    out, is closed when the run is gone. A copy has nothing open.

    Args:
        close: closes what is open.
    """

    def __init__(self, close: Callable[[Opened], Any] = lambda opened: None):
        self._close = close
        self._opened: dict[int, Opened] = {}

    def of(self, trainer: Any) -> Opened | None:
        """Return what a run has open."""
        return self._opened.get(id(trainer))

    def values(self) -> list[Opened]:
        """Return what all runs have open."""
        return list(self._opened.values())

    def open(self, trainer: Any, opened: Opened) -> Opened:
        """Note what a run has opened, in the place of what it had; returns it."""
        if id(trainer) not in self._opened:
            with contextlib.suppress(TypeError):  # a hook that is called by hand may be given None
                weakref.finalize(trainer, self._close_at, id(trainer)).atexit = False
        self._opened[id(trainer)] = opened
        return opened

    def take(self, trainer: Any) -> Opened | None:
        """Return what a run has open, for the caller to close."""
        return self._opened.pop(id(trainer), None)

    def close(self, trainer: Any) -> None:
        """Close what a run has open, if it has."""
        self._close_at(id(trainer))

    def _close_at(self, key: int) -> None:
        opened = self._opened.pop(key, None)
        if opened is not None:
            self._close(opened)

    def __reduce__(self) -> Any:
        return PerRun, (self._close,)


_claimed: set[str] = set()
_claiming = threading.Lock()


class Claim:
    """The right of a run to write to a path, until it is released.

    Args:
        owner: the factory, for the warning.
        path: of a file or a directory.
        suffix: of the path.

    Attributes:
        path: the same; or, while another run has that, one beside it with the same suffix.
    """

    def __init__(self, owner: str, path: str, suffix: str = ""):
        stem = path.removesuffix(suffix).rstrip("/")
        beside = (f"{stem}-{number}{suffix}" for number in itertools.count(2))
        with _claiming:
            self.path = next(free for free in itertools.chain([path], beside) if os.path.abspath(free) not in _claimed)
            self._place = os.path.abspath(self.path)
            _claimed.add(self._place)
        if self.path != path:
            _logger.warning(
                "%s: another run of this process is writing to %s, so this one writes to %s; give trainers that train "
                "at the same time callbacks with paths of their own",
                owner,
                path,
                self.path,
            )

    def release(self) -> None:
        """Let other runs write there."""
        with _claiming:
            _claimed.discard(self._place)
