"""Leaves of a state: scalars, keys, dtypes that are an array's own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._state.host_fields import StateMismatch
from ant_jax._trees import PyTree, differences, in_lines


@jax.jit
def key_of_cycle(key: jax.Array, cycle: Any) -> jax.Array:
    """The random key that the steps of a cycle of 2**31 batches draw from: in the first the run's own."""
    # No step folds this number in, so that no later cycle has a key that a step has had.
    later = jax.random.fold_in(jax.random.fold_in(key, 2**32 - 1), cycle)
    return jnp.where(cycle > 0, later, key)


@functools.lru_cache(maxsize=1024, typed=True)  # True and 1 are different scalars
def scalar(value: bool | int) -> jax.Array:
    """A scalar on the device; kept, since a fresh transfer costs as much as a small step."""
    return jax.device_put(np.bool_(value) if isinstance(value, bool) else np.int32(value))


def strong(leaf: Any, like: Any = None) -> jax.Array:
    """Turn a leaf into a device array whose dtype is its own, not a Python scalar's weak one.

    A weakly typed leaf would give the compiled step another signature, and so compile it once more.

    Args:
        leaf: an array or a Python scalar.
        like: the array that it replaces, whose dtype and sharding it takes.
    """
    weak = getattr(leaf, "weak_type", False)  # arrays of random keys have no such attribute
    if isinstance(leaf, jax.Array) and not weak and (like is None or leaf.sharding == like.sharding):
        return leaf
    if like is None:
        array = jnp.asarray(leaf)
        return jnp.asarray(array, dtype=array.dtype)
    array = jnp.asarray(leaf, dtype=like.dtype)
    # An array that is committed to its place where the old one was not would be another signature, too.
    return jax.device_put(array, like.sharding) if like.committed else array


def refuse_mismatch(what: str, expected: PyTree, actual: PyTree, owner: str, *, dtypes: bool = True) -> None:
    """Raise StateMismatch if ``actual``, the state's ``what``, is not of the form that ``owner`` expects."""
    lines = differences(expected, actual, dtypes=dtypes)
    if lines:
        raise StateMismatch(
            f"state.{what} is not of the form that {owner} needs; is the state another trainer's? Make one with this "
            f"trainer's init.{in_lines(lines)}"
        )
