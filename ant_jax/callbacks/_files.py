"""Logs as files."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

import numpy as np

from ant_jax._callback import Callback
from ant_jax.callbacks._records import recording


def csv_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "csv_log") -> Callback:
    """Write the logs as a table, a row an epoch or a row every so many batches.

    On the host; the file is written in the background, and every row is there as soon as it is written. A run that goes
    on drops the rows of the steps that it does again, so the file ends like that of a run that was not interrupted; a
    run from step 0 begins the file anew. A log that appears later gets a column then. Arrays are left out.

    Args:
        path: of the file; its directory is made.
        every: a row of the means over every so many batches; ``None``: a row of ``on_epoch_end``'s logs an epoch.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback. The columns are ``epoch``, ``step`` (batches trained on) and the logs.

    Raises:
        ValueError: ``every`` is below 1.

    >>> csv_log("runs/digits.csv")
    Callback(name='csv_log', hooks=on_train_begin, on_epoch_end, on_train_end, on_exception)
    """
    return recording("csv_log", name, _Table(pathlib.Path(path)), every, epochs=every is None)


def json_log(path: str | os.PathLike[str], *, every: int | None = None, name: str = "json_log") -> Callback:
    """Write the logs as JSON lines, one object an epoch, and one every so many batches.

    On the host; the file is written in the background, and every line is there as soon as it is written. A run that
    goes on drops the lines of the steps that it does again, as in :func:`csv_log`. What is not finite is ``null``, an
    array a list.

    Args:
        path: of the file; its directory is made.
        every: also a line of the means over every so many batches; ``None``: epochs only.
        name: of the callback; it keeps no memory.

    Returns:
        A host callback. Every object has ``epoch``, ``step`` (batches trained on) and the logs.

    Raises:
        ValueError: ``every`` is below 1.

    >>> json_log("runs/digits.jsonl", every=100)
    Callback(name='json_log', hooks=on_train_begin, on_batch_end, on_epoch_end, on_train_end, on_exception)
    """
    return recording("json_log", name, _Lines(pathlib.Path(path)), every)


class _File:
    """A text file that loses the records of steps that are done again when it is opened."""

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._file: TextIO | None = None

    def _begin(self, text: str) -> None:
        """Put ``text`` in the place of the file, at once or not at all, to go on writing behind it."""
        self.close(None)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_name(f".{self._path.name}.new")
        beside.write_text(text, newline="")
        beside.replace(self._path)
        self._file = self._path.open("a", newline="")

    def _append(self, text: str) -> None:
        if self._file is None:
            raise ValueError(f"{self._path} is not open")
        self._file.write(text)
        self._file.flush()

    def close(self, error: BaseException | None) -> None:
        del error
        if self._file is not None:
            self._file.close()
            self._file = None


class _Lines(_File):
    """JSON lines."""

    def open(self, memory: Any, step: int) -> Any:
        lines = self._path.read_text().splitlines() if step and self._path.exists() else []
        self._begin("".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= step))
        return memory

    def write(self, record: Mapping[str, Any], epoch: int, step: int, of_epoch: bool) -> None:
        del of_epoch
        values = {log: _plain(np.asarray(value).tolist()) for log, value in record.items()}
        self._append(json.dumps({"epoch": epoch, "step": step, **values}) + "\n")


class _Table(_File):
    """Comma-separated values."""

    def __init__(self, path: pathlib.Path):
        super().__init__(path)
        self._columns: list[str] = []

    def open(self, memory: Any, step: int) -> Any:
        rows = [row for row in self._read() if int(row["step"]) <= step] if step else []
        self._columns = list(rows[0]) if rows else ["epoch", "step"]
        self._begin(self._as_text(rows, header=True))
        return memory

    def write(self, record: Mapping[str, Any], epoch: int, step: int, of_epoch: bool) -> None:
        del of_epoch
        row = {"epoch": epoch, "step": step, **{log: value for log, value in record.items() if np.ndim(value) == 0}}
        if row.keys() <= set(self._columns):
            self._append(self._as_text([row]))
            return
        rows = [*self._read(), row]
        self._columns = list(dict.fromkeys([*self._columns, *row]))
        self._begin(self._as_text(rows, header=True))

    def _read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open(newline="") as file:
            return list(csv.DictReader(file))

    def _as_text(self, rows: Iterable[Mapping[str, Any]], header: bool = False) -> str:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
