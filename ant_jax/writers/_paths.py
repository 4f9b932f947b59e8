"""Paths that runs write to: one run at a time, and a file at once or not at all."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import pathlib
import threading
from collections.abc import Iterator


_logger = logging.getLogger("ant_jax")
_claimed: set[str] = set()
_claiming = threading.Lock()


class Claim:
    """The right of a run to write to a path, until it is released.

    Args:
        owner: what writes, for the warning.
        path: of a file or a directory.
        suffix: of the path.

    Attributes:
        path: the same; while another run has that, one beside it with the same suffix.
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


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a path to write to; the file takes the place of ``path`` at once, or, after an exception, not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".new.{path.name}")  # with the suffix, because it may decide the format
    try:
        yield beside
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
