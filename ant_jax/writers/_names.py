"""What logs are called in a tracker."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any


class UniqueNames:
    """Names that a tracker accepts, another one for every log.

    The same log has the same name in every record, also in those of a run that goes on.

    Args:
        accepted: turns the name of a log into one that the tracker accepts.
        there: the names in the run that goes on.
        folders: whether a name may be a folder of others, ``a`` beside ``a/b``.

    >>> UniqueNames(str.lower).rename({"a": 1.0, "A": 2.0})
    {'a': 1.0, 'a-d3d99e8b': 2.0}
    """

    def __init__(self, accepted: Callable[[str], str], there: Iterable[str] = (), *, folders: bool = True):
        self._accepted, self._there, self._folders = accepted, frozenset(there), folders
        self._names: dict[str, str] = {}

    def rename(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return the record under the names."""
        new = record.keys() - self._names.keys()
        # Names that the tracker accepts as they are come first, and a folder before what is in it.
        for log in sorted(new, key=lambda log: (self._accepted(log) != log, log)):
            self._names[log] = self._choose(log)
        return {self._names[log]: value for log, value in record.items()}

    def _choose(self, log: str) -> str:
        name = self._accepted(log)
        flat = name.replace("/", ".")
        apart = f"{flat}-{checksum(log)}"
        if apart in self._there:  # the run that goes on has told it apart
            return apart
        used = set(self._names.values())
        return next((free for free in (name, flat) if free not in used and not self._is_nested(free, used)), apart)

    def _is_nested(self, name: str, used: set[str]) -> bool:
        """Return whether a name is a folder of another one, or in it."""
        if self._folders:
            return False
        return any(other.startswith(f"{name}/") or name.startswith(f"{other}/") for other in used | self._there)


def checksum(log: str) -> str:
    """Return eight hexadecimal digits of a name."""
    return f"{zlib.crc32(log.encode(errors='surrogatepass')):08x}"


def in_utf8(log: str) -> str:
    """Escape what UTF-8 cannot encode."""
    return log.encode(errors="backslashreplace").decode()
