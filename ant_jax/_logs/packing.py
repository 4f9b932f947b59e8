"""The logs of a step in few arrays, and out of them again."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax


# Scalars that are put into a vector by one kernel of XLA's, whose cost grows with the square of their number.
GROUP = 32
# Scalars that a program returns one by one; each costs a launch a microsecond, and its compilation 7 milliseconds.
FEW = 32
# Those that it returns one by one of more than these: that would be a small part of what a look at all of them reads.
FEW_OF_MANY = 4


@struct.dataclass
class PackedLogs:
    """Logs with all scalars of the loss's dtype in one vector, so that bookkeeping costs the same for one and for many.

    (An operation on a scalar costs a small step on a CPU as much as one on a vector.)

    Attributes:
        names: of the scalars, the loss first.
        weighed: the logs that do not stand for the examples of their batch, each with the place of its weight in
            ``scalars``.
        sometimes: those of them that not every batch has; where a batch lacks one, it and its weight are 0.
        scalars: the scalars and then the weights, ``[..., names + weights]``. Logs that stand for the same examples
            share a weight.
        others: the other logs, ``[..., *shape]``.
    """

    names: tuple[str, ...] = struct.field(pytree_node=False)
    weighed: tuple[tuple[str, int], ...] = struct.field(pytree_node=False)
    sometimes: tuple[str, ...] = struct.field(pytree_node=False)
    scalars: Any
    others: dict[str, Any]

    def values(self) -> dict[str, Any]:
        """Return every log by its name."""
        return {name: self.scalars[..., i] for i, name in enumerate(self.names)} | self.others

    def weights(self) -> dict[str, Any]:
        """Return the weights of the logs that have one of their own."""
        return {name: self.scalars[..., place] for name, place in self.weighed}

    def weights_of_scalars(self, examples: int) -> Any:
        """Return what each of ``scalars`` is weighed with, in a batch of so many examples: the weights with 1."""
        if not self.weighed:
            return examples
        count, places = self.scalars.shape[-1], dict(self.weighed)
        at = np.array([places.get(name, -1) for name in self.names] + [-1] * (count - len(self.names)))
        weights = jnp.asarray(np.where(np.arange(count) < len(self.names), examples, 1), self.scalars.dtype)
        for place in sorted(set(places.values())):
            weights = jnp.where(at == place, self.scalars[place], weights)
        return weights

    def few(self) -> dict[str, Any]:
        """Return the first logs by their names; ``unpack`` adds the others."""
        count = len(self.names) if len(self.names) <= FEW else FEW_OF_MANY
        return {name: self.scalars[..., i] for i, name in enumerate(self.names[:count])} | self.others


def pack(
    logs: Mapping[str, Any],
    weights: Mapping[str, Any] | None = None,
    sometimes: tuple[str, ...] = (),
    vectors: Mapping[tuple[str, ...], Any] | None = None,
) -> PackedLogs:
    """Pack the logs of one step, or the form of such logs.

    Args:
        logs: arrays, the loss among them.
        weights: scalars, of the logs that do not stand for the examples of the batch.
        sometimes: the logs that not every batch has; the weight of what it lacks is 0.
        vectors: those whose entries are logs, by the names of these.

    >>> pack({"accuracy": jnp.float32(1), "loss": jnp.float32(2), "norms": jnp.ones(3)}).names
    ('loss', 'accuracy')
    """
    dtype, weights = logs["loss"].dtype, weights or {}
    scalars = [name for name, log in logs.items() if log.shape == () and log.dtype == dtype]
    names = sorted(scalars, key=lambda name: (name != "loss", name))
    distinct = {id(weight): weight for weight in weights.values()}
    places = {key: len(names) + i for i, key in enumerate(distinct)}
    parts = _parts(names, logs, vectors or {})
    vector = vector_of([*parts, *(weight.astype(dtype) for weight in distinct.values())])
    of_names = set(names)
    packed = PackedLogs(
        tuple(names),
        tuple(sorted((name, places[id(weight)]) for name, weight in weights.items())),
        tuple(sorted(sometimes)),
        vector,
        {name: log for name, log in logs.items() if name not in of_names},
    )
    return _without_absent(packed) if sometimes else packed


def _without_absent(packed: PackedLogs) -> PackedLogs:
    """Put zeros where a batch lacks a log: what leaves the step is free of NaN, unless something is wrong."""
    weights, count = packed.weights(), packed.scalars.shape[-1]
    may_lack = np.array([name in packed.sometimes for name in packed.names] + [False] * (count - len(packed.names)))
    lacks = jnp.logical_and(may_lack, packed.weights_of_scalars(1) == 0)
    others = {
        name: jnp.where(weights[name] == 0, jnp.zeros_like(log), log) if name in packed.sometimes else log
        for name, log in packed.others.items()
    }
    scalars = jnp.where(lacks, jnp.zeros_like(packed.scalars), packed.scalars)
    return dataclasses.replace(packed, scalars=scalars, others=others)


def _parts(names: list[str], logs: Mapping[str, Any], vectors: Mapping[tuple[str, ...], Any]) -> list[Any]:
    """The scalars of these names in their order, and in the place of all that are entries of a vector, the vector."""
    starting = {of_vector[0]: of_vector for of_vector in vectors}
    parts: list[Any] = []
    at = 0
    while at < len(names):
        of_vector = starting.get(names[at], ())
        # The names of other logs may be among them in the order.
        whole = bool(of_vector) and tuple(names[at : at + len(of_vector)]) == of_vector
        parts.append(vectors[of_vector] if whole else logs[names[at]])
        at += len(of_vector) if whole else 1
    return parts


def vector_of(parts: Sequence[Any]) -> Any:
    """Put scalars and vectors of one dtype into a vector, one after the other.

    Not with jnp.stack, because XLA on a CPU makes a kernel of each operand's computation, and compiles each.

    >>> vector_of([jnp.float32(1), jnp.arange(2.0)]).tolist()
    [1.0, 0.0, 1.0]
    """
    groups: list[Any] = []
    for are_scalars, alike in itertools.groupby(parts, key=lambda part: part.shape == ()):
        some = list(alike)
        if are_scalars:
            some = [_small_vector(some[start : start + GROUP]) for start in range(0, len(some), GROUP)]
        groups += some
    if len(groups) == 1:
        return groups[0]
    lengths = [group.size for group in groups]
    vector = jnp.zeros(sum(lengths), groups[0].dtype)
    for start, group in zip(itertools.accumulate(lengths, initial=0), groups, strict=False):
        vector = lax.dynamic_update_slice(vector, group, (start,))
    return vector


def entries_of(vectors: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Map the names of the entries of vectors to the entries, as scalars.

    >>> {name: float(entry) for name, entry in entries_of({("a", "b"): jnp.arange(2.0)}).items()}
    {'a': 0.0, 'b': 1.0}
    """
    return {name: entry for names, vector in vectors.items() for name, entry in zip(names, _taken(vector), strict=True)}


