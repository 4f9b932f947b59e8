"""What a model keeps beside its parameters, and the form that it must keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ant_jax._trees import PyTree, describe, in_lines, named_leaves


# An entry of the model state that a model may return in training: the parameters as it has written them itself, which
# take the place of those that it was given. It is no part of the state that is kept.
WRITTEN_PARAMS = "_written_params"


def without_written(model_state: PyTree) -> tuple[PyTree, PyTree | None]:
    """Split what the model has written to its parameters from a model state; ``None`` if it has not."""
    if not isinstance(model_state, Mapping) or WRITTEN_PARAMS not in model_state:
        return model_state, None
    rest = {name: entry for name, entry in model_state.items() if name != WRITTEN_PARAMS}
    return rest, model_state[WRITTEN_PARAMS]


def with_form_of(old: PyTree, new: PyTree, owner: str) -> PyTree:
    """Bring a new model state into the form of the old one: leaves by their paths, dtypes where nothing is lost.

    Args:
        old: as it went in.
        new: as it came out; of another precision, or with Python numbers, where that was the model's arithmetic.
        owner: who returned it, for the message.

    Raises:
        TypeError: a leaf is missing or new, of another shape, or of a dtype that cannot become the old one.

    >>> with_form_of({"mean": jnp.zeros(())}, {"mean": 1.5}, "the model")
    {'mean': Array(1.5, dtype=float32)}
    """
    before, after = named_leaves(old), named_leaves(new)
    lines = [
        *(f"{path}: missing, expected {describe(leaf)}" for path, leaf in before.items() if path not in after),
        *(f"{path}: unexpected, {describe(leaf)}" for path, leaf in after.items() if path not in before),
        *(
            f"{path}: expected {describe(leaf)}, got {describe(after[path])}"
            for path, leaf in before.items()
            if path in after and not _becomes(after[path], leaf)
        ),
    ]
    if lines:
        raise TypeError(
            f"{owner} returned a model state of another form than it was given:{in_lines(sorted(lines))}\n"
            f"What a model keeps has its final structure, shapes and dtypes from init on; a running mean begins with "
            f"0.0, not with 0"
        )
    leaves = [_as(leaf, after[path]) for path, leaf in before.items()]
    return jax.tree.unflatten(jax.tree.structure(old), leaves)


# A number may become one of its own kind, or of a later one; random keys and the like have none of these kinds.
_KINDS = (jnp.bool_, jnp.integer, jnp.floating, jnp.complexfloating)


def _kind(dtype: Any) -> int:
    return next((position for position, kind in enumerate(_KINDS) if jnp.issubdtype(dtype, kind)), len(_KINDS))


def _becomes(new: Any, old: Any) -> bool:
    """Whether a leaf can take the place of another without a loss, but for that of precision."""
    if not isinstance(new, bool | int | float | complex | jax.Array | np.ndarray | np.generic):
        return False
    if np.shape(new) != old.shape:
        return False
    dtype = jnp.result_type(new)
    before, after = _kind(old.dtype), _kind(dtype)
    if dtype == old.dtype or max(before, after) == len(_KINDS):
        return dtype == old.dtype
    if before == after == _kind(jnp.int32):
        weak = not hasattr(new, "dtype") or getattr(new, "weak_type", False)
        return weak or jnp.promote_types(dtype, old.dtype) == old.dtype
    return after <= before


def _as(old: Any, new: Any) -> Any:
    if _kind(old.dtype) == len(_KINDS):
        return new
    # Also without another dtype, because a weak one would make another program of the next step.
    return jnp.asarray(new).astype(old.dtype)
