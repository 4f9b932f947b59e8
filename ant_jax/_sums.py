"""The logs of a step in few arrays, and their sums over an epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax


@struct.dataclass
class PackedLogs:
    """Logs with all float32 scalars in one vector, so that bookkeeping costs the same for one log and for twenty.

    (An operation on a scalar costs a small step on a CPU as much as one on a vector.)

    Attributes:
        names: of the scalars.
        scalars: their values, ``[..., names]``.
        others: the logs that are not float32 scalars, ``[..., *shape]``.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    scalars: jax.Array
    others: dict[str, jax.Array]

    def unpacked(self) -> dict[str, jax.Array]:
        """Return every log by its name."""
        return {name: self.scalars[..., i] for i, name in enumerate(self.names)} | self.others


def pack(logs: Mapping[str, Any]) -> PackedLogs:
    """Pack the logs of one step.

    >>> pack({"loss": jnp.float32(2), "norms": jnp.ones(3)}).names
    ('loss',)
    """
    names = tuple(sorted(name for name, log in logs.items() if log.shape == () and log.dtype == jnp.float32))
    return _packed_by(names, logs)


def _packed_by(names: tuple[str, ...], values: Mapping[str, Any]) -> PackedLogs:
    others = {name: value for name, value in values.items() if name not in names}
    # Not jnp.stack: XLA on a CPU would fuse what computes the values into the concatenation, and run it there slowly.
    scalars = jnp.zeros(len(names), values[names[0]].dtype)
    for i, name in enumerate(names):
        scalars = lax.dynamic_update_index_in_dim(scalars, values[name], i, axis=0, allow_negative_indices=False)
    return PackedLogs(names, scalars, others)


@struct.dataclass
class LogSums:
    """The sum of every log over examples, in float32, and the number of examples in it, in int32."""

    totals: PackedLogs
    counts: PackedLogs

    def add(self, logs: PackedLogs, counts: Mapping[str, Any]) -> LogSums:
        """Add the logs of a batch, each weighted by the examples that it stands for."""

        def share(total: Any, value: Any, count: Any) -> Any:
            # A value that stands for no example may be NaN, and must not count.
            return total + jnp.where(count > 0, value.astype(jnp.float32) * count.astype(jnp.float32), 0.0)

        packed = _packed_by(logs.names, counts)
        totals = jax.tree.map(share, self.totals, logs, packed)
        return LogSums(totals, jax.tree.map(jnp.add, self.counts, packed))


def zero_sums(logs: Mapping[str, jax.ShapeDtypeStruct]) -> LogSums:
    """Return the sums over no examples, for logs of these shapes."""
    zeros = pack({name: jnp.zeros(log.shape, log.dtype) for name, log in logs.items()})
    totals = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), zeros)
    counts = _packed_by(zeros.names, {name: jnp.zeros((), jnp.int32) for name in logs})
    return LogSums(totals, counts)


@jax.jit
def means(sums: LogSums) -> dict[str, jax.Array]:
    """Turn sums into means; NaN where there were no examples."""
    return jax.tree.map(lambda total, count: total / count.astype(jnp.float32), sums.totals, sums.counts).unpacked()
