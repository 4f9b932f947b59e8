"""Text files of rows: what CSV and JSON lines share."""

from __future__ import annotations

import abc
import copy
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Self, TextIO

from ant_jax._arguments import check_path
from ant_jax.writers._paths import Claim, replacing
from ant_jax.writers._writer import Start, Writer


Row = dict[str, Any]


class TextFile(Writer):
    """A file of rows ``{"epoch": ..., "step": ..., ...}``; the subclass decides the format.

    A run that goes on drops the rows of what it does again, and a row that was torn when a process was killed, so the
    file ends like that of an uninterrupted run. A run from step 0 begins the file anew. While another run of the
    process writes the file, the run writes one beside it, ``digits-2.csv`` for ``digits.csv``, and logs a warning
    (logger ``ant_jax``).

    Args:
        path: of the file; its directory is made.

    Raises:
        ValueError: ``path`` is not the path of a file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        check_path(type(self).__name__, "path", path, file=True)
        self._path = pathlib.Path(path)
        self._claim: Claim | None = None
        self._file: TextIO | None = None
        self._row: Row = {}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({os.fspath(self._path)!r})"

    def open(self, start: Start) -> Self:
        """Claim the path, and keep the rows of the file that come before ``start``."""
        opened = copy.copy(self)
        claim = Claim(type(self).__name__, os.fspath(self._path), self._path.suffix)
        opened._claim, opened._path = claim, pathlib.Path(claim.path)
        try:
            rows = opened._read() if start.step else []
            opened._put([row for row in rows if _is_behind(row, start)])
        except BaseException:
            claim.release()
            raise
        return opened

    def write_scalars(self, step: int, scalars: Mapping[str, Any], *, epoch: int) -> None:
        """Add numbers to the row, which ``flush`` writes."""
        for column in ("epoch", "step"):
            if column in scalars:
                owner = type(self).__name__
                raise ValueError(
                    f"{owner}: a callback published a log named {column!r}, which is what {owner} itself writes in "
                    f"every row; publish it under another name"
                )
        self._row = {"epoch": epoch, "step": step, **self._row, **scalars}

    def flush(self) -> None:
        """Write the row, and hand it to the operating system."""
        row, self._row = self._row, {}  # also where writing fails
        if row:
            self._write(row)

    def close(self, error: BaseException | None) -> None:
        """Close the file, and let other runs have the path."""
        del error
        try:
            self._close_file()
        finally:
            if self._claim is not None:
                self._claim.release()

    @abc.abstractmethod
    def _write(self, row: Row) -> None:
        """Append a row."""

    @abc.abstractmethod
    def _parse(self, text: str) -> list[Row]:
        """Return the rows of whole lines."""

    @abc.abstractmethod
    def _format(self, rows: list[Row]) -> str:
        """Return the text of a file of these rows."""

    def _read(self) -> list[Row]:
        """Return the rows in the file, without one that a process was writing when it was killed."""
        text = self._path.read_bytes() if self._path.exists() else b""
        return self._parse(text[: text.rfind(b"\n") + 1].decode(errors="surrogatepass"))

    def _put(self, rows: list[Row]) -> None:
        """Replace the file by one of these rows, at once or not at all."""
        self._close_file()
        with replacing(self._path) as beside:
            beside.write_text(self._format(rows), encoding="utf-8", errors="surrogatepass", newline="")

    def _append(self, text: str) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8", errors="surrogatepass", newline="")
        self._file.write(text)
        self._file.flush()

    def _close_file(self) -> None:
        file, self._file = self._file, None  # also where closing fails
        if file is not None:
            file.close()


def _is_behind(row: Mapping[str, Any], start: Start) -> bool:
    """Return whether a run that begins at ``start`` does not write a row again.

    After an exception between the last batch of an epoch and the next epoch, the epoch can end anew at the very step of
    its row. The means over its batches, ``train_...``, tell its row from that of its last batches.
    """
    return int(row["step"]) <= start.step and (int(row["epoch"]) < start.epoch or "train_loss" not in row)