@jax.jit  # so that vectors of one length are taken apart in one trace
def _taken(vector: Any) -> list[Any]:
    return [part.reshape(()) for part in lax.split(vector, [1] * vector.size)]


def _small_vector(scalars: list[Any]) -> Any:
    vector = jnp.zeros(len(scalars), scalars[0].dtype)
    for i, value in enumerate(scalars):
        vector = lax.dynamic_update_index_in_dim(vector, value, i, axis=0, allow_negative_indices=False)
    return vector


class _Entry(NamedTuple):
    """A log that is taken out of packed ones when it is read.

    Attributes:
        scalars: of one step or of several.
        row: which step's, where there are several.
        place: in the scalars; ``None`` of a log that is given alone.
        weight: the place of its weight, where a batch may lack the log.
        alone: the log, where a program has returned it one by one.
    """

    scalars: Any
    row: int | None
    place: int | None
    weight: int | None
    alone: Any

    def on_device(self) -> Any:
        value = self.alone if self.place is None else self._at(self.place)
        if self.weight is None or not jnp.issubdtype(value.dtype, jnp.inexact):
            return value
        with jax.debug_nans(False):  # here NaN says that nothing is there
            return _marked(value, self._at(self.weight))

    def on_host(self) -> np.ndarray:
        scalars = np.asarray(self.scalars)  # copied once for all entries, since JAX keeps the copy
        scalars = scalars if self.row is None else scalars[self.row]
        value = np.asarray(self.alone if self.place is None else scalars[self.place])
        lacks = self.weight is not None and value.dtype.kind in "fc" and not scalars[self.weight] > 0
        return np.full_like(value, np.nan) if lacks else value

    def _at(self, place: int) -> Any:
        indices = [place] if self.row is None else [self.row, place]
        return _entry(self.scalars, *jax.device_put([np.int32(index) for index in indices]))


class Unpacked(Mapping[str, Any]):
    """Logs on the host, as device arrays; a log that the batch lacks is NaN (0, for an integer).

    What a program has not returned one by one is taken out of the packed logs when it is read, because each is a launch
    of its own, and there may be hundreds.

    Args:
        values: by name; not copied, because every launch makes such logs.
    """

    def __init__(self, values: dict[str, Any]):
        self._values = values

    def __getitem__(self, name: str) -> Any:
        value = self._values[name]
        if isinstance(value, _Entry):
            value = self._values[name] = value.on_device()
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def on_host(self) -> dict[str, Any]:
        """Return the values, and copy the packed ones to the host together, which waits for the device."""
        return {name: value.on_host() if isinstance(value, _Entry) else value for name, value in self._values.items()}

    def selected(self, names: Mapping[str, str]) -> Unpacked:
        """Return some of the values without reading them.

        Args:
            names: old ones, by the new ones in the new order.
        """
        return Unpacked({new: self._values[old] for new, old in names.items()})

    def unread(self) -> Mapping[str, Any]:
        """Return what makes equal logs, without reading them."""
        return self._values


def unpack(
    few: Mapping[str, Any], packed: PackedLogs, row: int | None = None, more: Mapping[str, Any] | None = None
) -> Unpacked:
    """Unpack the logs of one step.

    Args:
        few: what a program has returned of them one by one.
        packed: all of them, of one step or of several.
        row: which step's, where there are several.
        more: other values, by name.
    """
    values = {**(more or {}), **few}
    for place, name in enumerate(packed.names):
        if name not in few:
            values[name] = _Entry(packed.scalars, row, place, None, None)
    weights = dict(packed.weighed) if packed.sometimes else {}
    for name in packed.sometimes:
        place = packed.names.index(name) if name not in few else None
        values[name] = _Entry(packed.scalars, row, place, weights[name], few.get(name))
    return Unpacked(values)


@jax.jit
def _entry(array: Any, *indices: Any) -> Any:
    for index in indices:
        array = lax.dynamic_index_in_dim(array, index, 0, keepdims=False)
    return array


@jax.jit
def _marked(value: Any, weight: Any) -> Any:
    return jnp.where(weight > 0, value, jnp.full_like(value, jnp.nan))
