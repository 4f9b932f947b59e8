"""JSON lines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ant_jax.writers._text_file import Row, TextFile


class JSONLinesWriter(TextFile):
    """Write numbers, arrays and texts as one JSON object a line; images are left out.

    A number that is not finite is ``null``, an array a list, a complex number a string. What happens to the rows of a
    run that goes on, and where another run writes the file, is the same as in :class:`CSVWriter`.

    Args:
        path: of the file; its directory is made. Every object has ``epoch``, ``step`` (batches trained on) and the
            logs.

    Raises:
        ValueError: ``path`` is not the path of a file; while training, a log is named ``epoch`` or ``step``.

    >>> JSONLinesWriter("runs/digits.jsonl")
    JSONLinesWriter('runs/digits.jsonl')
    """

    def write_histograms(self, step: int, arrays: Mapping[str, Any], *, epoch: int) -> None:
        """Add arrays to the row, as lists."""
        self.write_scalars(step, arrays, epoch=epoch)

    def write_texts(self, step: int, texts: Mapping[str, str], *, epoch: int) -> None:
        """Add texts to the row."""
        self.write_scalars(step, texts, epoch=epoch)

    def _write(self, row: Row) -> None:
        self._append(self._format([{name: _plain(np.asarray(value).tolist()) for name, value in row.items()}]))

    def _parse(self, text: str) -> list[Row]:
        return [json.loads(line) for line in text.splitlines()]

    def _format(self, rows: list[Row]) -> str:
        return "".join(json.dumps(row) + "\n" for row in rows)


def _plain(value: Any) -> Any:
    """Replace what JSON has not: NaN, infinities and complex numbers."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, complex):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value
