"""Sums of logs over an epoch, and their means."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from ant_jax._logs.packing import PackedLogs, Unpacked, unpack


# Floats in a sum: each holds what rounding has left out of those before it. Three of float32 stand for 72 bits.
WORDS = 3


@struct.dataclass
class LogSums:
    """The sum of every log over examples, and of every weight.

    The examples of a log without a weight of its own are those of all batches, which the host counts.

    Attributes:
        totals: in float32 or, for logs of 64 bits, in float64; ``[WORDS, ...]``.
    """

    totals: PackedLogs

    def add(self, logs: PackedLogs, examples: int) -> LogSums:
        """Add the logs of a batch of so many examples, each weighted by the examples that it stands for."""
        totals, weights = self.totals, logs.weights()
        scalars = _plus(totals.scalars, logs.scalars, logs.weights_of_scalars(examples))
        others = {
            name: _plus(totals.others[name], log, weights.get(name, examples)) for name, log in logs.others.items()
        }
        return LogSums(dataclasses.replace(totals, scalars=scalars, others=others))


def zero_sums(form: PackedLogs) -> LogSums:
    """Return the sums over no examples, for logs of this form."""
    return LogSums(jax.tree.map(lambda leaf: jnp.zeros((WORDS, *leaf.shape), _dtype_of_sum(leaf.dtype)), form))


def means(sums: LogSums, examples: int) -> Unpacked:
    """Turn sums into means; NaN where there were no examples.

    Args:
        sums: of batches.
        examples: in all of them.
    """
    with _dividing():
        few, packed = _means(sums, jax.device_put(np.float64(examples)))
    return unpack(few, packed)


def plus(total: Any, value: Any, examples: int) -> Any:
    """Add a value that stands for so many examples to a sum, which is on the device if one of the two is.

    Args:
        total: what this function has returned before, ``[WORDS, ...]``; ``None``: the sum of nothing.
        value: a number or an array.
        examples: how many.
    """
    if isinstance(value, jax.Array) or isinstance(total, jax.Array):
        value = jnp.asarray(value)
        total = jnp.zeros((WORDS, *value.shape), _dtype_of_sum(value.dtype)) if total is None else total
        return _plus_on_device(
            jnp.asarray(total, _dtype_of_sum(value.dtype)), value, jax.device_put(np.int32(examples))
        )
    value = np.asarray(value)
    value = value.astype(np.promote_types(value.dtype, np.float64))
    with np.errstate(invalid="ignore", over="ignore"):
        return _with_carries(np.zeros((WORDS, *value.shape)) if total is None else total, value * examples, np)


def mean(total: Any, examples: int) -> Any:
    """Turn a sum that ``plus`` has made into a mean."""
    if isinstance(total, jax.Array):
        with _dividing():
            return _quotient(total, jax.device_put(np.float64(examples)))
    high, middle, low = total
    return (high + (middle + low)) / examples


@contextlib.contextmanager
def _dividing() -> Iterator[None]:
    """Divide in float64, since a float32 does not hold a large count; NaN says that there is nothing to divide."""
    with jax.enable_x64(True), jax.debug_nans(False), jax.debug_infs(False):
        yield


@jax.jit
def _means(sums: LogSums, examples: Any) -> tuple[dict[str, jax.Array], PackedLogs]:
    totals = sums.totals
    scalars, weights = _joined(totals.scalars), {name: _joined(weight) for name, weight in totals.weights().items()}
    places = dict(totals.weighed)
    at = np.array([places.get(name, -1) for name in totals.names])
    counts = jnp.where(at < 0, examples, scalars[at])
    others = {name: _quotient(total, weights.get(name, examples)) for name, total in totals.others.items()}
    means = (scalars[: len(at)] / counts).astype(totals.scalars.dtype)
    packed = PackedLogs(totals.names, (), (), means, others)
    return packed.few(), packed


@jax.jit
def _quotient(total: Any, examples: Any) -> Any:
    joined = _joined(total)
    return (joined / examples.astype(joined.dtype)).astype(total.dtype)


def _joined(total: Any) -> Any:
    is_complex = jnp.issubdtype(total.dtype, jnp.complexfloating)
    high, middle, low = total.astype(jnp.complex128 if is_complex else jnp.float64)
    return high + (middle + low)


def _dtype_of_sum(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    return jnp.dtype(jnp.float64 if dtype.itemsize == 8 else jnp.float32)


def _plus(total: Any, value: Any, weight: Any) -> Any:
    """Add a value so many times; what stands for no example may be NaN, and does not count."""
    value = value.astype(total.dtype)
    if isinstance(weight, int):
        return total if weight == 0 else _with_carries(total, value * weight, jnp)
    addend = jnp.where(weight > 0, value * weight.astype(value.dtype), jnp.zeros_like(value))
    return _with_carries(total, addend, jnp)


_plus_on_device = jax.jit(_plus)


def _with_carries(total: Any, addend: Any, xp: Any) -> Any:
    """Add to sums of ``WORDS`` words in one array, because XLA on a CPU takes as long for one word as for three."""
    high, middle, low = total
    high, carry = _two_sum(high, addend)
    carry, rest = _two_sum(middle, carry)
    joined = xp.where(xp.isfinite(high), high + carry, high)
    middle = carry - (joined - high)
    finite = xp.isfinite(joined)  # of a sum that is infinite, the rest would be NaN
    zeros = xp.zeros_like(joined)
    return xp.stack([joined, xp.where(finite, middle, zeros), xp.where(finite, low + rest, zeros)])


def _two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """Return a sum and, exactly, what rounding has taken from it (Knuth, The art of computer programming 2, 4.2.2)."""
    total = a + b
    back = total - a
    return total, (a - (total - back)) + (b - back)
