"""How many batches a chunk has, and when it is put on the device."""

from __future__ import annotations

from collections.abc import Iterable

import jax

from ant_jax._data.epoch_batches import Chunk, EpochBatches
from ant_jax._engine.launch import MAX_ROWS
from ant_jax._trees import PyTree


MAX_CHUNK_BYTES = 32 * 2**20


# On a CPU, launches of a chunk that cost less than to transfer it first.
FEW_LAUNCHES = 16


# Batches in a chunk of a loader that cannot say how long an epoch is.
ROWS_OF_UNKNOWN = 64


def rows_of(feed: EpochBatches, fused: bool, every: Iterable[int] = (), most: int = MAX_ROWS) -> int | None:
    """How many batches to stack into a chunk of this feed; ``None`` when each is launched by itself.

    Chunks end where looks do, where they can: every so many batches, for the rarest looks that fit into a chunk.

    Args:
        feed: whose.
        fused: whether a launch may have more than one step.
        every: the intervals of looks.
        most: batches in a chunk, at most.
    """
    if not fused:
        return None
    most = max(1, min(most, MAX_ROWS, MAX_CHUNK_BYTES // max(1, _bytes_of(feed.first))))
    batches = feed.length
    if batches is None:
        return min(most, ROWS_OF_UNKNOWN)
    chunks = -(-batches // most)
    rows = max(1, -(-batches // max(1, chunks)))  # the same in every chunk, so that none is mostly padding
    interval = max((n for n in every if n <= rows), default=1)
    return rows - rows % interval


def on_device(chunk: Chunk, launches: int) -> Chunk:
    """Start the transfer of a chunk's batches to the device, unless its launches do that better.

    On a CPU a launch takes arrays of the host for less than ``jax.device_put`` costs, and reads a chunk where it
    lies, if that is aligned as ``aligned_empty`` does it. So few launches are given it as it is.

    Args:
        chunk: whose.
        launches: how many it takes, for looks alone.
    """
    if launches <= FEW_LAUNCHES and jax.default_backend() == "cpu":
        return chunk
    return chunk._replace(batches=jax.device_put(chunk.batches))


def _bytes_of(batch: PyTree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
