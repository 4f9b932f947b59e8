"""One run at a time saves into a directory."""

from __future__ import annotations

import contextlib
import datetime
import os
import pathlib
import socket
import weakref
from io import FileIO

from ant_jax._checkpoint.manifest import CheckpointError


try:
    import fcntl
except ImportError:  # Windows has no such locks; there, nobody is kept out
    fcntl = None

NAME = ".lock"

# The files of all locks of this process. A forked child inherits them, and the system would keep a lock for as long as
# the child lives, although the process that took it is dead.
_files: weakref.WeakSet[FileIO] = weakref.WeakSet()


def _close_all() -> None:
    for file in list(_files):
        file.close()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_close_all)


class DirectoryLock:
    """Holds a directory for one writer, until ``release`` or the end of the process, however that comes.

    A child that the process forks holds nothing.

    Args:
        directory: which must exist.

    Raises:
        CheckpointError: another writer, in this process or in another one, holds it.
        OSError: it cannot be written to.
    """

    def __init__(self, directory: pathlib.Path):
        self._path = directory / NAME
        self._file = FileIO(self._path, "a+")
        _files.add(self._file)
        try:
            if fcntl is not None:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().decode().strip() or "another run"
            self._file.close()
            raise CheckpointError(
                f"{directory} is in use by {holder}; wait for it to end, or save into another directory (each "
                f"checkpoint callback needs one of its own)"
            ) from None
        self._file.truncate(0)
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n".encode())

    @property
    def held(self) -> bool:
        """Whether the directory is still the one that was locked, and not removed or made anew."""
        try:
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        except (OSError, ValueError):  # ValueError: closed
            return False

    def release(self) -> None:
        """Let others have it; the file stays, since removing it would let two writers lock two files."""
        with contextlib.suppress(OSError, ValueError):
            self._file.truncate(0)
            if fcntl is not None:  # closing is not enough where a child that C code has forked has inherited the file
                fcntl.flock(self._file, fcntl.LOCK_UN)
        self._file.close()
