"""What one callback has open while runs go on: each run its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ant_jax._resources import Resources


Opened = TypeVar("Opened")

# Of hooks that are called by hand with an object that is no trainer.
_by_hand = Resources()


class PerRun(Generic[Opened]):
    """The key of one callback in ``trainer.resources``; it holds nothing itself.

    Args:
        close: closes the resource.
    """

    def __init__(self, close: Callable[[Opened], Any] | None = None):
        self._close = close

    def of(self, trainer: Any) -> Opened | None:
        """Return what the callback has open in a run."""
        return _resources_of(trainer).get(self)

    def open(self, trainer: Any, opened: Opened) -> Opened:
        """Keep a resource, in place of the one before, until the run ends; returns it."""
        return _resources_of(trainer).open(self, opened, self._close)

    def take(self, trainer: Any) -> Opened | None:
        """Return what the callback has open in a run, for the caller to close."""
        return _resources_of(trainer).take(self)

    def close(self, trainer: Any) -> None:
        """Close what the callback has open in a run, if it has."""
        _resources_of(trainer).close(self)


def _resources_of(trainer: Any) -> Resources:
    return getattr(trainer, "resources", _by_hand)
