"""The batches that a host callback has not looked at yet."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np


class Window(Mapping[str, np.ndarray]):
    """The logs of some batches in a row, each log an array whose first axis is the batch: ``window["loss"][-1]``.

    Where a batch lacks a log, the array has NaN (0, for integers). What each value counts for is in ``weights``, and
    ``mean`` reads both, as the history does.

    Args:
        rows: of every log, ``batch_size`` among them.
        weights: of the logs that do not stand for the examples of their batch.

    >>> rows = {"batch_size": np.array([2, 2, 1]), "loss": np.array([1.0, 3.0, 5.0])}
    >>> window = Window(rows, {})
    >>> window.mean("loss"), window.weights["loss"].tolist()
    (2.6, [2, 2, 1])
    """

    def __init__(self, rows: Mapping[str, np.ndarray], weights: Mapping[str, np.ndarray]):
        self._rows, self._own = rows, weights

    @functools.cached_property
    def weights(self) -> Mapping[str, np.ndarray]:
        """For how many examples each value stands: 0 where a batch lacks the log, or counts for nothing."""
        return {name: self._own.get(name, self._rows["batch_size"]) for name in self}

    def mean(self, name: str) -> Any:
        """Return the mean of a log over the examples that it stands for; NaN when there are none.

        A NaN that a batch has computed makes the mean NaN; one that says that a batch lacks the log does not.

        Args:
            name: of the log.

        Returns:
            A float, or for a log that is an array, an array.

        Raises:
            KeyError: there is no log of that name.
        """
        values, weights = self[name], self.weights[name]
        counts = weights > 0
        if not counts.any():
            return math.nan if values.ndim == 1 else np.full(values.shape[1:], np.nan)
        wide = np.promote_types(np.float64, values.dtype) if values.dtype.kind == "c" else np.float64
        mean = np.average(values[counts].astype(wide), axis=0, weights=weights[counts])
        return mean.item() if values.ndim == 1 else mean

    def means(self) -> dict[str, Any]:
        """Return the mean of every scalar log but ``batch_size``."""
        return {name: self.mean(name) for name, values in self.items() if values.ndim == 1 and name != "batch_size"}

    def between(self, start: int, stop: int) -> Window:
        """Return the window of the batches from ``start`` to ``stop``."""
        rows, weights = ({name: of[start:stop] for name, of in part.items()} for part in (self._rows, self._own))
        return Window(rows, weights)

    def parts(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Return what makes an equal window: the rows, and the weights that are not the examples of the batch."""
        return dict(self._rows), dict(self._own)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._rows[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"Window(batches={len(self._rows.get('batch_size', ()))}, logs={', '.join(self._rows) or 'none'})"


def with_nan(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Put NaN where values stand for no example; integers cannot say it, and stay."""
    if values.dtype.kind in "biu":
        return values
    counts = (weights > 0).reshape(-1, *[1] * (values.ndim - 1))
    return np.where(counts, values, np.full_like(values, np.nan))


def join_windows(windows: Sequence[Window]) -> Window:
    """Make one window of some that follow each other; those of no batch may have no logs."""
    windows = [window for window in windows if len(window.get("batch_size", ()))]
    if not windows:
        return Window({}, {})
    rows, weights = windows[0].parts()
    return Window(
        {name: np.concatenate([window[name] for window in windows]) for name in rows},
        {name: np.concatenate([window.weights[name] for window in windows]) for name in weights},
    )
