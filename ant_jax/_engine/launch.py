"""The logs of a launch, and a place in a chunk."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from ant_jax._data.epoch_batches import Chunk
from ant_jax._logs.packing import PackedLogs, Unpacked
from ant_jax._logs.windows import Window, with_nan
from ant_jax._state.leaves import scalar


# The most batches in a chunk, and the most memory that they may take; two chunks are on the device at a time.
MAX_ROWS = 256


class Launch(NamedTuple):
    """The logs of the steps of one launch, on the device.

    Attributes:
        steps: how many.
        examples: in the batch of each.
        latest: the logs of the last step, ``batch_size`` among them.
        rows: the logs of every batch of the chunk, each ``[rows, ...]``, where ``start`` to ``start + steps`` are this
            launch's; after a single step outside the loop, its logs.
        start: see ``rows``; ``None`` after a single step outside the loop.
    """

    steps: int
    examples: int
    latest: Unpacked
    rows: PackedLogs
    start: int | None

    def read(self) -> Window:
        """Return the logs of every step; waits for the device."""
        which = None if self.start is None else slice(self.start, self.start + self.steps)
        rows = jax.tree.map(lambda log: np.asarray(log)[which], self.rows)
        logs, weights = rows.values(), rows.weights()
        logs |= {name: with_nan(logs[name], weights[name]) for name in rows.sometimes}
        return Window({"batch_size": np.full(self.steps, self.examples), **logs}, weights)


class Cursor:
    """A place in a chunk.

    Args:
        chunk: the chunk.
        batch_idx: where in the epoch it begins.
        window: batches in an accumulation window.

    Attributes:
        offset: the same for compiled code, which counts the batches of an epoch in int32: after nearly 2**31 of them it
            begins anew, at the beginning of an accumulation window.
    """

    def __init__(self, chunk: Chunk, batch_idx: int, window: int):
        self.chunk, self.row, self._first = chunk, 0, batch_idx
        self.offset = scalar(batch_idx % ((2**31 - MAX_ROWS) // window * window))

    @property
    def batch_idx(self) -> int:
        """The next batch's index in the epoch."""
        return self._first + self.row

    @property
    def remaining(self) -> int:
        """Batches that are left in the chunk."""
        return self.chunk.filled - self.row
