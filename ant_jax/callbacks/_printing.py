"""Print where a progress bar may be on the screen, and where there may be no screen at all: no print ends a run."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


# Around what only shows something: a run is worth more than that.
QUIETLY = contextlib.suppress(Exception)


class Stream:
    """A text stream to which writing never fails.

    A stream may be missing (``None``, as under ``pythonw``), closed, at the end of a broken pipe, or without a method.
    Then nothing is written. Characters that its encoding lacks are written as ``?``.

    Args:
        wrapped: the stream.
    """

    def __init__(self, wrapped: Any):
        self._wrapped = wrapped

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with QUIETLY:
            return bool(self._wrapped.isatty())
        return False

    def takes(self, text: str) -> bool:
        """Whether its encoding has the characters of a text."""
        try:
            text.encode(getattr(self._wrapped, "encoding", None) or "utf-8")
        except (LookupError, TypeError, UnicodeError):
            return False
        return True

    def write(self, text: str) -> int:
        """Write as much of a text as can be written; returns the length of the text."""
        with QUIETLY:
            try:
                self._wrapped.write(text)
            except UnicodeEncodeError:
                encoding = getattr(self._wrapped, "encoding", None) or "ascii"
                self._wrapped.write(text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        """Hand what was written over to the system."""
        with QUIETLY:
            self._wrapped.flush()

    def fileno(self) -> int:
        """The file descriptor; tqdm asks for the width of the terminal by it."""
        return self._wrapped.fileno()

    def __eq__(self, other: object) -> bool:  # tqdm compares streams, to clear the bars on the one that it writes to
        return self._wrapped == getattr(other, "_wrapped", other)

    def __hash__(self) -> int:
        return hash(self._wrapped)


def print_beside_bars(line: str) -> None:
    """Print a line and leave tqdm's bars intact."""
    from tqdm import tqdm

    with QUIETLY:  # there may be bars that are not ours
        tqdm.write(line, file=Stream(sys.stdout))
