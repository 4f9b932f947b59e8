"""Logs as files."""

from __future__ import annotations

import csv
import functools
import io
import itertools
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np

from ant_jax._arguments import check_path, refuse_taken
from ant_jax._callback import Callback
from ant_jax.callbacks._background import replacing
from ant_jax.callbacks._records import recording
from ant_jax.callbacks._runs import Claim


def csv_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "csv_log") -> Callback:
    """Write the logs as a table, a row an epoch or a row every so many batches.

    On the host; the file is written in the background, and every row is there as soon as it is written. A run that goes
    on drops the rows of what it does again, and one that was torn when a process was killed, so the file ends like that
    of a run that was not interrupted; a run from step 0 begins the file anew. A log that appears later gets a column
    then. Arrays are left out. With ``every``, where a callback listed before this one raises in ``on_batch_end``, this
    one is not told of the batch, so a run that goes on from the exception's ``train_state`` has no row of it. A run
    that begins while another one of this process writes the file, such as a ``fit`` in a hook of that one, writes
    another file beside it, ``digits-2.csv`` for ``digits.csv``, and says so (logger ``ant_jax``, a warning).

    Args:
        path: of the file; its directory is made.
        every: a row of the means over every so many batches; ``None``: a row of ``on_epoch_end``'s logs an epoch.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback. The columns are ``epoch``, ``step`` (batches trained on) and the logs.

    Raises:
        ValueError: ``path`` is none of a file, or ``every`` is below 1; while training, if a log is named ``epoch`` or
            ``step``.

    >>> csv_log("runs/digits.csv")
    Callback(name='csv_log', hooks=on_train_begin, on_epoch_end, on_train_end, on_exception)
    """
    check_path("csv_log", "path", path, file=True)
    return recording("csv_log", name, functools.partial(_Table, pathlib.Path(path)), every, epochs=every is None)


def json_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "json_log") -> Callback:
    """Write the logs as JSON lines, one object an epoch, and one every so many batches.

    On the host; the file is written in the background, and every line is there as soon as it is written. A run that
    goes on drops the lines of what it does again, as in :func:`csv_log`, and lacks the line of a batch in whose
    ``on_batch_end`` a callback listed before this one raised. Runs at the same time write files of their own, as there,
    too. What is not finite is ``null``, an array a list, a complex number a string.

    Args:
        path: of the file; its directory is made.
        every: also a line of the means over every so many batches; ``None``: epochs only.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback. Every object has ``epoch``, ``step`` (batches trained on) and the logs.

    Raises:
        ValueError: ``path`` is none of a file, or ``every`` is below 1; while training, if a log is named ``epoch`` or
            ``step``.

    >>> json_log("runs/digits.jsonl", every=100)
    Callback(name='json_log', hooks=on_train_begin, on_batch_end, on_epoch_end, on_train_end, on_exception)
    """
    check_path("json_log", "path", path, file=True)
    return recording("json_log", name, functools.partial(_Lines, pathlib.Path(path)), every)


class _File:
    """A text file of rows, ``{"epoch": ..., "step": ..., ...}``, kept in a format that is up to the subclass.

    Attributes:
        owner: the factory, for errors.
    """

    owner: str

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: TextIO | None = None

    def open(self, memory: Any, epoch: int, step: int) -> Any:
        self._claim = Claim(self.owner, os.fspath(self._path), self._path.suffix)
        self._path = pathlib.Path(self._claim.path)
        try:
            rows = self._read() if step else []
            self._put([row for row in rows if _is_behind(row, epoch, step)])
        except BaseException:
            self._claim.release()
            raise
        return memory

    def close(self, error: BaseException | None) -> None:
        del error
        try:
            self._close_file()
        finally:
            self._claim.release()

    def _close_file(self) -> None:
        file, self._file = self._file, None  # also where closing fails
        if file is not None:
            file.close()

    def _read(self) -> list[dict[str, Any]]:
        """The rows in the file, but for the one that a process was writing when it was killed."""
        text = self._path.read_bytes() if self._path.exists() else b""
        return self._parsed(text[: text.rfind(b"\n") + 1].decode(errors="surrogatepass"))

    def _put(self, rows: list[dict[str, Any]]) -> None:
        """Make a file of these rows in the place of the one there is, at once or not at all."""
        self._close_file()
        with replacing(self._path) as beside:
            beside.write_text(self._as_text(rows), encoding="utf-8", errors="surrogatepass", newline="")

    def _append(self, text: str) -> None:
        if self._file is None:
            self._file = self._path.open("a", encoding="utf-8", errors="surrogatepass", newline="")
        self._file.write(text)
        self._file.flush()

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        raise NotImplementedError

    def _as_text(self, rows: list[dict[str, Any]]) -> str:
        raise NotImplementedError


class _Lines(_File):
    """JSON lines."""

    owner = "json_log"

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        refuse_taken(self.owner, record, "epoch", "step")
        values = {log: _plain(np.asarray(value).tolist()) for log, value in record.items()}
        self._append(self._as_text([{"epoch": epoch, "step": step, **values}]))

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in text.splitlines()]

    def _as_text(self, rows: list[dict[str, Any]]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)


class _Table(_File):
    """Comma-separated values. A row has no entry where its cell is empty."""

    owner = "csv_log"

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        self._columns: list[str] = []

    def write(self, record: Mapping[str, Any], epoch: int, step: int) -> None:
        refuse_taken(self.owner, record, "epoch", "step")
        row = {"epoch": epoch, "step": step, **{log: value for log, value in record.items() if np.ndim(value) == 0}}
        if row.keys() <= set(self._columns):
            self._append(_as_csv(self._columns, [row]))
        else:
            self._put([*self._read(), row])

    def _put(self, rows: list[dict[str, Any]]) -> None:
        super()._put(rows)
        self._columns = _columns_of(rows)  # not before the file has them

    def _parsed(self, text: str) -> list[dict[str, Any]]:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{name: value for name, value in row.items() if value} for row in rows]

    def _as_text(self, rows: list[dict[str, Any]]) -> str:
        columns = _columns_of(rows)
        return _as_csv(columns, [dict(zip(columns, columns, strict=True)), *rows])


def _is_behind(row: Mapping[str, Any], epoch: int, step: int) -> bool:
    """Whether a run whose next epoch to end is ``epoch``, and that has done ``step`` batches, is past what a row tells.

    An epoch can end anew at the very step of its row: after an exception between its last batch and the next epoch. The
    means over its batches, ``train_...``, tell its row from that of its last batches.
    """
    return int(row["step"]) <= step and (int(row["epoch"]) < epoch or "train_loss" not in row)


def _columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain(["epoch", "step"], *rows)))


def _as_csv(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    # A lone carriage return is quoted with everything else or not at all, and not read back unquoted.
    quoting = csv.QUOTE_ALL if any("\r" in column for column in columns) else csv.QUOTE_MINIMAL
    csv.DictWriter(text, columns, lineterminator="\n", quoting=quoting).writerows(rows)
    return text.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no NaN, no infinity and no complex numbers."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
