"""Numbers that are not finite."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np


class NonFiniteError(FloatingPointError):
    """A number in training is NaN or infinite; the message says which and where."""


def first_nonfinite(leaves: Mapping[str, np.ndarray], *, infinities: bool = True) -> str | None:
    """Name the first leaf with a NaN or an infinity in it; ``None`` when all are finite.

    Args:
        leaves: arrays by name; those that are not floating-point are passed by.
        infinities: whether an infinity counts, or a NaN alone.

    >>> first_nonfinite({"bias": np.zeros(2), "kernel": np.array([1.0, np.nan])})
    'kernel'
    """
    for name, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            bad = ~np.isfinite(leaf) if infinities else np.isnan(leaf)
            if bad.any():
                return name
    return None
