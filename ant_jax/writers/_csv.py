"""Comma-separated values."""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Iterable, Mapping
from typing import Any

from ant_jax.writers._text_file import Row, TextFile


class CSVWriter(TextFile):
    """Write numbers as a table; a number that appears later gets a column then. The rest is left out.

    A run that goes on drops the rows of what it does again, and one that was torn when a process was killed, so the
    file ends like that of an uninterrupted run; a run from step 0 begins the file anew. While another run of the
    process writes the file, the run writes one beside it, ``digits-2.csv`` for ``digits.csv``, and logs a warning
    (logger ``ant_jax``).

    Args:
        path: of the file; its directory is made. The columns are ``epoch``, ``step`` (batches trained on) and the
            logs.

    Raises:
        ValueError: ``path`` is not the path of a file; while training, a log is named ``epoch`` or ``step``.

    >>> CSVWriter("runs/digits.csv")
    CSVWriter('runs/digits.csv')
    """

    def __init__(self, path: str | os.PathLike[str]):
        super().__init__(path)
        self._columns: list[str] = []

    def _write(self, row: Row) -> None:
        if row.keys() <= set(self._columns):
            self._append(_as_csv(self._columns, [row]))
        else:
            self._put([*self._read(), row])

    def _put(self, rows: list[Row]) -> None:
        super()._put(rows)
        self._columns = _columns_of(rows)  # not before the file has them

    def _parse(self, text: str) -> list[Row]:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        return [{name: value for name, value in row.items() if value} for row in rows]

    def _format(self, rows: list[Row]) -> str:
        columns = _columns_of(rows)
        return _as_csv(columns, [dict(zip(columns, columns, strict=True)), *rows])


def _columns_of(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(itertools.chain(["epoch", "step"], *rows)))


def _as_csv(columns: list[str], rows: Iterable[Mapping[str, Any]]) -> str:
    text = io.StringIO(newline="")
    # csv quotes a lone carriage return with everything else or not at all, and does not read it back unquoted.
    quoting = csv.QUOTE_ALL if any("\r" in column for column in columns) else csv.QUOTE_MINIMAL
    csv.DictWriter(text, columns, lineterminator="\n", quoting=quoting).writerows(rows)
    return text.getvalue()
